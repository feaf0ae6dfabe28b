"""Tokens, graph vectors and sequences: by hand, there and back, and what is no graph."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import helpers
from molecule_diffusion import encodings


def test_tokens_by_hand():
    atoms, bonds, _ = helpers.to_graph("C=O")
    tokens = helpers.one_hot_graphs(torch.from_numpy(atoms)[None], torch.from_numpy(bonds)[None])
    assert tokens.shape == (1, 9, 41) and tokens.dtype == torch.float32
    carbon, oxygen, padding = tokens[0, 0], tokens[0, 1], tokens[0, 2]
    # place 0-4: the atom's class; then 4 places for the bond to each of the 9 atoms
    assert carbon.nonzero().flatten().tolist() == [0, 5, 5 + 4 + 2, *range(13, 41, 4)]
    assert oxygen.nonzero().flatten().tolist() == [2, 5 + 2, *range(9, 41, 4)]
    assert padding.nonzero().flatten().tolist() == [4, *range(5, 41, 4)]


# ---------------------------------------------------------------------------------------------------------------------
# Graph vectors
# ---------------------------------------------------------------------------------------------------------------------


def test_a_graph_vector_by_hand():
    x = helpers.graph_vector(*helpers.to_graphs(["C=O"]))
    assert x.shape == (1, encodings.GRAPH_SIZE) == (1, 189) and x.dtype == torch.float32
    atoms, pairs = helpers.split_vector(x[0])
    assert atoms.shape == (9, 5) and pairs.shape == (36, 4)
    assert atoms.argmax(-1).tolist() == [0, 2, *[helpers.NO_ATOM] * 7]
    assert pairs.argmax(-1).tolist() == [2, *[0] * 35]  # the pair (0, 1) is the first one
    assert x.unique().tolist() == [-1, 1] and (x == 1).sum() == 9 + 36


def test_vectors_become_the_same_graphs_again(qm9):
    rows = np.random.default_rng(0).choice(len(qm9), 1000, replace=False)
    atoms, bonds = qm9.atoms[rows], qm9.bonds[rows]
    x = helpers.graph_vector(atoms, bonds)
    for vectors in (x, x.to(torch.int8), 0.1 * x, x.bfloat16()):
        again = helpers.vector_graph(vectors)
        assert [part.dtype for part in again] == [np.int8, np.int8]
        np.testing.assert_array_equal(again[0], atoms)
        np.testing.assert_array_equal(again[1], bonds)
    assert torch.equal(helpers.graph_vector(torch.from_numpy(atoms), torch.from_numpy(bonds)), x)


def test_no_graphs_are_no_vectors(qm9):
    assert helpers.graph_vector(qm9.atoms[:0], qm9.bonds[:0]).shape == (0, 189)
    assert [part.shape for part in helpers.vector_graph(torch.empty(0, 189))] == [(0, 9), (0, 9, 9)]


def with_bond(i, j, order, symmetric=True):
    def change(atoms, bonds):
        bonds[0, i, j] = order
        if symmetric:
            bonds[0, j, i] = order
        return atoms, bonds

    return change


def with_atom(value):
    def change(atoms, bonds):
        atoms[0, 0] = value
        return atoms, bonds

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (with_bond(0, 1, 1, symmetric=False), "not symmetric"),
        (with_bond(0, 0, 1), "on its diagonal"),
        (with_bond(0, 8, 1), "leads to a padded atom"),
        (with_bond(0, 1, 4), r"bonds holds 0\.\.4: expected 0\.\.3"),
        (with_bond(0, 1, -1), r"bonds holds -1\.\."),
        (with_atom(5), r"atoms holds 0\.\.5: expected 0\.\.4"),
        (with_atom(-1), r"atoms holds -1\.\."),
        (lambda a, b: (a.astype(np.float32), b), "atoms has dtype float32: expected integer classes"),
        (lambda a, b: (a, b.astype(bool)), "bonds has dtype bool: expected integer classes"),
        (lambda a, b: (torch.from_numpy(a).half(), b), "atoms has dtype float16"),
        (lambda a, b: (a[0], b[0]), r"atoms \(9,\) and bonds \(9, 9\): expected \(N, 9\)"),
        (lambda a, b: (a, b[:1]), "with the same N"),
        (lambda a, b: (np.eye(5, dtype=np.int8)[a], b), "expected .* with the same N"),
    ],
    ids="asymmetric diagonal padding bond-class negative-bond atom-class negative-atom float-atoms bool-bonds "
    "half-atoms one-graph fewer-bonds one-hots".split(),
)
def test_what_is_no_graph_has_no_vector(change, message):
    with pytest.raises(ValueError, match=message):
        helpers.graph_vector(*change(*helpers.to_graphs(["C=O", "CCO"])))


def test_the_parts_of_a_vector_are_views():
    x = torch.zeros(2, 3, 189)
    atoms, pairs = helpers.split_vector(x)
    assert atoms.shape == (2, 3, 9, 5) and pairs.shape == (2, 3, 36, 4)
    atoms += 1
    pairs += 2
    assert x[..., :45].unique().tolist() == [1] and x[..., 45:].unique().tolist() == [2]


@pytest.mark.parametrize("shape", [(4, 188), (4, 190), (189, 4), (4, 9, 5), (4, 9, 41), (4, 0), (1,)])
def test_other_shapes_are_no_graph_vector(graph_denoiser, shape):
    x = torch.zeros(shape)
    readers = (
        helpers.split_vector,
        helpers.vector_graph,
        helpers.expected_graph,
        lambda x: graph_denoiser(x, torch.tensor(3)),
    )
    for read in readers:
        with pytest.raises(
            ValueError, match=r"a graph vector of shape \(.*\): expected \(..., 189\), see graph_vector"
        ):
            read(x)


def test_any_noise_becomes_a_symmetric_graph_without_bonds_to_padding(x_0):
    generator = torch.Generator().manual_seed(0)
    scheduler = DDPMScheduler(**helpers.GRAPH_NOISE_SCHEDULE)
    for t in (0, 300, 700, 999):
        noise = torch.randn(len(x_0), 189, generator=generator)
        for eps in (torch.zeros_like(noise), 100 * noise, noise.abs(), -noise.abs(), noise):
            x_t = scheduler.add_noise(x_0, eps, torch.full((len(x_0),), t))
            atoms, bonds = helpers.vector_graph(x_t)
            np.testing.assert_array_equal(bonds, bonds.transpose(0, 2, 1))
            assert not bonds[atoms == helpers.NO_ATOM].any()
            helpers.check_graphs(atoms, bonds)
    assert (atoms != helpers.vector_graph(x_0)[0]).any(), "nothing was noisy"


def test_expected_graph_by_hand():
    logits = torch.randn(3, 189, generator=torch.Generator().manual_seed(0)) * 3
    expected = np.empty((3, 189))
    for row, values in zip(expected, logits.double().numpy()):
        for start, classes in [(5 * i, 5) for i in range(9)] + [(45 + 4 * k, 4) for k in range(36)]:
            weights = np.exp(values[start : start + classes])
            row[start : start + classes] = 2 * weights / weights.sum() - 1
    np.testing.assert_allclose(helpers.expected_graph(logits), expected, atol=1e-6)
    assert helpers.expected_graph(logits.bfloat16()).dtype == torch.float32  # probabilities in full precision


def test_certain_logits_expect_the_graph_itself(x_0):
    torch.testing.assert_close(helpers.expected_graph(50 * x_0), x_0)


# ---------------------------------------------------------------------------------------------------------------------
# Sequences
# ---------------------------------------------------------------------------------------------------------------------


def test_sequences_become_the_same_graphs_again(qm9):
    atoms, bonds = qm9.atoms[:500], qm9.bonds[:500]
    data = helpers.graph_sequence(atoms, bonds)
    assert data.shape == (500, 1, 45, 9) and data.dtype == np.uint8 and (data.sum(-1) == 1).all()
    again = helpers.sequence_graph(0.9 * data + 0.01)
    assert (again[0] == atoms).all() and (again[1] == bonds).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_no_graphs(bad):
    x = torch.zeros(2, 189)
    x[1, 5] = bad
    with pytest.raises(ValueError, match="the graph vectors: NaN or infinite values"):
        helpers.vector_graph(x)
    with pytest.raises(ValueError, match="the sequences hold NaN or infinite values"):
        helpers.sequence_graph(np.full((1, 1, 45, 9), bad))


@pytest.mark.parametrize("shape", [(2, 45, 9), (2, 1, 72, 53), (2, 1, 45, 8)])
def test_other_shapes_are_no_sequences(shape):
    with pytest.raises(ValueError, match=r"expected \(N, 1, 45, 9\), see graph_sequence"):
        helpers.sequence_graph(np.zeros(shape))


def test_numpy_arrays_are_read_as_tensors_are(qm9):
    atoms, bonds = qm9.atoms[:5], qm9.bonds[:5]
    tokens = encodings.one_hot_graphs(atoms, bonds)
    assert torch.equal(tokens, encodings.one_hot_graphs(torch.from_numpy(atoms), torch.from_numpy(bonds)))
    found_atoms, found_bonds = helpers.vector_graph(helpers.graph_vector(atoms, bonds).numpy())
    np.testing.assert_array_equal(found_atoms, atoms)
    np.testing.assert_array_equal(found_bonds, bonds)


@pytest.mark.parametrize("shapes", [((2, 9, 9), (9,)), ((2, 9, 9), (3, 9)), ((2, 9), (2, 9)), ((2, 9, 8), (2, 9))])
def test_every_matrix_is_aligned_by_its_own_order(shapes):
    adjacency, order = torch.zeros(shapes[0]), torch.zeros(shapes[1], dtype=torch.long)
    with pytest.raises(ValueError, match=r"expected \(B, 9, 9\) and \(B, 9\)"):
        helpers.align(adjacency, order)
