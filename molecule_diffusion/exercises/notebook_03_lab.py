"""Notebook 03: the samplers: a whole one (03.7), one that explodes (03.8), and a step with a share of noise (03.10)."""

import numpy as np
import torch

from molecule_diffusion.encodings import expected_graph, vector_graph
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_pair, expect_something
from molecule_diffusion.schedules import alpha_bars, cosine_betas, posterior_mean

# ---------------------------------------------------------------------------------------------------------------------
# 03.7: the sampler, whole
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(model, n, timesteps, alpha_bar, generator):
    """Algorithm 2 in long steps, for a network that names classes and reads its last guess.

    Args: model: function (x, t, guess) -> logits (n, 189); timesteps: rising, walked from the last to the first.
    Returns: the atoms and the bonds of n graphs.
    """
    kept = alpha_bar[timesteps]
    betas = 1 - kept / torch.cat([torch.ones(1), kept[:-1]])
    x, guess = torch.randn(n, 189, generator=generator), None
    for k in reversed(range(len(timesteps))):
        guess = expected_graph(model(x, timesteps[k], guess))
        x = posterior_mean(guess, x, k, betas)
        if k > 0:
            variance = (1 - kept[k - 1]) / (1 - kept[k]) * betas[k]
            x = x + variance.sqrt() * torch.randn(x.shape, generator=generator)
    return vector_graph(x)


class _NotingNetwork:
    """Logits that depend on all that it reads and are never sure; it notes what it reads, and its logits."""

    def __init__(self):
        self.weights = torch.randn(3, 189, generator=torch.Generator().manual_seed(1))
        self.calls = []  # (x, t, guess, logits)

    def __call__(self, x, t, guess=None):
        if not torch.is_tensor(t):
            raise WrongAnswer(f"the network wants t as a tensor, `timesteps[k]`; {type(t).__name__} came")
        if len(self.calls) == 50:
            raise WrongAnswer("the network was called more than 50 times for 7 timesteps")
        t = t.double().mean().item()
        logits = x * self.weights[0] + t / 1000 * self.weights[1]
        if guess is not None:
            logits = logits + guess * self.weights[2]
            guess = guess.clone()
        self.calls.append((x.clone(), t, guess, logits))
        return logits


@exercise("03.7", draw)
def _check_draw(answer):
    alpha_bar, timesteps = alpha_bars(cosine_betas(1000)), torch.tensor([30, 120, 300, 480, 700, 850, 999])
    network = _NotingNetwork()
    drawn = answer(network, 200, timesteps, alpha_bar, torch.Generator().manual_seed(0))
    expect_something(drawn)
    _expect_walk(network.calls, timesteps.tolist())
    _expect_guesses(network.calls)
    _expect_steps(network.calls, alpha_bar)
    if torch.is_tensor(drawn) and drawn.shape == (200, 189):
        raise WrongAnswer("numbers came back, no graphs: read the classes off with `helpers.vector_graph(x)`")
    expect_pair(drawn, "the atoms and the bonds, as `helpers.vector_graph` makes them")
    right = vector_graph(expected_graph(network.calls[-1][3]))
    if [np.shape(part) for part in drawn] != [part.shape for part in right]:
        raise WrongAnswer("atoms (n, 9) and bonds (n, 9, 9) were expected, as `helpers.vector_graph` makes them")
    if not all(np.array_equal(np.asarray(part), wanted) for part, wanted in zip(drawn, right)):
        raise WrongAnswer(
            "the graphs are not those of the last guess. After the last step ᾱ is 1: x is the guess, and no noise is "
            "added. (For k = 0, `kept[k - 1]` is `kept[-1]`, the ᾱ of the *noisiest* step.)"
        )


