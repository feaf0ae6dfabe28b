"""Which atom is which: matching a true graph with the probabilities of a decoder (Simonovsky & Komodakis, 2018).

Two graphs in two orders can be one molecule, so before a GraphVAE's loss compares anything it looks for the order in
which the truth resembles the prediction most: similarities, max-pooling matching (Cho et al. 2014), an assignment.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from molecule_diffusion.chemistry import ATOM_TYPES, BOND_TYPES, MAX_ATOMS

ROUNDS = 40  # of max-pooling matching


@dataclass
class SoftGraph:
    """What a GraphVAE's decoder says: a graph of nine places in which everything has a probability.

    Attributes:
        exists: (B, 9), that place a holds an atom: the diagonal of the paper's adjacency matrix.
        bonded: (B, 9, 9), symmetric, that places a and b are bonded; the diagonal does not count.
        elements: (B, 9, 4), which element place a holds, if it holds one (C, N, O, F).
        kinds: (B, 9, 9, 3), symmetric, which bond joins a and b, if one does (single, double, triple).
    """

    exists: torch.Tensor
    bonded: torch.Tensor
    elements: torch.Tensor
    kinds: torch.Tensor


def as_soft_graph(atoms, bonds):
    """Graphs as a decoder that is certain would write them. Shapes: atoms (B, 9), bonds (B, 9, 9) -> SoftGraph."""
    atoms, bonds = torch.as_tensor(atoms).long(), torch.as_tensor(bonds).long()
    elements = F.one_hot(atoms, len(ATOM_TYPES))[..., :-1].float()
    kinds = F.one_hot(bonds, len(BOND_TYPES))[..., 1:].float()
    return SoftGraph(elements.sum(-1), kinds.sum(-1), elements, kinds)


def similarities(atoms, bonds, soft):
    """How well true atoms fit predicted places, and true bonds predicted pairs (arXiv:1802.03480).

    Args: atoms (B, 9) and bonds (B, 9, 9), classes; soft: SoftGraph.
    Returns: single (B, 9, 9): of atom i and place a; directed, the true bonds i-j in both directions, as three index
        tensors (graph, i, j) of length E; pair (E, 9, 9): of such a bond and the places (a, b).
    """
    both_exist = soft.exists[:, :, None] * soft.exists[:, None, :]
    off_diagonal = 1 - torch.eye(MAX_ATOMS, device=both_exist.device)
    weights = soft.kinds * (soft.bonded * both_exist * off_diagonal)[..., None]  # (B, a, b, kind)
    graph, i, j = directed = bonds.nonzero(as_tuple=True)
    pair = weights.permute(0, 3, 1, 2)[graph, bonds[graph, i, j].long() - 1]
    fits = F.pad(soft.elements, (0, 1)) * soft.exists[..., None]  # (B, a, class); padding fits nowhere
    single = fits.transpose(1, 2).gather(1, atoms.long()[:, :, None].expand(-1, -1, MAX_ATOMS))
    return single, directed, pair


def max_pooling(single, directed, pair, rounds=ROUNDS):
    """Beliefs x that true atom i is place a, by max-pooling matching (Cho et al. 2014), of a whole batch at once.

    x_ia <- x_ia · single_ia + Σ_j max_b x_jb · pair_{ij,ab}, over the true neighbours j of i; then x is rescaled.
    Args: as `similarities` returns them; rounds: how often. Returns: (B, 9 atoms, 9 places).
    """
    graph, i, j = directed
    here, there = graph * MAX_ATOMS + i, graph * MAX_ATOMS + j  # rows of x, all graphs below one another
    by_partner = pair.permute(2, 0, 1).contiguous()  # (b, E, a): the largest of nine slices is found fastest so
    x = torch.ones_like(single)
    for _ in range(rounds):
        rows = x.view(-1, MAX_ATOMS)
        best = (by_partner * rows[there].T[:, :, None]).amax(0)
        pooled = torch.zeros_like(rows).index_add_(0, here, best)
        x = x * single + pooled.view_as(x)
        x = x / x.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None]
    return x


def assign(x):
    """The one-to-one assignment with the largest sum, by the Hungarian algorithm (Kuhn 1955).

    Shapes: beliefs (B, 9 atoms, 9 places) -> order (B, 9): the true atom that stands at each place.
    """
    x = x.cpu().numpy()
    order = np.stack([linear_sum_assignment(beliefs.T, maximize=True)[1] for beliefs in x])
    return torch.from_numpy(order)


@torch.no_grad()
def match_graphs(atoms, bonds, soft, rounds=ROUNDS):
    """Which true atom stands at each place of a predicted graph.

    Args: atoms (B, 9) and bonds (B, 9, 9), classes; soft: SoftGraph; rounds: of max-pooling matching.
    Returns: order, long (B, 9): `reorder(atoms, bonds, order)` is the truth in the decoder's order.
    """
    return assign(max_pooling(*similarities(atoms, bonds, soft), rounds)).to(atoms.device)


def reorder(atoms, bonds, order):
    """Graphs with their atoms in new orders, each its own. Shapes: (B, 9), (B, 9, 9), order (B, 9) -> the first two."""
    batch = torch.arange(len(order), device=order.device)[:, None]
    return atoms[batch, order], bonds[batch[..., None], order[:, :, None], order[:, None, :]]
