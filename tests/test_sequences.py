"""The sequence system: its networks, its judges, its command from a small file to a table and samples."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import helpers
from molecule_diffusion import grammar, sequence_table, sequences
from molecule_diffusion.models import SequenceVAE


@pytest.fixture(scope="module")
def expressions(tmp_path_factory):
    """80 expressions as an HDF5 and a CSV file."""
    folder = tmp_path_factory.mktemp("expressions")
    table = grammar.random_expressions(80)
    paths = folder / "small.h5", folder / "small.csv"
    helpers.save_conditions(*paths, grammar.expression_sequences(table["expr"]), table)
    return paths


@pytest.fixture(scope="module")
def trained(expressions, tmp_path_factory):
    """The folder and the table of a run that trained for a moment."""
    folder = tmp_path_factory.mktemp("run")
    return folder, sequence_table.train_sequences(*expressions, folder, scale=0.05)


@pytest.mark.parametrize("length, width, rows", [(72, 53, 4), (45, 9, 3), (7, 2, 3)])
def test_the_vae_takes_any_shape(length, width, rows):
    vae = SequenceVAE(length, width, rows=rows, width=16, layers=1, latent_dim=2)
    classes = torch.randint(width, (5, length)).to(torch.uint8)
    mean, logvar = vae.encode(classes)
    assert mean.shape == logvar.shape == (5, *vae.latent_shape)
    assert vae.decode(mean).shape == (5, length, width) and vae(classes, 0.1).shape == ()
    assert sequences.decode_probabilities(vae, mean).sum(-1) == pytest.approx(1)


def test_a_run_leaves_table_networks_and_samples(trained, expressions):
    folder, table = trained
    assert table.loc["nothing: uniform", "MSE"] == pytest.approx(52 / 53**2)
    assert (table.loc["another test sequence", ["grammatical", "exact"]] == [1, 0]).all()
    assert len(table) == 14 and (table["N"] == 10).all() and json.loads((folder / "table.json").read_text())
    samples = helpers.load_conditions(folder / "samples.h5", folder / "samples.csv")
    assert samples.data.shape == (10, 1, 72, 53) and {"found type", "found part", "text"} <= set(samples.table)
    pipe = sequences.SequencePipeline.from_pretrained(folder / "prior_pipeline")
    pipe.set_progress_bar_config(disable=True)
    first, again = (
        pipe(3, {"type": "sum"}, generator=torch.Generator().manual_seed(0), num_inference_steps=4) for _ in range(2)
    )
    assert first.classes.shape == (3, 72) and (first.classes == again.classes).all() and len(first) == 3


def test_a_repeated_call_goes_on_where_the_first_one_was(trained, expressions, capsys):
    folder, table = trained
    done = json.loads((folder / "table.json").read_text())
    done["VAE, there and back"]["exact"] = 0.5  # what is kept is not computed again
    (folder / "table.json").write_text(json.dumps(done))
    again = sequence_table.train_sequences(*expressions, folder, scale=0.05)
    assert again.loc["VAE, there and back", "exact"] == 0.5 and "steps of" not in capsys.readouterr().out


def test_a_folder_of_another_run_is_refused(trained, expressions):
    with pytest.raises(ValueError, match="of other files, another seed, scale or version"):
        sequence_table.train_sequences(*expressions, trained[0], seed=1, scale=0.05)


def test_the_command_and_its_errors(expressions, tmp_path, capsys):
    with pytest.raises(SystemExit):
        helpers.main(["sequences", str(tmp_path / "none.h5"), str(tmp_path / "none.csv")])
    assert "FileNotFoundError: no file at" in capsys.readouterr().err
    pd.read_csv(expressions[1])[:-1].to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(SystemExit):
        helpers.main(["sequences", str(expressions[0]), str(tmp_path / "short.csv"), "--out", str(tmp_path / "run")])
    assert "small.h5 holds 80 sequences, short.csv 79 rows" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_too_few_different_sequences_are_refused():
    with pytest.raises(ValueError, match="0 of 60 sequences occur only once: expected at least 40"):
        sequences.split_sequences(np.zeros((60, 5), np.uint8))


def test_repeated_sequences_are_never_tested():
    classes = np.arange(100, dtype=np.uint8)[:, None] % 90  # ten occur twice
    train, test = sequences.split_sequences(classes)
    assert not set(classes[train, 0]) & set(classes[test, 0]) and len(train) + len(test) == 100


def test_languages_are_recognised_and_judged(qm9):
    table = helpers.condition_table(qm9, qm9.test[:60])
    classes = helpers.graph_sequence(qm9.atoms[qm9.test[:60]], qm9.bonds[qm9.test[:60]])[:, 0].argmax(-1)
    judge = sequences.judge_for(classes.astype(np.uint8), table)
    assert judge.language == "molecules"
    wrong = classes.copy()
    wrong[0, 0] = 5  # a bond where an atom should be
    fine, types, parts = judge(wrong)
    assert not fine[0] and types[0] is None and fine[1:].all()
    assert types[1:] == table["type"].tolist()[1:] and parts[1:] == table["part"].tolist()[1:]


def test_own_categories_of_a_known_language_are_judged_by_the_nearest_sequence():
    table = grammar.random_expressions(40)
    classes = grammar.sequence_rules(grammar.expression_sequences(table["expr"])).astype(np.uint8)
    judge = sequences.judge_for(classes, table.assign(type=np.arange(40).astype(str)))
    broken = classes.copy()
    broken[:, 0] = 20
    fine, types, parts = judge(broken)
    assert judge.language == "expressions" and not fine.any()
    assert judge(classes)[0].all() and judge(classes)[1] == np.arange(40).astype(str).tolist()


def test_an_unknown_language_is_judged_by_the_nearest_sequence():
    rng = np.random.default_rng(0)
    classes = rng.integers(5, size=(50, 12)).astype(np.uint8)
    table = pd.DataFrame({"type": np.arange(50).astype(str), "part": "a"})
    judge = sequences.judge_for(classes, table)
    assert judge.language is None
    changed = classes.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 5
    fine, types, parts = judge(changed)
    assert fine is None and types == table["type"].tolist() and parts == ["a"] * 50


def test_fewer_steps_for_a_small_file():
    small, large = (sequences.settings_for("vae", number) for number in (540, 50_000))
    assert large["steps"] == sequences.SETTINGS["vae"]["steps"] and small["steps"] < large["steps"] / 5
    assert small["batch_size"] == 135
