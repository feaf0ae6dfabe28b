"""Every network with weights to train, and the few formulas that belong to them."""

import math

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from molecule_diffusion.checks import check_count, check_finite, quoted
from molecule_diffusion.chemistry import (
    ATOM_TYPES,
    BOND_TYPES,
    MAX_ATOMS,
    check_graphs,
    mask_bonds,
    matrix_from_pairs,
    pairs_from_matrix,
    pairs_on,
)
from molecule_diffusion.encodings import GRAPH_SIZE, one_hot_graphs, split_vector

# ---------------------------------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------------------------------


class PairHead(nn.Module):
    """Bond logits of the 36 pairs i < j from tokens, equal for (i, j) and (j, i).

    Shapes: (B, 9, width) -> (B, 36, 4).
    """

    def __init__(self, width):
        super().__init__()
        self.sum = nn.Linear(width, width)
        self.product = nn.Linear(width, width)
        self.out = nn.Linear(width, len(BOND_TYPES))

    def forward(self, tokens):
        row, column = pairs_on(tokens.device)
        s = self.sum(tokens)
        p = self.product(tokens)
        return self.out(F.gelu(s[:, row] + s[:, column] + p[:, row] * p[:, column]))


def transformer(width, layers, heads=4):
    """A pre-norm transformer encoder. Shapes: (B, 9, width) -> (B, 9, width)."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)


def timestep_embedding(t, dim):
    """Sinusoidal embedding of timesteps 0..999 (Vaswani et al. 2017). Shapes: (B,) -> (B, dim)."""
    frequencies = torch.exp(-np.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


def time_network(dim):
    """What makes a `timestep_embedding` ready for the residual blocks. Shapes: (B, dim) -> (B, dim)."""
    return nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())


class ResidualBlock(nn.Module):
    """x + gate · MLP(adaLN(x)); shift, scale and gate come from the time embedding (DiT, arXiv:2212.09748).

    adaLN is a layer norm whose scale and shift depend on t. Shapes: x (B, width), time (B, time_dim) -> (B, width).
    """

    def __init__(self, width, hidden, time_dim):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(time_dim, 3 * width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x, time):
        shift, scale, gate = self.modulation(time).chunk(3, -1)
        return x + gate * self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))


def summed_cross_entropy(logits, classes):
    """-Σ log p(class) in nats over a batch and its places. Shapes: logits (B, places, k), classes (B, places) -> ()."""
    return F.cross_entropy(logits.flatten(0, 1).float(), classes.flatten().long(), reduction="sum")


# ---------------------------------------------------------------------------------------------------------------------
# The TokenVAE
# ---------------------------------------------------------------------------------------------------------------------


def reparameterise(mean, logvar, eps):
    """z = μ + σ·ε, a draw from N(μ, σ²) through which gradients pass; logvar = log σ². All of one shape."""
    return mean + (0.5 * logvar).exp() * eps


def kl_divergence(mean, logvar):
    """KL(N(μ, σ²) ‖ N(0, I)) in nats (appendix B of arXiv:1312.6114). Shapes: two (..., d) -> (...)."""
    if mean.shape != logvar.shape:
        raise ValueError(f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)}: expected tensors of one shape")
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(-1)


def slerp(a, b, share):
    """Spherical interpolation between vectors: a at share 0, b at share 1. Shapes: two (d,) and a number -> (d,).

    Between parallel vectors, where the sine below is 0, the way is straight.
    """
    if a.ndim != 1 or a.shape != b.shape or np.ndim(share) > 0:
        raise ValueError(
            f"slerp between {tuple(a.shape)} and {tuple(b.shape)} with share={quoted(share)}: expected two vectors "
            "(d,) and one number; flatten latents first"
        )
    theta = torch.arccos(((a @ b) / (a.norm() * b.norm())).clamp(-1, 1))
    if torch.sin(theta) < 1e-6:
        return (1 - share) * a + share * b
    return (torch.sin((1 - share) * theta) * a + torch.sin(share * theta) * b) / torch.sin(theta)


class TokenVAE(ModelMixin, ConfigMixin):
    """A variational autoencoder on graphs with one latent token per atom (Kingma & Welling, arXiv:1312.6114).

    Args:
        width, layers: of the transformer encoder and of the decoder, which has the same size.
        latent_dim: numbers per token; a molecule's latent is (9, latent_dim).
    """

    @register_to_config
    def __init__(self, width: int = 128, layers: int = 3, latent_dim: int = 8):
        super().__init__()
        self.embed = nn.Linear(len(ATOM_TYPES) + MAX_ATOMS * len(BOND_TYPES), width)
        self.embed_latent = nn.Linear(latent_dim, width)
        self.position = nn.Parameter(torch.randn(2, MAX_ATOMS, width) * 0.02)  # encoder's, decoder's
        self.encoder = transformer(width, layers)
        self.decoder = transformer(width, layers)
        self.to_latent = nn.Linear(width, 2 * latent_dim)
        self.atom_head = nn.Linear(width, len(ATOM_TYPES))
        self.bond_head = PairHead(width)

    @property
    def latent_shape(self):
        """Of one molecule's latent: (9, latent_dim)."""
        return MAX_ATOMS, self.config.latent_dim

    def encode(self, atoms, bonds):
        """q(z | graph) = N(mean, exp(logvar)). Shapes: (B, 9), (B, 9, 9) -> mean, logvar, each (B, 9, latent_dim)."""
        tokens = self.embed(one_hot_graphs(atoms, bonds).to(self.dtype)) + self.position[0]
        mean, logvar = self.to_latent(self.encoder(tokens)).chunk(2, -1)
        return mean, logvar.clamp(-12, 4)

    def decode(self, z):
        """Logits of p(graph | z). Shapes: (B, 9, latent_dim) -> atoms (B, 9, 5), bonds of pairs i < j (B, 36, 4)."""
        tokens = self.decoder(self.embed_latent(z) + self.position[1])
        return self.atom_head(tokens), self.bond_head(tokens)

    @torch.no_grad()
    def decode_graphs(self, z):
        """The most likely graph of each latent, bonds to padding removed. Returns int8 (B, 9) and (B, 9, 9).

        Raises: ValueError where latents or weights hold NaN or infinite values.
        """
        atom_logits, bond_logits = self.decode(z)
        check_finite("what the TokenVAE decoded", atom_logits, bond_logits)
        atoms = atom_logits.argmax(-1).to(torch.int8)
        pairs = bond_logits.argmax(-1).to(torch.int8)
        return atoms, mask_bonds(atoms, matrix_from_pairs(pairs))

    def loss(self, atoms, bonds, kl_weight):
        """Reconstruction and weighted KL per molecule in nats (β-VAE, Higgins et al. 2017); with kl_weight 1, -ELBO.

        loss = -log p(atoms | z) - Σ_{i<j} log p(bond_ij | z) + kl_weight · KL(q(z | graph) ‖ N(0, I))
        Shapes: atoms (B, 9), bonds (B, 9, 9) -> ().
        """
        mean, logvar = self.encode(atoms, bonds)
        atom_logits, bond_logits = self.decode(reparameterise(mean, logvar, torch.randn_like(mean)))
        reconstruction = summed_cross_entropy(atom_logits, atoms)
        reconstruction = reconstruction + summed_cross_entropy(bond_logits, pairs_from_matrix(bonds))
        kl = kl_divergence(mean.float(), logvar.float()).sum()
        return (reconstruction + kl_weight * kl) / len(atoms)

    forward = loss  # so that training through DistributedDataParallel works


