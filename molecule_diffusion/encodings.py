"""Graphs as the tensors that networks read, and back: one-hot tokens, graph vectors, one-hot sequences.

It also holds the two reading aids of GraphVAE's probabilistic adjacency matrix, `align` and `apply_thresholds`.
"""

import functools

import numpy as np
import torch
from torch.nn import functional as F

from molecule_diffusion.checks import check_finite
from molecule_diffusion.chemistry import (
    ATOM_TYPES,
    BOND_TYPES,
    MAX_ATOMS,
    PAIRS,
    check_graphs,
    mask_bonds,
    matrix_from_pairs,
    pairs_from_matrix,
)

_ATOM_ENTRIES = MAX_ATOMS * len(ATOM_TYPES)  # the first 45 of a graph vector's 189 numbers
GRAPH_SIZE = _ATOM_ENTRIES + len(PAIRS[0]) * len(BOND_TYPES)


def one_hot(atoms):
    """One-hot rows of atom classes, in the order of ATOM_TYPES. Shapes: int (9,) -> (9, 5)."""
    return np.eye(len(ATOM_TYPES), dtype=int)[atoms]


def one_hot_graphs(atoms, bonds):
    """Graphs as one token per atom: its one-hot class and its one-hot row of bonds.

    Shapes: atoms int (B, 9), bonds int (B, 9, 9) -> float (B, 9, 5 + 9·4 = 41).
    """
    atoms, bonds = torch.as_tensor(atoms), torch.as_tensor(bonds)
    types = F.one_hot(atoms.long(), len(ATOM_TYPES))
    rows = F.one_hot(bonds.long(), len(BOND_TYPES)).flatten(2)
    return torch.cat([types, rows], -1).float()


# ---------------------------------------------------------------------------------------------------------------------
# Graph vectors: the x_0 of diffusion on graphs
# ---------------------------------------------------------------------------------------------------------------------


def graph_vector(atoms, bonds):
    """Graphs as the x_0 of diffusion: the one-hots of 9 atoms and 36 pairs, scaled to -1 and 1, in one vector.

    Only the pairs i < j stand in it, so a noisy graph is symmetric whatever noise is added.
    Shapes: atoms int (N, 9), bonds int (N, 9, 9) -> float tensor (N, 189 = 9·5 + 36·4).
    Raises: ValueError where `check_graphs` finds a wrong shape, dtype, class or an asymmetric bond.
    """
    atoms, bonds = map(torch.from_numpy, check_graphs(atoms, bonds))
    types = F.one_hot(atoms.long(), len(ATOM_TYPES)).flatten(1)
    pairs = F.one_hot(pairs_from_matrix(bonds).long(), len(BOND_TYPES)).flatten(1)
    return 2 * torch.cat([types, pairs], 1).float() - 1


def split_vector(x):
    """The two parts of a graph vector: (..., 189) -> atoms (..., 9, 5), pairs (..., 36, 4); views, not copies."""
    if x.shape[-1] != GRAPH_SIZE:
        raise ValueError(f"a graph vector of shape {tuple(x.shape)}: expected (..., {GRAPH_SIZE}), see graph_vector")
    atoms, pairs = x[..., :_ATOM_ENTRIES], x[..., _ATOM_ENTRIES:]
    return atoms.unflatten(-1, (MAX_ATOMS, -1)), pairs.unflatten(-1, (-1, len(BOND_TYPES)))


def vector_graph(x):
    """The graphs nearest to graph vectors, bonds to padding removed: (N, 189) -> int8 arrays (N, 9), (N, 9, 9).

    Raises: ValueError for another shape, and for NaN or infinite values.
    """
    x = torch.as_tensor(x)
    check_finite("the graph vectors", x)
    atoms, pairs = (part.argmax(-1).to(torch.int8).cpu().numpy() for part in split_vector(x))
    return atoms, mask_bonds(atoms, matrix_from_pairs(pairs))


def expected_graph(logits):
    """E[x_0] under a denoiser's class probabilities: logits (B, 189) -> graph vectors (B, 189) between -1 and 1."""
    return torch.cat([2 * part.float().softmax(-1).flatten(-2) - 1 for part in split_vector(logits)], -1)


