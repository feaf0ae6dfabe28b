"""Notebook 00: what a share is a share of, a scorer with faults, and rows of scores that give their makers away."""

import numpy as np

from molecule_diffusion.chemistry import to_smiles
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_something
from molecule_diffusion.exercises.predicting import Name, Number, prediction
from molecule_diffusion.qm9 import shared_qm9

prediction("00.p1", Number("seconds of one core", lowest=0))
prediction("00.p2", Number("of the draws", lowest=0, highest=1))
prediction("00.p3", Name(("valid", "fragmented", "corrected", "unique", "novel", "FCD")))


def new_molecules(N, valid, unique, novel):
    """How many new molecules N draws gave: each share is of what the one before left."""
    return N * valid * unique * novel


@exercise("00.1", new_molecules)
def _check_new_molecules(answer):
    N, v, u, n = 1000, 0.9, 0.8, 0.25
    hints = [
        (N * n, "this takes `novel` as a share of all draws; it is a share of the distinct valid ones"),
        (N * v * n, "duplicates are still counted: where does `unique` come in"),
        (N * u * n, "invalid draws are still counted"),
        (N * v * u, "these are the distinct valid molecules; how many of them are new"),
        (v * u * n, "this is a share; the question is how many of N"),
    ]
    expect(answer(N, v, u, n), new_molecules(N, v, u, n), "1,000 draws, valid 0.9, unique 0.8, novel 0.25", hints)
    expect(answer(500, 1.0, 0.5, 0.5), 125, "500 draws, valid 1.0, unique 0.5, novel 0.5")


# ---------------------------------------------------------------------------------------------------------------------
# 00.2: a scorer with two faults
# ---------------------------------------------------------------------------------------------------------------------


def score_draws(smiles, training):
    """The shares valid, unique and novel. Args: smiles: canonical, None for no molecule; training: a set of SMILES."""
    valid = [text for text in smiles if text is not None and "." not in text]
    distinct = set(valid)
    new = distinct - training
    return len(valid) / len(smiles), len(distinct) / len(valid), len(new) / len(distinct)


# Eight draws: two are no molecule, one is in pieces, five are valid; of these four are distinct, and one is new.
_DRAWS = ["CCO", None, "CCO", "CC.O", "CC1CO1", "CCN", "C#N", None]
_TRAINING = {"CCO", "CCN", "C#N", "CCC"}


@exercise("00.2", score_draws)
def _check_score_draws(answer):
    got = answer(list(_DRAWS), set(_TRAINING))
    expect_something(got)
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        raise WrongAnswer("return three things: the shares valid, unique and novel")
    case = "eight draws, of which five are valid, four of these distinct, one of these new"
    if max(got) > 1:
        raise WrongAnswer(f"{max(got):.3g} came as a share; return numbers from 0 to 1, not counts or per cent")
    valid_hints = [
        (6 / 8, "valid is 6/8: `CC.O` still counts, but it is in two pieces"),
        (5 / 6, "valid is 5/6: the draws that are no molecule count, too; divide by all draws"),
        (6 / 6, "valid is 6/6: it is a share of all draws, and pieces are not valid"),
    ]
    expect(got[0], 5 / 8, f"valid, {case}", valid_hints)
    unique_hints = [
        (4 / 8, "unique is 4/8: it is a share of the valid draws, not of all"),
        (5 / 8, "unique is 5/8: it is a share of the valid draws, and `CC.O` is none of them"),
        (5 / 6, "unique is 5/6: `CC.O` still counts here"),
        (4 / 6, "unique is 4/6: divide by the valid draws, without the one in pieces"),
    ]
    expect(got[1], 4 / 5, f"unique, {case}", unique_hints)
    novel_hints = [
        (2 / 5, "novel is 2/5: `CC.O` still counts here"),
        (1 / 5, "novel is 1/5: it is a share of the distinct molecules, not of the valid draws"),
        (1 / 8, "novel is 1/8: it is a share of the distinct molecules, not of all draws"),
        (3 / 4, "novel is 3/4: these are the known ones"),
    ]
    expect(got[2], 1 / 4, f"novel, {case}", novel_hints)
    got = answer(["CCO", "CCC.C", "CCF", "CCF"], {"CCO"})
    expect(got, (3 / 4, 2 / 3, 1 / 2), "CCO, CCC.C, CCF and CCF, of which CCO is known")


# ---------------------------------------------------------------------------------------------------------------------
# 00.3: four rows of scores
# ---------------------------------------------------------------------------------------------------------------------

_EVIDENCE = {  # what each maker's fault must show
    "copies its examples": "one that copies has nothing that is novel",
    "repeats itself": "one that repeats itself has few different molecules: look at unique",
    "draws only chains": "in chains there is no ring: look at W(rings)",
    "breaks valences": "one that breaks valences has draws that are not valid",
}
MAKERS = tuple(_EVIDENCE)
_MADE_BY = {"A": "draws only chains", "B": "repeats itself", "C": "breaks valences", "D": "copies its examples"}


def line_up():
    """Four crowds of 1,000 SMILES for exercise 00.3, each by a maker with one fault: {"A": list, …, "D": list}.

    None stands for what is no molecule. The makers are seeded: every call gives the same crowds.
    """
    random = np.random.default_rng(0)
    qm9 = shared_qm9()
    rows = random.choice(qm9.train, 1000, replace=False)
    known = [qm9.smiles[row] for row in rows]
    crowds = {
        "draws only chains": ["".join(random.choice(list("CNO"), 9)) for _ in range(1000)],
        "repeats itself": [known[k] for k in random.integers(0, 12, 1000)],
        "breaks valences": to_smiles(qm9.atoms[rows], _with_one_higher_bond(qm9.bonds[rows], random)),
        "copies its examples": known,
    }
    return {letter: crowds[maker] for letter, maker in _MADE_BY.items()}


def _with_one_higher_bond(bonds, random):
    """Copies of bond matrices (N, 9, 9) in which one single or double bond of each, if it has one, is one higher."""
    bonds = bonds.copy()
    for matrix in bonds:
        first, second = np.nonzero((matrix == 1) | (matrix == 2))
        if len(first) == 0:
            continue
        k = random.integers(len(first))
        i, j = first[k], second[k]
        matrix[i, j] += 1
        matrix[j, i] = matrix[i, j]
    return bonds


@exercise("00.3", _MADE_BY)
def _check_diagnosis(answer):
    if not isinstance(answer, dict):
        raise WrongAnswer(f'expected a dictionary, {{"A": "…", "B": "…", …}}; {type(answer).__name__} came')
    if set(answer) != set(_MADE_BY):
        raise WrongAnswer(f"expected an entry for each of A, B, C and D; there are some for {sorted(map(str, answer))}")
    open_ones = [letter for letter in _MADE_BY if answer[letter] is None or answer[letter] is ...]
    if open_ones:
        raise WrongAnswer(f"there is no answer yet for {', '.join(open_ones)}. Replace the `...`")
    for letter, maker in answer.items():
        if maker not in MAKERS:
            raise WrongAnswer(f"{letter}: {maker!r} is none of the four; choose from {', '.join(map(repr, MAKERS))}")
    wrong = [letter for letter in sorted(_MADE_BY) if answer[letter] != _MADE_BY[letter]]
    if wrong:
        letter = wrong[0]
        raise WrongAnswer(
            f"{len(wrong)} of 4 are not right. {letter} is not the maker that {answer[letter]}: "
            f"{_EVIDENCE[answer[letter]]}"
        )
