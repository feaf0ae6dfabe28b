"""Notebook 06, sections 3, 4 and 6: DDIM with η, the order of a solver, the study read, the Pareto front, a tuning.

Those of sections 2 and 5 stand in notebook_06_lab.
"""

import functools

import numpy as np
import torch

from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.checks import quoted
from molecule_diffusion.evaluation import fcd_to_validation
from molecule_diffusion.exercises.checking import (
    WrongAnswer,
    exercise,
    expect,
    expect_something,
    known_network,
)
from molecule_diffusion.files import RESULTS, read_json
from molecule_diffusion.schedules import (
    NOISE_SCHEDULE,
    PowerSpacedDPMSolver,
    alpha_bars,
    cosine_betas,
    read_restarts,
    sampler,
)

# ---------------------------------------------------------------------------------------------------------------------
# 06.2 and 06.3: DDIM with η, and the order of a solver
# ---------------------------------------------------------------------------------------------------------------------


def ddim_loop(predict_v, z, timesteps, alpha_bar, eta, generator):
    """DDIM with fresh noise (eq. 12 and 16 of arXiv:2010.02502) for a network that predicts v, `predict_v(z_t, t)`.

    timesteps fall and may leave steps out; after the last, ᾱ_s = 1. With eta > 0 every step draws its noise by
    `torch.randn(z.shape, generator=generator, dtype=z.dtype)`, the last one too, where its weight is 0.
    """
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        now, after = alpha_bar[t], torch.ones_like(alpha_bar[0]) if last else alpha_bar[timesteps[k + 1]]
        v = predict_v(z, t)
        z_0 = now.sqrt() * z - (1 - now).sqrt() * v
        eps = (1 - now).sqrt() * z + now.sqrt() * v
        sigma = eta * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).sqrt()
        direction = (1 - after - sigma**2).clamp(min=0).sqrt()  # rounding may leave -6e-8 of what is 0
        z = after.sqrt() * z_0 + direction * eps
        if eta > 0:
            z = z + sigma * torch.randn(z.shape, generator=generator, dtype=z.dtype)
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
        sigma = {"variance": eta * full, "squared": eta**2 * full.sqrt(), "one": full.sqrt()}.get(
            mistake, eta * full.sqrt()
        )
        if mistake == "beta":
            sigma = eta * (1 - now / after).sqrt()
        if mistake == "ratio":
            sigma = eta * ((1 - after) / (1 - now)).sqrt()
        taken = {"kept": 0 * sigma, "eta": eta * full, "full": full, "sigma": sigma}.get(mistake, sigma**2)
        direction = (1 - after - taken).clamp(min=0)
        z = after.sqrt() * z_0 + (direction if mistake == "root" else direction.sqrt()) * eps
        if mistake != "no noise":
            z = z + sigma * torch.randn(z.shape, generator=generator, dtype=z.dtype)
    return z


_ENDS = {"index -1": -1, "first entry": 0}
_AFTER_THE_LAST = "after the last step ᾱ_s is 1"
_DDIM_MISTAKES = {
    "no noise": "the fresh noise is missing: add σ_η times a draw when eta is above 0",
    "kept": "the old noise keeps its full weight sqrt(1 - ᾱ_s); beside fresh noise it gets sqrt(1 - ᾱ_s - σ_η²)",
    "variance": "σ_η is η times the *root*; you used the variance without its root",
    "squared": "σ_η contains η once; you squared it",
    "eta": "the weight of the old noise contains σ_η², so η is squared there",
    "full": "the weight of the old noise contains σ_η², and so η²; yours contains no η",
    "sigma": "the weight of the old noise is sqrt(1 - ᾱ_s - σ_η²); you subtracted σ_η without the square",
    "one": "η has no effect: this is the answer for η = 1",
    "root": "the square root is missing in the weight of the old noise, sqrt(1 - ᾱ_s - σ_η²)",
    "beta": "the factor sqrt((1 - ᾱ_s) / (1 - ᾱ_t)) is missing in σ_η",
    "ratio": "the factor sqrt(1 - ᾱ_t / ᾱ_s) is missing in σ_η",
    "sign": "the sign in the guess of ε: it is sqrt(1 - ᾱ_t)·z_t *plus* sqrt(ᾱ_t)·v",
    "epsilon": "the network's answer is used as if it were ε; it is v",
    "v as noise": "the guess of z_0 is right, but v is put back as if it were ε; compute ε from z_t and v",
    "sample": "the network's answer is used as if it were z_0; it is v",
    "one step": "the steps are far apart: s is the *next of `timesteps`*, not t - 1",
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
            "the root of a negative number: in σ_η stands 1 - ᾱ_t / ᾱ_s, the noisier ᾱ above; "
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
            "NaN with η = 1 in single precision: where 1 - ᾱ_s - σ_η² should be 0, rounding leaves -6e-8, and its root "
            "is NaN. Keep it at 0 or above with `.clamp(min=0)` before the root"
        )