@torch.no_grad()
def encode_graphs(vae, atoms, bonds, batch_size=2000):
    """Posterior means of many graphs, the latents that diffusion learns.

    Shapes: atoms (N, 9), bonds (N, 9, 9), arrays or tensors -> float tensor (N, 9, latent_dim), on the CPU.
    """
    check_count("batch_size", batch_size)
    atoms, bonds = map(torch.from_numpy, check_graphs(atoms, bonds))
    means = []
    for some_atoms, some_bonds in zip(atoms.split(batch_size), bonds.split(batch_size)):
        mean, _ = vae.encode(some_atoms.to(vae.device), some_bonds.to(vae.device))
        means.append(mean.float().cpu())
    return torch.cat(means)


# ---------------------------------------------------------------------------------------------------------------------
# A VAE on sequences
# ---------------------------------------------------------------------------------------------------------------------


class SequenceVAE(ModelMixin, ConfigMixin):
    """A variational autoencoder on one-hot sequences of any length and width, the TokenVAE's sibling.

    Neighbouring rows share a token, so that the transformers have few tokens to compare and a token much to say. A
    sequence is given by the class numbers of its rows, int (B, length), which say the same as its one-hots.

    Args:
        length, classes: of the sequences: rows, and entries of a row.
        rows: of a sequence that share one latent token.
        width, layers: of the transformer encoder and of the decoder, which has the same size.
        latent_dim: numbers per token.
    """

    @register_to_config
    def __init__(
        self, length: int, classes: int, rows: int = 4, width: int = 128, layers: int = 3, latent_dim: int = 8
    ):
        super().__init__()
        tokens = math.ceil(length / rows)
        self.embed = nn.Linear(rows * classes, width)
        self.embed_latent = nn.Linear(latent_dim, width)
        self.position = nn.Parameter(torch.randn(2, tokens, width) * 0.02)  # encoder's, decoder's
        self.encoder = transformer(width, layers)
        self.decoder = transformer(width, layers)
        self.to_latent = nn.Linear(width, 2 * latent_dim)
        self.head = nn.Linear(width, rows * classes)

    @property
    def latent_shape(self):
        """Of one sequence's latent: (tokens, latent_dim)."""
        return self.position.shape[1], self.config.latent_dim

    def encode(self, classes):
        """q(z | sequence) = N(mean, exp(logvar)). Shapes: (B, length) -> mean, logvar, each (B, tokens, latent_dim)."""
        one_hots = F.one_hot(classes.long(), self.config.classes).to(self.dtype)
        missing = self.position.shape[1] * self.config.rows - self.config.length  # rows of the last token
        tokens = F.pad(one_hots, (0, 0, 0, missing)).reshape(len(classes), self.position.shape[1], -1)
        mean, logvar = self.to_latent(self.encoder(self.embed(tokens) + self.position[0])).chunk(2, -1)
        return mean, logvar.clamp(-12, 4)

    def decode(self, z):
        """Logits of p(sequence | z). Shapes: (B, tokens, latent_dim) -> (B, length, classes)."""
        tokens = self.decoder(self.embed_latent(z) + self.position[1])
        rows = self.head(tokens).reshape(len(z), -1, self.config.classes)
        return rows[:, : self.config.length]

    def loss(self, classes, kl_weight):
        """Reconstruction and weighted KL per sequence in nats, as in `TokenVAE.loss`. Shapes: (B, length) -> ()."""
        mean, logvar = self.encode(classes)
        logits = self.decode(reparameterise(mean, logvar, torch.randn_like(mean)))
        kl = kl_divergence(mean.float(), logvar.float()).sum()
        return (summed_cross_entropy(logits, classes) + kl_weight * kl) / len(classes)

    forward = loss  # so that training through DistributedDataParallel works


