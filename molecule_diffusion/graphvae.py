"""GraphVAE (Simonovsky & Komodakis, arXiv:1802.03480): a whole graph from one vector, compared after a matching."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from molecule_diffusion.checks import check_finite
from molecule_diffusion.chemistry import (
    ATOM_TYPES,
    BOND_TYPES,
    MAX_ATOMS,
    NO_ATOM,
    PAIRS,
    matrix_from_pairs,
    pairs_from_matrix,
)
from molecule_diffusion.matching import SoftGraph, match_graphs, reorder
from molecule_diffusion.models import kl_divergence, reparameterise

ELEMENTS = len(ATOM_TYPES) - 1
KINDS = len(BOND_TYPES) - 1

# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------


def sparse_graphs(atoms, bonds):
    """A batch as torch_geometric's layers read it: only atoms that exist and bonds that exist.

    Shapes: atoms (B, 9), bonds (B, 9, 9) -> nodes (V, 4) one-hot elements, edges (2, E), from and to, both directions
    of each bond, kinds (E,) from 0, graph (V,): to which of the B graphs a node belongs.
    """
    real = atoms != NO_ATOM
    number = real.flatten().cumsum(0).view_as(atoms) - 1  # of each atom among all V
    graph, _ = real.nonzero(as_tuple=True)
    nodes = F.one_hot(atoms[real].long(), ELEMENTS).float()
    which, i, j = bonds.nonzero(as_tuple=True)
    edges = torch.stack([number[which, j], number[which, i]])  # from j to i
    return nodes, edges, bonds[which, i, j].long() - 1, graph


class EdgeConditionedConvolution(nn.Module):
    """A graph convolution with a matrix for each kind of bond (Simonovsky & Komodakis, arXiv:1704.02901).

    h_i <- h_i · W + bias + mean over the neighbours j of h_j · W(kind of the bond ij)

    This is torch_geometric's NNConv with a linear layer on one-hot kinds, but each atom is multiplied by three matrices
    once, where NNConv makes a matrix for every bond.
    Shapes: h (V, size_in), edges (2, E), kinds (E,) -> (V, size_out).
    """

    def __init__(self, size_in, size_out):
        super().__init__()
        self.own = nn.Linear(size_in, size_out)
        self.neighbour = nn.Linear(size_in, KINDS * size_out, bias=False)

    def forward(self, h, edges, kinds):
        from torch_geometric.utils import scatter

        start, end = edges
        offered = self.neighbour(h).view(len(h) * KINDS, -1)  # of each atom, for each kind of bond
        messages = offered[start * KINDS + kinds]
        return self.own(h) + scatter(messages, end, dim_size=len(h), reduce="mean")


class GatedSum(nn.Module):
    """One vector for a graph: tanh(Σ_i sigmoid(gate(h_i, x_i)) ⊙ tanh(value(h_i, x_i))) (eq. 7 of arXiv:1511.05493).

    Shapes: h (V, width), x (V, 4), graph (V,) -> (B, out).
    """

    def __init__(self, width, out):
        super().__init__()
        self.gate = nn.Linear(width + ELEMENTS, out)
        self.value = nn.Linear(width + ELEMENTS, out)

    def forward(self, h, x, graph, number):
        from torch_geometric.nn import global_add_pool

        both = torch.cat([h, x], 1)
        return torch.tanh(global_add_pool(torch.sigmoid(self.gate(both)) * torch.tanh(self.value(both)), graph, number))


class GraphEncoder(nn.Module):
    """Edge-conditioned convolutions, each with batch norm and ReLU, then a `GatedSum`.

    Shapes: atoms (B, 9), bonds (B, 9, 9) -> (B, 2 · latent_dim).
    """

    def __init__(self, widths, pooled, latent_dim):
        super().__init__()
        sizes = [ELEMENTS, *widths]
        pairs = list(zip(sizes, sizes[1:]))
        self.convolutions = nn.ModuleList(EdgeConditionedConvolution(*pair) for pair in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(size_out) for _, size_out in pairs)
        self.pool = GatedSum(sizes[-1], pooled)
        self.to_latent = nn.Linear(pooled, 2 * latent_dim)

    def forward(self, atoms, bonds):
        nodes, edges, kinds, graph = sparse_graphs(atoms, bonds)
        h = nodes = nodes.to(self.to_latent.weight.dtype)
        for convolution, norm in zip(self.convolutions, self.norms):
            h = F.relu(norm(convolution(h, edges, kinds)))
        return self.to_latent(self.pool(h, nodes, graph, len(atoms)))


# ---------------------------------------------------------------------------------------------------------------------
# The VAE
# ---------------------------------------------------------------------------------------------------------------------


class GraphVAE(ModelMixin, ConfigMixin):
    """The GraphVAE of arXiv:1802.03480 on graphs of at most nine heavy atoms, bonds kekulised.

    Args:
        latent_dim: numbers of a molecule's latent, the paper's c.
        widths: of the encoder's graph convolutions; pooled: of the graph's vector.
        hidden: widths of the decoder's layers.
        matching: whether the loss looks for the order first; False compares in the canonical order.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 40,
        widths: list = (32, 64),
        pooled: int = 128,
        hidden: list = (128, 256, 512),
        matching: bool = True,
    ):
        super().__init__()
        self.encoder = GraphEncoder(widths, pooled, latent_dim)
        layers, sizes = [], [latent_dim, *hidden]
        for size_in, size_out in zip(sizes, sizes[1:]):
            layers += [nn.Linear(size_in, size_out), nn.BatchNorm1d(size_out), nn.ReLU()]
        self.decoder = nn.Sequential(*layers)
        self.exists_head = nn.Linear(sizes[-1], MAX_ATOMS)
        self.bonded_head = nn.Linear(sizes[-1], len(PAIRS[0]))
        self.element_head = nn.Linear(sizes[-1], MAX_ATOMS * ELEMENTS)
        self.kind_head = nn.Linear(sizes[-1], len(PAIRS[0]) * KINDS)

    def encode(self, atoms, bonds):
        """q(z | graph) = N(mean, exp(logvar)). Shapes: (B, 9), (B, 9, 9) -> mean, logvar, each (B, latent_dim)."""
        mean, logvar = self.encoder(atoms, bonds).chunk(2, -1)
        return mean, logvar.clamp(-12, 4)

    def decode(self, z):
        """Logits of p(graph | z). Shapes: (B, latent_dim) -> exists (B, 9), bonded (B, 36), elements (B, 9, 4),
        kinds (B, 36, 3); those of bonds for the pairs i < j, so that both directions are equal."""
        h = self.decoder(z)
        elements = self.element_head(h).view(-1, MAX_ATOMS, ELEMENTS)
        kinds = self.kind_head(h).view(-1, len(PAIRS[0]), KINDS)
        return self.exists_head(h), self.bonded_head(h), elements, kinds

    @staticmethod
    def soft_graph(exists, bonded, elements, kinds):
        """The probabilities in `decode`'s logits, as a SoftGraph."""
        kinds = matrix_from_pairs(kinds.float().softmax(-1).transpose(1, 2)).permute(0, 2, 3, 1)
        bonded = matrix_from_pairs(bonded.float().sigmoid())
        return SoftGraph(exists.float().sigmoid(), bonded, elements.float().softmax(-1), kinds)

    @torch.no_grad()
    def decode_graphs(self, z, spanning_tree=True, tau_atom=0.5, tau_bond=0.5):
        """The graph of each latent: what is more probable than not, each class the most probable one.

        Args:
            spanning_tree: whether the bonds of the most probable tree through all atoms are added, as in the paper.
            tau_atom, tau_bond: above which probability a place holds an atom, and two places a bond.

        Returns: int8 (B, 9) and (B, 9, 9). Raises: ValueError where latents or weights hold NaN or infinite values.
        """
        logits = self.decode(z)
        check_finite("what the GraphVAE decoded", *logits)
        soft = self.soft_graph(*logits)
        exists = soft.exists > tau_atom
        both = exists[:, :, None] & exists[:, None, :]
        bonded = soft.bonded > tau_bond
        if spanning_tree:
            bonded = bonded | largest_tree(soft.bonded, exists)
        atoms = torch.where(exists, soft.elements.argmax(-1), NO_ATOM)
        bonds = torch.where(bonded & both, soft.kinds.argmax(-1) + 1, 0)
        return atoms.to(torch.int8), bonds.to(torch.int8)

    def losses(self, atoms, bonds):
        """The loss in its parts, each a mean over the batch: of atoms that exist, bonded pairs, elements, kinds of
        bonds, each an average over its entries, as in the paper; and the KL in nats, summed over the latent.

        Shapes: atoms (B, 9), bonds (B, 9, 9) -> dict of scalars.
        """
        mean, logvar = self.encode(atoms, bonds)
        exists, bonded, elements, kinds = self.decode(reparameterise(mean, logvar, torch.randn_like(mean)))
        if self.config.matching:
            with torch.no_grad():
                order = match_graphs(atoms, bonds, self.soft_graph(exists, bonded, elements, kinds))
            atoms, bonds = reorder(atoms, bonds, order)
        real = atoms != NO_ATOM
        pairs = pairs_from_matrix(bonds).long()
        return {
            "exists": F.binary_cross_entropy_with_logits(exists.float(), real.float()),
            "bonded": F.binary_cross_entropy_with_logits(bonded.float(), (pairs > 0).float()),
            "elements": _mean_where(real, elements, atoms.long()),
            "kinds": _mean_where(pairs > 0, kinds, pairs - 1),
            "KL": kl_divergence(mean.float(), logvar.float()).mean(),
        }

    def loss(self, atoms, bonds, kl_weight):
        """The averaged losses and kl_weight times the KL in nats (arXiv:1802.03480). Returns: scalar.

        With kl_weight = 1 / latent_dim the KL is averaged over the latent, as the others are over their entries.
        """
        parts = self.losses(atoms, bonds)
        return parts["exists"] + parts["bonded"] + parts["elements"] + parts["kinds"] + kl_weight * parts["KL"]

    forward = loss  # so that training through DistributedDataParallel works


