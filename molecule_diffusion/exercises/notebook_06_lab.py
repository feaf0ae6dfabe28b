"""Notebook 06, sections 2, 4 and 5: a fair comparison, a paired one, a guided step, the debugging lab."""

import copy
import functools

import numpy as np
import torch
from diffusers import DDPMScheduler

from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.checks import quoted
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_something
from molecule_diffusion.models import encode_graphs
from molecule_diffusion.qm9 import shared_qm9
from molecule_diffusion.schedules import NOISE_SCHEDULE, cosine_betas, sampler

# ---------------------------------------------------------------------------------------------------------------------
# 06.1: a comparison confounded by its seed
# ---------------------------------------------------------------------------------------------------------------------


def compare(draw, settings, seed):
    """What `draw(generator=…, **setting)` returns for each of the settings, all from the same noise: {name: …}."""
    found = {}
    for name, setting in settings.items():
        generator = torch.Generator().manual_seed(seed)
        found[name] = draw(generator=generator, **setting)
    return found


class _Recorder:
    """A `draw` that keeps the noise and the setting of each call."""

    def __init__(self):
        self.noise, self.settings = {}, {}

    def __call__(self, generator=None, **setting):
        if generator is None:
            raise WrongAnswer("`draw` got no generator, so it takes torch's global one; hand it over: generator=…")
        if not isinstance(generator, torch.Generator):
            raise WrongAnswer(
                f"`draw` got generator={quoted(generator)}: expected a torch.Generator; a setting is handed over "
                "as **setting"
            )
        ticket = f"molecules of call {len(self.noise) + 1}"
        self.noise[ticket] = torch.randn(3, generator=generator)
        torch.randn(setting.get("num_inference_steps", 1), generator=generator)  # as a sampler with fresh noise does
        self.settings[ticket] = setting
        return ticket


def _noise_of(answer, settings, seed):
    """The noise (settings, 3) from which an answer draws with each setting."""
    draw, given = _Recorder(), copy.deepcopy(settings)
    got = answer(draw, given, seed)
    if got is None and not draw.noise:
        expect_something(got)
    if not draw.noise:
        raise WrongAnswer("`draw` was never called")
    if not isinstance(got, dict):
        raise WrongAnswer(f"return a dictionary, {{name: what was drawn}}; {type(got).__name__} came")
    if missing := [name for name in settings if name not in got]:
        raise WrongAnswer(
            f"there is no result for {missing[0]!r}; every setting needs one (a `return` inside the loop ends it)"
        )
    if given != settings:
        raise WrongAnswer("the caller's settings were changed; hand the generator over beside **setting")
    for name, setting in settings.items():
        if got[name] not in draw.noise:
            raise WrongAnswer(f"the result for {name!r} is not what `draw` returned")
        if not draw.settings[got[name]]:
            raise WrongAnswer(f"{name!r} was drawn without its setting; hand it over: draw(generator=…, **setting)")
        if draw.settings[got[name]] != setting:
            raise WrongAnswer(f"{name!r} was drawn with {draw.settings[got[name]]}, its setting is {setting}")
    return torch.stack([draw.noise[got[name]] for name in settings])


@exercise("06.1", compare)
def _check_compare(answer):
    settings = {"20 steps": {"num_inference_steps": 20}, "20 steps again": {"num_inference_steps": 20}}
    settings["25 steps"] = {"num_inference_steps": 25}
    before = torch.get_rng_state()
    try:
        first, other, again = (_noise_of(answer, settings, seed) for seed in (3, 8, 3))
        touched = not torch.equal(before, torch.get_rng_state())
    finally:
        torch.set_rng_state(before)
    if not torch.equal(first, first[:1].expand_as(first)):
        shared = torch.Generator().manual_seed(3)
        start = torch.randn(3, generator=shared)
        torch.randn(20, generator=shared)
        if torch.equal(first[:2], torch.stack([start, torch.randn(3, generator=shared)])):
            raise WrongAnswer(
                "the settings share one generator object: the second begins where the first one stopped, so with other "
                "noise. Make a generator anew for each setting"
            )
        raise WrongAnswer("the settings start from different noise; each needs a generator with the *same* seed")
    if touched:
        raise WrongAnswer(
            "this seeds torch's global generator, from which all other code draws as well; make a torch.Generator()"
        )
    if torch.equal(first, other):
        raise WrongAnswer("the noise is the same for seed 3 and for seed 8: the argument `seed` is not used")
    if not torch.equal(first, again):
        raise WrongAnswer("the same seed gave other noise the second time; seed each generator by `manual_seed(seed)`")


