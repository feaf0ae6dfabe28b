"""The benchmark: what is measured, what is kept, and the table and figure that are made of it."""

import json
import re

import pytest
from diffusers import DDPMScheduler

import helpers
from molecule_diffusion import benchmark


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A benchmark whose files lie in a folder of its own, of few settings."""
    for name in ("BENCHMARK", "FIGURE", "README"):
        monkeypatch.setattr(benchmark, name, tmp_path / getattr(benchmark, name).name)
    benchmark.README.write_text(f"before\n{benchmark.MARKS[0]}\nold\n{benchmark.MARKS[1]}\nafter\n")
    chosen = [
        benchmark.Setting(benchmark.TRAINING_MOLECULES),
        benchmark.Setting("token_vae", "token_vae"),
        benchmark.Setting(
            "latent_diffusion, stock DDPMScheduler",
            "latent_diffusion",
            {"num_inference_steps": 10, "restarts": [("jump", 0.4, 3)]},
            benchmark.stock_scheduler,
        ),
        benchmark.Setting(benchmark.RANDOM_GRAPHS),
    ]
    monkeypatch.setattr(benchmark, "settings", lambda: chosen)
    return chosen


def test_every_generator_and_its_fast_setting_is_measured():
    labels = [setting.label for setting in benchmark.settings()]
    generators = helpers.RECIPES.keys() - {"property_oracle", "retriever"}
    assert generators <= set(labels) and len(set(labels)) == len(labels)
    assert labels[0] == benchmark.TRAINING_MOLECULES and labels[-1] == benchmark.RANDOM_GRAPHS
    assert {f"{name}, fast setting" for name in generators if helpers.RECIPES[name].fast} <= set(labels)
    [stock] = [setting for setting in benchmark.settings() if "stock" in setting.label]
    assert type(stock.scheduler()) is DDPMScheduler and stock.arguments["restarts"] == []


def test_what_is_measured_and_made_of_it(small, monkeypatch):
    benchmark.make_benchmark(num_molecules=60, num_guard=20, num_seeds=2)
    every = json.loads(benchmark.BENCHMARK.read_text())["rows"]
    assert [row["N"] for row in every] == [60, 60, 20, 20] * 4
    assert benchmark.summaries(20)["token_vae"]["N"] == 20 != benchmark.summaries()["token_vae"]["N"]
    rows = [row for row in every if row["N"] == 60]
    assert [(row["label"], row["seed"]) for row in rows] == [(setting.label, k) for setting in small for k in (0, 1)]
    assert rows[0]["valid"] == 1 and rows[2]["fcd"] != rows[3]["fcd"]
    assert rows[4]["network_calls"] == 13 and "network_calls" not in rows[2]
    assert benchmark.FIGURE.read_bytes().startswith(b"\x89PNG")
    text = benchmark.README.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    [line] = [line for line in text.splitlines() if line.startswith("| `token_vae` |")]
    shares = [100 * row["valid"] for row in rows[2:4]]
    assert f"| {sum(shares) / 2:.1f} ± {abs(shares[0] - shares[1]) / 2**0.5:.1f} |" in line
    assert re.search(r"± [\d.]+ \| 2 \| – \|", line), "the number of seeds"
    assert re.search(r"\| `latent_diffusion`, stock DDPMScheduler \|.*\| 13 \| \d", text)

    # again, with other arguments of one setting: the others are kept
    measured = []
    monkeypatch.setattr(benchmark, "measure", lambda setting, n, seed: measured.append(setting.label) or rows[4])
    small[2].arguments["num_inference_steps"] = 11
    benchmark.make_benchmark(num_molecules=60, num_guard=20, num_seeds=2)
    assert measured == [small[2].label] * 4
    assert len(json.loads(benchmark.BENCHMARK.read_text())["rows"]) == 16


def test_a_readme_without_its_marks_is_left_alone(small):
    benchmark.make_benchmark(num_molecules=20, num_guard=10, num_seeds=1)
    assert "±" not in benchmark.benchmark_table().partition("| molecules |")[2], "one seed has no spread"
    benchmark.README.write_text("nothing of it")
    with pytest.raises(ValueError, match="README.md lacks the lines <!-- made by"):
        benchmark.write_readme()
    assert benchmark.README.read_text() == "nothing of it"
