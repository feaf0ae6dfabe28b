"""Two more networks for graph diffusion: the graph as an image, and the graph as a graph.

Both take and give what `GraphDenoiser` does, so that one loss, one sampler and one pipeline serve all three.
"""

import functools

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from molecule_diffusion.chemistry import ATOM_TYPES, BOND_TYPES, MAX_ATOMS, NO_ATOM, PAIRS, matrix_from_pairs, pairs_on
from molecule_diffusion.encodings import graph_image, image_vector, split_vector
from molecule_diffusion.models import time_network, timestep_embedding

CHANNELS = len(ATOM_TYPES) + len(BOND_TYPES)  # of the image of a graph


class PixelDenoiser(ModelMixin, ConfigMixin):
    """Graph diffusion with a U-Net for pictures, `diffusers.UNet2DModel`, on the 9 × 9 image of a graph.

    The image (`graph_image`) has the atoms on its diagonal and the bonds beside it. A convolution treats all places
    alike, but atom order is canonical and places differ: a learned map of the places is added to what it reads.

    Args:
        widths: channels of the U-Net at full size and at half of it.
        layers: residual blocks at each size.
    """

    @register_to_config
    def __init__(self, widths: list = (32, 64), layers: int = 1):
        super().__init__()
        side = MAX_ATOMS + 1  # one row and one column of zeros, because the U-Net halves the side
        self.places = nn.Parameter(torch.zeros(2 * CHANNELS, side, side))
        self.unet = UNet2DModel(
            sample_size=side,
            in_channels=2 * CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            down_block_types=("DownBlock2D",) * len(widths),
            up_block_types=("UpBlock2D",) * len(widths),
            norm_num_groups=8,
            add_attention=False,
        )

    def forward(self, x_t, t, x_0=None):
        """Logits of the clean graph. Shapes: as in `GraphDenoiser`."""
        if x_0 is None:
            x_0 = torch.zeros_like(x_t)
        images = torch.cat([graph_image(x_t), graph_image(x_0)], 1)
        images = F.pad(images, (0, 1, 0, 1)) + self.places
        images = images.contiguous(memory_format=torch.channels_last)  # a quarter faster on a CPU, and no other result
        predicted = self.unet(images, t.reshape(-1).expand(len(images))).sample
        return image_vector(predicted[:, :, :MAX_ATOMS, :MAX_ATOMS])


class GraphNetworkDenoiser(ModelMixin, ConfigMixin):
    """Graph diffusion with a graph network: another order of the atoms gives the same answer in that order.

    Nine nodes and all pairs of them carry states, which inform one another layer by layer. What message passing cannot
    see is handed to it: paths, rings, valences and connectedness of its own last guess (`structure`).

    Args:
        nodes, edges: width of a node's and of a pair's state.
        layers: rounds of message passing.
        heads: of the attention by which a node listens to the others.
        time_dim: of the embedding of t.
    """

    @register_to_config
    def __init__(self, nodes: int = 128, edges: int = 64, layers: int = 5, heads: int = 4, time_dim: int = 128):
        super().__init__()
        of_atoms, of_pairs = 7, 7  # numbers that `structure` finds
        self.time = time_network(time_dim)
        self.embed_nodes = nn.Linear(2 * len(ATOM_TYPES) + of_atoms + time_dim, nodes)
        self.embed_edges = nn.Linear(2 * len(BOND_TYPES) + of_pairs + time_dim, edges)
        self.blocks = nn.ModuleList(GraphLayer(nodes, edges, heads) for _ in range(layers))
        self.norm_nodes = nn.LayerNorm(nodes)
        self.norm_edges = nn.LayerNorm(edges)
        self.atoms = nn.Linear(nodes, len(ATOM_TYPES))
        self.bonds = nn.Linear(edges, len(BOND_TYPES))

    def forward(self, x_t, t, x_0=None):
        """Logits of the clean graph. Shapes: as in `GraphDenoiser`."""
        if x_0 is None:
            x_0 = torch.zeros_like(x_t)
        of_atoms, of_pairs = structure(x_0)
        (noisy_atoms, guessed_atoms), (noisy_bonds, guessed_bonds) = split_vector(torch.stack([x_t, x_0]))
        time = self.time(timestep_embedding(t.reshape(-1), self.config.time_dim).to(self.dtype))
        time = time.expand(len(x_t), -1)[:, None]
        h = torch.cat([noisy_atoms, guessed_atoms, of_atoms, time.expand(-1, MAX_ATOMS, -1)], -1)
        e = torch.cat([noisy_bonds, guessed_bonds], -1)
        e = torch.cat([F.pad(e, (0, 0, 0, MAX_ATOMS)), of_pairs, time.expand(-1, of_pairs.shape[1], -1)], -1)
        h, e = self.embed_nodes(h), self.embed_edges(e)
        for block in self.blocks:
            h, e = block(h, e)
        pairs = self.bonds(self.norm_edges(e[:, : len(PAIRS[0])]))
        return torch.cat([self.atoms(self.norm_nodes(h)).flatten(1), pairs.flatten(1)], 1)


