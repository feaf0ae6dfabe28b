"""Molecules as graphs, as RDKit sees them and as SMILES; what counts as valid; what can be read off a molecule."""

import functools
import json
import re

import numpy as np
import torch
from rdkit import Chem, rdBase

from molecule_diffusion.checks import check_smiles_list, quoted

MAX_SMILES_LENGTH = 500  # letters; RDKit takes minutes for very long ones, or dies
MAX_ATOMS = 9
ATOM_TYPES = ("C", "N", "O", "F", "none")
BOND_TYPES = ("none", "single", "double", "triple")
NO_ATOM = ATOM_TYPES.index("none")
PAIRS = np.triu_indices(MAX_ATOMS, 1)  # the 36 pairs i < j that a symmetric bond matrix is made of

_BOND_ORDERS = (None, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
_KNOWN_BONDS = {*_BOND_ORDERS[1:], Chem.BondType.AROMATIC}
_ATOM_INDEX = {symbol: index for index, symbol in enumerate(ATOM_TYPES[:NO_ATOM])}
_VALENCES = np.array([4, 3, 2, 1, 0])  # of C, N, O, F and "none"


# ---------------------------------------------------------------------------------------------------------------------
# Reading SMILES
# ---------------------------------------------------------------------------------------------------------------------


def read_smiles(smiles, sanitize=True):
    """An RDKit molecule from a SMILES, without atom maps and isotopes; None where RDKit cannot read it.

    Atom maps and isotopes label atoms and do not make another molecule here: [CH3:1]O and [13CH3]O are CO.
    Raises: ValueError for what is no text, and for a SMILES of more than MAX_SMILES_LENGTH letters.
    """
    if not isinstance(smiles, str):
        raise ValueError(f"{quoted(smiles)}: expected a SMILES, a text")
    if len(smiles) > MAX_SMILES_LENGTH:
        raise ValueError(
            f"a SMILES of {len(smiles):,} letters, {quoted(smiles, 40)}: this course reads at most {MAX_SMILES_LENGTH}"
        )
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles, sanitize=sanitize)
    if mol is None or "[" not in smiles:  # labels stand in brackets
        return mol
    return without_labels(mol, sanitize)


def without_labels(mol, sanitize=True):
    """A molecule without atom maps and isotopes; itself where it has none."""
    if not any(atom.GetAtomMapNum() or atom.GetIsotope() for atom in mol.GetAtoms()):
        return mol
    mol = Chem.Mol(mol)
    for atom in mol.GetAtoms():
        atom.SetAtomMapNum(0)
        atom.SetIsotope(0)
    return Chem.RemoveHs(mol, sanitize=sanitize)  # heavy hydrogen stood as an atom of its own


# ---------------------------------------------------------------------------------------------------------------------
# From a molecule to its graph
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
    mol = _parse(molecule)
    name = quoted(molecule if isinstance(molecule, str) else Chem.MolToSmiles(mol))
    elements = [atom.GetSymbol() for atom in mol.GetAtoms()]
    n = len(elements)
    if not 1 <= n <= MAX_ATOMS:
        raise ValueError(f"{name} has {n} heavy atoms; this course works with 1 to {MAX_ATOMS}")
    unknown = sorted(set(elements) - set(_ATOM_INDEX))
    if unknown:
        raise ValueError(f"{name} contains {', '.join(unknown)}; known elements: {', '.join(_ATOM_INDEX)}")
    smiles = Chem.MolToSmiles(mol, isomericSmiles=False)
    if set(smiles) & set("[$~<>:"):  # only then can there be a charge, a radical or another kind of bond
        _refuse_charges_and_odd_bonds(mol, name)
    order = json.loads(mol.GetProp("_smilesAtomOutputOrder").replace(",]", "]"))
    if not smiles.isupper():  # aromatic atoms are written in lower case
        mol = Chem.Mol(mol)
        Chem.Kekulize(mol, clearAromaticFlags=True)
    atoms = np.full(MAX_ATOMS, NO_ATOM, np.int8)
    bonds = np.zeros((MAX_ATOMS, MAX_ATOMS), np.int8)
    atoms[:n] = [_ATOM_INDEX[elements[i]] for i in order]
    bonds[:n, :n] = Chem.GetAdjacencyMatrix(mol, useBO=True)[order][:, order]
    return atoms, bonds, smiles


def _parse(molecule):
    if isinstance(molecule, Chem.Mol):
        return without_labels(molecule)
    if not isinstance(molecule, str):
        raise ValueError(f"{quoted(molecule)}: expected a SMILES string or an RDKit molecule")
    mol = read_smiles(molecule)
    if mol is None:
        raise ValueError(f"{quoted(molecule)} is not a valid SMILES (syntax or valence)")
    return mol


