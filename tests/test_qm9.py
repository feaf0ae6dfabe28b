"""QM9: the data, geometries, PyG's features, and the cache with everything that can damage it."""

import errno
import hashlib
import importlib.util
import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from rdkit import Chem
from shared import PEAK_MEMORY
from torch_geometric.datasets import QM9 as PygQM9
from torch_geometric.datasets.qm9 import atomrefs

import helpers
from molecule_diffusion import qm9 as room

# ---------------------------------------------------------------------------------------------------------------------
# The data
# ---------------------------------------------------------------------------------------------------------------------


def test_counts(qm9):
    assert (len(qm9), qm9.dropped) == (130_251, 580)
    assert len(qm9) + qm9.dropped == room.QM9_MOLECULES == 130_831
    assert qm9.atoms.shape == (130_251, 9) and qm9.bonds.shape == (130_251, 9, 9)
    assert qm9.targets.shape == (130_251, 19) and qm9.targets.dtype == np.float32
    assert np.isfinite(qm9.targets).all()
    assert repr(qm9).startswith("QM9: 130,251 molecules (580 that need formal charges dropped); train 115,251")


def test_what_was_left_out_is_neutral_as_a_whole(qm9):
    """443 zwitterions, which QM9 writes with charges, and 137 with nitro groups, which RDKit writes with charges."""
    left_out = qm9.left_out()
    assert len(left_out) == qm9.dropped
    zwitterions = [text for text in left_out if "+" in text]
    others = [Chem.MolFromSmiles(text) for text in left_out if "+" not in text]
    assert (len(zwitterions), len(others)) == (443, 137)
    assert all(mol.HasSubstructMatch(Chem.MolFromSmarts("[#6][N+](=O)[O-]")) for mol in others)
    assert all(Chem.GetFormalCharge(Chem.MolFromSmiles(text)) == 0 for text in left_out)


def test_split_is_fixed_complete_and_does_not_leak(qm9):
    parts = [qm9.train, qm9.validation, qm9.test]
    assert [len(part) for part in parts] == [115_251, 5_000, 10_000]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(qm9)))
    train, validation, test = ({qm9.smiles[i] for i in part} for part in parts)
    assert not (train & validation or train & test or validation & test)
    # every table of the course was measured on exactly these molecules
    assert qm9.test[:5].tolist() == [43, 53, 91, 100, 119]
    assert [qm9.smiles[i] for i in qm9.test[:3]] == ["CC1CO1", "CC(C)(C)C", "CC1CCC1"]
    fingerprint = hashlib.sha256("\n".join(qm9.smiles[i] for i in qm9.test).encode()).hexdigest()
    assert fingerprint.startswith("5d08392cb0ad85c8")


@pytest.mark.parametrize(
    "name, value",
    [
        ("mu", 0.0),
        ("alpha", 13.21),
        ("gap", 0.5048 * 27.211386246),
        ("U0", -40.47893 * 27.211386246),
        ("U0_atom", -395.999594594 * 0.04336414),  # kcal/mol of gdb9.sdf.csv, the table that PyG reads
        ("U_atom", -398.643290011 * 0.04336414),
        ("H_atom", -401.014646522 * 0.04336414),
        ("G_atom", -372.471772148 * 0.04336414),
        ("Cv", 6.469),
        ("A", 157.7118),
    ],
)
def test_targets_of_methane(qm9, name, value):
    assert qm9.smiles[0] == "C"
    assert qm9.target(name)[0] == pytest.approx(value, rel=1e-6)


def test_an_unknown_target_lists_the_known_ones(qm9):
    with pytest.raises(ValueError, match="unknown target 'HOMO'; QM9 has mu, alpha, homo"):
        qm9.target("HOMO")


def test_the_halves_share_no_molecule(qm9):
    first, second = qm9.halves()
    assert abs(len(first) - len(second)) < 100 and len(first) + len(second) == len(qm9.train)
    assert not {qm9.smiles[i] for i in first} & {qm9.smiles[i] for i in second}
    assert set(first) | set(second) == set(qm9.train)


# ---------------------------------------------------------------------------------------------------------------------
# Geometries and PyG
# ---------------------------------------------------------------------------------------------------------------------


# the molecules whose coordinates come in another order than their SMILES, e.g. HC≡C-C≡N
REORDERED = [3, 22, 23, 474, 50603, 51135, 58007, 129893]