# ---------------------------------------------------------------------------------------------------------------------
# 06.4: a paired comparison
# ---------------------------------------------------------------------------------------------------------------------


def paired_verdict(rows, others, border):
    """Is the FCD of `rows` better than that of `others`? Paired by seed; a smaller FCD is better.

    Args:
        rows, others: lists of dicts with the keys "seed" and "fcd", the same seeds in any order.
        border: from how many standard errors on a mean difference counts.

    Returns: (mean difference, its standard error, "better", "worse" or "not resolved").
    """
    fcd_of = {row["seed"]: row["fcd"] for row in others}
    differences = np.array([row["fcd"] - fcd_of[row["seed"]] for row in rows])
    mean = differences.mean()
    error = differences.std(ddof=1) / len(differences) ** 0.5
    verdict = "not resolved"
    if mean < -border * error:
        verdict = "better"
    if mean > border * error:
        verdict = "worse"
    return mean, error, verdict


def _rows(fcds, seeds=(0, 1, 2)):
    """Rows of a study as an answer to 06.4 gets them."""
    return [{"seed": seed, "N": 2000, "fcd": fcd} for seed, fcd in zip(seeds, fcds)]


def _wrong_errors(rows, others):
    """What students compute in place of the standard error: [(value, what is wrong)]."""
    a, b = ([row["fcd"] for row in sorted(part, key=lambda row: row["seed"])] for part in (rows, others))
    d, n = np.subtract(a, b), len(a)
    return [
        (d.std(ddof=1), "this is the spread of *one* difference; their mean is known better, by the root of n"),
        (d.std() / n**0.5, "divide by n - 1 under the root of the spread, `ddof=1`; NumPy's default is n"),
        (d.std(), "this is the spread of one difference, and with NumPy's default n; use `ddof=1`, and divide by √n"),
        (d.std(ddof=1) / n, "divide the spread by the *root* of n, not by n"),
        (d.var(ddof=1) / n, "this is the variance of the mean; take its root"),
        (
            (np.var(a, ddof=1) / n + np.var(b, ddof=1) / n) ** 0.5,
            "this is the standard error without pairing, Var(A) + Var(B); take the spread of the *differences*",
        ),
    ]


# (what the case is, the rows, the others)
_PAIRS = [
    ("a worse setting", _rows([0.40, 0.83, 0.60]), _rows([0.35, 0.79, 0.56])),
    ("a better setting", _rows([0.35, 0.79, 0.56]), _rows([0.40, 0.83, 0.60])),
    ("rows in another order", _rows([0.40, 0.83, 0.60]), _rows([0.56, 0.35, 0.79], (2, 0, 1))),
    ("differences of both signs", _rows([0.40, 0.78, 0.60]), _rows([0.35, 0.79, 0.56])),
    ("a small but certain difference", _rows([0.4010, 0.8310, 0.6011]), _rows([0.40, 0.83, 0.60])),
    ("a setting and itself", _rows([0.40, 0.83, 0.60]), _rows([0.40, 0.83, 0.60])),
    ("five seeds", _rows([0.4, 0.5, 0.6, 0.7, 0.8], range(5)), _rows([0.3, 0.45, 0.52, 0.6, 0.75], range(5))),
]


@exercise("06.4", paired_verdict)
def _check_paired_verdict(answer):
    for case, rows, others in _PAIRS:
        border = 2.78 if len(rows) == 5 else 4.3
        told = f"{case}, FCD {[row['fcd'] for row in rows]} and {[row['fcd'] for row in others]}"
        expected = paired_verdict(rows, others, border)
        try:
            got = answer(copy.deepcopy(rows), copy.deepcopy(others), border)
        except ZeroDivisionError:
            raise WrongAnswer(f"{told}: division by zero. Compare with border · error in place of dividing") from None
        expect_something(got)
        if not isinstance(got, (tuple, list)) or len(got) != 3:
            raise WrongAnswer("return three things: the mean difference, its standard error, and the verdict")
        _check_mean(got[0], expected[0], rows, others, told)
        _check_error(got[1], expected[1], rows, others, told)
        _check_verdict(got[2], expected, border, told)


def _check_mean(got, mean, rows, others, told):
    if got is ... or np.isclose(got, mean, atol=1e-9):
        expect_something(got)
        return
    if np.isclose(got, -mean, atol=1e-9):
        raise WrongAnswer(f"{told}: the sign of the mean difference; it is the FCD of `rows` less that of `others`")
    if np.isclose(got, np.sum([a["fcd"] for a in rows]) - np.sum([b["fcd"] for b in others]), atol=1e-9):
        raise WrongAnswer(f"{told}: this is the sum of the differences; take their mean")
    raise WrongAnswer(f"{told}: the mean difference is {mean:.6g}, yours {got:.6g}")


