"""Notebook 04: diffusion on latents."""

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
)

from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.checks import quoted
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_something, known_network
from molecule_diffusion.exercises.predicting import Name, Number, prediction
from molecule_diffusion.models import encode_graphs, standardise
from molecule_diffusion.qm9 import shared_qm9
from molecule_diffusion.schedules import NOISE_SCHEDULE, alpha_bars, cosine_betas, sampler

prediction("04.p1", Name(("a half", "a tenth", "hardly at all")))
prediction("04.p2", Name(("below", "above")))
prediction("04.p3", Number("of the 72 numbers", lowest=0, highest=72))
prediction("04.p4", Number("as the mean of the draws"))
prediction("04.p5", Number("% valid after one step", lowest=0, highest=100))
prediction("04.p6", Number("weights", lowest=0))
prediction("04.p7", Name(("decoder", "diffusion")))
prediction("04.p8", Number("% of the valid results", lowest=0, highest=100))

# ---------------------------------------------------------------------------------------------------------------------
# 04.1 to 04.3: latents, v, the loop
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# 04.4: samples that are all alike
# ---------------------------------------------------------------------------------------------------------------------


def make_scheduler():
    """A DDPMScheduler for latents: the course's noise schedule, and no guess cut to the range of pixels."""
    return DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False)


def _gaussian_v(z_t, t, alpha_bar):
    """The exact v for data N(2, 0.5²)."""
    a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    z_0 = 2 + 0.25 * a / (0.25 * a**2 + s**2) * (z_t - 2 * a)
    return (a * z_t - z_0) / s


