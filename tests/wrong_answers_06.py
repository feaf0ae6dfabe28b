"""Wrong answers to the exercises of notebook 06, each with words that answer it; `test_exercises` tries them."""

import numpy as np
import torch

from molecule_diffusion.exercises import notebook_06, notebook_06_lab


def compare_with(generator_of, hand_over=True):
    """An answer to 06.1 that takes the generator for the k-th setting from `generator_of(k, seed)`."""

    def answer(draw, settings, seed):
        found = {}
        for k, (name, setting) in enumerate(settings.items()):
            found[name] = draw(generator=generator_of(k, seed), **(setting if hand_over else {}))
        return found

    return answer


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def shared_generator(draw, settings, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: draw(generator=generator, **setting) for name, setting in settings.items()}


def global_seed(draw, settings, seed):
    torch.manual_seed(seed)
    return {name: draw(**setting) for name, setting in settings.items()}


def first_setting_only(draw, settings, seed):
    for name, setting in settings.items():
        return {name: draw(generator=seeded(seed), **setting)}


def settings_changed(draw, settings, seed):
    for setting in settings.values():
        setting["generator"] = seeded(seed)
    return {name: draw(**setting) for name, setting in settings.items()}


def one_setting_for_all(draw, settings, seed):
    setting = settings["20 steps"]
    return {name: draw(generator=seeded(seed), **setting) for name in settings}


def diagnosis(kept=0.3, largest=100, clipped=1.0, quiet=0.1, batches=0.1):
    """The right answer to 06.6 with other limits, as a function."""

    def answer(*given):
        found = notebook_06_lab.symptoms(*given)
        if found["kept"] > kept:
            return "signal left"
        if found["largest"] > largest:
            return "prediction type"
        if found["largest"] <= clipped:
            return "clipping"
        if found["quiet"] > quiet:
            return "lost betas"
        return "batches" if found["other batches"] > batches else "healthy"

    return answer


def eta_loop(change="", fresh=1.0):
    """The right loop of exercise 06.2 with one change, as a function."""

    def answer(predict_v, z, timesteps, alpha_bar, eta, generator):
        for k, t in enumerate(timesteps):
            last = k == len(timesteps) - 1
            now = alpha_bar[t]
            after = torch.ones_like(now) if last else alpha_bar[timesteps[k + 1]]
            if change == "-1" and last:
                after = alpha_bar[-1]
            if change == "first" and last:
                after = alpha_bar[0]
            if change == "t - 1":
                after = alpha_bar[t - 1]
            v = predict_v(z, t)
            z_0, eps = now.sqrt() * z - (1 - now).sqrt() * v, (1 - now).sqrt() * z + now.sqrt() * v
            if change == "sign":
                eps = (1 - now).sqrt() * z - now.sqrt() * v
            if change == "epsilon":
                z_0, eps = (z - (1 - now).sqrt() * v) / now.sqrt(), v
            if change == "v":
                eps = v
            if change == "sample":
                z_0, eps = v, (z - now.sqrt() * v) / (1 - now).sqrt()
            share = 1.0 if change == "no eta" else eta
            full = (1 - after) / (1 - now) * (1 - now / after)
            if change == "upside down":
                full = (1 - after) / (1 - now) * (1 - after / now)
            sigma = share * (full if change == "variance" else full.sqrt())
            if change == "eta squared":
                sigma = eta * sigma
            if change == "beta":
                sigma = eta * (1 - now / after).sqrt()
            taken = {"kept": 0 * sigma, "eta once": eta * full, "no square": sigma}.get(change, sigma**2)
            left = 1 - after - taken
            if change != "unguarded":
                left = left.clamp(min=0)
            z = after.sqrt() * z_0 + (left if change == "no root" else left.sqrt()) * eps
            z = z + fresh * sigma * torch.randn(z.shape, generator=generator, dtype=z.dtype)
        return z

    return answer