def _mean_where(mask, logits, classes):
    """-log p(class), averaged over a graph's entries that the mask names, then over the graphs; no entry counts as 0.

    Shapes: mask (B, places), logits (B, places, k), classes (B, places) -> ().
    """
    classes = classes.clamp(0, logits.shape[-1] - 1)  # those that the mask leaves out may be none
    nats = F.cross_entropy(logits.transpose(1, 2).float(), classes, reduction="none")
    return ((nats * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def largest_tree(bonded, exists):
    """The tree of largest probability through all atoms of each graph, grown atom by atom (Prim's algorithm).

    Args: bonded (B, 9, 9), probabilities; exists: bool (B, 9). Returns: bool (B, 9, 9), symmetric.
    """
    graph = torch.arange(len(exists), device=exists.device)
    inside = torch.zeros_like(exists)
    inside[graph, exists.float().argmax(1)] = True  # the first atom
    inside &= exists
    tree = torch.zeros_like(bonded, dtype=torch.bool)
    for _ in range(MAX_ATOMS - 1):
        crossing = inside[:, :, None] & (exists & ~inside)[:, None, :]
        best = bonded.masked_fill(~crossing, -1).flatten(1).argmax(1)
        row, column = best // MAX_ATOMS, best % MAX_ATOMS
        found = crossing.flatten(1).any(1)
        tree[graph[found], row[found], column[found]] = True
        inside[graph[found], column[found]] = True
    return tree | tree.transpose(1, 2)
