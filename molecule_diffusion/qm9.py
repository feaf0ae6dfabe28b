"""All of QM9 from the package qm9pack: graphs, 19 targets, a fixed split, geometries, PyTorch Geometric's `Data`."""

import contextlib
import functools
import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rdkit import Chem
from torch.nn import functional as F

from molecule_diffusion.chemistry import (
    ChargedMoleculeError,
    matrix_from_pairs,
    pairs_from_matrix,
    stack_graphs,
    to_graph,
)
from molecule_diffusion.files import MADE, atomic, read_npz

QM9_MOLECULES = 130_831  # QM9 less its 3,054 uncharacterised molecules, as qm9pack 1.0.3 ships it
QM9_CACHE = MADE / "qm9_v1.npz"
SPLIT_SEED, TEST_SIZE, VALIDATION_SIZE = 0, 10_000, 5_000

HARTREE_TO_EV = 27.211386246  # as torch_geometric.datasets.qm9
KCALMOL_TO_EV = 0.04336414
HARTREE_TO_KCALMOL = 627.509  # as gdb9.sdf.csv, the table that PyG reads

# The 19 targets in PyG's order: name, unit, meaning.
TARGETS = (
    ("mu", "D", "dipole moment"),
    ("alpha", "a0^3", "isotropic polarisability"),
    ("homo", "eV", "energy of the highest occupied orbital"),
    ("lumo", "eV", "energy of the lowest unoccupied orbital"),
    ("gap", "eV", "gap between HOMO and LUMO"),
    ("r2", "a0^2", "electronic spatial extent"),
    ("zpve", "eV", "zero-point vibrational energy"),
    ("U0", "eV", "internal energy at 0 K"),
    ("U", "eV", "internal energy at 298.15 K"),
    ("H", "eV", "enthalpy at 298.15 K"),
    ("G", "eV", "free energy at 298.15 K"),
    ("Cv", "cal/(mol K)", "heat capacity at 298.15 K"),
    ("U0_atom", "eV", "atomisation energy at 0 K"),
    ("U_atom", "eV", "atomisation energy at 298.15 K"),
    ("H_atom", "eV", "atomisation enthalpy at 298.15 K"),
    ("G_atom", "eV", "atomisation free energy at 298.15 K"),
    ("A", "GHz", "rotational constant A"),
    ("B", "GHz", "rotational constant B"),
    ("C", "GHz", "rotational constant C"),
)

# Energies of the free atoms in Hartree: U0, U, H, G (Ramakrishnan et al. 2014, atomref.txt).
ATOM_ENERGIES = {
    "H": (-0.500273, -0.498857, -0.497912, -0.510927),
    "C": (-37.846772, -37.845355, -37.844411, -37.861317),
    "N": (-54.583861, -54.582445, -54.581501, -54.598897),
    "O": (-75.064579, -75.063163, -75.062219, -75.079532),
    "F": (-99.718730, -99.717314, -99.716370, -99.733544),
}

_QM9_RAW_COLUMNS = (
    "Dipole_debye Polarizability_bohr3 HOMO_au LUMO_au HOMO_LUMO_gap_au R2_bohr2 ZPVE_au InternalEnergy_0K_au "
    "InternalEnergy_298K_au Enthalphy_298K_au GibbsFreeEnergy_298K_au Heatcapacity_Cv_cal_mol_K "
    "RotA_GHz RotB_GHz RotC_GHz"
).split()