def _expect_walk(calls, timesteps):
    """Raise WrongAnswer unless the walk began with pure noise and went from the last timestep to the first."""
    seen = [t for _, t, _, _ in calls]
    if seen and seen == timesteps[: len(seen)]:
        raise WrongAnswer(f"the walk begins at t = {seen[0]:g}, the clean end; the noise stands at t = {timesteps[-1]}")
    if seen and len(seen) <= len(timesteps) and max(seen) < len(timesteps):
        raise WrongAnswer("the network was told the number k of the step; tell it the t, `timesteps[k]`")
    if len(seen) != len(timesteps):
        raise WrongAnswer(f"the network was called {len(seen)} times for {len(timesteps)} timesteps; once for each")
    if seen != timesteps[::-1]:
        raise WrongAnswer(f"the network was asked at t = {', '.join(f'{t:g}' for t in seen)}; walk from last to first")
    start = calls[0][0]
    if start.shape != (200, 189):
        raise WrongAnswer(f"n = 200 graphs were asked for: x of shape (200, 189); {tuple(start.shape)} came")
    if abs(start.mean()) > 0.05 or abs(start.std() - 1) > 0.05:
        raise WrongAnswer(
            f"the walk must start from pure noise, mean 0 and standard deviation 1; x has {start.mean():.2f} and "
            f"{start.std():.2f}"
        )


def _expect_guesses(calls):
    """Raise WrongAnswer unless the network read nothing at first, and then always its own last guess."""
    if calls[0][2] is not None and calls[0][2].any():
        raise WrongAnswer("at the first step there is no guess yet: give None")
    for (_, _, _, logits), (_, _, guess, _) in zip(calls, calls[1:]):
        if guess is None or not guess.any():
            raise WrongAnswer("from the second step on the network reads its last guess: model(x, t, guess)")
        if torch.allclose(guess, logits):
            raise WrongAnswer(
                "the guess that the network reads are its logits; a guess is `helpers.expected_graph` of them"
            )
        if not torch.allclose(guess, expected_graph(logits), atol=1e-5):
            raise WrongAnswer("the network does not read its own last guess, `helpers.expected_graph` of its logits")


def _expect_steps(calls, alpha_bar):
    """Raise WrongAnswer unless every step is a draw from the posterior that the guess gives."""
    steps = []
    for (x, t, _, logits), (after, s, _, _) in zip(calls, calls[1:]):
        steps.append((x, after, logits, expected_graph(logits), int(t), int(s)))
    kinds = [[*_possible_steps(step, alpha_bar)] for step in steps]
    fits = [[_fits(step, mean, spread) for mean, spread, _ in kind] for step, kind in zip(steps, kinds)]
    if all(fit[0] for fit in fits):
        return
    for k in range(1, len(fits[0])):
        if all(fit[k] for fit in fits):
            raise WrongAnswer(kinds[0][k][2])
    step, kind = next((step, kind) for step, kind, fit in zip(steps, kinds, fits) if not fit[0])
    mean, spread, _ = kind[0]
    left = (step[1] - mean).std()
    raise WrongAnswer(
        f"in the step from t = {step[4]} back to t = {step[5]}, take the posterior's mean away from the new x: noise "
        f"of the standard deviation {spread:.3f} should be left. It is {left:.3f}, or not independent of x and guess"
    )


def _possible_steps(step, alpha_bar):
    """Yield (mean, standard deviation, what went wrong) of the right step, and then of the usual mistakes."""
    x, _, logits, guess, t, s = step
    now, later = alpha_bar[t], alpha_bar[s]
    beta, one = 1 - now / later, 1 - alpha_bar[t] / alpha_bar[t - 1]
    long, single = torch.stack([1 - later, beta]), torch.stack([1 - alpha_bar[t - 1], one])
    mean, variance = posterior_mean(guess, x, 1, long), (1 - later) / (1 - now) * beta
    as_noise = (x - (1 - now).sqrt() * guess) / now.sqrt()
    yield mean, variance.sqrt(), ""
    yield (
        mean,
        torch.zeros(()),
        "fresh noise is missing: every step but the last adds some, of the posterior's variance",
    )
    yield mean, variance, "the noise is multiplied by the variance; multiply it by its root"
    yield mean, torch.ones(()), "the fresh noise has the variance 1; multiply it by the root of the posterior's"
    yield mean, beta.sqrt(), "the fresh noise has the variance β; the posterior's is β times (1 - ᾱ_s) / (1 - ᾱ_t)"
    wrong = "this is a single step back from t, β = 1 - ᾱ_t / ᾱ_{t-1}; but the next x is asked at s: β = 1 - ᾱ_t / ᾱ_s"
    yield posterior_mean(guess, x, 1, single), ((1 - alpha_bar[t - 1]) / (1 - now) * one).sqrt(), wrong
    yield posterior_mean(guess, x, 1, single), variance.sqrt(), wrong
    wrong = "the guess is taken for noise; this network names the molecule, so its guess *is* x_0"
    yield posterior_mean(as_noise, x, 1, long), variance.sqrt(), wrong
    wrong = "the logits are taken for x_0; x_0 lies between -1 and 1: `helpers.expected_graph` of the logits"
    yield posterior_mean(logits, x, 1, long), variance.sqrt(), wrong
    yield posterior_mean(x, guess, 1, long), variance.sqrt(), "x_0 and x_t are exchanged in the posterior's mean"
    wrong = "x_t is thrown away and the guess noised anew; the posterior keeps a part of x_t"
    yield later.sqrt() * guess, (1 - later).sqrt(), wrong
    yield guess, torch.zeros(()), "the guess takes the place of x; a step back goes only a part of the way to it"


