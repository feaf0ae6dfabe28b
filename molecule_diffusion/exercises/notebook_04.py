"""Notebook 04: diffusion on latents."""

import torch

from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_something, known_network
from molecule_diffusion.models import standardise
from molecule_diffusion.schedules import alpha_bars, cosine_betas


@exercise("04.1", standardise)
def _check_standardise(answer):
    z = torch.randn(500, 9, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 0.01]) + 3
    z[:, :3] *= 2
    expected, mean, scale = standardise(z)
    got = answer(z.clone())
    expect_something(got)
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        raise WrongAnswer("return three things: the standardised latents, the mean, the scale")
    spread = z.std(0)
    hints = [
        (z.mean(), "this is one mean for everything; every dimension has its own: average over the molecules only"),
        (z.mean((0, 1)), "each of the 9 tokens has its own mean; average over the molecules only"),
        (z.mean((1, 2)), "this averages each molecule; average over the molecules, axis 0"),
    ]
    expect(got[1], mean, "the mean", hints)
    hints = [
        (spread, "this is one scale for every dimension: it blows dimensions without information up to full size"),
        (
            spread.mean(),
            "dimensions without information count in the scale; leave those under a tenth of the largest out",
        ),
        (spread.max(), "this is the largest spread; take the mean of those that carry information"),
        (z.std(), "one spread over all entries mixes in the differences between the means; take z.std(0) first"),
        (spread[spread <= 0.1 * spread.max()].mean(), "these are the dimensions *without* information"),
        (scale**2, "this is a variance; the scale is a standard deviation"),
    ]
    expect(got[2], scale, "the scale", hints)
    hints = [
        (z / scale, "the mean is not subtracted"),
        (z - mean, "the scale is missing"),
        (z / scale - mean, "subtract first, then divide"),
        ((z - mean) * scale, "divide by the scale; you multiplied"),
    ]
    expect(got[0], expected, "the standardised latents", hints)


def v_target(z_0, eps, t, alpha_bar):
    """v = sqrt(ᾱ_t)·ε - sqrt(1 - ᾱ_t)·z_0 (arXiv:2202.00512). Shapes: (B, ...), (B, ...), (B,), (T,) -> (B, ...)."""
    kept = alpha_bar[t].reshape(-1, *[1] * (z_0.ndim - 1))
    return kept.sqrt() * eps - (1 - kept).sqrt() * z_0


@exercise("04.2", v_target)
def _check_v_target(answer):
    z_0, eps, t = (
        torch.tensor([[2.0, -1.0], [0.5, 1.0]]),
        torch.tensor([[-0.5, 2.0], [-1.0, 0.3]]),
        torch.tensor([1, 2]),
    )
    alpha_bar = torch.tensor([0.9, 0.64, 0.1])
    kept = alpha_bar[t][:, None]
    hints = [
        (kept.sqrt() * z_0 + (1 - kept).sqrt() * eps, "this is z_t, the network's input; v is what it should answer"),
        (kept.sqrt() * eps + (1 - kept).sqrt() * z_0, "the sign: v *subtracts* z_0"),
        ((1 - kept).sqrt() * z_0 - kept.sqrt() * eps, "this is -v: the sign is turned round"),
        (kept.sqrt() * z_0 - (1 - kept).sqrt() * eps, "z_0 and ε are exchanged"),
        ((1 - kept).sqrt() * eps - kept.sqrt() * z_0, "the weights are exchanged: at little noise v is nearly ε"),
        (kept * eps - (1 - kept) * z_0, "both square roots are missing"),
        (kept.sqrt() * eps - (1 - kept) * z_0, "the square root at z_0 is missing"),
        (kept * eps - (1 - kept).sqrt() * z_0, "the square root at ε is missing"),
        (
            alpha_bar[t].sqrt() * eps - (1 - alpha_bar[t]).sqrt() * z_0,
            "each *row* has its own t; add axes to ᾱ_t",
        ),
    ]
    expect(answer(z_0, eps, t, alpha_bar), v_target(z_0, eps, t, alpha_bar), "two latents at t = 1 and t = 2", hints)
    z_0, eps = torch.ones(2, 9, 8), torch.zeros(2, 9, 8)
    expect(answer(z_0, eps, t, alpha_bar), v_target(z_0, eps, t, alpha_bar), "z_0 of shape (2, 9, 8)")