def _check_error(got, error, rows, others, told):
    if got is ... or np.isclose(got, error, atol=1e-9):
        expect_something(got)
        return
    by_place = np.array([a["fcd"] - b["fcd"] for a, b in zip(rows, others)])
    seeds = [[row["seed"] for row in part] for part in (rows, others)]
    if seeds[0] != seeds[1] and np.isclose(got, by_place.std(ddof=1) / len(rows) ** 0.5):
        raise WrongAnswer(f"{told}: you paired by place; the same *seed* stands at another place there")
    for wrong, said in _wrong_errors(rows, others):
        if np.isclose(got, wrong, atol=1e-9):
            raise WrongAnswer(f"the standard error: {said}")
    raise WrongAnswer(f"{told}: the standard error is {error:.6g}, yours {got:.6g}")


def _check_verdict(got, expected, border, told):
    mean, error, verdict = expected
    if got == verdict:
        return
    if got not in ("better", "worse", "not resolved"):
        raise WrongAnswer(f'the verdict {quoted(got)}: expected "better", "worse" or "not resolved"')
    if verdict == "not resolved":
        why = f"{mean:+.4f} is not beyond {border} standard errors, {border * error:.4f}"
    elif {got, verdict} == {"better", "worse"}:
        why = "a *smaller* FCD is better"
    else:
        why = f"{mean:+.4f} is beyond {border} standard errors, {border * error:.4f}, however small it is"
    raise WrongAnswer(f"{told}: the verdict is {verdict!r}, yours {got!r}; {why}")


# ---------------------------------------------------------------------------------------------------------------------
# 06.5: a guided step
# ---------------------------------------------------------------------------------------------------------------------


def guided_v(network, z, t, wish, negative, scale):
    """Classifier-free guidance (arXiv:2207.12598) from one call of the network, on twice the batch.

    Args:
        network: (z_t, t, condition) -> v, a row for each row.
        wish, negative: conditions (B, numbers); negative=None asks for nothing, which is all zeros.
        scale: 1 leaves the answer to the wish as it is, and then no other answer is needed.
    """
    if scale == 1:
        return network(z, t, wish)
    if negative is None:
        negative = torch.zeros_like(wish)
    v_with, v_neg = network(torch.cat([z, z]), t, torch.cat([wish, negative])).chunk(2)
    return v_neg + scale * (v_with - v_neg)


class _KnownNetwork:
    """A network for 06.5 that anyone can compute, and that remembers the rows of each call."""

    def __init__(self):
        self.rows = []

    def __call__(self, z, t, condition):
        if not torch.is_tensor(z) or z.shape[1:] != (9, 8):
            raise WrongAnswer(
                f"the network got z of {_shape(z)}; expected (rows, 9, 8). Join batches along the first axis, "
                "torch.cat([…, …])"
            )
        if not torch.is_tensor(condition) or condition.shape[1:] != (4,):
            raise WrongAnswer(
                f"the network got a condition of {_shape(condition)}; expected (rows, 4). Join conditions along the "
                "first axis, torch.cat([…, …])"
            )
        if len(z) != len(condition):
            raise WrongAnswer(
                f"the network got {len(z)} rows of z and {len(condition)} conditions; every condition needs its own z, "
                "so z has to be there twice"
            )
        self.rows.append(len(z))
        asked = (condition @ torch.arange(1.0, 5.0, dtype=z.dtype))[:, None, None]
        return torch.sin(z + t / 1000) + asked * z + asked**2


def _shape(value):
    return f"shape {tuple(value.shape)}" if torch.is_tensor(value) else f"type {type(value).__name__}"