def _refuse_charges_and_odd_bonds(mol, name):
    if any(atom.GetFormalCharge() for atom in mol.GetAtoms()):
        raise ChargedMoleculeError(f"{name} carries formal charges; this course works with atoms that have none")
    if any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
        raise ValueError(f"{name} has unpaired electrons; this course works with closed-shell molecules")
    if any(bond.GetBondType() not in _KNOWN_BONDS for bond in mol.GetBonds()) or _aromatic_outside_rings(mol):
        raise ValueError(f"{name} has a bond that is not single, double, triple or, in a ring, aromatic")


def _aromatic_outside_rings(mol):
    return any(bond.GetBondType() == Chem.BondType.AROMATIC and not bond.IsInRing() for bond in mol.GetBonds())


def to_graphs(smiles):
    """Turn SMILES into graphs: `to_graph` over a list. Returns atoms int8 (N, 9) and bonds int8 (N, 9, 9)."""
    return stack_graphs([to_graph(one) for one in check_smiles_list("to_graphs", smiles)])


def stack_graphs(graphs):
    """A list of N graphs, as `to_graph` returns them, as two arrays: int8 (N, 9) and (N, 9, 9), for N = 0 too."""
    atoms = np.array([graph[0] for graph in graphs], np.int8).reshape(-1, MAX_ATOMS)
    bonds = np.array([graph[1] for graph in graphs], np.int8).reshape(-1, MAX_ATOMS, MAX_ATOMS)
    return atoms, bonds


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


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
    if pairs.ndim == 0 or pairs.shape[-1] != len(PAIRS[0]):
        raise ValueError(
            f"pairs of shape {tuple(pairs.shape)}: expected (..., {len(PAIRS[0])}), as pairs_from_matrix makes"
        )
    shape = (*pairs.shape[:-1], MAX_ATOMS, MAX_ATOMS)
    matrix = pairs.new_zeros(shape) if torch.is_tensor(pairs) else np.zeros(shape, pairs.dtype)
    row, column = _pairs_beside(pairs)
    matrix[..., row, column] = pairs
    matrix[..., column, row] = pairs
    return matrix


def pairs_from_matrix(bonds):
    """The 36 entries above the diagonal, row by row. Shapes: (..., 9, 9) -> (..., 36); numpy or torch."""
    if tuple(bonds.shape[-2:]) != (MAX_ATOMS, MAX_ATOMS):
        raise ValueError(f"bonds of shape {tuple(bonds.shape)}: expected (..., 9, 9)")
    row, column = _pairs_beside(bonds)
    return bonds[..., row, column]


def _pairs_beside(values):
    """`PAIRS` where the values lie: arrays for an array, tensors on its device for a tensor."""
    return pairs_on(values.device) if torch.is_tensor(values) else PAIRS


@functools.cache
def pairs_on(device):
    """`PAIRS` as tensors on a device, sent there once: two of shape (36,)."""
    return tuple(torch.from_numpy(index).to(device) for index in PAIRS)


def count_hydrogens(atoms, bonds):
    """Hydrogens on each atom: what its bonds leave of its valence C 4, N 3, O 2, F 1.

    Shapes: atoms (..., 9), bonds (..., 9, 9) -> (..., 9).
    """
    if atoms.shape[-1:] != (MAX_ATOMS,) or bonds.shape != (*atoms.shape, MAX_ATOMS):
        raise ValueError(f"atoms {atoms.shape} and bonds {bonds.shape}: expected (..., 9) and (..., 9, 9)")
    return _VALENCES[atoms] - bonds.sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# From a graph to a molecule, and what counts as valid
# ---------------------------------------------------------------------------------------------------------------------


def to_mols(atoms, bonds):
    """Turn graphs into unsanitised RDKit molecules, one per graph, padding left out.

    Args: atoms (N, 9) and bonds (N, 9, 9), as `check_graphs` wants them. Returns: list of N Chem.Mol.
    """
    atoms, bonds = check_graphs(atoms, bonds)
    templates = [Chem.Atom(symbol) for symbol in ATOM_TYPES[:NO_ATOM]]
    row, column = PAIRS
    mols = []
    for types, orders in zip(atoms.tolist(), pairs_from_matrix(bonds)):
        mol = Chem.RWMol()
        index = [mol.AddAtom(templates[t]) if t != NO_ATOM else -1 for t in types]
        for pair in orders.nonzero()[0].tolist():
            mol.AddBond(index[row[pair]], index[column[pair]], _BOND_ORDERS[orders[pair]])
        mols.append(mol.GetMol())
    return mols


def to_smiles(atoms, bonds):
    """Turn graphs into canonical SMILES without stereo; None where RDKit's full sanitisation refuses the graph.

    Nothing is repaired: a five-valent carbon is None, a graph in two pieces is a SMILES with a dot.
    """
    with rdBase.BlockLogs():
        return [sanitised_smiles(mol) for mol in to_mols(atoms, bonds)]