# ---------------------------------------------------------------------------------------------------------------------
# Denoisers
# ---------------------------------------------------------------------------------------------------------------------


class GraphDenoiser(ModelMixin, ConfigMixin):
    """The network of graph diffusion: from a noisy graph to class logits of the clean one.

    A residual MLP over the 9 atom rows and 36 pairs at once; atom order is canonical, so a weight can belong to a
    place. It also reads its own last guess of x_0 (self-conditioning, Chen et al., arXiv:2208.04202).

    Args: width, hidden, depth, time_dim: sizes of the residual MLP.
    """

    @register_to_config
    def __init__(self, width: int = 512, hidden: int = 1024, depth: int = 5, time_dim: int = 128):
        super().__init__()
        self.time = time_network(time_dim)
        self.embed = nn.Linear(2 * GRAPH_SIZE, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden, time_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, GRAPH_SIZE)

    def forward(self, x_t, t, x_0=None):
        """Logits of the clean graph.

        Shapes: x_t (B, 189), t (B,) or (), x_0 (B, 189): the last guess, or None before the first -> (B, 189).
        """
        split_vector(x_t)  # refuses other shapes
        if x_0 is None:
            x_0 = torch.zeros_like(x_t)
        time = self.time(timestep_embedding(t.reshape(-1), self.config.time_dim).to(self.dtype))
        x = self.embed(torch.cat([x_t, x_0], -1))
        for block in self.blocks:
            x = block(x, time)
        return self.out(self.norm(x))