def ddpm_loop(predict_v, z, timesteps, alpha_bar, generator):
    """The reverse process of a network that predicts v, `predict_v(z_t, t)`: from noise z to z_0 (arXiv:2006.11239).

    timesteps fall and may leave steps out, so a step's α is ᾱ_t / ᾱ_s, s being the next one; after the last, ᾱ_s = 1.
    Fresh noise is drawn with `torch.randn(z.shape, generator=generator)` after every step but the last.
    """
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        now, after = alpha_bar[t], torch.ones_like(alpha_bar[0]) if last else alpha_bar[timesteps[k + 1]]
        alpha = now / after
        z_0 = now.sqrt() * z - (1 - now).sqrt() * predict_v(z, t)
        z = (after.sqrt() * (1 - alpha) * z_0 + alpha.sqrt() * (1 - after) * z) / (1 - now)
        if not last:
            variance = (1 - after) / (1 - now) * (1 - alpha)
            z = z + variance.sqrt() * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    return z


def _wrong_loop(predict_v, z, timesteps, alpha_bar, generator, mistake):
    """`ddpm_loop` with one of the mistakes that students make, to recognise it."""
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        now = alpha_bar[t]
        after = alpha_bar[-1] if last else alpha_bar[timesteps[k + 1]]
        if mistake == "one step":
            after = alpha_bar[t - 1] if t > 0 else torch.ones_like(now)
        elif last and mistake != "end":
            after = torch.ones_like(now)
        alpha, v = now / after, predict_v(z, t)
        z_0 = now.sqrt() * z - (1 - now).sqrt() * v
        if mistake == "epsilon":
            z_0 = (z - (1 - now).sqrt() * v) / now.sqrt()
        if mistake == "sample":
            z_0 = v
        if mistake == "jump":
            return z_0
        z = (after.sqrt() * (1 - alpha) * z_0 + alpha.sqrt() * (1 - after) * z) / (1 - now)
        variance = (1 - after) / (1 - now) * (1 - alpha)
        if mistake == "large":
            variance = 1 - alpha
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        if mistake == "variance":
            z = z + variance * noise
        elif mistake != "no noise" and (not last or mistake == "one step"):
            z = z + variance.sqrt() * noise
    return z


_LOOP_MISTAKES = {
    "no noise": "the fresh noise is missing: after every step but the last, add it",
    "variance": "the noise is scaled by the variance; take its square root",
    "large": "the noise is too large: the variance is β̃, the one with (1 - ᾱ_s) / (1 - ᾱ_t) in front",
    "epsilon": "the network's answer is used as if it were ε; it is v",
    "sample": "the network's answer is used as if it were z_0; it is v",
    "one step": "the steps are far apart: s is the *next of `timesteps`*, not t - 1",
    "end": "After the last step ᾱ_s is 1 (your index may have become -1, which Python reads as the last entry)",
    "jump": "this stops after the first guess of z_0; go on to the last timestep",
}


@exercise("04.3", ddpm_loop)
def _check_ddpm_loop(answer):
    alpha_bar = alpha_bars(cosine_betas(1000).double())
    timesteps = [799, 599, 399, 199]
    predict_v = known_network(alpha_bar)

    def run(loop, *extra):
        seeded = torch.Generator().manual_seed(1)
        return loop(predict_v, start.clone(), timesteps, alpha_bar, seeded, *extra)

    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hints = [(run(_wrong_loop, mistake), said) for mistake, said in _LOOP_MISTAKES.items()]
    hints.append((start, "nothing changed: return the z of the last step"))
    got = run(answer)
    expect_something(got)
    if torch.is_tensor(got) and got.isnan().any():
        raise WrongAnswer(f"the root of a negative number: 1 - α is below 0 somewhere. {_LOOP_MISTAKES['end']}")
    expect(got, run(ddpm_loop), "a known network, 4 steps, generator with seed 1", hints)