def _wrong_guidance(z, t, wish, negative, scale):
    """What students return in 06.5 in place of the guided v: [(value, what is wrong)]."""
    network, nothing = _KnownNetwork(), torch.zeros_like(wish)
    other = nothing if negative is None else negative
    v_with, v_neg, v_nothing = (network(z, t, condition) for condition in (wish, other, nothing))
    in_turns = network(z.repeat_interleave(2, 0), t, torch.cat([wish, other]))
    first, second = in_turns.chunk(2)
    found = [
        (v_with + scale * (v_with - v_neg), "start from the negative answer; you started from the one with the wish"),
        (v_with + scale * (v_neg - v_with), "the two answers are exchanged; the halves come in the order of the batch"),
        (v_neg + scale * v_with, "what is multiplied by `scale` is the *difference* of the two answers"),
        (v_neg + (scale - 1) * (v_with - v_neg), "at scale 1 this must be the answer to the wish; you took scale - 1"),
        (network(z, t, other + scale * (wish - other)), "guide the two *answers*, not the conditions"),
        (second + scale * (first - second), "z and the conditions do not fit: put the whole batch z twice, z below z"),
        (in_turns, "return one row for each molecule: split the answer in its halves and combine them"),
        (torch.cat([v_with, v_neg]), "these are both answers; combine them: v_neg + scale · (v_with - v_neg)"),
    ]
    if negative is None:
        found.append((v_with, "negative=None means that nothing is asked for: put zeros in its place and guide"))
    else:
        found.append((v_nothing + scale * (v_with - v_nothing), "the negative condition is not used"))
        below = "; guidance is off at scale 1 only, not below" if scale < 1 else ""
        found.append((v_with, f"this is the answer to the wish alone; nothing is guided{below}"))
    return found


_GUIDED_CASES = [("a negative condition, scale 2.5", True, 2.5), ("negative=None, scale 3", False, 3.0)]
_GUIDED_CASES.append(("a negative condition, scale 0.5", True, 0.5))  # guidance is off at 1, not below