def always_ddpm(predict_v, z, timesteps, alpha_bar, eta, generator):
    return notebook_06.ddim_loop(predict_v, z, timesteps, alpha_bar, 1.0, generator)


def never_noisy(predict_v, z, timesteps, alpha_bar, eta, generator):
    return notebook_06.ddim_loop(predict_v, z, timesteps, alpha_bar, 0.0, generator)


def lam(kept):
    return 0.5 * np.log(kept / (1 - kept))


def two_step(change=""):
    """The right step of exercise 06.3 with one change, as a function."""

    def answer(z, guess, guess_before, before, now, after):
        if after == 1 and change != "to infinity":
            return guess
        h = lam(after) - lam(now)
        if change == "log SNR":
            h = 2 * h
        slope = guess
        if guess_before is not None:
            weight = h / (2 * (lam(now) - lam(before)))
            weight = {"half": 0.5, "inverted": 1 / (4 * weight), "no half": 2 * weight}.get(change, weight)
            slope = guess + weight * (guess - guess_before)
            if change == "backwards":
                slope = guess + weight * (guess_before - guess)
            if change == "older":
                slope = guess_before + weight * (guess - guess_before)
            if change == "order 1":
                slope = guess
        shrink = {"no root": (1 - after) / (1 - now), "upside down": ((1 - now) / (1 - after)) ** 0.5}.get(
            change, ((1 - after) / (1 - now)) ** 0.5
        )
        signal = {"after": after, "now": now**0.5}.get(change, after**0.5)
        move = {"sign": np.exp(-h) - 1, "growth": np.exp(h) - 1}.get(change, 1 - np.exp(-h))
        return shrink * z + signal * move * slope

    return answer


def by_border(mean, error, border):
    if abs(mean) <= border * error:
        return "not resolved"
    return "better" if mean < 0 else "worse"


def pairs(error=None, verdict=by_border, place=False, sign=1):
    """The right answer to exercise 06.4 with one change, as a function."""

    def answer(rows, others, border):
        a = np.array([row["fcd"] for row in rows])
        fcds = {row["seed"]: row["fcd"] for row in others}
        b = np.array([row["fcd"] for row in others] if place else [fcds[row["seed"]] for row in rows])
        d = sign * (a - b)
        found = error(a, b) if error else d.std(ddof=1) / len(d) ** 0.5
        return d.mean(), found, verdict(d.mean(), found, border)

    return answer


def paired_sum(rows, others, border):
    d = [one["fcd"] - other["fcd"] for one, other in zip(rows, others)]
    return sum(d), np.std(d, ddof=1) / len(d) ** 0.5, "worse"


def by_ratio(mean, error, border):
    return by_border(float(mean) / float(error), 1, border)


def guide(combine=lambda v_with, v_neg, scale: v_neg + scale * (v_with - v_neg), change=""):
    """The right answer to exercise 06.5 with one change, as a function."""

    def answer(network, z, t, wish, negative, scale):
        if change == "wish for None" and negative is None:
            return network(z, t, wish)
        if scale == 1 and change != "always twice" or scale < 1 and change == "off up to 1":
            return network(z, t, wish)
        if (negative is None and change != "None joined") or change == "negative unused":
            negative = torch.zeros_like(wish)
        twice = torch.cat([z, z])
        if change == "z once":
            twice = z
        if change == "in turns":
            twice = z.repeat_interleave(2, 0)
        if change == "stacked":
            twice = torch.stack([z, z])
        axis = 1 if change == "side by side" else 0
        both = network(twice, t, torch.cat([wish, negative], axis))
        return both if change == "both" else combine(*both.chunk(2), scale)

    return answer


def guide_by_two_calls(network, z, t, wish, negative, scale):
    negative = torch.zeros_like(wish) if negative is None else negative
    v_with, v_neg = network(z, t, wish), network(z, t, negative)
    return v_neg + scale * (v_with - v_neg)


def guide_the_conditions(network, z, t, wish, negative, scale):
    negative = torch.zeros_like(wish) if negative is None else negative
    return network(z, t, negative + scale * (wish - negative))