def standardise(z):
    """Latents with one mean for every dimension but ONE scale. Returns: standardised (N, 9, d), mean (9, d), scale ().

    The scale is the mean standard deviation of the dimensions that carry information (a tenth of the largest).
    """
    if len(z) < 2:
        raise ValueError(f"latents of {len(z)} molecules: their spread needs at least 2")
    mean, spread = z.mean(0), z.std(0)
    scale = spread[spread > 0.1 * spread.max()].mean()
    return (z - mean) / scale, mean, scale


class LatentDenoiser(ModelMixin, ConfigMixin):
    """The network of latent diffusion: a residual MLP on the flattened latent, predicting v (arXiv:2202.00512).

    It works on standardised latents, (z - latent_mean) / latent_scale: one mean for every dimension but ONE scale, so
    that dimensions which the VAE does not use stay small. Both are stored with the weights, and a mark of the VAE too.
    With a condition it is the network of the diffusion prior (Ramesh et al., arXiv:2204.06125). With self-conditioning
    it also reads its own last guess of z_0 (Chen et al., arXiv:2208.04202).

    Args:
        latent_dim: numbers per token, as in the TokenVAE.
        width, hidden, depth, time_dim: sizes of the residual MLP.
        condition_dim: numbers of the condition, 0 for none.
        self_conditioning: whether it reads its last guess.
        tokens: of a latent: a molecule's nine, or those of a SequenceVAE.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 8,
        width: int = 768,
        hidden: int = 1536,
        depth: int = 3,
        time_dim: int = 128,
        condition_dim: int = 0,
        self_conditioning: bool = False,
        tokens: int = MAX_ATOMS,
    ):
        super().__init__()
        size = tokens * latent_dim
        self.register_buffer("latent_mean", torch.zeros(tokens, latent_dim))
        self.register_buffer("latent_scale", torch.ones(()))
        self.register_buffer("vae_mark", torch.zeros(8))
        self.time = time_network(time_dim)
        self.embed = nn.Linear(size * (1 + self_conditioning) + condition_dim, width)
        if condition_dim:
            self.condition = nn.Sequential(nn.Linear(condition_dim, width), nn.SiLU(), nn.Linear(width, time_dim))
        self.blocks = nn.ModuleList(ResidualBlock(width, hidden, time_dim) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, size)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def set_latents(self, vae, z):
        """Remember the VAE and how its latents z (N, 9, latent_dim) are standardised. Returns: them, standardised."""
        standardised, mean, scale = standardise(z)
        self.latent_mean.copy_(mean)
        self.latent_scale.copy_(scale)
        self.vae_mark.copy_(_vae_mark(vae))
        return standardised

    def check_vae(self, vae):
        """Raises: ValueError where the network was trained on the latents of another VAE."""
        mark = self.vae_mark.float()
        if mark.any() and not torch.allclose(mark, _vae_mark(vae).to(mark.device), atol=1e-3, rtol=1e-2):
            raise ValueError(
                "this denoiser was trained on the latents of another VAE; its samples would decode to nonsense. Take "
                "both from one pipeline, or train the denoiser on this VAE's latents (set_latents)"
            )

    def forward(self, z_t, t, condition=None, z_0=None):
        """The network's v.

        Shapes: z_t (B, 9, latent_dim), t (B,) or (), condition (B, condition_dim), z_0 (B, 9, latent_dim): the last
        guess, or None before the first -> (B, 9, latent_dim).
        """
        time = self.time(timestep_embedding(t.reshape(-1), self.config.time_dim).to(self.dtype))
        x = z_t.flatten(1)
        if self.config.self_conditioning:
            x = torch.cat([x, torch.zeros_like(x) if z_0 is None else z_0.flatten(1)], 1)
        if self.config.condition_dim:
            time = time + self.condition(condition)
            x = torch.cat([x, condition], 1)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, time)
        return self.out(self.norm(x)).view_as(z_t)


def _vae_mark(vae):
    """Eight of a VAE's weights, enough to tell it from any other."""
    return vae.to_latent.weight.detach().flatten()[:8].float()
