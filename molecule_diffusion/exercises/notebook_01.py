"""Notebook 01: molecules as tensors."""

import numpy as np

from molecule_diffusion.chemistry import (
    MAX_ATOMS,
    NO_ATOM,
    count_hydrogens,
    mask_bonds,
    matrix_from_pairs,
    pairs_from_matrix,
    to_graph,
)
from molecule_diffusion.encodings import one_hot
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_pair

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


@exercise("01.3", mask_bonds)
def _check_mask_bonds(answer):
    noisy = matrix_from_pairs(np.arange(2, 38, dtype=np.int8) % 4)
    for name, (atoms, _) in (("FC1=NC1", RING), ("formaldehyde", FORMALDEHYDE)):
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
        expect(got, mask_bonds(atoms, noisy), f"{name} with noise in all places", hints)
        if (given != noisy).any():
            raise WrongAnswer("the result is right but the caller's matrix was changed; work on a copy")


@exercise("01.4", pairs_from_matrix)
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
    expect(answer(matrix.copy()), np.arange(1, 37), "the matrix whose pairs are 1, 2, … 36", hints)
    pairs = pairs_from_matrix(RING[1])
    hints = [(pairs[pairs > 0], "only the bonds came back; the zeros, no bond, belong to the 36 too")]
    expect(answer(RING[1].copy()), pairs, "FC1=NC1", hints)


def reorder(atoms, bonds, order):
    """The same molecule with atom order[k] at place k. Shapes: (9,), (9, 9), (9,) -> (9,), (9, 9)."""
    return atoms[order], bonds[order][:, order]


@exercise("01.5", reorder)
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