def front(as_good, better, keep=lambda values: ~np.isnan(values).any(1)):
    """A Pareto front by other comparisons, as a function for exercise 06.7."""

    def answer(values):
        dominated = [(as_good(values, point) & better(values, point)).any() for point in values]
        return ~np.array(dominated) & keep(values)

    return answer


def both_at_most(values, point):
    return (values <= point).all(1)


def one_less(values, point):
    return (values < point).any(1)


def first_of_equals(values):
    _, first = np.unique(values, axis=0, return_index=True)
    kept = np.zeros(len(values), bool)
    kept[first] = True
    return kept & front(both_at_most, one_less)(values)


def fast(**changes):
    """A right answer to 06.8 with changes."""
    return {"sampler": "UniPC", "spacing": "leading", "steps": 5, "restarts": []} | changes


def without(key):
    return {name: value for name, value in fast().items() if name != key}


WRONG = {
    "06.1": [
        (shared_generator, "share one generator object"),
        (compare_with(lambda k, seed: seeded(0)), "`seed` is not used"),
        (compare_with(lambda k, seed: torch.Generator()), "`seed` is not used"),
        (global_seed, "got no generator"),
        (compare_with(lambda k, seed: torch.manual_seed(seed)), "torch's global generator"),
        (compare_with(lambda k, seed: seeded(seed + k)), r"the \*same\* seed"),
        (compare_with(lambda k, seed: seed), "expected a torch.Generator"),
        (compare_with(lambda k, seed: seeded(seed), hand_over=False), "was drawn without its setting"),
        (one_setting_for_all, "its setting is {'num_inference_steps': 25}"),
        (first_setting_only, "no result for '20 steps again'"),
        (settings_changed, "caller's settings were changed"),
        (lambda draw, settings, seed: [draw(generator=seeded(seed), **s) for s in settings.values()], "list came"),
        (lambda draw, settings, seed: {name: seeded(seed) for name in settings}, "`draw` was never called"),
    ],
    "06.6": [
        (lambda *given: "healthy", r"A is not healthy: its largest \|z\| is exactly 1"),
        (lambda *given: "clipping", "B cannot be 'clipping': then no number could lie beyond 1"),
        (diagnosis(largest=1.1, clipped=0.99), "A is not healthy"),
        (diagnosis(quiet=1), "B is not healthy: its quiet numbers have a spread of 0.3"),
        (diagnosis(batches=100), "C is not healthy: the same seed draws other molecules in other batches"),
        (diagnosis(batches=-1), "the healthy sampler cannot be 'batches': then other batches would give other"),
        (diagnosis(largest=1e9), "D cannot be 'lost betas': then noise of the size 0.3"),
        (diagnosis(kept=2), "E is not healthy: a known latent still shows in its first state"),
        (diagnosis(kept=0.95), "a patient that is not in the table is not healthy: a known latent still shows"),
        (diagnosis(quiet=0.02), "'lost betas': then noise of the size 0.3 would be left"),
        (lambda *given: "beta schedule", "unknown cause 'beta schedule'; known ones: healthy, signal left"),
        (lambda *given: ["clipping"], "unknown cause"),
        (lambda *given: None, "the function returns nothing yet"),
        ({"A": "clipping"}, "a function was expected, dict came"),
    ],
    "06.2": [
        (eta_loop(fresh=0.0), "the fresh noise is missing"),
        (eta_loop("kept"), "keeps its full weight"),
        (eta_loop("variance"), r"η times the \*root\*"),
        (eta_loop("eta squared"), "contains η once"),
        (eta_loop("eta once"), "so η is squared there"),
        (eta_loop("no square"), "without the square"),
        (eta_loop("no root"), "the square root is missing in the weight"),
        (eta_loop("no eta"), "η has no effect"),
        (always_ddpm, "this is the answer for η = 1"),
        (eta_loop("beta"), r"1 - ᾱ_r\) / \(1 - ᾱ_t\)\) is missing"),
        (eta_loop("sign"), r"\*plus\*"),
        (eta_loop("epsilon"), "as if it were ε; it is v"),
        (eta_loop("v"), "v is put back as if it were ε"),
        (eta_loop("sample"), "as if it were z_0"),
        (eta_loop("t - 1"), "not t - 1"),
        (eta_loop("-1"), "after the last step ᾱ_r is 1"),
        (eta_loop("first"), "not the first entry"),
        (eta_loop("upside down"), "the noisier ᾱ above"),
        (eta_loop("unguarded"), "clamp"),
        (never_noisy, "this is the answer for η = 0"),
        (lambda predict_v, z, timesteps, alpha_bar, eta, generator: z, "nothing changed"),
    ],
    "06.3": [
        (two_step("order 1"), "this is a step of first order"),
        (two_step("half"), "only if both steps are equally long"),
        (two_step("inverted"), "yours is upside down"),
        (two_step("no half"), "the factor ½ is missing in the weight"),
        (two_step("backwards"), r"D goes \*on\*"),
        (two_step("older"), "started it from the old one"),
        (two_step("log SNR"), r"λ is \*half\* the logarithm"),
        (two_step("no root"), "the root is missing in the factor at z"),
        (two_step("upside down"), "the factor at z is upside down"),
        (two_step("after"), "the root of ᾱ_r is missing"),
        (two_step("now"), r"ᾱ at the \*end\* of the step"),
        (two_step("sign"), "the sign of the bracket"),
        (two_step("growth"), r"you took exp\(h\) - 1"),
        (two_step("to infinity"), "at ᾱ = 1 λ is infinite"),
        (lambda z, guess, guess_before, before, now, after: z, "nothing changed"),
        (lambda z, guess, guess_before, before, now, after: guess, "ends at the guess"),
    ],
    "06.4": [
        (pairs(sign=-1), "the sign of the mean difference"),
        (pairs(place=True), "you paired by place"),
        (pairs(lambda a, b: (a - b).std(ddof=1)), r"the spread of \*one\* difference"),
        (pairs(lambda a, b: (a - b).std() / len(a) ** 0.5), "`ddof=1`; NumPy's default is n"),
        (pairs(lambda a, b: (a - b).std(ddof=1) / len(a)), r"by the \*root\* of n"),
        (pairs(lambda a, b: (a - b).var(ddof=1) / len(a)), "this is the variance of the mean"),
        (
            pairs(lambda a, b: ((a.var(ddof=1) + b.var(ddof=1)) / len(a)) ** 0.5),
            "the standard error without pairing",
        ),
        (pairs(verdict=lambda mean, *_: "better" if mean < 0 else "worse"), "is not beyond 4.3 standard errors"),
        (pairs(verdict=lambda mean, error, border: by_border(-mean, error, border)), r"a \*smaller\* FCD is better"),
        (pairs(verdict=lambda mean, *_: by_border(mean, 0.04, 1)), "is beyond 4.3 standard errors"),
        (pairs(verdict=by_ratio), "division by zero"),
        (pairs(verdict=lambda mean, *_: bool(mean < 0)), 'expected "better", "worse" or "not resolved"'),
        (paired_sum, "this is the sum of the differences"),
        (lambda rows, others, border: "worse", "return three things"),
    ],
    "06.5": [
        (guide(lambda v_with, v_neg, scale: v_with + scale * (v_with - v_neg)), "start from the negative answer"),
        (guide(lambda v_with, v_neg, scale: v_with + scale * (v_neg - v_with)), "the two answers are exchanged"),
        (guide(lambda v_with, v_neg, scale: v_neg + scale * v_with), r"is the \*difference\* of the two answers"),
        (guide(lambda v_with, v_neg, scale: v_neg + (scale - 1) * (v_with - v_neg)), "you took scale - 1"),
        (guide(lambda v_with, v_neg, scale: v_with), "nothing is guided"),
        (guide(change="off up to 1"), "guidance is off at scale 1 only, not below"),
        (guide(change="both"), "these are both answers; combine them"),
        (guide(change="in turns"), "put the whole batch z twice"),
        (guide(change="z once"), "the network got 3 rows of z and 6 conditions"),
        (guide(change="stacked"), r"z of shape \(2, 3, 9, 8\); expected \(rows, 9, 8\)"),
        (guide(change="side by side"), r"a condition of shape \(3, 8\); expected \(rows, 4\)"),
        (guide(change="negative unused"), "the negative condition is not used"),
        (guide(change="wish for None"), "nothing is asked for: put zeros in its place"),
        (guide(change="None joined"), "negative=None cannot be joined"),
        (guide(change="always twice"), "3 rows are enough; the network got 6"),
        (guide_by_two_calls, "called 2 times; one call on twice the batch"),
        (guide_the_conditions, r"guide the two \*answers\*, not the conditions"),
    ],
    "06.7": [
        (front(lambda v, p: (v < p).all(1), one_less), "equal in one column and better in the other does dominate"),
        (front(lambda v, p: (v >= p).all(1), lambda v, p: (v > p).any(1)), r"front of the \*largest\* values"),
        (front(both_at_most, lambda v, p: True), "compared with itself as well"),
        (front(lambda v, p: True, one_less), r"at least as good in \*both\*"),
        (front(both_at_most, lambda v, p: np.arange(len(v)) != (v == p).all(1).argmax()), "remove each other"),
        (front(both_at_most, one_less, lambda v: True), "a row with NaN is on your front"),
        (front(both_at_most, one_less, lambda v: ~np.isnan(v).any()), "emptied the whole front"),
        (first_of_equals, "only one was kept"),
        (lambda values: values[:, 0] == values[:, 0].min(), "smallest of the first column; both goals count"),
        (lambda values: values[:, 1] == values[:, 1].min(), "smallest of the second column; both goals count"),
        (lambda values: (values == values.min(0)).any(1), "so is what lies between them"),
        (lambda values: values.sum(1) == values.sum(1).min(), "cannot be added"),
        (lambda values: ~front(both_at_most, one_less)(values), "the other way round"),
        (lambda values: np.flatnonzero(front(both_at_most, one_less)(values)), "these are the positions"),
        (lambda values: values[front(both_at_most, one_less)(values)], "these are the settings themselves"),
        (lambda values: front(both_at_most, one_less)(values).sum(), "expected True or False for each setting"),
        (lambda values: front(both_at_most, one_less)(values[:-1]), r"expected shape \(3,\), got \(2,\)"),
    ],
    "06.8": [
        (fast(steps=6), "6 steps and 0 in restarts make 6 network calls; the budget is 5"),
        (fast(restarts=[("jump", 0.3, 2)]), "5 steps and 2 in restarts make 7 network calls"),
        (fast(eta=0.5), "there is no knob 'eta'; the knobs are sampler, spacing, steps, restarts"),
        (without("spacing"), "'spacing' is missing"),
        (fast(sampler="unipc"), "sampler='unipc': expected one of DDPM, DDIM"),
        (fast(spacing="Karras"), "spacing='Karras': expected one of trailing, leading, linspace"),
        (fast(steps=2.5), "steps=2.5: expected a whole number of at least 1"),
        (fast(restarts=[("jump", 0.3)]), "expected a list of triples"),
        (fast(restarts="none"), "expected a list of triples"),
        (["UniPC", "leading", 5, []], "a dict was expected, list came"),
        (fast(sampler="SDE-DPM-Solver++"), "With fresh noise a long step is a coarser approximation"),
        (fast(sampler="DDIM"), "DDIM is of order 1"),
        (fast(spacing="trailing"), "Each knob has one more value"),
        (fast(steps=3, restarts=[("jump", 0.3, 2)]), "2 of the calls go into restarts, which leaves 3"),
        (fast(steps=3), "2 of the 5 calls are not spent"),
    ],
}