def graph_image(x):
    """Graph vectors as images: channels 0–4, the atoms, on the diagonal; channels 5–8, the bonds, off it; 0 elsewhere.

    Shapes: (B, 189) -> (B, 9 channels, 9, 9), symmetric.
    """
    split_vector(x)  # refuses other shapes
    where, _, _ = _image_places(x.device)
    image = F.pad(x, (0, 1)).index_select(1, where)  # the 0 that stands elsewhere is entry 189
    return image.view(len(x), -1, MAX_ATOMS, MAX_ATOMS)


def image_vector(image):
    """The graph vectors in images, of which the two halves of a pair are averaged: (B, 9, 9, 9) -> (B, 189)."""
    _, upper, lower = _image_places(image.device)
    image = image.flatten(1)
    return (image.index_select(1, upper) + image.index_select(1, lower)) / 2


@functools.cache
def _image_places(device):
    """Which entry of the vector each pixel shows, 189 for none; and which pixels, two, show each entry."""
    row, column = PAIRS
    atoms, pairs = split_vector(torch.arange(GRAPH_SIZE))
    places = torch.arange(MAX_ATOMS)
    where = torch.full((len(ATOM_TYPES) + len(BOND_TYPES), MAX_ATOMS, MAX_ATOMS), GRAPH_SIZE)
    where[: len(ATOM_TYPES), places, places] = atoms.T
    where[len(ATOM_TYPES) :, row, column] = pairs.T
    upper = where.flatten().argsort()[:GRAPH_SIZE]
    where[len(ATOM_TYPES) :, column, row] = pairs.T
    mirrored = torch.arange(where.numel()).view(where.shape).transpose(1, 2).flatten()
    return where.flatten().to(device), upper.to(device), mirrored[upper].to(device)


# ---------------------------------------------------------------------------------------------------------------------
# One-hot sequences, as files of conditions hold them
# ---------------------------------------------------------------------------------------------------------------------


def graph_sequence(atoms, bonds):
    """Graphs as one-hot sequences: 9 atoms, then 36 pairs i < j. Returns uint8 (N, 1, 45, 9): 5 + 4 classes."""
    atoms, bonds = check_graphs(atoms, bonds)
    rows = np.concatenate([atoms, pairs_from_matrix(bonds) + len(ATOM_TYPES)], 1)
    return np.eye(len(ATOM_TYPES) + len(BOND_TYPES), dtype=np.uint8)[rows][:, None]


def sequence_graph(data):
    """The graphs nearest to sequences (N, 1, 45, 9), one-hot or probabilities: int8 arrays (N, 9), (N, 9, 9)."""
    data = np.asarray(data)
    if data.ndim != 4 or data.shape[1:] != (1, 45, 9):
        raise ValueError(f"sequences of shape {data.shape}: expected (N, 1, 45, 9), see graph_sequence")
    if not np.isfinite(data).all():
        raise ValueError("the sequences hold NaN or infinite values")
    data = data[:, 0]
    atoms = data[:, :MAX_ATOMS, : len(ATOM_TYPES)].argmax(-1).astype(np.int8)
    pairs = data[:, MAX_ATOMS:, len(ATOM_TYPES) :].argmax(-1).astype(np.int8)
    return atoms, mask_bonds(atoms, matrix_from_pairs(pairs))


# ---------------------------------------------------------------------------------------------------------------------
# GraphVAE's probabilistic adjacency matrix
# ---------------------------------------------------------------------------------------------------------------------


def align(adjacency, order):
    """Matrices with rows and columns in a new order, each its own. Shapes: (B, 9, 9), (B, 9) -> (B, 9, 9)."""
    if order.ndim != 2 or adjacency.shape != (*order.shape, order.shape[1]):
        raise ValueError(
            f"adjacency {tuple(adjacency.shape)} and order {tuple(order.shape)}: expected (B, 9, 9) and (B, 9)"
        )
    batch = torch.arange(len(order))[:, None, None]
    return adjacency[batch, order[:, :, None], order[:, None, :]]


def apply_thresholds(adjacency, tau_bond, tau_atom):
    """Which atoms exist and which pairs are bonded, from probabilities (B, 9, 9): booleans (B, 9) and (B, 9, 9)."""
    exists = adjacency.diagonal(dim1=1, dim2=2) > tau_atom
    both = exists[:, :, None] & exists[:, None, :]
    return exists, (adjacency > tau_bond) & both & ~torch.eye(MAX_ATOMS, dtype=torch.bool)