def _fits(step, mean, spread):
    """Whether the new x is the mean plus independent normal noise of this standard deviation."""
    x, after, _, guess, _, _ = step
    left = after - mean
    if spread == 0:
        return left.abs().max() < 1e-3
    left = left / spread
    independent = all(abs((left * part / part.std()).mean()) < 0.05 for part in (x, guess))
    return bool(independent and abs(left.mean()) < 0.05 and abs(left.std() - 1) < 0.05)


# ---------------------------------------------------------------------------------------------------------------------
# 03.8: the sampler that explodes
# ---------------------------------------------------------------------------------------------------------------------


def draw_with_eps(predict_eps, x, timesteps, alpha_bar, generator):
    """Algorithm 2 in long steps, for a network that predicts ε, with the guess of x_0 cut to what x_0 can be.

    Args: predict_eps: function (x, t) -> ε; x: noise; timesteps: rising, walked from the last to the first.
    """
    kept = alpha_bar[timesteps]
    betas = 1 - kept / torch.cat([torch.ones(1), kept[:-1]])
    for k in reversed(range(len(timesteps))):
        eps = predict_eps(x, timesteps[k])
        x_0 = (x - (1 - kept[k]).sqrt() * eps) / kept[k].sqrt()
        x = posterior_mean(x_0.clamp(-1, 1), x, k, betas)
        if k > 0:
            variance = (1 - kept[k - 1]) / (1 - kept[k]) * betas[k]
            x = x + variance.sqrt() * torch.randn(x.shape, generator=generator)
    return x


class _KnownNetwork:
    """The best ε for numbers that are +1 with probability 0.8 and -1 with 0.2, plus an error; it notes what it gets.

    With a = sqrt(ᾱ) and s = sqrt(1 - ᾱ), Bayes' rule gives the mean of x_0: tanh(a·x / s² + ½·log(0.8 / 0.2)).
    """

    def __init__(self, alpha_bar, error):
        self.alpha_bar = alpha_bar
        self.error = error
        self.sizes = []

    def __call__(self, x, t):
        self.sizes.append(x.square().mean().item())
        a, s = self.alpha_bar[t].sqrt(), (1 - self.alpha_bar[t]).sqrt()
        x_0 = torch.tanh(a * x / s**2 + np.log(2))
        return (x - a * x_0) / s + self.error


@exercise("03.8", draw_with_eps)
def _check_draw_with_eps(answer):
    alpha_bar = alpha_bars(cosine_betas(1000))
    timesteps = torch.arange(19, 1000, 20)
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    for error in (0.0, 0.05):
        network = _KnownNetwork(alpha_bar, error)
        drawn = answer(network, noise.clone(), timesteps, alpha_bar, torch.Generator().manual_seed(1))
        expect_something(drawn)
        what = "with an error of 0.05 in ε" if error else "with the exact network"
        if not torch.is_tensor(drawn) or drawn.shape != noise.shape:
            raise WrongAnswer(f"expected a tensor like x, got {getattr(drawn, 'shape', type(drawn).__name__)}")
        _expect_calm(network.sizes, len(timesteps), what)
        size, share = drawn.square().mean().item(), (drawn > 0).float().mean().item()
        if not 0.9 < size < 1.1:  # NaN, too
            raise WrongAnswer(f"{what}, what comes out has the size {size:.3g}; numbers 1 and -1 have the size 1")
        if not 0.74 < share < 0.84:
            raise WrongAnswer(
                f"{what}, {share:.0%} of the numbers are positive; 80 % should be (a few less with the error). "
                "The cure must not change what the network says elsewhere"
            )


