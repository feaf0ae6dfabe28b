"""Notebook 03: diffusion on graphs."""

import numpy as np
import torch

from molecule_diffusion.chemistry import PAIRS
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_something
from molecule_diffusion.schedules import alpha_bars, cosine_betas, posterior_mean, q_sample


@exercise("03.1", alpha_bars)
def _check_alpha_bars(answer):
    betas = torch.tensor([0.1, 0.2, 0.5])
    hints = [
        (1 - betas, "these are the α of single steps; ᾱ is their product up to t"),
        (betas.cumprod(0), "this multiplies the β; multiply 1 - β"),
        ((1 - betas).cumsum(0), "this adds; ᾱ multiplies"),
        ((1 - betas).prod(), "one number; ᾱ has one for every step"),
        ((1 - betas).cumprod(0).sqrt(), "without the root: ᾱ itself"),
        (1 - betas.cumsum(0), "this subtracts the β one after another; multiply the 1 - β"),
    ]
    expect(answer(betas.clone()), alpha_bars(betas), "β = 0.1, 0.2, 0.5", hints)


@exercise("03.2", q_sample)
def _check_q_sample(answer):
    x_0, eps, t = torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[0.5, 2.0], [-1.0, 0.0]]), torch.tensor([0, 2])
    alpha_bar = torch.tensor([0.81, 0.5, 0.04])
    kept = alpha_bar[t][:, None]
    hints = [
        (kept * x_0 + (1 - kept) * eps, "both square roots are missing"),
        (kept.sqrt() * x_0 + (1 - kept) * eps, "the square root at the noise is missing"),
        (kept * x_0 + (1 - kept).sqrt() * eps, "the square root at x_0 is missing"),
        (kept.sqrt() * x_0 + (1 - kept.sqrt()) * eps, "take the root of 1 - ᾱ, not 1 minus the root"),
        ((1 - kept).sqrt() * x_0 + kept.sqrt() * eps, "signal and noise are exchanged"),
        (alpha_bar[t].sqrt() * x_0 + (1 - alpha_bar[t]).sqrt() * eps, "each *row* has its own t; add an axis to ᾱ_t"),
    ]
    expect(answer(x_0, t, eps, alpha_bar), q_sample(x_0, t, eps, alpha_bar), "two graphs at t = 0 and t = 2", hints)
    x_0, eps = torch.ones(2, 9, 9), torch.zeros(2, 9, 9)
    expect(answer(x_0, t, eps, alpha_bar), q_sample(x_0, t, eps, alpha_bar), "x_0 of shape (2, 9, 9)")


def symmetric_noise(noise):
    """Symmetric noise of variance 1 off the diagonal, 0 on it: the upper half, mirrored. Shapes: (..., 9, 9), same."""
    upper = noise.triu(1)
    return upper + upper.transpose(-1, -2)


@exercise("03.3", symmetric_noise)
def _check_symmetric_noise(answer):
    noise = torch.randn(2000, 9, 9, generator=torch.Generator().manual_seed(0))
    got = answer(noise.clone())
    expect_something(got)
    if not torch.is_tensor(got) or got.shape != noise.shape:
        raise WrongAnswer(f"expected a tensor of shape (2000, 9, 9), got {getattr(got, 'shape', type(got).__name__)}")
    if not torch.equal(got, got.transpose(1, 2)):
        raise WrongAnswer("entry [i, j] differs from entry [j, i]: not symmetric")
    if got.diagonal(dim1=1, dim2=2).any():
        raise WrongAnswer("the diagonal is not zero: no atom is bonded to itself")
    off = got[:, PAIRS[0], PAIRS[1]]
    if abs(np.corrcoef(off[:, :8].T)[np.triu_indices(8, 1)]).max() > 0.1:
        raise WrongAnswer("different pairs got the same noise; each pair needs its own draw")
    if abs(off.mean()) > 0.02:
        raise WrongAnswer(f"the mean off the diagonal is {off.mean():.2f}; noise has mean 0")
    if abs(off.var() - 1) > 0.03:
        raise WrongAnswer(
            f"the variance off the diagonal is {off.var():.2f}; the schedule expects 1. A mean of two draws has ½, "
            "their sum 2"
        )