def errors_at_100(at_50):
    """What order 1 and order 2 promise when the steps become half as long: half and a quarter of the error."""
    return {"DDIM": at_50["DDIM"] / 2, "DPM-Solver++": at_50["DPM-Solver++"] / 4}


def _toy_error(name, steps):
    """The error of the spread in % of z_0 ~ N(0, 0.5²), whose exact v is known; its size, without sign."""
    scheduler = sampler(name)
    scheduler.set_timesteps(steps)
    z = torch.ones(1, 1, dtype=torch.float64)
    for t in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[t].double()
        v = (kept * (1 - kept)).sqrt() * 0.75 / (0.25 * kept + 1 - kept) * z
        z = scheduler.step(v, t, z).prev_sample
    return abs(100 * (z.item() / 0.5 - 1))


_ORDERS = {"DDIM": (1, "half the step makes half the error"), "DPM-Solver++": (2, "half the step makes a quarter")}


@exercise("06.3", errors_at_100)
def _check_errors_at_100(answer):
    before = {name: _toy_error(name, 50) for name in _ORDERS}
    got = answer(dict(before))
    expect_something(got)
    if not isinstance(got, dict):
        raise WrongAnswer(f"return a dict with the keys {' and '.join(_ORDERS)}; a {type(got).__name__} came")
    for name, (order, rule) in _ORDERS.items():
        if got.get(name) is None or got[name] is ...:
            raise WrongAnswer(f"the prediction for {name} is missing")
        guess, was, measured = float(got[name]), before[name], _toy_error(name, 100)
        if guess <= 0:
            raise WrongAnswer(f"{name}: {guess:g} %; give the size of the error, a number above 0")
        if abs(guess - was) <= 0.05 * was:
            raise WrongAnswer(f"{name}: {guess:.2g} % is the error at 50 calls; with 100 it is smaller")
        if guess > was:
            raise WrongAnswer(f"{name}: {guess:.2g} % is larger than the error at 50 calls; shorter steps make it fall")
        factor = max(guess / measured, measured / guess)
        if factor > 1.5:
            raise WrongAnswer(
                f"{name}: you predicted {guess:.2g} %, {measured:.2g} % was measured, a factor of {factor:.1f} away. "
                f"Its order is {order}: {rule}"
            )


# ---------------------------------------------------------------------------------------------------------------------
# 06.4: how many steps are enough
# ---------------------------------------------------------------------------------------------------------------------


ASKED = ("DDIM", "DPM-Solver++", "SDE-DPM-Solver++")


def _mean_fcds():
    """From the study: {sampler: {steps: FCD, mean of the seeds}}, and the smallest difference that is resolved.

    As in section 2: two means of three rows, the spread known from ten rows (factor 2.26 from the t distribution).
    """
    study = read_json(RESULTS / "06_study.json")
    means = {}
    for name in ASKED:
        rows = study[f"steps, {name}"]
        counts = sorted({row["steps"] for row in rows})
        means[name] = {n: float(np.mean([row["fcd"] for row in rows if row["steps"] == n])) for n in counts}
    margin = 2.26 * (2 / 3) ** 0.5 * float(np.std([row["fcd"] for row in study["seeds"]], ddof=1))
    return means, margin


def enough_steps():
    """{sampler: the smallest number of steps whose mean FCD is not resolved from the sampler's smallest one}"""
    means, margin = _mean_fcds()
    return {name: _enough(means[name], margin) for name in ASKED}


def _enough(fcds, margin):
    """The smallest number of steps within the margin of the best; fcds: {steps: FCD}."""
    return min(steps for steps, fcd in fcds.items() if fcd <= min(fcds.values()) + margin)


@exercise("06.4", enough_steps)
def _check_enough_steps(answer):
    got = answer()
    expect_something(got)
    if not isinstance(got, dict):
        raise WrongAnswer(f"return a dict, sampler to number of steps; {type(got).__name__} came")
    if all(steps is ... for steps in got.values()):
        raise WrongAnswer("there is no answer yet. Replace each `...` by a number of steps")
    means, margin = _mean_fcds()
    problems = [_problem(name, got[name], means[name], margin) for name in ASKED if name in got]
    problems += [f"{name} is missing" for name in ASKED if name not in got]
    problems = [problem for problem in problems if problem]
    if problems:
        raise WrongAnswer("; ".join(problems))