def _mean_of_known_data(scheduler):
    """The mean of 2,000 draws with an exact network; the data's is 2."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(20)
    z = torch.randn(2000, 1, generator=generator)
    for t in scheduler.timesteps:
        v = _gaussian_v(z, t, scheduler.alphas_cumprod)
        z = scheduler.step(v, t, z, generator=generator).prev_sample
    return z.mean().item()


@exercise("04.4", make_scheduler)
def _check_make_scheduler(answer):
    got = answer()
    expect_something(got)
    if isinstance(got, type):
        raise WrongAnswer("this is the class; call it, and return the scheduler that it makes")
    if not isinstance(got, DDPMScheduler):
        raise WrongAnswer(f"return a DDPMScheduler; {type(got).__name__} came")
    for name, value in NOISE_SCHEDULE.items():
        if got.config[name] != value:
            raise WrongAnswer(
                f"{name} was right: the network was trained with {value!r}, yours has {got.config[name]!r}; "
                "leave it, and look at the settings that are *not* written down"
            )
    if got.config.thresholding:
        raise WrongAnswer("thresholding cuts the guesses, too, only at another place for each; latents have no range")
    mean = _mean_of_known_data(got)
    if abs(mean - 2) < 0.1:
        return
    if got.config.clip_sample:
        reach = got.config.clip_sample_range
        raise WrongAnswer(
            f"on data with the mean 2 and an exact network, your sampler draws the mean {mean:.2f}: no guess of z_0 "
            f"above {reach:g} gets through. Which setting cuts the guesses? Print the whole config"
        )
    raise WrongAnswer(f"on data with the mean 2 and an exact network, your sampler draws the mean {mean:.2f}")


# ---------------------------------------------------------------------------------------------------------------------
# 04.5: a schedule that was lost on the way
# ---------------------------------------------------------------------------------------------------------------------


def swap(kind, scheduler):
    """Another sampler for the same network: a scheduler of class `kind` with the noise schedule of `scheduler`."""
    settings = {name: scheduler.config[name] for name in NOISE_SCHEDULE}
    return kind.from_config(scheduler.config, **settings)


_SWAPS = [  # what a network was trained with, and the class that shall draw from it
    (HeunDiscreteScheduler, {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}),
    (DDIMScheduler, {"prediction_type": "epsilon", "beta_end": 0.015, "clip_sample": False}),
    (DPMSolverMultistepScheduler, NOISE_SCHEDULE | {"num_train_timesteps": 400, "clip_sample": False}),
    (KDPM2DiscreteScheduler, {"prediction_type": "sample", "beta_schedule": "scaled_linear", "clip_sample": False}),
]


@exercise("04.5", swap)
def _check_swap(answer):
    for kind, settings in _SWAPS:
        scheduler = DDPMScheduler(**settings)
        before = dict(scheduler.config)
        got = answer(kind, scheduler)
        expect_something(got)
        if isinstance(got, type):
            raise WrongAnswer("this is the class; return a scheduler of that class")
        if not isinstance(got, kind):
            raise WrongAnswer(f"asked for a {kind.__name__}, a {type(got).__name__} came")
        if dict(scheduler.config) != before:
            raise WrongAnswer("the scheduler that was handed over has been changed; make a new one")
        for name in NOISE_SCHEDULE:
            wanted, found = before[name], got.config[name]
            if found != wanted:
                raise WrongAnswer(_lost_setting(kind, name, wanted, found, settings))
        if got.config.get("clip_sample"):
            raise WrongAnswer(f"clip_sample has become True again in {kind.__name__}, by its own default")


def _lost_setting(kind, name, wanted, found, given):
    """What to say about a setting that did not arrive."""
    said = f"{name} is {found!r} in your {kind.__name__}, but the network was trained with {wanted!r}"
    if found == NOISE_SCHEDULE[name] and wanted != NOISE_SCHEDULE[name]:
        return f"{said}: take it from `scheduler.config`, for not every network has the course's noise schedule"
    if name not in given:
        return f"{said}: nobody wrote it down, so the new class took its own default. Hand it over by name"
    return f"{said}: hand it over as well"


# ---------------------------------------------------------------------------------------------------------------------
# 04.6: whose fault is it?
# ---------------------------------------------------------------------------------------------------------------------

FAULTS = ("decoder", "diffusion", "clipping", "memorised", "nothing")
diagnosis = {"A": "decoder", "B": "diffusion", "C": "clipping", "D": "memorised", "E": "nothing"}
_WHY = {
    "A": "compare the molecules that were only encoded and decoded with those that were drawn: are these worse?",
    "B": "its VAE rebuilds nearly everything, and what it rebuilds is valid; the drawn latents are new and spread out "
    "as real ones are. What is left?",
    "C": "look at the spread of the drawn latents, beside that of encoded molecules",
    "D": "look at how many draws are molecules that the diffusion has learned from",
    "E": "compare each of its numbers with that of the training molecules",
}


@exercise("04.6", diagnosis)
def _check_diagnosis(answer):
    if not isinstance(answer, dict) or set(answer) != set(diagnosis):
        raise WrongAnswer(f"expected a dictionary with the keys {', '.join(diagnosis)}")
    for letter, fault in answer.items():
        if fault not in FAULTS:
            raise WrongAnswer(f"{letter} is {quoted(fault)}: expected one of {', '.join(FAULTS)}")
    if len(set(answer.values())) < len(answer):
        raise WrongAnswer("each of the five names belongs to one letter")
    for letter, fault in diagnosis.items():
        if answer[letter] != fault:
            raise WrongAnswer(f"{letter} is not {answer[letter]!r}: {_WHY[letter]}")


# ---------------------------------------------------------------------------------------------------------------------
# 04.7: how much noise an edit needs
# ---------------------------------------------------------------------------------------------------------------------

edit_setting = {"strength": 0.4, "num_inference_steps": 30}
EDIT_GOAL, EDIT_CALLS = 0.1, 12


@exercise("04.7", edit_setting)
def _check_edit_setting(answer):
    if not isinstance(answer, dict) or set(answer) != set(edit_setting):
        raise WrongAnswer(f"expected a dictionary with the keys {', '.join(map(repr, edit_setting))}")
    strength, steps = answer["strength"], answer["num_inference_steps"]
    if isinstance(strength, (bool, str)) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
        raise WrongAnswer(f"strength={quoted(strength)}: expected a number from 0 to 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:
        raise WrongAnswer(f"num_inference_steps={quoted(steps)}: expected a whole number from 1 to 1000")
    calls = round(strength * steps)
    if calls > EDIT_CALLS:
        raise WrongAnswer(
            f"{strength:g} of {steps} steps are {calls} network calls per molecule; {EDIT_CALLS} are allowed"
        )
    if calls == 0:
        raise WrongAnswer(f"{strength:g} of {steps} steps is no step at all: every molecule comes back as it was")
    related, unchanged = _measured_edits(strength, steps)
    if related < EDIT_GOAL:
        way = "most molecules come back unchanged: more noise" if unchanged > 0.4 else "too little is kept: less noise"
        if unchanged <= 0.4 and calls < 6:
            way = "or the way back is too short: more steps"
        raise WrongAnswer(
            f"of 400 edits {related:.0%} are valid, new and related, and {unchanged:.0%} are unchanged; "
            f"{EDIT_GOAL:.0%} related ones were asked for ({way})"
        )


def _measured_edits(strength, steps):
    """Shares of 400 edits of 20 validation molecules: valid, changed and of similarity 0.4 or more; unchanged."""
    qm9 = shared_qm9()
    pipe = load_pipeline("latent_diffusion")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = sampler("SDE-DPM-Solver++")
    rows = qm9.validation[::250].repeat(20)
    originals = [qm9.smiles[i] for i in rows]
    latents = encode_graphs(pipe.vae, qm9.atoms[rows], qm9.bonds[rows])
    generator = torch.Generator().manual_seed(0)
    edited = pipe(len(rows), steps, generator=generator, latents=latents, strength=float(strength))
    related = unchanged = 0
    for before, after, valid in zip(originals, edited.smiles, edited.valid):
        unchanged += before == after
        related += bool(valid) and before != after and tanimoto(before, after) >= 0.4
    return related / len(rows), unchanged / len(rows)


def tanimoto(first, second):
    """Similarity of the Morgan fingerprints (radius 2) of two SMILES, 0 to 1."""
    from rdkit import Chem, DataStructs
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    generator = GetMorganGenerator(radius=2)
    first, second = (generator.GetFingerprint(Chem.MolFromSmiles(smiles)) for smiles in (first, second))
    return DataStructs.TanimotoSimilarity(first, second)


# ---------------------------------------------------------------------------------------------------------------------
# 04.8: keep a fragment
# ---------------------------------------------------------------------------------------------------------------------


def repaint(step, known, keep, timesteps, alpha_bar, repeats, n, generator):
    """Draw n latents whose kept tokens follow a known one at every noise level (RePaint, arXiv:2201.09865).

    Args:
        step: function (z, t, s, generator) -> z one step later; s is the next timestep, None after the last.
        known: (9, d), clean; keep: (9,) bool, which of its tokens stay.
        timesteps: falling; alpha_bar: (T,).
        repeats: how often each step but the last is taken; between two of them z is noised from s up to t again.

    Random numbers are drawn by `torch.randn(z.shape, generator=generator)` in this order: the start; then per visit
    those of the way up (not for the first visit), those of the known tokens, those of the step. Returns: (n, 9, d).
    """
    z = torch.randn((n, *known.shape), generator=generator)
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        s = None if last else timesteps[k + 1]
        for visit in range(1 if last else repeats):
            if visit > 0:
                kept = alpha_bar[t] / alpha_bar[s]
                z = kept.sqrt() * z + (1 - kept).sqrt() * torch.randn(z.shape, generator=generator)
            noise = torch.randn(z.shape, generator=generator)
            noised = alpha_bar[t].sqrt() * known + (1 - alpha_bar[t]).sqrt() * noise
            z = torch.where(keep[:, None], noised, z)
            z = step(z, t, s, generator)
    return torch.where(keep[:, None], known, z)


def _wrong_repaint(step, known, keep, timesteps, alpha_bar, repeats, n, generator, mistake):
    """`repaint` with one of the mistakes that students make, to recognise it."""
    mask = keep if mistake == "numbers" else keep[:, None]
    if mistake == "inverted":
        mask = ~mask
    z = torch.randn((n, *known.shape), generator=generator)
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        s = None if last else timesteps[k + 1]
        visits = 1 if last or mistake == "once" else repeats
        for visit in range(visits + (mistake == "one more" and not last)):
            if visit > 0 and mistake != "no way up":
                kept = alpha_bar[t] if mistake == "all the way" else alpha_bar[t] / alpha_bar[s]
                up = torch.randn(z.shape, generator=generator)
                z = kept * z + (1 - kept) * up if mistake == "up roots" else kept.sqrt() * z + (1 - kept).sqrt() * up
            noise = torch.randn(z.shape, generator=generator)
            a = alpha_bar[t]
            noised = a * known + (1 - a) * noise if mistake == "roots" else a.sqrt() * known + (1 - a).sqrt() * noise
            if mistake == "clean":
                noised = known.expand_as(z)
            if mistake == "after":
                z = torch.where(mask, noised, step(z, t, s, generator))
            else:
                z = step(torch.where(mask, noised, z), t, s, generator)
    return z if mistake == "end" else torch.where(mask, known, z)


_REPAINT_MISTAKES = {
    "inverted": "the mask is inverted: `keep` is True where the molecule is *known*",
    "numbers": "the mask runs over numbers, not tokens: `keep[:, None]`",
    "clean": "the known tokens are put in clean, beside noisy ones; noise them to step t first",
    "roots": "the square roots are missing where the known tokens are noised",
    "after": "the known tokens are put in *after* the step, with the noise of t; put them in before it",
    "once": "every step is taken once only; `repeats` has no effect",
    "one more": "each step is taken repeats + 1 times; `repeats` counts the first one, too",
    "no way up": "a step is repeated without noising z from s up to t before, so the network is told the wrong t",
    "all the way": "on the way up from s to t the kept share is ᾱ_t / ᾱ_s, not ᾱ_t",
    "up roots": "the square roots are missing on the way up from s to t",
    "end": "at the very end the kept tokens are still the network's; put the known ones in once more",
}


@exercise("04.8", repaint)
def _check_repaint(answer):
    alpha_bar = alpha_bars(cosine_betas(1000))
    predict_v = known_network(alpha_bar)
    made = torch.Generator().manual_seed(0)
    known, keep = torch.randn(9, 9, generator=made), torch.arange(9) < 4

    def step(z, t, s, generator):
        after = torch.ones(()) if s is None else alpha_bar[s]
        z_0 = alpha_bar[t].sqrt() * z - (1 - alpha_bar[t]).sqrt() * predict_v(z, t)
        z_0 = z_0 + 0.5 * z.mean(1, keepdim=True)  # every token looks at all, the kept ones too
        return after.sqrt() * z_0 + 0.5 * (1 - after).sqrt() * torch.randn(z.shape, generator=generator)

    def run(loop, repeats, *extra):
        seeded = torch.Generator().manual_seed(1)
        return loop(step, known.clone(), keep.clone(), [799, 599, 399, 199], alpha_bar, repeats, 3, seeded, *extra)

    for repeats in (1, 3):
        got = run(answer, repeats)
        expect_something(got)
        hints = [(run(_wrong_repaint, repeats, mistake), said) for mistake, said in _REPAINT_MISTAKES.items()]
        expect(got, run(repaint, repeats), f"three latents, four tokens kept, repeats = {repeats}", hints)
