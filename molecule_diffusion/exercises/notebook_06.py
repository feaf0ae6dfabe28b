"""Notebook 06, sections 3 and 6: DDIM with η, a step of second order, the Pareto front, a tuning.

Those of sections 2, 4 and 5 stand in notebook_06_lab.
"""

import functools

import numpy as np
import torch

from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.checks import quoted
from molecule_diffusion.evaluation import fcd_to_validation
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_something, known_network
from molecule_diffusion.schedules import alpha_bars, cosine_betas, read_restarts, sampler

# ---------------------------------------------------------------------------------------------------------------------
# 06.2: DDIM with η
# ---------------------------------------------------------------------------------------------------------------------


def ddim_loop(predict_v, z, timesteps, alpha_bar, eta, generator):
    """DDIM with fresh noise (eq. 12 and 16 of arXiv:2010.02502) for a network that predicts v, `predict_v(z_t, t)`.

    timesteps fall and may leave steps out; after the last, ᾱ_r = 1. With eta > 0 every step draws its noise by
    `torch.randn(z.shape, generator=generator, dtype=z.dtype)`, the last one too, where its weight is 0.
    """
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        now, after = alpha_bar[t], torch.ones_like(alpha_bar[0]) if last else alpha_bar[timesteps[k + 1]]
        v = predict_v(z, t)
        z_0 = now.sqrt() * z - (1 - now).sqrt() * v
        eps = (1 - now).sqrt() * z + now.sqrt() * v
        w_fresh = eta * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).sqrt()
        w_old = (1 - after - w_fresh**2).clamp(min=0).sqrt()  # rounding may leave -6e-8 of what is 0
        z = after.sqrt() * z_0 + w_old * eps
        if eta > 0:
            z = z + w_fresh * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    return z


def _wrong_ddim(predict_v, z, timesteps, alpha_bar, eta, generator, mistake):
    """`ddim_loop` with one of the mistakes that students make, to recognise it."""
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        now, after = alpha_bar[t], torch.ones_like(alpha_bar[0]) if last else alpha_bar[timesteps[k + 1]]
        if mistake == "one step" and t > 0:
            after = alpha_bar[t - 1]
        if last and mistake in _ENDS:
            after = alpha_bar[_ENDS[mistake]]
        v = predict_v(z, t)
        z_0, eps = now.sqrt() * z - (1 - now).sqrt() * v, (1 - now).sqrt() * z + now.sqrt() * v
        if mistake == "sign":
            eps = (1 - now).sqrt() * z - now.sqrt() * v
        if mistake == "epsilon":
            z_0, eps = (z - (1 - now).sqrt() * v) / now.sqrt(), v
        if mistake == "v as noise":
            eps = v
        if mistake == "sample":
            z_0, eps = v, (z - now.sqrt() * v) / (1 - now).sqrt()
        if mistake == "jump":
            return z_0
        full = (1 - after) / (1 - now) * (1 - now / after)  # the variance at η = 1
        w_fresh = {"variance": eta * full, "squared": eta**2 * full.sqrt(), "one": full.sqrt()}.get(
            mistake, eta * full.sqrt()
        )
        if mistake == "beta":
            w_fresh = eta * (1 - now / after).sqrt()
        if mistake == "ratio":
            w_fresh = eta * ((1 - after) / (1 - now)).sqrt()
        taken = {"kept": 0 * w_fresh, "eta": eta * full, "full": full, "no square": w_fresh}.get(mistake, w_fresh**2)
        left = (1 - after - taken).clamp(min=0)
        z = after.sqrt() * z_0 + (left if mistake == "root" else left.sqrt()) * eps
        if mistake != "no noise":
            z = z + w_fresh * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    return z