def _problem(name, steps, fcds, margin):
    """What is wrong with a number of steps for one sampler; None if it is right."""
    if steps is ...:
        return f"{name}: replace the `...`"
    if isinstance(steps, bool) or not isinstance(steps, (int, float, np.number)) or steps not in fcds:
        return f"{name}: {steps!r} is not among the numbers of steps in the table: {', '.join(map(str, fcds))}"
    best = min(fcds.values())
    if fcds[steps] > best + margin:
        return (
            f"{name}: {steps} is too small. The FCD there, {fcds[steps]:.3f}, is {fcds[steps] - best:.3f} above the "
            f"smallest one, {best:.3f}; differences are resolved from {margin:.3f} on"
        )
    if steps == _enough(fcds, margin):
        return None
    if fcds[steps] == best:
        return f"{name}: {steps} is too large. It has the smallest FCD, but that of fewer steps is not resolved from it"
    return f"{name}: {steps} is too large. A smaller number of the table is not resolved from the best, either"


# ---------------------------------------------------------------------------------------------------------------------
# 06.6 and 06.7: the Pareto front, and one millisecond per molecule
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


@exercise("06.6", pareto_front)
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
    """An answer of 06.6 as an array of 0 and 1; what holds no True and False is told so."""
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
FAST_FCD = 1.3  # the shipped sampler with 5 plain steps: 1.68, and from seed to seed 1.62 ± 0.17
FAST_SEEDS = (606, 607)  # no study of notebook 06 uses them

fast_setting = {"power": 1.0, "noise": False, "order": 2, "steps": 5, "restarts": []}


@exercise("06.7", fast_setting)
def _check_fast_setting(answer):
    calls = _calls_of(answer)
    if calls > FAST_CALLS:
        again = calls - answer["steps"]
        raise WrongAnswer(
            f"{answer['steps']} steps and {again} in restarts make {calls} network calls; the budget is {FAST_CALLS}"
        )
    restarts = tuple(tuple(restart) for restart in answer["restarts"])
    valid, fcd = _quality(float(answer["power"]), answer["noise"], answer["order"], int(answer["steps"]), restarts)
    if not fcd <= FAST_FCD:  # NaN too
        raise WrongAnswer(
            f"{calls} network calls, {valid:.1%} valid, FCD {fcd:.2f} (mean of two seeds, N = 1,000), and at most "
            f"{FAST_FCD} was asked for.{_advice(answer, calls)}"
        )


def _calls_of(setting):
    """Network calls per molecule of an answer to 06.7; what is no setting is told so."""
    if not isinstance(setting, dict):
        raise WrongAnswer(f"a dict was expected, {type(setting).__name__} came")
    for key in setting:
        if key not in fast_setting:
            raise WrongAnswer(f"there is no knob {quoted(key)}; the knobs are {', '.join(fast_setting)}")
    for key in fast_setting:
        if key not in setting or setting[key] is ...:
            raise WrongAnswer(f"{key!r} is missing; the knobs are {', '.join(fast_setting)}")
    power, noise, order, steps = (setting[key] for key in ("power", "noise", "order", "steps"))
    if isinstance(power, bool) or not isinstance(power, (int, float, np.number)) or not 0 < power < np.inf:
        raise WrongAnswer(f"power={quoted(power)}: expected a number above 0")
    if not isinstance(noise, (bool, np.bool_)):
        raise WrongAnswer(f"noise={quoted(noise)}: expected True or False")
    if isinstance(order, bool) or order not in (1, 2):
        raise WrongAnswer(f"order={quoted(order)}: expected 1 or 2")
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise WrongAnswer(f"steps={quoted(steps)}: expected a whole number of at least 1")
    try:
        restarts = read_restarts(setting["restarts"])
    except ValueError as error:
        raise WrongAnswer(str(error)) from None
    return steps + sum(restart.steps for restart in restarts)


@functools.lru_cache(maxsize=32)
def _quality(power, noise, order, steps, restarts):
    """What a setting of latent_diffusion reaches at N = 1,000: mean share of valid ones, mean FCD to validation."""
    pipe = load_pipeline("latent_diffusion")
    pipe.set_progress_bar_config(disable=True)
    kind = "sde-dpmsolver++" if noise else "dpmsolver++"
    pipe.scheduler = PowerSpacedDPMSolver(
        power=power, **NOISE_SCHEDULE | {"algorithm_type": kind, "solver_order": int(order)}
    )
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
    if setting["order"] == 1:
        return " At order 1 the error of a long step is large; compare with order 2"
    if setting["power"] >= 1.5:
        longest = 1 - (1 - 1 / setting["steps"]) ** setting["power"]
        return (
            f" With power {setting['power']:g} the first step alone covers {longest:.0%} of the times; "
            "compare with a smaller power"
        )
    if setting["noise"]:
        return " With fresh noise a long step is a coarser approximation; compare with noise False"
    return " Change one knob at a time and look where FCD falls"