def steps_left(timesteps, strength):
    """The last `strength` of the timesteps (SDEdit, arXiv:2108.01073). Shapes: (S,) and a number -> (at most S,)."""
    return timesteps[len(timesteps) - round(strength * len(timesteps)) :]


@exercise("04.4", steps_left)
def _check_steps_left(answer):
    timesteps = torch.arange(100).flip(0) * 10 + 9
    got = answer(timesteps.clone(), 0.3)
    expect_something(got)
    hints = [
        (timesteps[:30], "these are the first steps, which start from pure noise; keep the *last* ones"),
        (timesteps[30:], "strength is the share of steps that is *done*; you left that share out"),
        (timesteps[-30], "this is the first timestep only; return it and all that follow"),
        (timesteps[71:], "one step short"),
        (timesteps[69:], "one step too many"),
        (30, "this is their number; return the timesteps"),
    ]
    expect(got, timesteps[70:], "100 timesteps, strength 0.3", hints)
    hints = [(timesteps[72:], "`int` cuts off: 0.29 · 100 is 28.999… in a computer. Use `round`")]
    expect(answer(timesteps.clone(), 0.29), timesteps[71:], "100 timesteps, strength 0.29", hints)
    hints = [(timesteps, "strength 0 must leave no step; `timesteps[-0:]` are all of them")]
    expect(answer(timesteps.clone(), 0.0), timesteps[:0], "strength 0", hints)
    expect(answer(timesteps.clone(), 1.0), timesteps, "strength 1")


def inpaint_mix(z_t, known, keep, t, eps, alpha_bar):
    """z_t with the known tokens noised to step t in place of its own (RePaint, arXiv:2201.09865, eq. 8).

    Shapes: z_t, eps (B, 9, d), known (9, d) clean, keep (9,) bool, t a whole number, alpha_bar (T,) -> (B, 9, d).
    """
    noised = alpha_bar[t].sqrt() * known + (1 - alpha_bar[t]).sqrt() * eps
    return torch.where(keep[:, None], noised, z_t)


@exercise("04.5", inpaint_mix)
def _check_inpaint_mix(answer):
    generator = torch.Generator().manual_seed(0)
    z_t, eps, known = (torch.randn(shape, generator=generator) for shape in ((3, 9, 9), (3, 9, 9), (9, 9)))
    keep, alpha_bar, t = torch.arange(9) < 4, torch.tensor([0.9, 0.64, 0.1]), 1
    mask, noised = keep[:, None], 0.8 * known + 0.6 * eps
    hints = [
        (torch.where(mask, z_t, noised), "the mask is inverted: `keep` is True where the molecule is *known*"),
        (torch.where(mask, known, z_t), "the known tokens are clean, z_t is noisy; noise them to step t first"),
        (torch.where(keep, noised, z_t), "the mask runs over numbers, not tokens: `keep[:, None]`"),
        (torch.where(mask, 0.64 * known + 0.36 * eps, z_t), "both square roots are missing"),
        (torch.where(mask, 0.8 * known + 0.36 * eps, z_t), "the square root at the noise is missing"),
        (torch.where(mask, 0.8 * known, z_t), "the noise is missing in the known tokens"),
        (noised, "every token was replaced; keep z_t where `keep` is False"),
        (0.8 * torch.where(mask, known, z_t) + 0.6 * eps, "z_t is noised a second time; noise the known part only"),
        (noised * mask, "the unknown tokens are zero; they must stay those of z_t"),
        (noised * mask + z_t, "both are added at the kept tokens; take z_t only where `keep` is False"),
    ]
    case = "three latents, tokens 0 to 3 known, ᾱ_t = 0.64"
    expect(
        answer(z_t.clone(), known, keep, t, eps, alpha_bar),
        inpaint_mix(z_t, known, keep, t, eps, alpha_bar),
        case,
        hints,
    )
    expect(
        answer(z_t.clone(), known, ~keep, 2, eps, alpha_bar), inpaint_mix(z_t, known, ~keep, 2, eps, alpha_bar), "t = 2"
    )
