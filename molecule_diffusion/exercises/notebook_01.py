"""Notebook 01: molecules as tensors."""

import numpy as np
from rdkit import Chem, rdBase

from molecule_diffusion.chemistry import (
    ATOM_TYPES,
    MAX_ATOMS,
    NO_ATOM,
    PAIRS,
    count_hydrogens,
    to_graph,
    to_smiles,
)
from molecule_diffusion.encodings import one_hot
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_pair, expect_something
from molecule_diffusion.exercises.predicting import Name, Number, prediction
from molecule_diffusion.qm9 import shared_qm9

prediction("01.p1", Name(("negative", "positive")))
prediction("01.p2", Number("of all atoms", lowest=0, highest=1))
prediction("01.p3", Number("independent columns", lowest=0, highest=17))
prediction("01.p4", Number("of the bonds", lowest=0, highest=1))
prediction("01.p5", Name(("narrower", "wider")))
prediction("01.p6", Number("lines", lowest=0, highest=9))

# Formaldehyde C=O, and a strained test case with three elements: FC1=NC1 has a ring, a double bond and padding.
FORMALDEHYDE, RING = to_graph("C=O")[:2], to_graph("FC1=NC1")[:2]


@exercise("01.1", one_hot)
def _check_one_hot(answer):
    for name, (atoms, _) in (("formaldehyde", FORMALDEHYDE), ("FC1=NC1", RING)):
        good = one_hot(atoms)
        hints = [
            (good.T, f"{name}: rows and columns are swapped; one row per atom, one column per class"),
            (good[:, :4], f"{name}: 'none' is a class too: padding rows need their own column"),
            (
                good * (atoms != NO_ATOM)[:, None],
                f"{name}: padding rows are all zero; 'none' is a class too, the last column",
            ),
        ]
        expect(answer(atoms.copy()), good, name, hints)


@exercise("01.2", count_hydrogens)
def _check_count_hydrogens(answer):
    for name, (atoms, bonds) in (("formaldehyde", FORMALDEHYDE), ("FC1=NC1", RING), ("C#N", to_graph("C#N")[:2])):
        valence = np.array([4, 3, 2, 1, 0])[atoms]
        hints = [
            (valence - (bonds > 0).sum(-1), f"{name}: a double bond uses up two valences; add bond orders, not bonds"),
            (bonds.sum(-1), f"{name}: this is the used valence; hydrogens fill what is left"),
            (
                np.array([4, 3, 2, 1, 4])[atoms] - bonds.sum(-1),
                f"{name}: padding has no hydrogens; give 'none' the valence 0",
            ),
        ]
        expect(answer(atoms.copy(), bonds.copy()), count_hydrogens(atoms, bonds), name, hints)


# ---------------------------------------------------------------------------------------------------------------------
# 01.3: bonds that come back wrong
# ---------------------------------------------------------------------------------------------------------------------


def pairs_from_list(bond_list, places):
    """The 36 numbers of a molecule from a list of its bonds.

    Args: bond_list: (atom, atom, class) per bond, in any order, either atom first; places: the 36 pairs (i, j), i < j.
    """
    pairs = np.zeros(len(places), int)
    for first, second, bond in bond_list:
        pair = (min(first, second), max(first, second))
        pairs[places.index(pair)] = bond
    return pairs


