"""Molecules to a file: formats, the same seed, resuming after a kill, several processes, and what is refused."""

import json
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from rdkit import Chem
from shared import untrained

import helpers
from molecule_diffusion import sampling


@pytest.fixture
def small(monkeypatch):
    """Batches of 20 molecules from a small pipeline with random weights."""
    monkeypatch.setattr(sampling, "BATCH", 20)
    monkeypatch.setattr(sampling, "load_pipeline", lambda name: untrained(name))


def test_a_csv_holds_every_draw(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "BATCH", 30)
    done = sampling.sample_to_file("token_vae", 75, tmp_path / "a.csv", seed=3)
    table = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)
    assert tuple(table.columns) == sampling.COLUMNS and len(table) == done.drawn == done.written == 75
    assert str(done) == "a.csv: 75 of 75 molecules"
    valid = table[table["valid"]].reset_index(drop=True)
    assert 20 < len(valid) < 75 and helpers.evaluate(valid["smiles"].tolist()).valid == 1
    described = helpers.describe(valid["smiles"])
    assert described["type"].tolist() == valid["type"].tolist() and described["part"].tolist() == valid["part"].tolist()
    assert (described["QED"] - valid["QED"].astype(float)).abs().max() < 1e-4
    assert set(table[~table["valid"]]["type"]) == {""}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv"]


def test_smi_and_sdf_hold_the_valid_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "BATCH", 10)
    sampling.sample_to_file("token_vae", 25, tmp_path / "a.csv")
    smi, sdf = (sampling.sample_to_file("token_vae", 25, tmp_path / f"a.{ending}") for ending in ("smi", "sdf"))
    table = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)
    valid = table[table["valid"]]["smiles"].tolist()
    assert (tmp_path / "a.smi").read_text().splitlines() == valid and smi.written == len(valid) < smi.drawn == 25
    mols = list(Chem.SDMolSupplier(str(tmp_path / "a.sdf"), removeHs=False))
    assert len(mols) == sdf.written <= len(valid) and all(mol.GetConformer().Is3D() for mol in mols)
    names = [mol.GetProp("_Name") for mol in mols]
    assert names == [name for name in valid if name in names]
    assert "that cannot be written so are left out" in str(smi)


def test_the_seed_decides_and_batches_are_drawn_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "BATCH", 20)
    for name, n, seed in (("a", 50, 0), ("b", 50, 0), ("c", 50, 1), ("d", 70, 0)):
        sampling.sample_to_file("latent_diffusion", n, tmp_path / f"{name}.csv", seed, num_inference_steps=5)
    a, b, c, d = ((tmp_path / f"{name}.csv").read_text() for name in "abcd")
    assert a == b != c
    assert d.splitlines()[:41] == a.splitlines()[:41]  # the whole batches of the shorter file


def test_wishes_and_settings_reach_the_prior(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "BATCH", 40)
    wishes = {"type": "ester", "part": "chain"}
    sampling.sample_to_file("diffusion_prior", 80, tmp_path / "a.csv", condition=wishes, guidance_scale=2.0)
    table = pd.read_csv(tmp_path / "a.csv")
    assert (table["type"] == "ester").mean() > 0.7 and (table["part"] == "chain").mean() > 0.7