def test_bond_lengths_are_plausible(qm9):
    limits = {1: (0.93, 1.15), 2: (1.1, 1.75)}  # Ångström: with hydrogen, between heavy atoms
    for i in [*REORDERED, *np.random.default_rng(0).choice(len(qm9), 300, replace=False)]:
        mol = qm9.mol(i)
        assert Chem.MolToSmiles(Chem.RemoveHs(mol), isomericSmiles=False) == qm9.smiles[i]
        positions = mol.GetConformer().GetPositions()
        for bond in mol.GetBonds():
            ends = bond.GetBeginAtom(), bond.GetEndAtom()
            length = np.linalg.norm(np.subtract(*(positions[atom.GetIdx()] for atom in ends)))
            low, high = limits[min(2, *(atom.GetAtomicNum() for atom in ends))]
            assert low < length < high, f"{qm9.smiles[i]}: {[atom.GetSymbol() for atom in ends]} {length:.2f} Å"


def test_molecule_numbers_are_checked(qm9):
    assert Chem.MolToSmiles(Chem.RemoveHs(qm9.mol(-1))) == qm9.smiles[len(qm9) - 1]
    with pytest.raises(IndexError, match="QM9 has molecules 0 to 130250"):
        qm9.mol(130_251)


@pytest.fixture(scope="module")
def pyg(qm9, tmp_path_factory):
    """Rows of QM9, and what PyG's own code makes of the same molecules in the files that it would download."""
    rows = [*REORDERED, 0, 1, 2, *np.linspace(4, len(qm9) - 2, 190).astype(int).tolist()]
    root = tmp_path_factory.mktemp("pyg")
    raw = root / "raw"
    raw.mkdir()
    with Chem.SDWriter(str(raw / "gdb9.sdf")) as writer:
        for i in rows:
            writer.write(qm9.mol(i))
    source = pd.concat([pd.read_csv(path) for path in room.qm9pack_files()], ignore_index=True).iloc[qm9.row[rows]]
    columns = "RotA_GHz RotB_GHz RotC_GHz Dipole_debye Polarizability_bohr3 HOMO_au LUMO_au HOMO_LUMO_gap_au R2_bohr2"
    columns += " ZPVE_au InternalEnergy_0K_au InternalEnergy_298K_au Enthalphy_298K_au GibbsFreeEnergy_298K_au"
    columns += " Heatcapacity_Cv_cal_mol_K"
    values = source[columns.split()].to_numpy(float)
    counts = np.array([json.loads(text) for text in source["Stoichiometry"]])  # of H, C, N, O, F: the order of atomrefs
    # atomrefs are in eV, made with this value of a Hartree
    free_atoms = [counts @ np.array(atomrefs[target]) / 27.211386024 for target in (7, 8, 9, 10)]
    atomisation = (values[:, 10:14] - np.stack(free_atoms, 1)) * 627.509
    header = "mol_id,A,B,C,mu,alpha,homo,lumo,gap,r2,zpve,u0,u298,h298,g298,cv,u0_atom,u298_atom,h298_atom,g298_atom"
    lines = [
        ",".join([f"gdb_{i}", *map(str, row)]) for i, row in zip(qm9.index[rows], np.hstack([values, atomisation]))
    ]
    (raw / "gdb9.sdf.csv").write_text("\n".join([header, *lines, ""]))
    (raw / "uncharacterized.txt").write_text("\n".join(["header"] * 9 + ["footer"] * 2))

    class LocalQM9(PygQM9):
        def download(self):
            pass

    return rows, LocalQM9(str(root))


@pytest.mark.parametrize("name", "x z pos edge_index edge_attr y name smiles".split())
def test_to_pyg_equals_pyg(qm9, pyg, name):
    rows, dataset = pyg
    assert len(rows) == len(dataset)
    for i, expected in zip(rows, dataset):
        data = helpers.to_pyg(qm9, i)
        got, wanted = data[name], expected[name]
        if torch.is_tensor(wanted):
            assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
            # an SDF holds coordinates to 4 decimals
            tolerance = dict(rtol=0, atol=6e-5) if name == "pos" else dict(rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got, wanted, **tolerance)
        else:
            assert got == wanted
        assert set(data.keys()) == set(expected.keys())
        assert data.idx == int(data.name.removeprefix("gdb_")) - 1


