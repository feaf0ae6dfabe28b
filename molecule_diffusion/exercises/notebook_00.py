"""Notebook 00: what a share is a share of."""

from molecule_diffusion.exercises.checking import exercise, expect


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
