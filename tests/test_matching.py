"""Matching: the batched version against loops, graphs whose answer is known, what a tie does."""

import itertools

import numpy as np
import pytest
import torch

import helpers
from molecule_diffusion import matching


def loop_similarities(atoms, bonds, soft):
    """The similarities of arXiv:1802.03480 for one graph, as they stand there: S[i, a, j, b]."""
    s = torch.zeros(9, 9, 9, 9)
    for i, j, a, b in itertools.product(range(9), repeat=4):
        if i == j and a == b and atoms[i] != helpers.NO_ATOM:
            s[i, a, j, b] = soft.elements[a, atoms[i]] * soft.exists[a]
        if i != j and a != b and bonds[i, j]:
            kind = soft.kinds[a, b, bonds[i, j] - 1]
            s[i, a, j, b] = kind * soft.bonded[a, b] * soft.exists[a] * soft.exists[b]
    return s


def loop_max_pooling(s, rounds):
    x = torch.ones(9, 9)
    for _ in range(rounds):
        new = torch.zeros(9, 9)
        for i, a in itertools.product(range(9), repeat=2):
            new[i, a] = x[i, a] * s[i, a, i, a]
            for j in range(9):
                if j != i:
                    new[i, a] += max(x[j, b] * s[i, a, j, b] for b in range(9) if b != a)
        x = new / new.norm()
    return x


def random_soft_graph(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    bonded, kinds = torch.rand(number, 9, 9, generator=generator), torch.rand(number, 9, 9, 3, generator=generator)
    return helpers.SoftGraph(
        torch.rand(number, 9, generator=generator),
        (bonded + bonded.transpose(1, 2)) / 2,
        torch.rand(number, 9, 4, generator=generator).softmax(-1),
        (kinds + kinds.transpose(1, 2)) / 2,
    )


def one(soft, k):
    return helpers.SoftGraph(soft.exists[k], soft.bonded[k], soft.elements[k], soft.kinds[k])


def test_the_batch_is_what_loops_give():
    atoms, bonds = map(torch.from_numpy, helpers.to_graphs(["CC=O", "N#CC1CC1O", "C", "FC1=NC2CC1O2"]))
    soft = random_soft_graph(4)
    x = helpers.max_pooling(*helpers.similarities(atoms, bonds, soft), rounds=3)
    for k in range(4):
        s = loop_similarities(atoms[k].long(), bonds[k].long(), one(soft, k))
        torch.testing.assert_close(x[k], loop_max_pooling(s, 3))


def test_a_graph_does_not_depend_on_its_neighbours_in_the_batch():
    atoms, bonds = map(torch.from_numpy, helpers.to_graphs(["CC=O", "N#CC1CC1O", "CCCCO"]))
    soft = random_soft_graph(3)
    together = helpers.max_pooling(*helpers.similarities(atoms, bonds, soft))
    for k in range(3):
        alone = [part[k : k + 1] for part in (soft.exists, soft.bonded, soft.elements, soft.kinds)]
        x = helpers.max_pooling(*helpers.similarities(atoms[k : k + 1], bonds[k : k + 1], helpers.SoftGraph(*alone)))
        torch.testing.assert_close(x[0], together[k])


def test_the_example_of_the_notebook_by_hand():
    """C–C=O against O=C–C: the tables of notebook 02, unscaled."""
    atoms, bonds = map(torch.from_numpy, helpers.to_graphs(["CC=O"]))
    order = torch.tensor([[2, 1, 0, *range(3, 9)]])
    soft = helpers.as_soft_graph(*helpers.reorder(atoms, bonds, order))
    after = {1: [[0, 2, 2], [1, 3, 2], [2, 1, 0]], 2: [[0, 4, 5], [1, 7, 4], [5, 1, 0]]}
    for rounds, table in after.items():
        x = helpers.max_pooling(*helpers.similarities(atoms, bonds, soft), rounds)[0, :3, :3]
        expected = torch.tensor(table).float()
        torch.testing.assert_close(x / x.norm(), expected / expected.norm())
    assert helpers.match_graphs(atoms, bonds, soft)[0, :3].tolist() == [2, 1, 0]


def test_a_shuffled_molecule_gets_its_order_back_but_for_ties(qm9):
    rows = qm9.validation[:200]
    atoms, bonds = torch.from_numpy(qm9.atoms[rows]), torch.from_numpy(qm9.bonds[rows])
    rng = np.random.default_rng(0)
    order = torch.from_numpy(np.stack([rng.permutation(9) for _ in rows]))
    shuffled = helpers.reorder(atoms, bonds, order)
    found = helpers.match_graphs(atoms, bonds, helpers.as_soft_graph(*shuffled))
    back = helpers.reorder(atoms, bonds, found)
    same_atoms = (back[0] == shuffled[0]).all(1)
    same_bonds = (back[1] == shuffled[1]).flatten(1).all(1)
    assert same_atoms.all() and same_bonds.float().mean() > 0.65  # atoms that are alike are mixed up


def test_the_order_is_a_permutation_also_where_nothing_fits():
    atoms, bonds = map(torch.from_numpy, helpers.to_graphs(["C", "F"]))
    soft = helpers.as_soft_graph(torch.full((2, 9), helpers.NO_ATOM), torch.zeros(2, 9, 9, dtype=torch.long))
    order = helpers.match_graphs(atoms, bonds, soft)
    assert order.dtype == torch.long and (order.sort(1).values == torch.arange(9)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_the_assignment_has_the_largest_sum(seed):
    x = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(seed))
    order = matching.assign(x)[0]
    sums = {p: sum(x[0, atom, place] for place, atom in enumerate(p)) for p in itertools.permutations(range(4))}
    assert tuple(order.tolist()) == max(sums, key=sums.get)