@exercise("01.3", pairs_from_list)
def _check_pairs_from_list(answer):
    places = list(zip(*(index.tolist() for index in PAIRS)))
    lactam = [(0, 1, 2), (1, 2, 1), (2, 3, 1), (3, 4, 1), (4, 1, 1)]  # O=C1CCN1
    cases = {
        "C=O, one bond": [(0, 1, 2)],
        "O=C1CCN1": lactam,
        "O=C1CCN1 with its bonds listed backwards": lactam[::-1],
        "O=C1CCN1 with every bond from its other end": [(j, i, bond) for i, j, bond in lactam],
        "a bond between the last two places": [(8, 7, 3)],
    }
    for name, bond_list in cases.items():
        got = answer(list(bond_list), list(places))
        good = pairs_from_list(bond_list, places)
        by_arrival, lost, bonded = np.zeros((3, 36), int)
        for k, (first, second, bond) in enumerate(bond_list):
            by_arrival[k] = bond
            pair = (min(first, second), max(first, second))
            lost[places.index(pair)] = bond if first < second else 0
            bonded[places.index(pair)] = 1
        column_by_column = np.array([good[places.index((i, j))] for j in range(MAX_ATOMS) for i in range(j)])
        hints = [
            (by_arrival, f"{name}: place k still holds the bond that came k-th, whichever atoms it joins"),
            (lost, f"{name}: a bond whose first atom has the larger number is lost; (4, 1) is the pair (1, 4)"),
            (bonded, f"{name}: every bond came back as a single one; keep its class"),
            (column_by_column, f"{name}: these are the places column by column; use the order of `places`"),
        ]
        expect(got, good, name, hints)


def reorder(atoms, bonds, order):
    """The same molecule with atom order[k] at place k. Shapes: (9,), (9, 9), (9,) -> (9,), (9, 9)."""
    return atoms[order], bonds[order][:, order]


@exercise("01.4", reorder)
def _check_reorder(answer):
    atoms, bonds = RING
    order = np.array([2, 0, 3, 1, 4, 5, 6, 7, 8])
    inverse = np.argsort(order)
    got = answer(atoms.copy(), bonds.copy(), order)
    expect_pair(got, "the new atoms and the new bonds")
    hints = [
        (atoms, "the atoms did not move"),
        (atoms[inverse], "this is the inverse: place k must hold atom order[k]"),
    ]
    expect(got[0], atoms[order], "atoms of FC1=NC1", hints)
    hints = [
        (bonds, "the bond matrix did not move"),
        (bonds[order], "rows moved but columns did not; the matrix is not symmetric any more"),
        (bonds[:, order], "columns moved but rows did not; the matrix is not symmetric any more"),
        (bonds[inverse][:, inverse], "the bonds are reordered by the inverse"),
        (bonds[order][order], "rows moved twice; the columns need `[:, order]`"),
    ]
    expect(got[1], bonds[order][:, order], "bonds of FC1=NC1", hints)


# ---------------------------------------------------------------------------------------------------------------------
# 01.5: the whole encoder
# ---------------------------------------------------------------------------------------------------------------------


def encode(smiles):
    """A molecule as two arrays, its atoms in canonical order: int8 (9,) and int8 (9, 9).

    Raises: ValueError where it cannot be written without loss.
    """
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise ValueError(f"{smiles} is not a valid SMILES")
    if mol.GetNumAtoms() > MAX_ATOMS:
        raise ValueError(f"{smiles} has {mol.GetNumAtoms()} heavy atoms, there are {MAX_ATOMS} places")
    canonical = Chem.MolToSmiles(mol, isomericSmiles=False)
    mol = Chem.MolFromSmiles(canonical)  # read again, its atoms are in canonical order
    Chem.Kekulize(mol, clearAromaticFlags=True)
    atoms = np.full(MAX_ATOMS, NO_ATOM, np.int8)
    for atom in mol.GetAtoms():
        if atom.GetFormalCharge() != 0:
            raise ValueError(f"{smiles} has charges")
        if atom.GetSymbol() not in ATOM_TYPES:
            raise ValueError(f"{smiles} contains {atom.GetSymbol()}")
        atoms[atom.GetIdx()] = ATOM_TYPES.index(atom.GetSymbol())
    bonds = np.zeros((MAX_ATOMS, MAX_ATOMS), np.int8)
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        bonds[i, j] = int(bond.GetBondTypeAsDouble())
        bonds[j, i] = bonds[i, j]
    return atoms, bonds


