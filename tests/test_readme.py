"""The README's numbers are those of the benchmark and of the cards, and these agree with one another."""

import json

import pytest

import helpers
from molecule_diffusion import benchmark

README = (helpers.ROOT / "README.md").read_text(encoding="utf-8")
ROWS = json.loads(benchmark.BENCHMARK.read_text(encoding="utf-8"))["rows"]


def card_of(name):
    return json.loads((helpers.CHECKPOINTS / name / "card.json").read_text(encoding="utf-8"))


def test_the_table_is_the_benchmark_s():
    table = README.partition(benchmark.MARKS[0])[2].partition(benchmark.MARKS[1])[0]
    assert table.strip() == benchmark.benchmark_table().strip()


@pytest.mark.parametrize("setting", benchmark.settings(), ids=lambda setting: setting.label)
def test_the_benchmark_is_of_the_shipped_weights(setting):
    made_of = benchmark.fingerprint(setting)
    own = [row for row in ROWS if row["label"] == setting.label and row["made_of"] == made_of]
    seeds, guards = ([row["seed"] for row in own if row["N"] == n] for n in (10_000, 1000))
    assert len(own) == len(seeds) + len(guards)
    slow = setting.label in ("pixel_ddpm", "gnn_ddpm")  # ten thousand draws take them a quarter of an hour
    assert seeds == list(range(max(len(seeds), 1 if slow else 3)))
    assert guards == list(range(5)) or (slow and guards == [])


@pytest.mark.parametrize("setting", [one for one in benchmark.settings() if one.scheduler is None and one.checkpoint])
def test_a_card_has_the_benchmark_s_scores_of_its_seed(setting):
    metrics = card_of(setting.checkpoint)["metrics" if setting.label == setting.checkpoint else "metrics_fast"]
    known = {"label": setting.label, "N": metrics["N"], "seed": metrics["sampling_seed"]}
    [row] = [row for row in ROWS if known.items() <= row.items()]
    for metric in ("valid", "unique", "novel", "fcd"):
        assert row[metric] == pytest.approx(metrics[metric], rel=1e-6), metric


def test_reconstruction_in_the_readme_is_the_card_s():
    share = f"{card_of('token_vae')['metrics']['exact_reconstruction_test']:.2%}".replace("%", " %")
    assert share in README


def test_obedience_in_the_readme_is_the_card_s():
    metrics = card_of("diffusion_prior")["metrics"]
    assert f"{100 * metrics['type_obeyed']:.1f} % of its valid molecules have the type" in README
    assert f"{100 * metrics['part_obeyed']:.1f} % the part" in README


def test_scores_of_the_retriever_in_the_readme_are_the_card_s():
    metrics = card_of("retriever")["metrics"]
    known, sentences, unseen = (metrics[f"{kind} AP"] for kind in ("known", "sentences", "unseen"))
    text = " ".join(README.split())
    assert f"mean average precision {known:.3f} with the words of its training, {sentences:.3f} in" in text
    assert f"{unseen:.3f} with words that no training caption held" in text
    first = [f"{100 * metrics[f'{kind} P@1']:.1f}" for kind in ("known", "sentences", "unseen")]
    assert f"{first[0]}, {first[1]} and {first[2]} % of the cases" in text
