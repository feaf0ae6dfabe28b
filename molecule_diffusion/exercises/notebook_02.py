"""Notebook 02: variational autoencoders."""

import torch

from molecule_diffusion.chemistry import MAX_ATOMS
from molecule_diffusion.encodings import align, apply_thresholds
from molecule_diffusion.exercises.checking import exercise, expect, expect_pair
from molecule_diffusion.models import kl_divergence, reparameterise, slerp


@exercise("02.1", reparameterise)
def _check_reparameterise(answer):
    mean, logvar, eps = torch.tensor([1.0, -2.0]), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    hints = [
        (mean + logvar * eps, "`logvar` is a logarithm, not σ"),
        (mean + logvar.exp() * eps, "exp(logvar) is the variance σ²; the noise is multiplied by σ"),
        (mean + (0.5 * logvar).exp(), "the noise `eps` is missing"),
        (mean + (-0.5 * logvar).exp() * eps, "the sign in the exponential is wrong: a larger logvar is a wider cloud"),
    ]
    expect(answer(mean, logvar, eps), reparameterise(mean, logvar, eps), "mean (1, -2), logvar (2, -1)", hints)
    expect(answer(mean[:1], logvar[:1] * 0, eps[:1]), [1.5], "mean 1, logvar 0, eps 0.5")


@exercise("02.2", kl_divergence)
def _check_kl_divergence(answer):
    mean, logvar = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]), torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]])
    terms = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    hints = [
        (-terms.sum(-1), "the sign is wrong: a KL is never negative"),
        (2 * terms.sum(-1), "the factor ½ is missing"),
        (terms.sum(), "one number for the whole batch; sum over the last axis only"),
        (terms.sum(0), "this sums over the batch; sum over the latent dimensions"),
        (terms.mean(-1), "this is a mean over dimensions; the KL is their sum"),
        (0.5 * (mean**2 + logvar**2 - 1 - logvar).sum(-1), "σ² is exp(logvar)"),
    ]
    expect(answer(mean, logvar), kl_divergence(mean, logvar), "two molecules, three dimensions", hints)


@exercise("02.3", align)
def _check_align(answer):
    adjacency = torch.arange(162.0).view(2, 9, 9)
    order = torch.stack([torch.tensor([2, 0, 3, 1, 4, 5, 6, 8, 7]), torch.arange(8, -1, -1)])
    batch = torch.arange(2)[:, None]
    hints = [
        (adjacency, "nothing moved"),
        (adjacency[batch, order], "rows moved but columns did not"),
        (adjacency.transpose(1, 2)[batch, order].transpose(1, 2), "columns moved but rows did not"),
        (align(adjacency, order.argsort(1)), "this is the inverse: place k must hold true atom order[k]"),
        (adjacency[:, order[0]][:, :, order[0]], "every matrix was put in the first one's order"),
    ]
    expect(answer(adjacency.clone(), order), align(adjacency, order), "two matrices, two orders", hints)


@exercise("02.4", apply_thresholds)
def _check_apply_thresholds(answer):
    adjacency = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    adjacency = (adjacency + adjacency.transpose(1, 2)) / 2
    exists, bonded = apply_thresholds(adjacency, 0.4, 0.6)
    got = answer(adjacency.clone(), 0.4, 0.6)
    expect_pair(got, "which atoms exist and which pairs are bonded")
    swapped = apply_thresholds(adjacency, 0.6, 0.4)
    diagonal = adjacency.diagonal(dim1=1, dim2=2)
    hints = [
        (swapped[0], "the two thresholds are exchanged"),
        (diagonal < 0.6, "above the threshold exists, not below"),
    ]
    expect(got[0], exists, "which atoms exist", hints)
    off = ~torch.eye(MAX_ATOMS, dtype=torch.bool)
    hints = [
        ((adjacency > 0.4) & off, "a bond leads to an atom that does not exist: mask with both atoms"),
        ((adjacency > 0.4) & exists[:, :, None] & off, "only rows are masked; both atoms must exist"),
        ((adjacency > 0.4) & exists[:, None] & off, "only columns are masked; both atoms must exist"),
        (
            (adjacency > 0.4) & exists[:, :, None] & exists[:, None],
            "atoms are bonded to themselves: clear the diagonal",
        ),
    ]
    expect(got[1], bonded, "which pairs are bonded", hints)


def strict_shares(smiles):
    """Shares valid (of all) and unique (of the valid) of canonical SMILES; None and SMILES with a dot are not valid."""
    valid = [text for text in smiles if text is not None and "." not in text]
    return len(valid) / len(smiles), len(set(valid)) / len(valid) if valid else 0.0


@exercise("02.5", strict_shares)
def _check_strict_shares(answer):
    smiles = ["CCO", None, "C.C", "CCO", "C#N", None, "CCO", "O"]
    got = answer(list(smiles))
    expect_pair(got, "the shares valid and unique")
    hints = [
        (6 / 8, "a SMILES with a dot is in pieces and not valid"),
        (5 / 6, "this divides by those that RDKit took; divide by all, None included"),
        (5, "this is a count; return a share"),
    ]
    expect(got[0], 5 / 8, "valid: five of eight", hints)
    hints = [
        (3 / 8, "this divides by all; unique is a share of the valid ones"),
        (4 / 6, "the pieces are counted; unique is a share of the valid ones"),
        (3, "this is a count; return a share"),
        (2 / 5, "this counts those that occur once; count distinct ones"),
    ]
    expect(got[1], 3 / 5, "unique: CCO, C#N and O of five valid ones", hints)
    got = answer([None, "C.O"])
    expect_pair(got, "the shares valid and unique")
    expect(got, (0, 0), "no valid one")


@exercise("02.6", slerp)
def _check_slerp(answer):
    a, b = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 2.0])
    theta = torch.arccos((a @ b) / (a.norm() * b.norm()))
    cosine = torch.arccos(((a @ b) / 27).clamp(-1, 1))
    hints = [
        (0.75 * a + 0.25 * b, "this is the straight line"),
        (slerp(b, a, 0.25), "the ends are exchanged: s = 0 must give a"),
        (torch.sin(0.75 * theta) * a + torch.sin(0.25 * theta) * b, "divide by sin(θ)"),
        (
            (torch.sin(0.75 * cosine) * a + torch.sin(0.25 * cosine) * b) / torch.sin(cosine),
            "the angle is off: divide a·b by both lengths",
        ),
    ]
    expect(answer(a, b, 0.25), slerp(a, b, 0.25), "a quarter of the way", hints)
    expect(answer(a, b, 1.0), b, "s = 1")