def test_negative_rows_of_to_pyg_count_from_the_end(qm9):
    assert torch.equal(helpers.to_pyg(qm9, -1).y, helpers.to_pyg(qm9, len(qm9) - 1).y)


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def test_the_cache_is_small_and_loads_within_a_second(qm9):
    assert room.QM9_CACHE.stat().st_size <= 12e6
    seconds = []
    for _ in range(3):
        started = time.process_time()  # of this process alone, however busy the machine
        helpers.load_qm9()
        seconds.append(time.process_time() - started)
    assert min(seconds) <= 1


BUILD = """
import json, sys, time
from pathlib import Path
import helpers
from molecule_diffusion import qm9 as room
room.QM9_CACHE = Path(sys.argv[1])
started = time.process_time()
helpers.load_qm9()
seconds = time.process_time() - started
print(json.dumps([seconds, peak_memory()]))
"""


def test_building_from_qm9pack(qm9, run_python, tmp_path, monkeypatch):
    cache = tmp_path / "qm9.npz"
    result = run_python("-c", PEAK_MEMORY + BUILD, cache)
    assert result.returncode == 0, result.stderr
    seconds, peak = json.loads(result.stdout)
    assert peak <= 1.5e9
    assert seconds <= 60  # CPU seconds; 25 on a laptop of today
    assert "SMILES to graphs: 100%" in result.stderr
    monkeypatch.setattr(room, "QM9_CACHE", cache)
    again = helpers.load_qm9()
    assert again.smiles == qm9.smiles
    for name in ("atoms", "bonds", "targets", "index", "row"):
        np.testing.assert_array_equal(getattr(again, name), getattr(qm9, name))


@pytest.fixture
def small_cache(qm9, tmp_path, monkeypatch):
    """The path of a good cache of 40 molecules, which is also what a rebuild makes."""
    with np.load(room.QM9_CACHE) as file:
        columns = {name: file[name] for name in file.files if name != "checksum"}
    columns |= {name: columns[name][:40] for name in ("atoms", "pairs", "targets", "index", "row")}
    columns["smiles"] = np.frombuffer("\n".join(qm9.smiles[:40]).encode(), np.uint8)
    monkeypatch.setattr(room, "QM9_CACHE", tmp_path / "cache.npz")
    monkeypatch.setattr(room, "build_qm9", lambda: dict(columns))
    helpers.load_qm9()
    return room.QM9_CACHE


def flip_middle(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def with_other_columns(path):
    """A sound file of another version: its checksum is right, its columns are not ours."""
    columns = {"graphs": np.zeros(3)}
    np.savez_compressed(path, checksum=room.checksum(columns), **columns)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(flip_middle(path.read_bytes())),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"garbage" * 100),
        lambda path: np.savez(path, smiles=np.array(["C"])),
        with_other_columns,
    ],
    ids=["flipped byte", "truncated", "empty", "garbage", "no checksum", "other columns"],
)
def test_a_damaged_cache_is_rebuilt_with_a_message(qm9, small_cache, capsys, damage):
    good = small_cache.read_bytes()
    damage(small_cache)
    assert helpers.load_qm9().smiles == qm9.smiles[:40]
    assert "The QM9 cache is not usable" in capsys.readouterr().out
    helpers.load_qm9()
    assert capsys.readouterr().out == "", "the rebuilt cache is not used"
    assert len(small_cache.read_bytes()) == len(good)


def test_no_flipped_bit_gives_wrong_data_or_an_error(qm9, small_cache, capsys):
    good = small_cache.read_bytes()
    directory = range(len(good) - 300, len(good))  # the end of the zip, where no checksum protects the flags
    for place in [*range(0, len(good), 30), *directory]:
        small_cache.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        loaded = helpers.load_qm9()
        capsys.readouterr()  # hundreds of messages
        assert loaded.smiles == qm9.smiles[:40], place
        np.testing.assert_array_equal(loaded.targets, qm9.targets[:40])


