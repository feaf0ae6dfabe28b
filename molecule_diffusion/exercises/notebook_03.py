"""Notebook 03: diffusion on graphs."""

import numpy as np
import torch

from molecule_diffusion.chemistry import PAIRS
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_pair, expect_something
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


def my_betas(steps):
    """β of a cosine that spends fewer steps on its two ends: ᾱ from 0.98 to 0.00008, 79 % of the steps in between.

    Shapes: -> (steps,).
    """
    angle = torch.linspace(0.14, 1.562, steps, dtype=torch.float64)
    alpha_bar = torch.cos(angle) ** 2
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return 1 - alpha_bar / before


@exercise("03.4", my_betas)
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
        if alpha_bar[-1] > 1e-4:
            raise WrongAnswer(
                f"with {steps} steps ᾱ_T = {alpha_bar[-1]:.3g}: {alpha_bar[-1]:.2%} of the variance is still signal, "
                "but sampling starts from pure noise. Reach 0.0001 or less"
            )
        if alpha_bar[0] < 0.98:
            raise WrongAnswer(f"the first of {steps} steps already destroys {1 - alpha_bar[0]:.0%} of x_0; at most 2 %")
        busy = ((alpha_bar > 0.05) & (alpha_bar < 0.95)).double().mean()
        if busy < 0.75:
            raise WrongAnswer(
                f"only {busy:.0%} of the {steps} steps lie where signal and noise mix (ᾱ between 0.05 and 0.95); "
                "the others are spent on what is nearly clean or nearly noise. Reach 75 %"
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


# ---------------------------------------------------------------------------------------------------------------------
# 03.6: the sampler that explodes
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


@exercise("03.6", draw_with_eps)
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
# 03.7: a layer that knows no order
# ---------------------------------------------------------------------------------------------------------------------


def graph_layer(h, e, w):
    """A round of message passing: pairs learn from the sum and the product of their atoms, atoms from all others.

    Args: h: atoms' states (n, k); e: pairs' states (n, n, m), symmetric; w: weights "pair" (2k + m, m), "gate" (m, k)
        and "value" (k, k).
    Returns: new h and e.
    """
    total = h[:, None] + h[None]
    product = h[:, None] * h[None]
    e = e + torch.relu(torch.cat([total, product, e], -1) @ w["pair"])
    gate = torch.sigmoid(e @ w["gate"])
    messages = gate * (h @ w["value"])[None]
    return h + messages.sum(1), e


def _layer_with(pairs, messages):
    """`graph_layer` with another way to make pairs, (h, e, w) -> what is added to e, or messages, (gate, value)."""

    def layer(h, e, w):
        e = e + pairs(h, e, w)
        return h + messages(torch.sigmoid(e @ w["gate"]), h @ w["value"]), e

    return layer


def _mirrored(h, e, w):
    n = len(h)
    both = [h[:, None].expand(n, n, -1), h[None].expand(n, n, -1)]
    upper = torch.relu(torch.cat([*both, e], -1) @ w["pair"]) * torch.ones(n, n).triu(1)[..., None]
    return upper + upper.transpose(0, 1)


def _both_orders(h, e, w):
    n = len(h)
    both = [h[:, None].expand(n, n, -1), h[None].expand(n, n, -1)]
    learned = torch.relu(torch.cat([*both, e], -1) @ w["pair"])
    return (learned + learned.transpose(0, 1)) / 2


def _one_sided(h, e, w):
    n = len(h)
    return torch.relu(torch.cat([h[:, None].expand(n, n, -1), h[None].expand(n, n, -1), e], -1) @ w["pair"])


def _sum_and_product(h, e, w):
    return torch.relu(torch.cat([h[:, None] + h[None], h[:, None] * h[None], e], -1) @ w["pair"])


def _product_and_sum(h, e, w):
    return torch.relu(torch.cat([h[:, None] * h[None], h[:, None] + h[None], e], -1) @ w["pair"])


def _from_the_others(gate, value):
    return (gate * value[None]).sum(1)


def _from_oneself(gate, value):
    return (gate * value[:, None]).sum(1)


_LAYER_MISTAKES = [
    (_mirrored, _from_oneself, "both faults are still in it"),
    (
        _mirrored,
        _from_the_others,
        "atoms hear one another now. But in [h_i, h_j] it matters which atom comes first, also if one half is mirrored",
    ),
    (
        _sum_and_product,
        _from_oneself,
        "pairs know no order now. But an atom still hears only itself: into the message from j to i belongs j's value",
    ),
    (_one_sided, _from_the_others, "now the bond from i to j differs from the bond from j to i"),
    (_one_sided, _from_oneself, "now the bond from i to j differs from the bond from j to i"),
    (_both_orders, _from_the_others, "this knows no order either; but use the sum and the product, as asked"),
    (_product_and_sum, _from_the_others, "the sum comes first, then the product: the weights were made for that"),
    (_sum_and_product, lambda gate, value: (gate * value[None]).mean(1), "the messages are summed, not averaged"),
    (_sum_and_product, lambda gate, value: value, "no message is left: h_i gets the gated values of all atoms"),
]


@exercise("03.7", graph_layer)
def _check_graph_layer(answer):
    draw = torch.Generator().manual_seed(0)
    shapes = {"h": (4, 3), "e": (4, 4, 2), "pair": (8, 2), "gate": (2, 3), "value": (3, 3)}
    w = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    h, e = w.pop("h"), w.pop("e")
    e = e + e.transpose(0, 1)
    got = answer(h.clone(), e.clone(), w)
    expect_pair(got, "the new h and the new e")
    for pairs, messages, text in _LAYER_MISTAKES:
        if all(map(_alike, got, _layer_with(pairs, messages)(h, e, w))):
            raise WrongAnswer(text)
    new_h, new_e = graph_layer(h, e, w)
    expect(got[1], new_e, "the pairs' new states", [(new_e - e, "e is lost: add to it what the pairs learn")])
    expect(got[0], new_h, "the atoms' new states", [(new_h - h, "h is lost: add to it what the atoms hear")])


def _alike(got, wrong):
    return torch.is_tensor(got) and got.shape == wrong.shape and torch.allclose(got, wrong)


# ---------------------------------------------------------------------------------------------------------------------
# 03.8: what message passing can tell apart
# ---------------------------------------------------------------------------------------------------------------------


def told_apart(one, other, rounds):
    """After how many rounds of Weisfeiler and Leman's colours two graphs differ; -1 if they do not in these rounds.

    Args: one, other: graphs with equally many atoms, (atoms, bonds): classes (n,) and bond classes (n, n).
    """
    graphs = [one, other]
    colours = [[int(atom) for atom in atoms] for atoms, _ in graphs]
    for k in range(rounds + 1):
        if sorted(colours[0]) != sorted(colours[1]):
            return k
        names = {}
        renewed = []
        for (_, bonds), old in zip(graphs, colours):
            seen = []
            for i in range(len(old)):
                heard = [(int(bonds[i][j]), old[j]) for j in range(len(old)) if bonds[i][j] > 0]
                seen.append((old[i], tuple(sorted(heard))))
            renewed.append([names.setdefault(what, len(names)) for what in seen])
        colours = renewed
    return -1


def _graph(atoms, *bonds):
    """A graph from its atoms' classes and its bonds (i, j) or (i, j, class)."""
    matrix = np.zeros((len(atoms), len(atoms)), np.int8)
    for i, j, *kind in bonds:
        matrix[i, j] = matrix[j, i] = kind[0] if kind else 1
    return np.array(atoms, np.int8), matrix


def _chain(n, *more):
    return _graph([0] * n, *((i, i + 1) for i in range(n - 1 - len(more))), *more)


def _ring(n, first=0):
    return [(first + i, first + (i + 1) % n) for i in range(n)]


_PAIRS_OF_GRAPHS = [  # name, two graphs, rounds, the right number, what a wrong one may mean
    (
        "C-C-O and C-O-O",
        (_graph([0, 0, 2], (0, 1), (1, 2)), _graph([0, 2, 2], (0, 1), (1, 2))),
        5,
        0,
        "their atoms differ in number before any message is sent: compare the colours before the first round, too",
    ),
    (
        "a chain and a ring of three carbons",
        (_chain(3), _graph([0] * 3, *_ring(3))),
        5,
        1,
        "in a ring each atom hears two neighbours of one colour, at a chain's end only one: a set would forget that",
    ),
    (
        "butane and isobutane",
        (_chain(4), _graph([0] * 4, (0, 1), (0, 2), (0, 3))),
        5,
        1,
        "isobutane's middle hears three neighbours, so the first round tells them apart",
    ),
    (
        "a ring of four and four carbons that are all joined",
        (_graph([0] * 4, *_ring(4)), _graph([0] * 4, *_ring(4), (0, 2), (1, 3))),
        5,
        1,
        "new names must mean the same in both graphs: use one dictionary of names per round for both",
    ),
    (
        "C=C-C-C and C-C=C-C",
        (
            _graph([0] * 4, (0, 1, 2), (1, 2), (2, 3)),
            _graph([0] * 4, (0, 1), (1, 2, 2), (2, 3)),
        ),
        5,
        1,
        "a message carries the class of its bond, too",
    ),
    (
        "C-C-O-C-C and C-C-C-C-O with its atoms renumbered",
        (_graph([0, 0, 2, 0, 0], *_ring(5)[:4]), _graph([2, 0, 0, 0, 0], *_ring(5)[:4])),
        5,
        1,
        "O has two neighbours in one of them and one in the other",
    ),
    (
        "C-O-C-C-O and C-C-C-O-O",
        (_graph([0, 2, 0, 0, 2], *_ring(5)[:4]), _graph([0, 0, 0, 2, 2], *_ring(5)[:4])),
        5,
        1,
        "an atom's new colour holds its own old one, too, not only what it hears",
    ),
    (
        "2- and 3-methylpentane",
        (_chain(6, (1, 5)), _chain(6, (2, 5))),
        5,
        2,
        "both have three ends, two middles and one branch, so one round is not enough; two are",
    ),
    (
        "2- and 3-methylpentane, in one round",
        (_chain(6, (1, 5)), _chain(6, (2, 5))),
        1,
        -1,
        "only one round was allowed",
    ),
    (
        "propanol, written from either end",
        (_graph([0, 0, 0, 2], *_ring(4)[:3]), _graph([2, 0, 0, 0], *_ring(4)[:3])),
        5,
        -1,
        "it is the same molecule: compare the *sorted* colours, and sort what an atom hears",
    ),
    (
        "two triangles and a ring of six",
        (_graph([0] * 6, *_ring(3), *_ring(3, 3)), _graph([0] * 6, *_ring(6))),
        20,
        -1,
        "every atom hears two neighbours of its own colour, in every round. Bonds alone may be looked at",
    ),
]


@exercise("03.8", told_apart)
def _check_told_apart(answer):
    for name, (one, other), rounds, right, meaning in _PAIRS_OF_GRAPHS:
        copies = [tuple(part.copy() for part in graph) for graph in (one, other)]
        got = answer(*copies, rounds)
        expect_something(got)
        if isinstance(got, bool) or not isinstance(got, (int, np.integer)):
            raise WrongAnswer(f"return a whole number, the round in which they differ, or -1; {got!r} came")
        if got != right:
            raise WrongAnswer(f"{name}: expected {right}, got {got}; {meaning}")
        if any((copy[1] != graph[1]).any() for copy, graph in zip(copies, (one, other))):
            raise WrongAnswer("the caller's bonds were changed; work on copies")