@dataclass
class QM9:
    """QM9 less what needs formal charges, as graphs, with 19 targets and a fixed split.

    Attributes:
        smiles: N canonical SMILES without stereo.
        atoms, bonds: int8 (N, 9) and (N, 9, 9), see `to_graph`.
        targets: float32 (N, 19), order and units of `TARGETS` (those of torch_geometric.datasets.QM9).
        index: int32 (N,), the molecule's number in QM9, counted from 1.
        train, validation, test: row numbers. A SMILES that occurs twice is in `train` only, so nothing leaks.
        dropped: how many were left out because they can only be written with formal charges.
    """

    smiles: list
    atoms: np.ndarray
    bonds: np.ndarray
    targets: np.ndarray
    index: np.ndarray
    row: np.ndarray = field(repr=False)  # row in qm9pack's files
    dropped: int = 0
    train: np.ndarray = field(init=False, repr=False)
    validation: np.ndarray = field(init=False, repr=False)
    test: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        _, first, counts = np.unique(self.smiles, return_index=True, return_counts=True)
        single = np.random.default_rng(SPLIT_SEED).permutation(np.sort(first[counts == 1]))
        self.test = np.sort(single[:TEST_SIZE])
        self.validation = np.sort(single[TEST_SIZE : TEST_SIZE + VALIDATION_SIZE])
        self.train = np.setdiff1d(np.arange(len(self)), single[: TEST_SIZE + VALIDATION_SIZE])

    def halves(self):
        """Two halves of `train`, row numbers: one for a conditional generator, one for the oracle that judges it.

        Both see different molecules (Hoogeboom et al., arXiv:2203.17003); a SMILES that occurs twice is in one only.
        """
        smiles = np.array([self.smiles[i] for i in self.train])
        names = np.random.default_rng(SPLIT_SEED).permutation(np.unique(smiles))
        first = np.isin(smiles, names[: len(names) // 2])
        return self.train[first], self.train[~first]

    def __len__(self):
        return len(self.smiles)

    def __repr__(self):
        return (
            f"QM9: {len(self):,} molecules ({self.dropped} that need formal charges dropped); "
            f"train {len(self.train):,}, validation {len(self.validation):,}, test {len(self.test):,}"
        )

    def target(self, name):
        """The column of one target, float32 (N,): `qm9.target("gap")`."""
        names = [target[0] for target in TARGETS]
        if name not in names:
            raise ValueError(f"unknown target {name!r}; QM9 has {', '.join(names)}")
        return self.targets[:, names.index(name)]

    def left_out(self):
        """The SMILES of the molecules that were dropped, as QM9 spells them: a list of `dropped` texts.

        They are read from qm9pack when asked for (about a second).
        """
        rows = np.setdiff1d(np.arange(QM9_MOLECULES), self.row)
        return _geometry_table()["SMILES"].iloc[rows].tolist()

    def mol(self, i):
        """The RDKit molecule i with hydrogens and its DFT coordinates in Ångström, in QM9's own atom order.

        Coordinates are read from qm9pack when first asked for (about a second), then kept in memory.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"molecule {i}: QM9 has molecules 0 to {len(self) - 1}")
        smiles, elements, coordinates = _geometry_table().iloc[int(self.row[i])]
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        elements = elements.translate(str.maketrans("", "", "[]'")).split(",")
        numbers = coordinates.replace("*^", "e").translate(str.maketrans("", "", "[]")).split(",")
        positions = np.array(numbers, float).reshape(-1, 3)
        conformer = Chem.Conformer(mol.GetNumAtoms())
        conformer.SetPositions(positions[_atom_order(mol, elements, positions)])
        mol.AddConformer(conformer)
        mol.SetProp("_Name", f"gdb_{self.index[i]}")
        return mol


@functools.cache
def _geometry_table():
    import pandas as pd

    columns = ["SMILES", "Elements", "XYZ_Ang"]
    return pd.concat([pd.read_csv(path, usecols=columns) for path in qm9pack_files()], ignore_index=True)


def _atom_order(mol, elements, positions):
    """Which row of `positions` belongs to which atom of `mol`: the same number for all but 10 molecules of QM9."""
    from rdkit.Chem import rdDetermineBonds

    same = list(range(len(elements)))
    bonds = np.array([(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()]).reshape(-1, 2)
    lengths = np.linalg.norm(positions[bonds[:, 0]] - positions[bonds[:, 1]], axis=1)
    if elements == [atom.GetSymbol() for atom in mol.GetAtoms()] and (lengths < 1.8).all():
        return same
    xyz = "\n".join([f"{len(elements)}\n"] + [f"{e} {x} {y} {z}" for e, (x, y, z) in zip(elements, positions)])
    found = Chem.MolFromXYZBlock(xyz)
    rdDetermineBonds.DetermineConnectivity(found)
    single = Chem.RWMol(mol)  # compare connections only, not bond orders
    for bond in single.GetBonds():
        bond.SetIsAromatic(False)
        bond.SetBondType(Chem.BondType.SINGLE)
    return list(found.GetSubstructMatch(single)) or same


def qm9pack_files():
    """Paths of the three CSV files of the package qm9pack. Raises: FileNotFoundError with the command that mends it."""
    spec = importlib.util.find_spec("qm9pack")  # found, not imported: its import needs an old setuptools
    remedy = "python -m pip install --force-reinstall --no-deps qm9pack==1.0.3"
    if spec is None:
        raise FileNotFoundError(f"the package qm9pack, which holds QM9, is not installed. Run: {remedy}")
    paths = [Path(spec.origin).parent / "data" / f"qm9_part{part}.csv" for part in (1, 2, 3)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"qm9pack lacks its file {path.name}. Run: {remedy}")
    return paths


def load_qm9():
    """Load all of QM9: about 20 s on 2 cores the first time, under a second from the cache after that.

    Reads the CSV files of the package qm9pack (no download) and keeps graphs, SMILES and targets in one file,
    data/qm9_v1.npz, or in the folder that the variable MOLECULE_DIFFUSION_DATA names. A damaged or stale cache is
    rebuilt, with a message; where it cannot be kept, the message says so. Of several processes that need it first, one
    builds it and the others wait.

    Returns: QM9 (see there).
    Raises: FileNotFoundError or ValueError where qm9pack's files are missing or truncated.
    Source: Ramakrishnan et al. 2014, doi:10.1038/sdata.2014.22; Ruddigkeit et al. 2012, doi:10.1021/ci300415d.
    """
    cached = _read_cache_or_say_why_not()
    if cached is not None:
        return cached
    with _building():
        cached = _read_cache_or_say_why_not(quiet=True)  # another process may have built it while this one waited
        if cached is not None:
            return cached
        columns = build_qm9()
        try:
            with atomic(QM9_CACHE) as part, open(part, "wb") as file:
                np.savez_compressed(file, checksum=checksum(columns), **columns)
        except OSError as error:
            print(
                f"QM9 is loaded, but its cache could not be kept ({error}); the next time takes as long. Free space in "
                f"{QM9_CACHE.parent}, or set MOLECULE_DIFFUSION_DATA to a folder that can be written."
            )
    return _qm9_from_columns(columns)


def _read_cache_or_say_why_not(quiet=False):
    """QM9 from its cache; None where there is none, or none that can be used, which is said."""
    if not QM9_CACHE.exists():
        return None
    try:
        return _read_qm9_cache()
    except ValueError as error:
        if not quiet:
            print(f"The QM9 cache is not usable ({error}); building it again.")
        return None


@contextlib.contextmanager
def _building():
    """Let one process at a time build the cache; where the lock file cannot be made, each builds for itself."""
    from filelock import FileLock, Timeout

    lock = FileLock(QM9_CACHE.with_name(QM9_CACHE.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("Another process is building the QM9 cache; waiting for it.")
        lock.acquire()
    except OSError:
        pass
    try:
        yield
    finally:
        lock.release()  # does nothing where it was not acquired


@functools.cache
def shared_qm9():
    """QM9, loaded once for the rooms below; its arrays are shared, so nobody may change them."""
    return load_qm9()


def graph_tensors(rows):
    """Atoms (n, 9) and bonds (n, 9, 9) of QM9's molecules `rows`, as tensors: a list of two."""
    qm9 = shared_qm9()
    return [torch.from_numpy(qm9.atoms[rows]), torch.from_numpy(qm9.bonds[rows])]


def checksum(columns):
    """SHA-256 over the names, shapes, types and contents of a dict of arrays."""
    layout = [(name, columns[name].shape, str(columns[name].dtype)) for name in sorted(columns)]
    digest = hashlib.sha256(repr(layout).encode())
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()


def _read_qm9_cache():
    columns = read_npz(QM9_CACHE, ("smiles", "atoms", "pairs", "targets", "index", "row", "dropped", "checksum"))
    if str(columns.pop("checksum")) != checksum(columns):
        raise ValueError(f"{QM9_CACHE.name} is damaged: its checksum does not match")
    return _qm9_from_columns(columns)


def _qm9_from_columns(columns):
    smiles = columns["smiles"].tobytes().decode().split("\n")
    bonds = matrix_from_pairs(columns["pairs"])
    rest = {name: columns[name] for name in ("atoms", "targets", "index", "row")}
    return QM9(smiles=smiles, bonds=bonds, dropped=int(columns["dropped"]), **rest)


def build_qm9():
    """Read qm9pack's files, turn what needs no formal charges into graphs. Returns: dict of arrays, as in the cache."""
    from tqdm.auto import tqdm

    table = _read_qm9pack()
    graphs, rows = [], []
    for row, smiles in enumerate(tqdm(table["SMILES"], desc="QM9: SMILES to graphs", unit=" molecules")):
        with contextlib.suppress(ChargedMoleculeError):  # counted below
            graphs.append(to_graph(smiles))
            rows.append(row)
    atoms, bonds = stack_graphs(graphs)
    raw = table.iloc[rows]
    return {
        "smiles": np.frombuffer("\n".join(graph[2] for graph in graphs).encode(), np.uint8),
        "atoms": atoms,
        "pairs": np.ascontiguousarray(pairs_from_matrix(bonds)),
        "targets": _targets(raw),
        "index": raw["Index"].to_numpy(np.int32),
        "row": np.array(rows, np.int32),
        "dropped": np.array(len(table) - len(rows)),
    }


def _read_qm9pack():
    import pandas as pd

    tables = []
    for path in qm9pack_files():
        try:
            tables.append(pd.read_csv(path, usecols=["Index", "SMILES", "Stoichiometry", *_QM9_RAW_COLUMNS]))
        except (ValueError, pd.errors.ParserError, UnicodeDecodeError) as error:
            raise ValueError(f"qm9pack's {path.name} cannot be read ({error}); install qm9pack==1.0.3 again") from None
    table = pd.concat(tables, ignore_index=True)
    if len(table) != QM9_MOLECULES or table.isna().any(axis=None):
        raise ValueError(
            f"qm9pack's files hold {len(table.dropna()):,} complete molecules, expected {QM9_MOLECULES:,}: "
            "they are truncated; install qm9pack==1.0.3 again"
        )
    return table


def _targets(raw):
    """The 19 targets of PyG from qm9pack's columns: float32 (N, 19), energies in eV."""
    values = raw[_QM9_RAW_COLUMNS].to_numpy(np.float64)
    counts = np.array([json.loads(text) for text in raw["Stoichiometry"]])  # of H, C, N, O, F
    free_atoms = counts @ np.array([ATOM_ENERGIES[symbol] for symbol in "HCNOF"])
    atomisation = (values[:, 7:11] - free_atoms) * HARTREE_TO_KCALMOL
    targets = np.concatenate([values[:, :12], atomisation, values[:, 12:]], axis=1).astype(np.float32)
    units = np.ones(len(TARGETS), np.float32)  # in single precision, as PyG does it
    for k, (name, unit, _) in enumerate(TARGETS):
        if unit == "eV":
            units[k] = KCALMOL_TO_EV if name.endswith("_atom") else HARTREE_TO_EV
    return targets * units


def to_pyg(qm9, i):
    """Molecule i as the torch_geometric `Data` that `torch_geometric.datasets.QM9` makes, hydrogens included.

    Returns: Data with x (n, 11): one-hot H C N O F, atomic number, aromatic, sp, sp2, sp3, number of hydrogens;
        z (n,); pos (n, 3) in Ångström; edge_index (2, 2b); edge_attr (2b, 4): single, double, triple, aromatic;
        y (1, 19); smiles; name; idx. PyG reads its file without sanitising it, so bonds are kekulised and the aromatic
        and sp columns are zero; notebook 01 computes them.
    """
    from torch_geometric.data import Data

    mol, i = qm9.mol(i), range(len(qm9))[i]
    Chem.Kekulize(mol, clearAromaticFlags=True)
    n = mol.GetNumAtoms()
    orders = torch.from_numpy(Chem.GetAdjacencyMatrix(mol, useBO=True)).long()
    edge_index = orders.nonzero().t().contiguous()
    z = torch.tensor([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    types = F.one_hot((z[:, None] == torch.tensor([1, 6, 7, 8, 9])).long().argmax(1), 5)
    hydrogens = ((orders > 0) & (z == 1)).sum(1)
    Chem.AssignAtomChiralTagsFromStructure(mol)  # as RDKit does when PyG reads 3D coordinates
    return Data(
        x=torch.cat([types, z[:, None], torch.zeros(n, 4, dtype=torch.long), hydrogens[:, None]], 1).float(),
        z=z,
        pos=torch.from_numpy(mol.GetConformer().GetPositions()).float(),
        edge_index=edge_index,
        edge_attr=F.one_hot(orders[edge_index[0], edge_index[1]] - 1, 4).float(),
        y=torch.from_numpy(qm9.targets[i : i + 1]),
        smiles=Chem.MolToSmiles(mol),
        name=mol.GetProp("_Name"),
        idx=int(qm9.index[i]) - 1,
    )