_ENCODED = ("C=O", "C#N", "FC1=NC1", "OCC", "C(O)C", "c1ccccc1", "c1cc[nH]c1", "CC1=CN=CC=N1", "CC1=NC=CN=C1", "OCCF")
_ENCODED += ("C[C@H](N)C(=O)O", "O=C1CCN1", "C1CC2CC1CO2", "N#CC1CC1C#C", "Cn1ccnc1C=O")
_REFUSED = {
    "[NH3+]CC(=O)[O-]": "has charges, which the arrays cannot hold",
    "O=N(=O)C1=CC=CO1": "has charges once RDKit has read it, which the arrays cannot hold",
    "CCCCCCCCCC": "has ten heavy atoms, and there are nine places",
    "CCCl": "contains chlorine, for which there is no class",
    "C1CC": "is no SMILES (its ring is open): MolFromSmiles returns None",
}


@exercise("01.5", encode)
def _check_encode(answer):
    with rdBase.BlockLogs():  # RDKit would print what it cannot read
        _expect_encoded(answer)
        for smiles, reason in _REFUSED.items():
            _expect_refusal(answer, smiles, reason)


def _expect_encoded(answer):
    for smiles in _ENCODED:
        atoms, bonds, canonical = to_graph(smiles)
        got = answer(smiles)
        expect_pair(got, "the atoms and the bonds")
        got_atoms, got_bonds = map(np.asarray, got)
        _expect_atoms(got_atoms, atoms, smiles)
        _expect_bonds(got_bonds, bonds, smiles)
        back = to_smiles(got_atoms[None].astype(np.int8), got_bonds[None].astype(np.int8))[0]
        if back != canonical:
            raise WrongAnswer(f"{smiles} comes back as {back}: another molecule. Look at the classes of its bonds")
    one, other = answer("CC1=CN=CC=N1"), answer("CC1=NC=CN=C1")
    if not np.array_equal(one[1], other[1]):
        raise WrongAnswer(
            "CC1=CN=CC=N1 and CC1=NC=CN=C1 are one molecule, but get two bond matrices, its two Kekulé forms. Write "
            "its canonical SMILES, read that again, and kekulise what you have read"
        )


def _expect_atoms(got, atoms, smiles):
    n = (atoms != NO_ATOM).sum()
    hints = [
        (np.where(atoms == NO_ATOM, 0, atoms), f"{smiles}: the empty places hold 0, which is carbon; fill with 'none'"),
        (atoms[:n], f"{smiles}: {n} numbers came; every molecule gets nine places, the empty ones hold 'none'"),
    ]
    expect_something(got)
    if got.shape == atoms.shape and sorted(got) == sorted(atoms) and not np.array_equal(got, atoms):
        raise WrongAnswer(
            f"{smiles}: the right atoms, but not in canonical order: expected {atoms.tolist()}, got {got.tolist()}. "
            "One molecule must get one pair of arrays, however it was written"
        )
    expect(got, atoms, f"{smiles}, atoms", hints)


def _expect_bonds(got, bonds, smiles):
    if got.shape != bonds.shape:
        raise WrongAnswer(f"{smiles}, bonds: expected shape (9, 9), got {got.shape}")
    if not np.array_equal(got, got.T):
        raise WrongAnswer(f"{smiles}: the bond matrix is not symmetric; write every bond at [i, j] and at [j, i]")
    if not np.array_equal(got > 0, bonds > 0):
        raise WrongAnswer(f"{smiles}: other atoms are bonded than should be; atoms and bonds need the same order")
    if not np.isin(got, range(4)).all():
        strange = got[~np.isin(got, range(4))][0]
        raise WrongAnswer(f"{smiles}: a bond has the class {strange}; there are 0, 1, 2 and 3. Kekulise first")
    if (got == 1).sum() > (bonds == 1).sum() and any(letter in "cn" for letter in to_graph(smiles)[2]):
        raise WrongAnswer(
            f"{smiles}: double bonds of its aromatic ring came out single (`int(1.5)` is 1). Kekulise before you read "
            "the bonds, with clearAromaticFlags=True"
        )