_ENDS = {"index -1": -1, "first entry": 0}
_AFTER_THE_LAST = "after the last step ᾱ_r is 1"
_DDIM_MISTAKES = {
    "no noise": "the fresh noise is missing: add w_fresh times a draw when eta is above 0",
    "kept": "the old noise keeps its full weight sqrt(1 - ᾱ_r); beside fresh noise it gets sqrt(1 - ᾱ_r - w_fresh²)",
    "variance": "w_fresh is η times the *root*; you used the variance without its root",
    "squared": "w_fresh contains η once; you squared it",
    "eta": "the weight of the old noise contains w_fresh², so η is squared there",
    "full": "the weight of the old noise contains w_fresh², and so η²; yours contains no η",
    "no square": "the weight of the old noise is sqrt(1 - ᾱ_r - w_fresh²); you subtracted w_fresh without the square",
    "one": "η has no effect: this is the answer for η = 1",
    "root": "the square root is missing in the weight of the old noise, sqrt(1 - ᾱ_r - w_fresh²)",
    "beta": "the factor sqrt((1 - ᾱ_r) / (1 - ᾱ_t)) is missing in w_fresh",
    "ratio": "the factor sqrt(1 - ᾱ_t / ᾱ_r) is missing in w_fresh",
    "sign": "the sign in the guess of ε: it is sqrt(1 - ᾱ_t)·z_t *plus* sqrt(ᾱ_t)·v",
    "epsilon": "the network's answer is used as if it were ε; it is v",
    "v as noise": "the guess of z_0 is right, but v is put back as if it were ε; compute ε from z_t and v",
    "sample": "the network's answer is used as if it were z_0; it is v",
    "one step": "the steps are far apart: r is the *next of `timesteps`*, not t - 1",
    "index -1": f"{_AFTER_THE_LAST} (your index may have become -1, which Python reads as the last entry)",
    "first entry": f"{_AFTER_THE_LAST}, not the first entry of alpha_bar",
    "jump": "this stops after the first guess of z_0; go on to the last timestep",
}