@functools.cache
def pair_numbers(device="cpu"):
    """The graph network's 45 pairs: the 36 pairs i < j, then each atom with itself.

    Returns: their first and their second atoms, (45,) each, and at (i, j) and (j, i) the number of their pair, (9, 9).
    """
    row, column = (torch.cat([index, torch.arange(MAX_ATOMS)]) for index in pairs_on("cpu"))
    pair_of = torch.zeros(MAX_ATOMS, MAX_ATOMS, dtype=torch.long)
    pair_of[row, column] = torch.arange(len(row))
    pair_of[column, row] = torch.arange(len(row))
    return row.to(device), column.to(device), pair_of.to(device)


def at(states, index):
    """The states (B, n, k) with these numbers: index of any shape -> (B, *index.shape, k)."""
    return states.index_select(1, index.flatten()).unflatten(1, index.shape)


class GraphLayer(nn.Module):
    """One round of message passing: pairs learn from their two nodes, nodes from all their pairs.

    Nothing in it knows an atom's number, and what a pair gets from its nodes, a sum and a product, does not depend on
    which comes first. Shapes: h (B, 9, nodes), e (B, 45, edges) -> the same.
    """

    def __init__(self, nodes, edges, heads):
        super().__init__()
        self.norm_nodes = nn.LayerNorm(nodes)
        self.norm_edges = nn.LayerNorm(edges)
        self.to_sum = nn.Linear(nodes, edges)
        self.to_product = nn.Linear(nodes, edges)
        self.edge_mlp = nn.Sequential(nn.Linear(3 * edges, 2 * edges), nn.SiLU(), nn.Linear(2 * edges, edges))
        self.attention = nn.Linear(edges, heads)
        self.gate = nn.Linear(edges, nodes)
        self.value = nn.Linear(nodes, nodes)
        self.node_mlp = nn.Sequential(nn.Linear(3 * nodes, 2 * nodes), nn.SiLU(), nn.Linear(2 * nodes, nodes))

    def forward(self, h, e):
        row, column, pair_of = pair_numbers(h.device)
        near = self.norm_nodes(h)
        s, p = self.to_sum(near), self.to_product(near)
        of_nodes = [at(s, row) + at(s, column), at(p, row) * at(p, column)]
        e = e + self.edge_mlp(torch.cat([*of_nodes, self.norm_edges(e)], -1))
        weights = at(self.attention(e), pair_of).softmax(2)  # (B, 9, 9, heads): over the neighbours of each node
        messages = at(self.gate(e).sigmoid(), pair_of) * self.value(near)[:, None]  # (B, 9, 9, nodes)
        by_head = messages.unflatten(-1, (weights.shape[-1], -1))
        heard = (weights[..., None] * by_head).sum(2).flatten(2)
        return h + self.node_mlp(torch.cat([near, heard, messages.mean(2)], -1)), e


def structure(x_0):
    """What a guessed graph is as a whole, for a network whose layers see one bond far each.

    From A, the probability of any bond between i and j: how many paths of 2 to 5 bonds join two atoms, and how many
    rings of 3 to 5 pass through one (the powers of A); an atom's degree and valence; and whether a way joins two atoms
    at all: the strength of the weakest bond on the best way. Without a guess, where x_0 is 0, all is a half.

    Shapes: x_0 (B, 189) -> of atoms (B, 9, 7), of pairs (B, 45, 7), the last whether it is an atom with itself.
    """
    atoms, bonds = ((1 + part.float()) / 2 for part in split_vector(x_0))  # probabilities
    exists = 1 - atoms[..., NO_ATOM]
    single, double, triple = matrix_from_pairs(bonds[..., 1:].transpose(1, 2)).unbind(1)  # (B, 9, 9) each
    a = single + double + triple
    degree = a.sum(2)
    valence = (single + 2 * double + 3 * triple).sum(2)
    powers = [a]
    for _ in range(4):
        powers.append(powers[-1] @ a)
    itself = torch.eye(MAX_ATOMS, device=a.device)
    joined = a + itself
    for _ in range(3):  # ways of at most 2, 4, 8 bonds
        joined = torch.minimum(joined[:, :, :, None], joined[:, None]).amax(2)
    reached = (joined * exists[:, None]).sum(2) / exists.sum(1, keepdim=True)
    rings = [power.diagonal(dim1=1, dim2=2) for power in powers[2:]]
    of_atoms = torch.stack([exists, degree, valence, reached, *map(torch.log1p, rings)], -1)
    of_pairs = torch.stack([*map(torch.log1p, powers), joined, itself.expand_as(a)], -1)
    row, column, _ = pair_numbers(x_0.device)
    return of_atoms.to(x_0.dtype), at(of_pairs.flatten(1, 2), row * MAX_ATOMS + column).to(x_0.dtype)