def _expect_calm(sizes, steps, what):
    """Raise WrongAnswer unless the network was asked at nearly every step, with x of a size of about 1."""
    if len(sizes) < 0.9 * steps or len(sizes) > 2 * steps:
        raise WrongAnswer(
            f"the network was called {len(sizes)} times for {steps} timesteps; at most the first few may be left out"
        )
    worst = max(sizes, key=lambda size: abs(np.log(max(size, 1e-9))) if np.isfinite(size) else np.inf)
    if not worst < 1.3:
        raise WrongAnswer(
            f"{what}, it gets an x of the size {worst:.3g}: it still explodes. Print x_0 in the first steps: ask "
            "how large it may be"
        )
    if worst < 0.8:
        raise WrongAnswer(
            f"{what}, the network gets an x of the size {worst:.2f}; in training x_t always had the size 1, noise "
            "included. Leave x_t and its noise alone, and mend the guess of x_0"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 03.10: a step with a share of the noise
# ---------------------------------------------------------------------------------------------------------------------


def step_back(x_t, guess, now, later, eta, z):
    """From ᾱ = now back to ᾱ = later: DDIM with the share eta of DDPM's noise. z: a draw from N(0, 1), like x_t."""
    eps = (x_t - now.sqrt() * guess) / (1 - now).sqrt()
    variance = eta**2 * (1 - later) / (1 - now) * (1 - now / later)
    return later.sqrt() * guess + (1 - later - variance).sqrt() * eps + variance.sqrt() * z


@exercise("03.10", step_back)
def _check_step_back(answer):
    x_t, guess, z = torch.tensor([0.5, -0.2, 1.4]), torch.tensor([0.9, -0.6, -1.0]), torch.tensor([1.0, -2.0, 0.3])
    now, later = torch.tensor(0.48), torch.tensor(0.64)
    eps = (x_t - now.sqrt() * guess) / (1 - now).sqrt()
    full = (1 - later) / (1 - now) * (1 - now / later)
    for eta in (0.0, 1.0, 0.5):
        variance = eta**2 * full
        rest, noise = (1 - later - variance).sqrt() * eps, variance.sqrt() * z
        signal = later.sqrt() * guess
        hints = [
            (signal + rest, "the fresh noise is missing"),
            (signal + (1 - later).sqrt() * eps + noise, "the old noise must make room for the fresh: 1 - ᾱ_s - σ²"),
            (signal + (1 - later).sqrt() * eps, "this is DDIM whatever η: the fresh noise is missing"),
            (signal + rest + variance * z, "z is multiplied by σ², the variance; multiply it by σ"),
            (signal + (1 - later - variance) * eps + noise, "the root at 1 - ᾱ_s - σ² is missing"),
            (guess + rest + noise, "the guess is not shrunk: √ᾱ_s belongs to it"),
            (later * guess + rest + noise, "the root at ᾱ_s is missing"),
            (signal + (1 - later - variance).sqrt() * x_t + noise, "x_t stands where its noise belongs: solve for ε̂"),
            (step_back(x_t, guess, now, later, eta**0.5, z), "σ² has η squared: σ is η times the posterior's"),
            (step_back(x_t, guess, now, later, 1.0, z), "η is not used: this is DDPM's noise for every η"),
            (step_back(x_t, guess, later, now, eta, z), "ᾱ_t and ᾱ_s are exchanged"),
        ]
        right = step_back(x_t, guess, now, later, eta, z)
        expect(answer(x_t, guess, now, later, eta, z), right, f"ᾱ from 0.48 to 0.64, η = {eta:g}", hints)
    clean = torch.ones(())
    expect(answer(x_t, guess, now, clean, 1.0, z), guess, "the last step, to ᾱ = 1, where only the guess is left")