@exercise("06.5", guided_v)
def _check_guided_v(answer):
    z = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    classes = torch.eye(4, dtype=torch.float64)
    wish, negative = classes[[0, 1, 3]], classes[[2, 0, 1]]
    t = torch.tensor(499)
    for case, has_negative, scale in _GUIDED_CASES:
        network, given = _KnownNetwork(), negative if has_negative else None
        try:
            got = answer(network, z.clone(), t, wish.clone(), given, scale)
        except (TypeError, AttributeError):
            if has_negative:
                raise
            raise WrongAnswer("negative=None cannot be joined: put zeros of the wish's shape in its place") from None
        hints = _wrong_guidance(z, t, wish, given, scale)
        expect(got, guided_v(_KnownNetwork(), z, t, wish, given, scale), case, hints)
        if len(network.rows) != 1:
            raise WrongAnswer(
                f"the network was called {len(network.rows)} times; one call on twice the batch is enough"
            )
    network = _KnownNetwork()
    got = answer(network, z.clone(), t, wish.clone(), negative.clone(), 1.0)
    expect(got, _KnownNetwork()(z, t, wish), "scale 1, the answer to the wish alone")
    if sum(network.rows) != len(z):
        raise WrongAnswer(
            f"at scale 1 the negative answer has no weight, so {len(z)} rows are enough; the network got "
            f"{sum(network.rows)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 06.6: five patients
# ---------------------------------------------------------------------------------------------------------------------

# what cannot be if it is the cause; said of a patient who does not have it
_CONTRADICTIONS = {
    "signal left": "then a known latent would still show in its first state, and 'kept at the start' is about 0",
    "clipping": "then no number could lie beyond 1 at the end, and its largest |z| does",
    "prediction type": "then its first guess would be multiplied by 20,000, and its latents end at the size of 1",
    "lost betas": "then noise of the size 0.3 would be left in the quiet numbers, and their spread is far from that",
    "batches": "then other batches would give other molecules, and they give the same ones",
}
# what shows in a patient who has it
_SYMPTOMS = {
    "signal left": "a known latent still shows in its first state",
    "clipping": "its largest |z| is exactly 1",
    "prediction type": "its latents end in the thousands",
    "lost betas": "its quiet numbers have a spread of 0.3",
    "batches": "the same seed draws other molecules in other batches",
}
_DIAGNOSIS = {"A": "clipping", "B": "lost betas", "C": "batches", "D": "prediction type", "E": "signal left"}


def _own_noise(n, seed=0):
    """A generator for each of n molecules."""
    return [torch.Generator().manual_seed(1000 * seed + k) for k in range(n)]


def _common_noise(n, seed=0):
    """One generator that all n molecules share."""
    return [torch.Generator().manual_seed(seed)] * n


def _scheduler_with(cause):
    """A DDPM scheduler for the course's latents with one fault."""
    if cause == "lost betas":  # given by place and not by name, they do not survive `from_config`
        settings = NOISE_SCHEDULE | {"clip_sample": False}
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        by_place = [settings.pop(name) for name in names]
        made = DDPMScheduler(*by_place, **settings)
        return DDPMScheduler.from_config(made.config)
    faults = {
        "signal left": {"num_train_timesteps": 100, "trained_betas": cosine_betas(1000)[:100].tolist()},
        "clipping": {"clip_sample": True},
        "prediction type": {"prediction_type": "epsilon"},
    }
    return sampler("DDPM", **faults.get(cause, {}))


def patient(name):
    """One of the five patients of the debugging lab: (scheduler, noise); `noise(n, seed)` gives n generators.

    Args: name: "A" to "E". Raises: ValueError for another.
    """
    if name not in _DIAGNOSIS:
        raise ValueError(f"patient({quoted(name)}): there are the patients {', '.join(_DIAGNOSIS)}")
    cause = _DIAGNOSIS[name]
    return _scheduler_with(cause), _common_noise if cause == "batches" else _own_noise


@torch.no_grad()
def _latents(scheduler, generators, batch_size=60, steps=10):
    """Standardised latents (molecules, 9, 8) of latent_diffusion, batch by batch; nothing is checked."""
    denoiser = _denoiser()
    scheduler.set_timesteps(steps)
    ends = []
    for first in range(0, len(generators), batch_size):
        own = generators[first : first + batch_size]
        z = torch.cat([torch.randn(1, 9, 8, generator=one) for one in own])
        for t in scheduler.timesteps:
            z = scheduler.step(denoiser(z, t), t, z, generator=own).prev_sample
        ends.append(z)
    return torch.cat(ends)


@functools.cache
def _denoiser():
    return load_pipeline("latent_diffusion").denoiser


@functools.cache
def _known():
    """Standardised latents of validation molecules, and which of their numbers hardly vary."""
    pipe, qm9 = load_pipeline("latent_diffusion"), shared_qm9()
    rows = qm9.validation[::16]
    z = encode_graphs(pipe.vae, qm9.atoms[rows], qm9.bonds[rows])
    z = (z - pipe.denoiser.latent_mean) / pipe.denoiser.latent_scale
    return z, z.std(0) < 0.1 * z.std(0).max()


def symptoms(scheduler, noise, latents, known, quiet):
    """What betrays each of the five faults, as numbers.

    Args:
        scheduler, noise: as `patient` gives them.
        latents: (scheduler, generators, batch_size) -> latents (molecules, 9, 8).
        known, quiet: latents of molecules (molecules, 9, 8), and which of their numbers hardly vary (9, 8).
    """
    z, again = latents(scheduler, noise(60)), latents(scheduler, noise(60), batch_size=20)
    scheduler.set_timesteps(10)
    noise_of_known = torch.randn(known.shape, generator=torch.Generator().manual_seed(0))
    start = scheduler.add_noise(known, noise_of_known, scheduler.timesteps[:1].expand(len(known)))
    return {
        "kept": ((known * start).mean() / (known**2).mean()).item(),
        "largest": z.abs().max().item(),
        "quiet": z[:, quiet].std().item(),
        "other batches": (z - again).abs().mean().item(),
    }


def diagnose(scheduler, noise, latents, known, quiet):
    """The fault of a patient, a key of _CONTRADICTIONS, or "healthy". Args: as of `symptoms`."""
    found = symptoms(scheduler, noise, latents, known, quiet)
    if found["kept"] > 0.3:
        return "signal left"
    if found["largest"] > 100:
        return "prediction type"
    if found["largest"] <= 1:
        return "clipping"
    if found["quiet"] > 0.1:
        return "lost betas"
    if found["other batches"] > 0.1:
        return "batches"
    return "healthy"


def _cases():
    """Who is shown to an answer of 06.6: (who it is, what is wrong, scheduler, noise)."""
    for name, cause in _DIAGNOSIS.items():
        yield name, cause, *patient(name)
    yield "the healthy sampler", "healthy", sampler("DDPM"), _own_noise
    shorter = sampler("DDPM", num_train_timesteps=300, trained_betas=cosine_betas(1000)[:300].tolist())
    yield "a patient that is not in the table", "signal left", shorter, _own_noise


@exercise("06.6", diagnose)
def _check_diagnose(answer):
    for who, cause, scheduler, noise in _cases():
        got = answer(scheduler, noise, _latents, *_known())
        expect_something(got)
        if not isinstance(got, str) or got not in ("healthy", *_CONTRADICTIONS):
            raise WrongAnswer(f"{who}: unknown cause {quoted(got)}; known ones: healthy, {', '.join(_CONTRADICTIONS)}")
        if got == cause:
            continue
        if got == "healthy":
            raise WrongAnswer(f"{who} is not healthy: {_SYMPTOMS[cause]}")
        raise WrongAnswer(f"{who} cannot be {got!r}: {_CONTRADICTIONS[got]}")