@pytest.mark.parametrize("existed", [True, False])
def test_an_interrupt_while_writing_leaves_the_old_cache(small_cache, monkeypatch, existed):
    def interrupted(file, **columns):
        file.write(b"half of it")
        raise KeyboardInterrupt

    if existed:
        small_cache.write_bytes(b"damaged, so that it is built again")
    else:
        small_cache.unlink()
    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        helpers.load_qm9()
    left = [path.name for path in small_cache.parent.iterdir() if not path.name.endswith(".lock")]
    assert left == ["cache.npz"] * existed
    if existed:
        assert small_cache.read_bytes() == b"damaged, so that it is built again"


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "QM9_CACHE", tmp_path / "none.npz")


def test_missing_qm9pack(no_cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="qm9pack, which holds QM9, is not installed. Run: python -m pip"):
        helpers.load_qm9()


def test_a_missing_file_of_qm9pack(no_cache, monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "qm9pack" / "__init__.py")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(FileNotFoundError, match="qm9pack lacks its file qm9_part1.csv. Run: python -m pip"):
        helpers.load_qm9()


@pytest.mark.parametrize(
    "cut, message",
    [
        (lambda text: "".join(text.splitlines(True)[:20]), "hold 57 complete molecules, expected 130,831"),
        (lambda text: text[:-300], "complete molecules, expected 130,831|cannot be read"),
        (lambda text: "", "cannot be read .*install qm9pack==1.0.3 again"),
        (lambda text: "a,b\n1,2\n", "cannot be read .*install qm9pack==1.0.3 again"),
        (lambda text: text + '"an open quote', "cannot be read|complete molecules, expected 130,831"),
    ],
)
def test_truncated_files_of_qm9pack(no_cache, monkeypatch, tmp_path, cut, message):
    paths = [tmp_path / path.name for path in room.qm9pack_files()]
    for source, target in zip(room.qm9pack_files(), paths):
        with open(source, encoding="utf-8") as file:
            target.write_text("".join(line for line, _ in zip(file, range(20))), encoding="utf-8")
    paths[1].write_text(cut(paths[1].read_text(encoding="utf-8")), encoding="utf-8")
    monkeypatch.setattr(room, "qm9pack_files", lambda: paths)
    with pytest.raises(ValueError, match=message):
        helpers.load_qm9()
    assert not room.QM9_CACHE.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, folders that cannot be written
# ---------------------------------------------------------------------------------------------------------------------

BUILD_SMALL = """
import sys, time
from pathlib import Path
from molecule_diffusion import qm9
qm9.QM9_CACHE = Path(sys.argv[1])
with qm9.np.load(sys.argv[2]) as file:
    columns = {name: file[name] for name in file.files if name != "checksum"}
def build():
    print("building", flush=True)
    time.sleep(1.5)
    return columns
qm9.build_qm9 = build
print(qm9.load_qm9())
"""


def test_two_first_builds_at_once_are_one(qm9, tmp_path):
    command = [sys.executable, "-c", BUILD_SMALL, str(tmp_path / "qm9.npz"), str(room.QM9_CACHE)]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=helpers.ROOT)
    processes = [subprocess.Popen(command, **options) for _ in range(3)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    said = "".join(output for output, _ in outputs)
    assert said.count("building\n") == 1 and said.count("130,251 molecules") == 3
    assert "Another process is building the QM9 cache; waiting for it." in said


def test_a_cache_that_cannot_be_kept_is_said_and_the_data_are_returned(qm9, small_cache, monkeypatch, capsys):
    def full(*arguments, **columns):
        raise OSError(errno.ENOSPC, "no space left")

    small_cache.unlink()
    monkeypatch.setattr(np, "savez_compressed", full)
    assert helpers.load_qm9().smiles == qm9.smiles[:40]
    said = capsys.readouterr().out
    assert "its cache could not be kept ([Errno 28] no space left)" in said and "MOLECULE_DIFFUSION_DATA" in said
    assert [path.name for path in small_cache.parent.iterdir() if not path.name.endswith(".lock")] == []


def test_a_folder_that_cannot_be_written(qm9, small_cache, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(room, "QM9_CACHE", tmp_path / "file" / "qm9.npz")
    assert helpers.load_qm9().smiles == qm9.smiles[:40]
    assert "its cache could not be kept" in capsys.readouterr().out


def test_garbage_is_not_said_to_be_a_pickle(qm9, small_cache, capsys):
    small_cache.write_bytes(b"garbage" * 100)
    helpers.load_qm9()
    said = capsys.readouterr().out
    assert "it is not an npz file" in said and "pickle" not in said