@exercise("06.2", ddim_loop)
def _check_ddim_loop(answer):
    alpha_bar = alpha_bars(cosine_betas(1000).double())
    timesteps = [799, 599, 399, 199]
    predict_v = known_network(alpha_bar)

    def run(loop, eta, *extra):
        seeded = torch.Generator().manual_seed(1)
        return loop(predict_v, start.clone(), timesteps, alpha_bar, eta, seeded, *extra)

    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hints = [(run(_wrong_ddim, 0.5, mistake), said) for mistake, said in _DDIM_MISTAKES.items()]
    hints.append((run(ddim_loop, 0.0), "η has no effect: this is the answer for η = 0"))
    hints.append((start, "nothing changed: return the z of the last step"))
    got = run(answer, 0.5)
    expect_something(got)
    if torch.is_tensor(got) and got.isnan().any():
        raise WrongAnswer(
            "the root of a negative number: in w_fresh stands 1 - ᾱ_t / ᾱ_r, the noisier ᾱ above; "
            f"and {_AFTER_THE_LAST} (your index may have become -1)"
        )
    expect(got, run(ddim_loop, 0.5), "a known network, 4 steps, η = 0.5, generator with seed 1", hints)
    hints = [(run(_wrong_ddim, 1.0, "no noise"), _DDIM_MISTAKES["no noise"])]
    expect(run(answer, 1.0), run(ddim_loop, 1.0), "the same with η = 1", hints)
    hints = [(run(ddim_loop, 1.0), _DDIM_MISTAKES["one"])]
    expect(run(answer, 0.0), run(ddim_loop, 0.0), "the same with η = 0, without fresh noise", hints)
    short, zeros = torch.tensor([0.2, 1e-9]), torch.zeros(2, 3)  # in single precision the square of sqrt(0.8) is > 0.8
    got = answer(lambda z_t, t: zeros, zeros + 1, [1, 0], short, 1.0, torch.Generator().manual_seed(1))
    if torch.as_tensor(got).isnan().any():
        raise WrongAnswer(
            "NaN with η = 1 in single precision: where 1 - ᾱ_r - w_fresh² should be 0, rounding leaves -6e-8, and its "
            "root is NaN. Keep it at 0 or above with `.clamp(min=0)` before the root"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 06.3: a step of second order
# ---------------------------------------------------------------------------------------------------------------------


def solver_step(z, guess, guess_before, before, now, after):
    """A step of DPM-Solver++(2M) from ᾱ = now to ᾱ = after (algorithm 2 of arXiv:2211.01095), data prediction.

    Args:
        z, guess: the state at `now`, and the network's guess of z_0 there.
        guess_before, before: the guess of the step before and the ᾱ where it was made; None in the first step, which is
            of first order. So is a step to after = 1, where λ is infinite: it ends at the guess.
    """
    if after == 1:
        return guess
    h = _half_log_snr(after) - _half_log_snr(now)
    slope = guess
    if guess_before is not None:
        h_before = _half_log_snr(now) - _half_log_snr(before)
        slope = guess + h / (2 * h_before) * (guess - guess_before)
    return ((1 - after) / (1 - now)) ** 0.5 * z + after**0.5 * (1 - np.exp(-h)) * slope


def _half_log_snr(kept):
    """λ = ½ log(ᾱ / (1 - ᾱ))"""
    return 0.5 * np.log(kept / (1 - kept))


def _wrong_solver_step(z, guess, guess_before, before, now, after, mistake):
    """`solver_step` with one of the mistakes that students make, to recognise it; never the last step."""
    scale = 2 if mistake == "log SNR" else 1
    h = scale * (_half_log_snr(after) - _half_log_snr(now))
    slope = guess
    if guess_before is not None:
        h_before = scale * (_half_log_snr(now) - _half_log_snr(before))
        weight = {"half": 0.5, "inverted": h_before / (2 * h), "no half": h / h_before, "first order": 0}.get(
            mistake, h / (2 * h_before)
        )
        slope = (guess_before if mistake == "from the older" else guess) + weight * (guess - guess_before)
        if mistake == "backwards":
            slope = guess - weight * (guess - guess_before)
    shrink, signal = ((1 - after) / (1 - now)) ** 0.5, after**0.5
    if mistake == "shrink root":
        shrink = shrink**2
    if mistake == "shrink upside down":
        shrink = 1 / shrink
    if mistake == "signal root":
        signal = after
    if mistake == "signal now":
        signal = now**0.5
    if mistake == "signals":
        shrink = (after / now) ** 0.5
    move = {"minus": np.exp(-h) - 1, "growing": np.exp(h) - 1, "e": np.exp(-h)}.get(mistake, 1 - np.exp(-h))
    return shrink * z + signal * move * slope


_ALWAYS = {
    "log SNR": "λ is *half* the logarithm of ᾱ / (1 - ᾱ); without the half, both lengths are twice too long",
    "shrink root": "the root is missing in the factor at z, sqrt((1 - ᾱ_r) / (1 - ᾱ_t))",
    "shrink upside down": "the factor at z is upside down: the noise shrinks, so it is sqrt((1 - ᾱ_r) / (1 - ᾱ_t))",
    "signals": "the factor at z is a ratio of the *noises*, sqrt((1 - ᾱ_r) / (1 - ᾱ_t)); you took the signals, ᾱ",
    "signal root": "the root of ᾱ_r is missing before the bracket",
    "signal now": "before the bracket stands the root of ᾱ at the *end* of the step (`after`), not of `now`",
    "minus": "the sign of the bracket: it is 1 - exp(-h), so the step goes *towards* D",
    "growing": "the bracket is 1 - exp(-h); you took exp(h) - 1",
    "e": "the bracket is 1 - exp(-h); the 1 is missing",
}
_SECOND_ORDER = {
    "first order": "this is a step of first order, DDIM's: the last guess is not used",
    "half": "the weight ½ is right only if both steps are equally long in λ; in general it is h / (2 h')",
    "inverted": "the weight is h / (2 h'), the new length above and the last one below; yours is upside down",
    "no half": "the factor ½ is missing in the weight h / (2 h')",
    "backwards": "D goes *on* from the last guess to the new one: the difference is guess - guess_before",
    "from the older": "start D from the new guess; you started it from the old one",
}


@exercise("06.3", solver_step)
def _check_solver_step(answer):
    scheduler = sampler("DPM-Solver++")
    z, guess, older = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = answer(z.clone(), guess.clone(), None, None, 0.2, 0.6)
    expect_something(got)
    case = (z, guess, None, None, 0.2, 0.6)
    hints = [(_wrong_solver_step(*case, mistake), said) for mistake, said in _ALWAYS.items()]
    hints.append((z, "nothing changed: return the new z"))
    hints.append((guess, "only a step to ᾱ = 1 ends at the guess; the others go there part of the way"))
    expect(got, solver_step(*case), "a first step, from ᾱ = 0.2 to 0.6", hints)
    case = (z, guess, older, 0.1, 0.3, 0.5)
    hints = [(_wrong_solver_step(*case, mistake), said) for mistake, said in _SECOND_ORDER.items()]
    got = answer(z.clone(), guess.clone(), older.clone(), 0.1, 0.3, 0.5)
    expect(got, solver_step(*case), "a second step, from ᾱ = 0.1 over 0.3 to 0.5", hints)
    last = _number(answer, z, guess, older, 0.5, 0.9, 1.0)
    if torch.as_tensor(last).isnan().any() or torch.as_tensor(last).isinf().any():
        raise WrongAnswer("NaN or infinity in the last step: at ᾱ = 1 λ is infinite. Ask for it first and return guess")
    expect(last, guess, "the last step, to ᾱ = 1, which ends at the guess")
    difference = (_walk(answer, scheduler, z) - _walk_of_diffusers(scheduler, z)).abs().max()
    if not difference < 1e-5:
        raise WrongAnswer(f"ten steps with a known network end {difference:.1e} away from diffusers' DPM-Solver++")


def _number(answer, *case):
    """The last step of an answer; a division by zero counts as infinity there, as it does for arrays."""
    try:
        return answer(*case)
    except ZeroDivisionError:
        return torch.tensor(torch.inf)


def _walk(step, scheduler, z, steps=10):
    """From noise to the data by an answer to 06.3, with a known network."""
    scheduler.set_timesteps(steps)
    kept = [scheduler.alphas_cumprod[t].item() for t in scheduler.timesteps] + [1.0]
    predict_v, guess_before = known_network(scheduler.alphas_cumprod.double()), None
    for k, t in enumerate(scheduler.timesteps):
        guess = kept[k] ** 0.5 * z - (1 - kept[k]) ** 0.5 * predict_v(z, t)
        z = step(z, guess, guess_before, kept[k - 1] if k > 0 else None, kept[k], kept[k + 1])
        guess_before = guess
    return z


def _walk_of_diffusers(scheduler, z, steps=10):
    predict_v = known_network(scheduler.alphas_cumprod.double())
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        z = scheduler.step(predict_v(z, t), t, z).prev_sample
    return z


# ---------------------------------------------------------------------------------------------------------------------
# 06.7 and 06.8: the Pareto front, and one millisecond per molecule
# ---------------------------------------------------------------------------------------------------------------------


def pareto_front(values):
    """Which settings no other one dominates: at least as good in both columns, and better in one. Less is better.

    Equal settings do not dominate each other; a row with NaN is never on the front, and dominates nobody.
    Shapes: (n, 2) -> bool (n,).
    """
    front = np.zeros(len(values), bool)
    for k, point in enumerate(values):
        as_good = (values <= point).all(1)
        better = (values < point).any(1)
        front[k] = not (as_good & better).any() and not np.isnan(point).any()
    return front


def _wrong_front(values, mistake):
    """`pareto_front` with one of the mistakes that students make, to recognise it."""
    front = np.zeros(len(values), bool)
    for k, point in enumerate(values):
        as_good, better = (values <= point).all(1), (values < point).any(1)
        if mistake == "less":
            as_good = (values < point).all(1)
        if mistake == "largest":
            as_good, better = (values >= point).all(1), (values > point).any(1)
        if mistake == "itself":
            better = True
        if mistake == "any":
            as_good = True
        if mistake == "equals":
            better = np.arange(len(values)) != k
        if mistake == "doubles":
            better |= np.arange(len(values)) < k
        front[k] = not (as_good & better).any()
        if mistake != "nan":
            front[k] &= not np.isnan(point).any()
    if mistake == "poisoned":
        front &= not np.isnan(values).any()
    return front


_FRONT_MISTAKES = {
    "largest": "this is the front of the *largest* values; here less is better",
    "itself": "every setting is dominated: each is compared with itself as well, and is as good as itself. Ask for "
    "*better in at least one* too",
    "any": "a setting that is better in one column and worse in the other does not dominate; it must be at least as "
    "good in *both*",
    "less": "a setting that is equal in one column and better in the other does dominate: *at least as good* is `<=`",
    "equals": "equal settings remove each other from the front; to dominate, one must be better in at least one column",
    "doubles": "of several equal settings only one was kept; none of them dominates another, so all stay",
    "nan": "a row with NaN is on your front. Every comparison with NaN is False, so nobody dominates it: ask for "
    "`np.isnan` yourself",
    "poisoned": "one row with NaN has emptied the whole front; leave out that row only",
}

# What each case can reveal, the easiest first: (its name, its rows, the mistakes to look for)
_FRONT_CASES = [
    ("one setting is the best in both", [[0.5, 3], [0.4, 2], [0.9, 4]], ["largest", "itself"]),
    ("five settings", [[0.4, 6], [0.5, 2], [0.6, 4], [1.8, 1], [0.7, 5]], ["any"]),
    ("a tie in one column", [[0.4, 6], [0.5, 3], [0.5, 5], [1.5, 1], [1.6, 1]], ["less"]),
    ("two equal settings", [[0.4, 6], [0.5, 3], [0.5, 3], [1.5, 1], [0.9, 4]], ["equals", "doubles"]),
    ("rows with NaN", [[0.4, 6], [np.nan, 2], [0.5, 3], [0.3, np.nan], [0.6, 4]], ["nan", "poisoned"]),
]


@exercise("06.7", pareto_front)
def _check_pareto_front(answer):
    for case, rows, mistakes in _FRONT_CASES:
        values = np.array(rows, float)
        expected = pareto_front(values)
        hints = [(_wrong_front(values, mistake), _FRONT_MISTAKES[mistake]) for mistake in mistakes]
        if not np.isnan(values).any():
            hints.append((~expected, "the other way round: these are the settings that *are* dominated"))
        if case == "five settings":
            first, second = (values[:, k] == values[:, k].min() for k in (0, 1))
            hints += [
                (first, "only the smallest of the first column; both goals count"),
                (second, "only the smallest of the second column; both goals count"),
                (first | second, "the best of each column are on the front, but so is what lies between them"),
                (values.sum(1) == values.sum(1).min(), "FCD and milliseconds cannot be added; compare each by itself"),
            ]
        if case == "two equal settings":
            last = expected & ~np.array([False, True, False, False, False])
            hints.append((last, _FRONT_MISTAKES["doubles"]))
        given = values.copy()
        got = _read_front(answer(given), expected)
        if not np.array_equal(given, values, equal_nan=True):
            raise WrongAnswer("the caller's `values` were changed; work on a copy")
        expect(got, expected.astype(int), f"{case}, {rows} (1 stands for True)", hints)
    values = np.random.default_rng(0).integers(1, 30, (60, 2)).astype(float)
    expect(_read_front(answer(values.copy()), None), pareto_front(values).astype(int), "60 settings")


def _read_front(got, expected):
    """An answer of 06.7 as an array of 0 and 1; what holds no True and False is told so."""
    expect_something(got)
    got = np.asarray(got)
    if got.dtype == bool:
        return got.astype(int)
    if expected is not None and np.array_equal(got, np.flatnonzero(expected)):
        raise WrongAnswer("these are the positions of the front; return True or False for each setting")
    if got.ndim == 2:
        raise WrongAnswer("these are the settings themselves; return True or False for each setting")
    raise WrongAnswer(f"expected True or False for each setting, a bool array; got numbers of type {got.dtype}")


FAST_CALLS = 5
FAST_FCD = 0.7  # equal steps of UniPC: trailing 0.78, leading 0.66; of DPM-Solver++: leading 0.74
FAST_SEEDS = (606, 607)  # no study of notebook 06 uses them
FAST_SAMPLERS = ("DDPM", "DDIM", "DPM-Solver++", "SDE-DPM-Solver++", "UniPC")
FAST_SPACINGS = ("trailing", "leading", "linspace")

fast_setting = {"sampler": "UniPC", "spacing": "leading", "steps": 5, "restarts": []}


@exercise("06.8", fast_setting)
def _check_fast_setting(answer):
    calls = _calls_of(answer)
    if calls > FAST_CALLS:
        again = calls - answer["steps"]
        raise WrongAnswer(
            f"{answer['steps']} steps and {again} in restarts make {calls} network calls; the budget is {FAST_CALLS}"
        )
    restarts = tuple(tuple(restart) for restart in answer["restarts"])
    try:
        valid, fcd = _quality(answer["sampler"], answer["spacing"], int(answer["steps"]), restarts)
    except ValueError as error:  # a restart that this sampler cannot make
        raise WrongAnswer(str(error)) from None
    if not fcd <= FAST_FCD:  # NaN too
        raise WrongAnswer(
            f"{calls} network calls, {valid:.1%} valid, FCD {fcd:.2f} (mean of two seeds, N = 1,000), and at most "
            f"{FAST_FCD} was asked for.{_advice(answer, calls)}"
        )


def _calls_of(setting):
    """Network calls per molecule of an answer to 06.8; what is no setting is told so."""
    if not isinstance(setting, dict):
        raise WrongAnswer(f"a dict was expected, {type(setting).__name__} came")
    for key in setting:
        if key not in fast_setting:
            raise WrongAnswer(f"there is no knob {quoted(key)}; the knobs are {', '.join(fast_setting)}")
    for key in fast_setting:
        if key not in setting or setting[key] is ...:
            raise WrongAnswer(f"{key!r} is missing; the knobs are {', '.join(fast_setting)}")
    for key, known in (("sampler", FAST_SAMPLERS), ("spacing", FAST_SPACINGS)):
        if setting[key] not in known:
            raise WrongAnswer(f"{key}={quoted(setting[key])}: expected one of {', '.join(known)}")
    steps = setting["steps"]
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise WrongAnswer(f"steps={quoted(steps)}: expected a whole number of at least 1")
    try:
        restarts = read_restarts(setting["restarts"])
    except ValueError as error:
        raise WrongAnswer(str(error)) from None
    return steps + sum(restart.steps for restart in restarts)


@functools.lru_cache(maxsize=32)
def _quality(name, spacing, steps, restarts):
    """What a setting of latent_diffusion reaches at N = 1,000: mean share of valid ones, mean FCD to validation."""
    pipe = load_pipeline("latent_diffusion")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = sampler(name, timestep_spacing=spacing)
    shares, distances = [], []
    for seed in FAST_SEEDS:
        drawn = pipe(1000, steps, torch.Generator().manual_seed(seed), restarts=list(restarts))
        shares.append(drawn.valid.mean())
        distance = fcd_to_validation(drawn.valid_smiles)
        distances.append(np.nan if distance is None else distance)
    return float(np.mean(shares)), float(np.mean(distances))


def _advice(setting, calls):
    """What about a setting that is not good enough may be the reason: a text."""
    if calls < FAST_CALLS:
        return f" {FAST_CALLS - calls} of the {FAST_CALLS} calls are not spent"
    if setting["restarts"]:
        return (
            f" {calls - setting['steps']} of the calls go into restarts, which leaves {setting['steps']} for the way "
            "from noise to data; compare with all of them there"
        )
    if setting["sampler"] in ("DDPM", "DDIM"):
        return f" {setting['sampler']} is of order 1, and its error of a long step is large; compare a higher order"
    if setting["sampler"] == "SDE-DPM-Solver++":
        return " With fresh noise a long step is a coarser approximation; compare with a sampler that adds none"
    return " Each knob has one more value that was better at five steps in section 4; turn both"