def sanitises(mol):
    """Sanitise a molecule in place. Returns: whether RDKit accepts it and aromatic bonds are in rings only."""
    if mol.GetNumAtoms() == 0 or Chem.SanitizeMol(mol, catchErrors=True) != Chem.SanitizeFlags.SANITIZE_NONE:
        return False
    return not _aromatic_outside_rings(mol)


def sanitised_smiles(mol):
    """Sanitise a molecule in place. Returns: its canonical SMILES without stereo, None where RDKit refuses it."""
    return Chem.MolToSmiles(mol, isomericSmiles=False) if sanitises(mol) else None


_CHARGE = re.compile(r"\[[^]]*[+-]")  # a bracket with a sign in it, the only way to write a charge in a SMILES


def verdict(smiles):
    """What a drawn molecule counts as, in every table and picture of the course.

    Args: smiles: as `to_smiles` returns it: canonical, None where RDKit refused the graph.
    Returns: "valid": one connected molecule without formal charges; "fragmented": uncharged pieces; "charged";
        "refused": no molecule at all.
    """
    if not smiles:
        return "refused"
    if _CHARGE.search(smiles):
        return "charged"
    return "fragmented" if "." in smiles else "valid"


def corrected_smiles(mol):
    """SMILES after the valency correction that some papers apply before they count (MoFlow, Zang & Wang 2020; GDSS).

    While an atom has too many bonds its highest bond is lowered by one order; then only the largest fragment is kept.
    Returns None where even that fails (no atom at all).
    """
    if not isinstance(mol, Chem.Mol):
        raise ValueError(f"corrected_smiles({quoted(mol)}): expected an RDKit molecule, as to_mols makes them")
    mol = Chem.RWMol(mol)
    with rdBase.BlockLogs():
        while problems := [p for p in Chem.DetectChemistryProblems(mol) if p.GetType() == "AtomValenceException"]:
            bonds = mol.GetAtomWithIdx(problems[0].GetAtomIdx()).GetBonds()
            if not bonds:
                return None
            _lower(mol, max(bonds, key=Chem.Bond.GetBondTypeAsDouble))
        fragments = Chem.GetMolFrags(mol, asMols=True, sanitizeFrags=False)
        if not fragments:
            return None
        return sanitised_smiles(max(fragments, key=Chem.Mol.GetNumAtoms))


def _lower(mol, bond):
    """Lower a bond by one order; a bond of another kind becomes a single one."""
    order = _BOND_ORDERS.index(bond.GetBondType()) - 1 if bond.GetBondType() in _BOND_ORDERS else 1
    ends = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
    mol.RemoveBond(*ends)
    if order:
        mol.AddBond(*ends, _BOND_ORDERS[order])


# ---------------------------------------------------------------------------------------------------------------------
# What can be read off a molecule
# ---------------------------------------------------------------------------------------------------------------------

PROPERTIES = ("QED", "logP", "weight", "rings")

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


def measure(mol):
    """QED, logP, weight (Da) and number of rings of a sanitised RDKit molecule: four numbers, order of PROPERTIES."""
    from rdkit.Chem import QED, Crippen, Descriptors

    return QED.qed(mol), Crippen.MolLogP(mol), Descriptors.MolWt(mol), mol.GetRingInfo().NumRings()


def properties(smiles):
    """QED, logP, weight (Da) and number of rings of molecules. Returns float array (N, 4), order of PROPERTIES.

    Raises: ValueError where RDKit cannot read one.
    """
    rows = []
    for text in check_smiles_list("properties", smiles):
        mol = read_smiles(text)
        if mol is None:
            raise ValueError(f"{quoted(text)} is not a valid SMILES (syntax or valence); measure valid molecules only")
        rows.append(measure(mol))
    return np.array(rows, float).reshape(-1, len(PROPERTIES))


def describe(smiles):
    """What can be read from molecules exactly: a table with the columns smiles, type, part, logP and QED.

    Args: smiles: list of valid SMILES of connected molecules, such as `evaluate(output).smiles`.
    Raises: ValueError where RDKit cannot read one.
    """
    import pandas as pd

    rows = []
    for text in check_smiles_list("describe", smiles):
        mol = read_smiles(text) if isinstance(text, str) else None
        if mol is None or "." in text or not text:
            raise ValueError(
                f"{quoted(text)} is not the SMILES of one connected molecule; describe valid molecules only"
            )
        qed, logp, *_ = measure(mol)
        rows.append((text, molecule_type(mol), molecule_part(mol), logp, qed))
    return pd.DataFrame(rows, columns=["smiles", "type", "part", "logP", "QED"])