KILLED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from molecule_diffusion import sampling
sampling.BATCH = 20
print("begun", flush=True)
sampling.sample_to_file("latent_diffusion", 400, sys.argv[2], num_inference_steps=3)
"""


def test_a_killed_call_goes_on_without_a_lost_or_doubled_molecule(tmp_path):
    command = [sys.executable, "-c", KILLED, str(helpers.ROOT)]
    subprocess.run([*command, str(tmp_path / "whole.csv")], check=True, capture_output=True, cwd=helpers.ROOT)
    path, record = tmp_path / "a.csv", tmp_path / "a.csv.progress.json"
    kills = 0
    while not path.exists():
        before = json.loads(record.read_text())["drawn"] if record.exists() else 0
        with subprocess.Popen([*command, str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None:
                time.sleep(0.002)
                if kills < 6 and record.exists() and json.loads(record.read_text())["drawn"] > before:
                    process.kill()
                    kills += 1
    assert kills >= 3, "too quick to be killed"
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "whole.csv"]


def test_an_interrupt_says_how_to_go_on(tmp_path, small, monkeypatch):
    write = sampling.WRITERS[".smi"]
    calls = []

    def interrupted(output, with_head):
        calls.append(output)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(output, with_head)

    monkeypatch.setitem(sampling.WRITERS, ".smi", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after 40 molecules; the same call goes on there"):
        sampling.sample_to_file("token_vae", 100, tmp_path / "a.smi")
    assert not (tmp_path / "a.smi").exists()
    assert sampling.sample_to_file("token_vae", 100, tmp_path / "a.smi").drawn == 100
    sampling.sample_to_file("token_vae", 100, tmp_path / "b.smi")
    assert (tmp_path / "a.smi").read_text() == (tmp_path / "b.smi").read_text()


def test_several_processes_share_the_molecules(tmp_path, small, monkeypatch):
    sampling.sample_to_file("token_vae", 90, tmp_path / "one.csv")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        sampling.sample_to_file("token_vae", 90, tmp_path / "two.csv")
    one = (tmp_path / "one.csv").read_text().splitlines()
    parts = [(tmp_path / f"two-{rank}-of-2.csv").read_text().splitlines() for rank in (1, 2)]
    assert one[0] == parts[0][0] == parts[1][0] and sorted(one[1:]) == sorted(parts[0][1:] + parts[1][1:])
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("RANK", "8")
    assert sampling.sample_to_file("token_vae", 90, tmp_path / "nine.csv").drawn == 0
    assert (tmp_path / "nine-9-of-9.csv").read_text() == ""


@pytest.mark.parametrize(
    "name, n, file, options, message",
    [
        ("token_vae", 5, "a.txt", {}, "a.txt: expected a file that ends in .csv, .smi, .sdf"),
        ("token_vae", 0, "a.csv", {}, "num_molecules=0: expected a whole number"),
        ("token_vae", 5, "a.csv", {"seed": True}, "seed=True: expected a whole number from 0"),
        ("token_vae", 5, "a.csv", {"seed": -1}, "seed=-1"),
        ("token_vae", 5, "a.csv", {"num_inference_steps": 5}, "token_vae takes no num_inference_steps"),
        ("latent_diffusion", 5, "a.csv", {"condition": {"type": "ester"}}, "latent_diffusion takes no condition"),
        ("property_oracle", 5, "a.csv", {}, "property_oracle draws no molecules"),
        ("diffusion_prior", 5, "a.csv", {"condition": {"type": "x"}}, "unknown type 'x'"),
        ("latent_diffusion", 5, "a.csv", {"num_inference_steps": 0}, "num_inference_steps=0"),
    ],
)
def test_what_cannot_be_drawn_leaves_no_file(tmp_path, name, n, file, options, message):
    with pytest.raises(ValueError, match=message):
        sampling.sample_to_file(name, n, tmp_path / file, **options)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_there_are_never_overwritten(tmp_path, small):
    path = tmp_path / "a.csv"
    path.write_text("mine")
    with pytest.raises(ValueError, match="a.csv is there already; delete it, or choose another name"):
        sampling.sample_to_file("token_vae", 5, path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda record, content: record.write_text("{"), "a.smi cannot be continued"),
        (lambda record, content: record.write_text("{}"), "a.smi cannot be continued"),
        (lambda record, content: record.write_text("[]"), "a.smi cannot be continued"),
        (lambda record, content: content.unlink(), "a.smi cannot be continued"),
        (lambda record, content: content.write_text(""), "is shorter than a.smi.progress.json says"),
    ],
)
def test_an_unfinished_file_that_is_damaged_or_of_another_call(tmp_path, small, monkeypatch, damage, message):
    def stopped(output, with_head):
        if not with_head:
            raise KeyboardInterrupt
        return "C\n", 1

    with monkeypatch.context() as patch:
        patch.setitem(sampling.WRITERS, ".smi", stopped)
        with pytest.raises(KeyboardInterrupt):
            sampling.sample_to_file("token_vae", 100, tmp_path / "a.smi")
    with pytest.raises(ValueError, match="was begun by another call.*delete a.smi.progress.json and a.smi.unfinished"):
        sampling.sample_to_file("token_vae", 99, tmp_path / "a.smi")
    damage(tmp_path / "a.smi.progress.json", tmp_path / "a.smi.unfinished")
    with pytest.raises(ValueError, match=message):
        sampling.sample_to_file("token_vae", 100, tmp_path / "a.smi")


def test_stream_is_the_same_molecules(monkeypatch):
    pipe = untrained("diffusion_prior")
    condition = {"type": ["ester"] * 3 + ["amide"] * 4, "part": "chain", "gap": torch.linspace(5, 8, 7)}
    options = dict(condition=condition, num_inference_steps=3, batch_size=3)
    whole = pipe(7, generator=torch.Generator().manual_seed(0), **options)
    parts = list(pipe.stream(7, generator=torch.Generator().manual_seed(0), **options))
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.latents for part in parts]), whole.latents)
    assert sum((part.smiles for part in parts), []) == whole.smiles


@pytest.mark.parametrize("rank, world", [("5", "2"), ("x", "2"), ("-1", "2"), ("0", "0")])
def test_processes_that_there_are_not(tmp_path, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=f"RANK={rank} and WORLD_SIZE={world}: expected process RANK"):
        sampling.sample_to_file("token_vae", 5, tmp_path / "a.smi")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batches", ["a", -1, 1.5, None, True])
def test_a_record_that_makes_no_sense(tmp_path, small, batches):
    counts = {"batches": batches, "drawn": 20, "written": 20, "bytes": 0}
    (tmp_path / "a.smi.progress.json").write_text(json.dumps({"call": {}, **counts}))
    (tmp_path / "a.smi.unfinished").write_text("")
    with pytest.raises(ValueError, match="a.smi cannot be continued .*delete a.smi.progress.json"):
        sampling.sample_to_file("token_vae", 100, tmp_path / "a.smi")


def test_a_folder_is_not_said_to_be_deleted(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(ValueError, match="a.csv is a folder; expected the name of a file"):
        sampling.sample_to_file("token_vae", 5, tmp_path / "a.csv")
