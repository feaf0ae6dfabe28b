"""The judge: a graph network that reads properties off a molecular graph."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from molecule_diffusion.chemistry import ATOM_TYPES, BOND_TYPES, MAX_ATOMS, NO_ATOM, PAIRS
from molecule_diffusion.conditions import CONDITION_TARGETS
from molecule_diffusion.graph_denoisers import GraphLayer, at, pair_numbers

VALENCES = (4, 3, 2, 1, 0)  # of ATOM_TYPES: what is not used by bonds between heavy atoms holds hydrogens
FARTHEST = 8  # bonds: the longest way between two of nine atoms
RING_SIZES = range(3, MAX_ATOMS + 1)
BONDS = len(PAIRS[0])  # the first 36 of `pair_numbers` are the pairs i < j


class PropertyOracle(ModelMixin, ConfigMixin):
    """A judge that is no generator: gap and dipole from a molecular graph, whatever the order of its atoms.

    A graph network as in `GraphNetworkDenoiser`. What many rounds of messages would have to find out is handed to it:
    hydrogens, shortest ways and rings (`graph_features`). It learns other properties beside those it is asked for,
    because what explains several of them at once is more likely to be right.

    Args:
        nodes, edges: width of an atom's and of a pair's state.
        layers: rounds of message passing.
        heads: of the attention by which an atom listens to the others.
        targets: names of the properties it is asked for.
        beside: names of those that it learns beside them.
    """

    @register_to_config
    def __init__(
        self,
        nodes: int = 128,
        edges: int = 64,
        layers: int = 4,
        heads: int = 4,
        targets: list = CONDITION_TARGETS[:2],
        beside: list = ("homo", "lumo", "alpha", "r2", "zpve", "Cv"),
    ):
        super().__init__()
        learned = len(targets) + len(beside)
        self.register_buffer("mean", torch.zeros(learned))
        self.register_buffer("std", torch.ones(learned))
        of_atoms = len(ATOM_TYPES) + 5 + len(RING_SIZES)
        of_pairs = len(BOND_TYPES) + FARTHEST + 2 + len(RING_SIZES)
        self.embed_nodes = nn.Linear(of_atoms, nodes)
        self.embed_edges = nn.Linear(of_pairs, edges)
        self.blocks = nn.ModuleList(GraphLayer(nodes, edges, heads) for _ in range(layers))
        self.norm_nodes = nn.LayerNorm(nodes)
        self.norm_edges = nn.LayerNorm(edges)
        self.out = nn.Sequential(nn.Linear(2 * (nodes + edges), 2 * nodes), nn.SiLU(), nn.Linear(2 * nodes, learned))

    def forward(self, of_atoms, of_pairs):
        """Standardised properties, targets first, from `graph_features`.

        Shapes: of_atoms (B, 9, 17), of_pairs (B, 45, 21) -> (B, targets + beside).
        """
        of_atoms, of_pairs = of_atoms.to(self.dtype), of_pairs.to(self.dtype)
        exists = 1 - of_atoms[..., NO_ATOM]
        row, column, _ = pair_numbers(exists.device)
        both = (exists[:, row] * exists[:, column])[:, :BONDS]
        h, e = self.embed_nodes(of_atoms), self.embed_edges(of_pairs)
        for block in self.blocks:
            h, e = block(h, e)
        h = self.norm_nodes(h) * exists[..., None]
        e = self.norm_edges(e[:, :BONDS]) * both[..., None]
        pooled = [h.sum(1) / MAX_ATOMS, h.amax(1), e.sum(1) / BONDS, e.amax(1)]
        return self.out(torch.cat(pooled, -1))


def graph_features(atoms, bonds):
    """What the oracle reads of graphs, zeros and ones.

    Of each atom: its class, its number of hydrogens, and the sizes of the rings through its bonds. Of each pair, in the
    order of `pair_numbers`: its bond, the length of the shortest way between the two (or that there is none), and the
    size of the smallest ring through the bond.

    Shapes: int tensors (B, 9), (B, 9, 9) -> uint8 (B, 9, 17), (B, 45, 21).
    """
    atoms, bonds = atoms.long(), bonds.long()
    row, column, pair_of = pair_numbers(atoms.device)
    hydrogens = torch.tensor(VALENCES, device=atoms.device)[atoms] - bonds.sum(2)
    ways = shortest_ways(bonds)[:, row, column]
    sizes = ring_sizes(bonds)
    rings = F.pad(torch.stack([sizes == size for size in RING_SIZES], -1), (0, 0, 0, MAX_ATOMS))  # an atom with itself
    of_pairs = [F.one_hot(bonds[:, row, column], len(BOND_TYPES)), F.one_hot(ways, FARTHEST + 2), rings]
    of_atoms = [F.one_hot(atoms, len(ATOM_TYPES)), F.one_hot(hydrogens.clamp(0, 4), 5), at(rings, pair_of).amax(2)]
    return torch.cat(of_atoms, -1).to(torch.uint8), torch.cat(of_pairs, -1).to(torch.uint8)


def shortest_ways(bonds):
    """How many bonds lie between two atoms, 9 where there is no way. Shapes: (B, 9, 9) -> (B, 9, 9)."""
    far = FARTHEST + 1
    ways = torch.where(bonds > 0, 1, far)
    ways = ways * (1 - torch.eye(MAX_ATOMS, dtype=torch.long, device=bonds.device))
    for middle in range(MAX_ATOMS):  # is the way over this atom shorter? (Floyd's algorithm)
        ways = torch.minimum(ways, ways[:, :, middle, None] + ways[:, middle, None, :])
    return ways.clamp(max=far)


def ring_sizes(bonds):
    """The size of the smallest ring through each of the 36 pairs, 0 where they have no bond or it lies in no ring.

    Take the bond away: if a way of k bonds still joins its two atoms, the ring has k + 1.
    Shapes: (B, 9, 9) -> (B, 36).
    """
    row, column, _ = pair_numbers(bonds.device)
    row, column, pair = row[:BONDS], column[:BONDS], torch.arange(BONDS, device=bonds.device)
    joined = (bonds > 0).float()
    without = joined[:, None].repeat(1, BONDS, 1, 1)
    without[:, pair, row, column] = 0
    without[:, pair, column, row] = 0
    reached = F.one_hot(row, MAX_ATOMS).float().expand(len(bonds), -1, -1)
    sizes = torch.zeros(len(bonds), BONDS, dtype=torch.long, device=bonds.device)
    for length in range(1, MAX_ATOMS):
        reached = (reached[:, :, None] @ without)[:, :, 0].clamp(max=1)
        arrived = (reached[:, pair, column] > 0) & (sizes == 0)
        sizes[arrived] = length + 1
    return sizes * joined[:, row, column].long()