@exercise("03.4", cosine_betas)
def _check_schedule(answer):
    for steps in (100, 1000):
        betas = answer(steps)
        expect_something(betas)
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.shape != (steps,):
            raise WrongAnswer(f"{steps} steps were asked for, β has shape {tuple(betas.shape)}")
        if not ((betas > 0) & (betas < 1)).all():
            raise WrongAnswer(f"β runs from {betas.min():.3g} to {betas.max():.3g}; each must be between 0 and 1")
        alpha_bar = alpha_bars(betas)
        if alpha_bar[-1] > 0.01:
            raise WrongAnswer(
                f"with {steps} steps ᾱ_T = {alpha_bar[-1]:.3f}: {alpha_bar[-1]:.0%} of the variance is still signal, "
                "but sampling starts from pure noise. Reach 0.01 or less"
            )
        if alpha_bar[0] < 0.98:
            raise WrongAnswer(f"the first of {steps} steps already destroys {1 - alpha_bar[0]:.0%} of x_0; at most 2 %")
        busy = ((alpha_bar > 0.05) & (alpha_bar < 0.95)).double().mean()
        if busy < 0.5:
            raise WrongAnswer(
                f"only {busy:.0%} of the {steps} steps lie where signal and noise mix (ᾱ between 0.05 and 0.95); "
                "the others are spent on what is nearly clean or nearly noise. Reach half"
            )


@exercise("03.5", posterior_mean)
def _check_posterior_mean(answer):
    betas = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)
    x_0, x_t = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.3, 0.4], dtype=torch.float64)
    alpha_bar = alpha_bars(betas)
    a, b, before, now = (1 - betas)[2], betas[2], alpha_bar[1], alpha_bar[2]
    hints = [
        (
            (before.sqrt() * b * x_t + a.sqrt() * (1 - before) * x_0) / (1 - now),
            "the weights of x_0 and x_t are exchanged",
        ),
        (
            (before * b * x_0 + a * (1 - before) * x_t) / (1 - now),
            "square roots are missing: at ᾱ_{t-1} and at α_t",
        ),
        (
            (now.sqrt() * b * x_0 + a.sqrt() * (1 - now) * x_t) / (1 - now),
            "ᾱ of step t stands where ᾱ of step t - 1 belongs",
        ),
        (before.sqrt() * b * x_0 + a.sqrt() * (1 - before) * x_t, "divide by 1 - ᾱ_t"),
        (
            (before.sqrt() * b * x_0 + now.sqrt() * (1 - before) * x_t) / (1 - now),
            "the weight of x_t has the root of α_t, a single step, not of ᾱ_t",
        ),
    ]
    expect(answer(x_0, x_t, 2, betas), posterior_mean(x_0, x_t, 2, betas), "β = 0.1, 0.2, 0.5 at t = 2", hints)
    expect(answer(x_0, x_t, 0, betas), x_0, "t = 0, where ᾱ_{-1} = 1 and only x_0 is left")


def x_0_from_eps(x_t, t, eps, alpha_bar):
    """The x_0 that x_t and the noise in it imply: `q_sample` solved for x_0. Shapes: (B, ...), (B,), (B, ...), (T,)."""
    kept = alpha_bar[t].reshape(-1, *[1] * (x_t.ndim - 1))
    return (x_t - (1 - kept).sqrt() * eps) / kept.sqrt()


@exercise("03.6", x_0_from_eps)
def _check_x_0_from_eps(answer):
    x_0, eps, t = torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[0.5, 2.0], [-1.0, 0.1]]), torch.tensor([0, 2])
    alpha_bar = torch.tensor([0.81, 0.5, 0.04])
    kept = alpha_bar[t][:, None]
    x_t = q_sample(x_0, t, eps, alpha_bar)
    hints = [
        ((x_t + (1 - kept).sqrt() * eps) / kept.sqrt(), "subtract the noise; you added it"),
        (x_t - (1 - kept).sqrt() * eps, "divide by the root of ᾱ_t"),
        ((x_t - (1 - kept) * eps) / kept.sqrt(), "the square root at the noise is missing"),
        ((x_t - (1 - kept).sqrt() * eps) / kept, "divide by the *root* of ᾱ_t"),
        ((x_t - eps) / kept.sqrt(), "the noise in x_t is scaled by the root of 1 - ᾱ_t"),
        ((x_t - (1 - kept).sqrt() * eps) * kept.sqrt(), "divide by the root of ᾱ_t; you multiplied"),
    ]
    expect(answer(x_t, t, eps, alpha_bar), x_0, "two graphs at t = 0 and t = 2", hints)