def _expect_refusal(answer, smiles, reason):
    """Raise WrongAnswer unless the answer raises a ValueError for this SMILES."""
    try:
        answer(smiles)
    except ValueError:
        return
    except Exception as error:  # whatever the student's code raises is shown to the student
        raise WrongAnswer(
            f"{smiles} {reason}. Your function stops with {type(error).__name__} ({error}); raise a ValueError that "
            "says why"
        ) from None
    raise WrongAnswer(f"{smiles} {reason}. Your function accepts it; it should raise a ValueError")


# ---------------------------------------------------------------------------------------------------------------------
# 01.6: a split with two faults
# ---------------------------------------------------------------------------------------------------------------------


class _Salted(str):
    """A text with another hash, as every start of Python gives to the same text."""

    def __hash__(self):
        return hash((str(self), 1))


def split(smiles, test_size, seed):
    """Train and test row numbers such that no SMILES is in both; exactly test_size rows are for the test."""
    _, first, counts = np.unique(smiles, return_index=True, return_counts=True)
    test = np.random.default_rng(seed).permutation(first[counts == 1])[:test_size]
    return np.setdiff1d(np.arange(len(smiles)), test), np.sort(test)


@exercise("01.6", split)
def _check_split(answer):
    smiles = [f"C{'C' * (k % 9)}{'O' * (k // 9 % 5)}" for k in range(90)]  # every SMILES twice …
    smiles += [f"N{'C' * k}" for k in range(30)]  # … and 30 once
    for seed in range(5):
        got = answer(list(smiles), 20, seed)
        expect_pair(got, "the rows for training and the rows for the test")
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
            more = ". A SMILES that occurs twice brings two rows" if len(test) > 20 else ""
            raise WrongAnswer(f"test_size was 20, the test part has {len(test)} rows{more}")
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
    if sorted(answer(list(map(_Salted, smiles)), 20, 0)[1]) != sorted(answer(list(smiles), 20, 0)[1]):
        raise WrongAnswer(
            "after a restart of Python the same seed gives another split. A set of texts has no order that lasts: what "
            "is shuffled must begin in the same order every time"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 01.7: how large must a part be?
# ---------------------------------------------------------------------------------------------------------------------

SIZES = {"validation": 1050, "test": 4200}
_GOALS = {"validation": 0.04, "test": 0.02}  # eV


@exercise("01.7", SIZES)
def _check_sizes(answer):
    if not isinstance(answer, dict) or set(answer) != set(_GOALS):
        raise WrongAnswer('expected a dictionary with two entries, {"validation": …, "test": …}')
    most = len(shared_qm9())
    for part, goal in _GOALS.items():
        size = answer[part]
        if size is None or size is ...:
            raise WrongAnswer(f"there is no answer yet for {part}. Replace the `...`")
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 1 <= size <= most:
            raise WrongAnswer(f"{part}: {size!r} came; a whole number of molecules was expected, at most {most:,}")
        spread = spread_of_the_mean(size)
        said = f"with {size:,} molecules, the mean gap of the {part} part has a spread of {spread:.4f} eV"
        if spread > 1.03 * goal:
            raise WrongAnswer(f"{said}; at most {goal} was asked for. Four times the molecules halve the spread")
        if spread < 0.87 * goal:
            raise WrongAnswer(
                f"{said}, less than the {goal} asked for: that part is larger than it needs to be, and every molecule "
                "in it is missing in training"
            )


def spread_of_the_mean(size):
    """The standard deviation, over draws, of the mean gap of `size` molecules of QM9 drawn without replacement, in eV.

    σ / √n, times √(1 - n / N) because no molecule is drawn twice.
    """
    gaps = shared_qm9().target("gap").astype(float)
    return gaps.std() * np.sqrt((1 - size / len(gaps)) / size)
