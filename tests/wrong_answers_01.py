"""Wrong answers to the exercises of notebook 01, each with words that answer it; `test_exercises` tries them."""

import collections

import numpy as np
from rdkit import Chem

import helpers
from molecule_diffusion.exercises import notebook_01

NONE = helpers.NO_ATOM
VALENCE = np.array([4, 3, 2, 1, 0])

ONE_HOT = [
    (lambda atoms: np.eye(5)[atoms].T, "rows and columns are swapped"),
    (lambda atoms: np.eye(5)[atoms][:, :4], "'none' is a class too"),
    (lambda atoms: np.eye(5)[atoms] * (atoms != NONE)[:, None], "padding rows are all zero"),
    (lambda atoms: np.eye(5)[atoms[atoms != NONE]], r"formaldehyde: expected shape \(9, 5\), got \(2, 5\)"),
    (lambda atoms: 2 * np.eye(5)[atoms] - 1, r"expected 0 at \[0, 1\], got -1"),
    (lambda atoms: np.eye(5)[helpers.to_graph("C=O")[0]], "FC1=NC1: expected"),  # right for one molecule only
]

HYDROGENS = [
    (lambda atoms, bonds: VALENCE[atoms] - (bonds > 0).sum(-1), "a double bond uses up two valences"),
    (lambda atoms, bonds: bonds.sum(-1), "this is the used valence"),
    (lambda atoms, bonds: np.array([4, 3, 2, 1, 4])[atoms] - bonds.sum(-1), "give 'none' the valence 0"),
    (lambda atoms, bonds: bonds.sum(-1) - VALENCE[atoms], "formaldehyde: expected 2 at .*got -2"),
    (lambda atoms, bonds: (VALENCE[atoms] - bonds.sum(-1)).sum(), r"expected shape \(9,\), got \(\)"),
    (lambda atoms, bonds: VALENCE[atoms] - bonds.max(-1), "FC1=NC1"),
    (lambda atoms, bonds: VALENCE[atoms] - (bonds == 1).sum(-1) - 2 * (bonds == 2).sum(-1), "C#N"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 01.3: bonds that come back wrong
# ---------------------------------------------------------------------------------------------------------------------


def by_arrival(bond_list, places):
    """As the notebook shows it."""
    pairs = np.zeros(36, int)
    place = 0
    for _first, _second, bond in bond_list:
        pairs[place] = bond
        place += 1
    return pairs


def sorted_by_arrival(bond_list, places):
    return by_arrival(sorted(bond_list), places)


def one_end_only(bond_list, places):
    pairs = np.zeros(36, int)
    for first, second, bond in bond_list:
        if first < second:
            pairs[places.index((first, second))] = bond
    return pairs


def bonded_or_not(bond_list, places):
    return np.minimum(notebook_01.pairs_from_list(bond_list, places), 1)


def columns(bond_list, places):
    return notebook_01.pairs_from_list(bond_list, [(i, j) for j in range(9) for i in range(j)])


def whole_matrix(bond_list, places):
    return helpers.matrix_from_pairs(notebook_01.pairs_from_list(bond_list, places))


PAIRS = [
    (by_arrival, "O=C1CCN1: place k still holds the bond that came k-th"),
    (sorted_by_arrival, "O=C1CCN1: place k still holds"),
    (one_end_only, "whose first atom has the larger number is lost"),
    (bonded_or_not, "every bond came back as a single one"),
    (columns, "these are the places column by column"),
    (whole_matrix, r"expected shape \(36,\), got \(9, 9\)"),
    (lambda bond_list, places: np.zeros(36, int), "C=O, one bond: expected 2|is lost"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 01.4: reorder
# ---------------------------------------------------------------------------------------------------------------------

REORDERED = [
    (lambda atoms, bonds, order: (atoms, bonds), "the atoms did not move"),
    (lambda atoms, bonds, order: (atoms[order], bonds), "the bond matrix did not move"),
    (lambda atoms, bonds, order: (atoms[order], bonds[order]), "rows moved but columns did not"),
    (lambda atoms, bonds, order: (atoms[order], bonds[:, order]), "columns moved but rows did not"),
    (lambda atoms, bonds, order: notebook_01.reorder(atoms, bonds, np.argsort(order)), "this is the inverse"),
    (lambda atoms, bonds, order: (atoms[order], bonds[order, order]), r"expected shape \(9, 9\), got \(9,\)"),
    (lambda atoms, bonds, order: bonds[order][:, order], "return two things"),
    (
        lambda a, b, order: (a[order], b[np.argsort(order)][:, np.argsort(order)]),
        "bonds are reordered by the inverse",
    ),
    (lambda atoms, bonds, order: (atoms[order], bonds[order][order]), "rows moved twice"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 01.5: the whole encoder
# ---------------------------------------------------------------------------------------------------------------------


def encoder(canonical=True, kekule=True, both_ends=True, fill=NONE, refuse=("none", "size", "charge", "element")):
    """The right encoder with something left out, as an answer. `refuse`: what it refuses."""

    def answer(smiles):
        mol = Chem.MolFromSmiles(smiles)
        if mol is None and "none" in refuse:
            raise ValueError("no SMILES")
        if mol.GetNumAtoms() > 9 and "size" in refuse:
            raise ValueError("too large")
        if canonical:
            mol = Chem.MolFromSmiles(Chem.MolToSmiles(mol, isomericSmiles=False))
        if kekule:
            Chem.Kekulize(mol, clearAromaticFlags=True)
        atoms, bonds = np.full(9, fill), np.zeros((9, 9), int)
        for atom in mol.GetAtoms():
            if atom.GetFormalCharge() and "charge" in refuse:
                raise ValueError("charges")
            if atom.GetSymbol() not in helpers.ATOM_TYPES and "element" in refuse:
                raise ValueError("element")
            if atom.GetSymbol() in helpers.ATOM_TYPES:
                atoms[atom.GetIdx()] = helpers.ATOM_TYPES.index(atom.GetSymbol())
        for bond in mol.GetBonds():
            i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
            bonds[i, j] = int(bond.GetBondTypeAsDouble())
            if both_ends:
                bonds[j, i] = bonds[i, j]
        return atoms, bonds

    return answer


def order_of_the_atoms_only(smiles):
    atoms, _ = notebook_01.encode(smiles)
    return atoms, encoder(canonical=False)(smiles)[1]


def kekulised_too_early(smiles):
    """Canonical order, but the Kekulé form of the spelling that came in."""
    mol = Chem.MolFromSmiles(smiles)
    text = Chem.MolToSmiles(mol, isomericSmiles=False)
    atoms, bonds = notebook_01.encode(smiles)
    order = list(mol.GetSubstructMatch(Chem.MolFromSmiles(text)))
    assert len(order) == (atoms != NONE).sum()
    if smiles.isupper():  # spelled with single and double bonds
        spelled = Chem.GetAdjacencyMatrix(Chem.MolFromSmiles(smiles, sanitize=False), useBO=True)
        bonds[: len(order), : len(order)] = spelled[order][:, order]
    return atoms, bonds


def adjacency(smiles):
    atoms, bonds = notebook_01.encode(smiles)
    return atoms, np.minimum(bonds, 1)


def aromatic_class(smiles):
    atoms, bonds = notebook_01.encode(smiles)
    ring = "1" in smiles and helpers.to_graph(smiles)[2] == "c1ccccc1"
    return atoms, np.where((bonds > 0) & ring, 4, bonds)


def without_padding(smiles):
    atoms, bonds = notebook_01.encode(smiles)
    return atoms[atoms != NONE], bonds


ENCODERS = [
    (encoder(canonical=False), "not in canonical order"),
    (encoder(kekule=False), r"double bonds of its aromatic ring came out single"),
    (encoder(both_ends=False), "write every bond at"),
    (encoder(fill=0), "the empty places hold 0, which is carbon"),
    (
        encoder(refuse=("none", "size", "element")),
        "has charges, which the arrays cannot hold. Your function accepts it",
    ),
    (encoder(refuse=("none", "charge", "element")), "ten heavy atoms.*IndexError|ten heavy atoms.*stops with"),
    (encoder(refuse=("none", "size", "charge")), "chlorine, for which there is no class. Your function accepts it"),
    (encoder(refuse=("size", "charge", "element")), "C1CC is no SMILES.*stops with AttributeError"),
    (order_of_the_atoms_only, "other atoms are bonded than should be"),
    (kekulised_too_early, "two Kekulé forms|comes back as"),
    (adjacency, "comes back as CO: another molecule"),
    (aromatic_class, "a bond has the class 4"),
    (without_padding, "every molecule gets nine places"),
    (lambda smiles: notebook_01.encode(smiles)[0], "return two things"),
    (lambda smiles: notebook_01.encode("C=O"), "C#N, atoms: expected"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 01.6: a split with two faults
# ---------------------------------------------------------------------------------------------------------------------


def drop_duplicates(smiles, test_size, seed):
    _, first = np.unique(smiles, return_index=True)
    rows = np.random.default_rng(seed).permutation(first)
    return rows[test_size:], rows[:test_size]


def plain_shuffle(smiles, test_size, seed):
    rows = np.random.default_rng(seed).permutation(len(smiles))
    return rows[test_size:], rows[:test_size]


def with_replacement(smiles, test_size, seed):
    rows = np.random.default_rng(seed).integers(0, len(smiles), len(smiles))
    return rows[test_size:], rows[:test_size]


def whole_set_for_training(smiles, test_size, seed):
    return np.arange(len(smiles)), notebook_01.split(smiles, test_size, seed)[1]


def no_seed(smiles, test_size, seed):
    return notebook_01.split(smiles, test_size, np.random.randint(2**31))


def shuffled_set(smiles, test_size, seed):
    """As the notebook shows it."""
    molecules = list(set(smiles))
    np.random.default_rng(seed).shuffle(molecules)
    return rows_of(smiles, molecules[:test_size])


def rows_of(smiles, chosen):
    """Row numbers (others, chosen), where `chosen` are SMILES."""
    chosen = set(chosen)
    test = [row for row, text in enumerate(smiles) if text in chosen]
    return [row for row, text in enumerate(smiles) if text not in chosen], test


def shuffled_set_of_single_ones(smiles, test_size, seed):
    counts = collections.Counter(smiles)
    single = list({text for text in smiles if counts[text] == 1})
    np.random.default_rng(seed).shuffle(single)
    return rows_of(smiles, single[:test_size])


def sorted_molecules(smiles, test_size, seed):
    molecules = sorted(set(smiles))
    np.random.default_rng(seed).shuffle(molecules)
    return rows_of(smiles, molecules[:test_size])


def cut_to_size(smiles, test_size, seed):
    train, test = sorted_molecules(smiles, test_size, seed)
    return train + test[test_size:], test[:test_size]


SPLITS = [
    (plain_shuffle, "molecules are in both parts, e.g. .* it occurs twice"),
    (drop_duplicates, "120 rows came in, 75 went out: nothing may be lost or doubled"),
    (with_replacement, "part twice; draw without replacement"),
    (lambda smiles, n, seed: (smiles[n:], smiles[:n]), "row numbers, not SMILES"),
    (whole_set_for_training, "20 rows are in both parts"),
    (lambda smiles, n, seed: notebook_01.split(smiles, n, 0), "seeds 0 and 1 give the same test part"),
    (no_seed, "the same seed gives two different splits"),
    (
        lambda smiles, n, seed: notebook_01.split(smiles, n // 2, seed),
        "test_size was 20, the test part has 10 rows",
    ),
    (lambda smiles, n, seed: notebook_01.split(smiles, n, seed)[1], "return two things"),
    (shuffled_set, r"the test part has \d+ rows. A SMILES that occurs twice brings two rows"),
    (sorted_molecules, "A SMILES that occurs twice brings two rows"),
    (shuffled_set_of_single_ones, "after a restart of Python the same seed gives another split"),
    (cut_to_size, "molecules are in both parts"),
]

SIZES = [
    ({"validation": 1050, "test": 1000}, "the test part has a spread of 0.0401 eV; at most 0.02 was asked for"),
    ({"validation": 1050, "test": 10_000}, "test part has .*larger than it needs to be"),
    ({"validation": 500, "test": 4200}, "the validation part has a spread .* at most 0.04"),
    ({"validation": 5000, "test": 4200}, "the validation part .*larger than it needs to be"),
    ({"validation": 4200, "test": 1050}, "the validation part .*larger than it needs to be"),
    ({"validation": 1050, "test": 0.02}, "test: 0.02 came; a whole number of molecules was expected"),
    ({"validation": 1050, "test": ...}, "no answer yet for test"),
    ({"test": 4200}, "a dictionary with two entries"),
    (4200, "a dictionary with two entries"),
]

WRONG = {
    "01.1": ONE_HOT,
    "01.2": HYDROGENS,
    "01.3": PAIRS,
    "01.4": REORDERED,
    "01.5": ENCODERS,
    "01.6": SPLITS,
    "01.7": SIZES,
}
