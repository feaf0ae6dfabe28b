"""Notebook 03: diffusion on graphs. The samplers, 03.7, 03.8 and 03.10, stand in notebook_03_lab."""

import torch
from torch.nn import functional as F

from molecule_diffusion.encodings import expected_graph, split_vector
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_pair, expect_something
from molecule_diffusion.exercises.predicting import Name, Number, Ranking, prediction
from molecule_diffusion.schedules import alpha_bars, posterior_mean, q_sample

NETWORKS = ("MLP", "U-Net", "graph network")
prediction("03.p1", Number("steps", lowest=0, highest=999))
prediction("03.p2", Number("visible rivals that win", lowest=0, highest=66))
prediction("03.p3", Number("of the draws", lowest=0, highest=1))
prediction("03.p4", Number("of the numbers are +1", lowest=0, highest=1))
prediction("03.p5", Ranking(("ε", "v", "x₀", "classes")))
prediction("03.p6", Number("points of validity", lowest=-100, highest=100))
prediction("03.p7", Name(NETWORKS))
prediction("03.p8", Name(NETWORKS))
prediction("03.p9", Number("of the mistakes", lowest=0, highest=1))
prediction("03.p10", Number("of the valid ones", lowest=0, highest=1))


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


# ---------------------------------------------------------------------------------------------------------------------
# 03.3: reading schedules
# ---------------------------------------------------------------------------------------------------------------------

FAULTS = {
    "A": "nothing to learn at the noisy end",
    "B": "signal left",
    "C": "fine",
    "D": "nothing to learn at the clean end",
}
_READ = {  # what the figure shows of each
    "A": "more than two fifths of its steps have ᾱ below 0.05, and it ends near 0",
    "B": "look at its last step: what is ᾱ there, and where does sampling begin",
    "C": "it ends near 0, and at neither end it spends more than a sixth of its steps",
    "D": "more than half of its steps have ᾱ above 0.95, and it ends near 0",
}


def lettered_schedules(steps=1000):
    """The β of the four schedules of exercise 03.3, of which three have a fault. Returns: dict of (steps,)."""
    share = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    kept = {
        "A": torch.exp(-0.1 * share - 9.95 * share**2),
        "B": torch.exp(-2.3 * share**2),
        "C": torch.cos(share * 1.5607) ** 2,
        "D": torch.cos((0.03 * share + 0.97 * share**5) * 1.5607) ** 2,
    }
    one = torch.ones(1, dtype=torch.float64)
    return {name: 1 - left / torch.cat([one, left[:-1]]) for name, left in kept.items()}


@exercise("03.3", FAULTS)
def _check_faults(answer):
    if not isinstance(answer, dict):
        raise WrongAnswer(f"a dictionary was expected, {type(answer).__name__} came")
    if open_ones := [name for name in FAULTS if answer.get(name) in (None, ...)]:
        raise WrongAnswer(f"there is no answer yet for {', '.join(open_ones)}. Replace the `...`")
    if extra := sorted(map(str, answer.keys() - FAULTS.keys())):
        raise WrongAnswer(f"there is no schedule {extra[0]!r}")
    for name, right in FAULTS.items():
        if answer[name] not in FAULTS.values():
            raise WrongAnswer(f"{name}: {answer[name]!r} is none of {', '.join(sorted(FAULTS.values()))}")
        if answer[name] != right:
            raise WrongAnswer(f"{name} is not “{answer[name]}”: {_READ[name]}")


# ---------------------------------------------------------------------------------------------------------------------
# 03.4: a schedule of one's own
# ---------------------------------------------------------------------------------------------------------------------


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
# 03.6: the loss
# ---------------------------------------------------------------------------------------------------------------------


def graph_loss(model, x_0, t, eps, alpha_bar):
    """Nats per molecule that the clean graph costs, given the noisy one; half of the batch also reads a first guess.

    Args: model: function (x_t, t, guess) -> logits (B, 189), guess None or (B, 189); x_0, eps (B, 189); t (B,).
    """
    x_t = q_sample(x_0, t, eps, alpha_bar)
    half = len(x_0) // 2
    guess = torch.zeros_like(x_0)
    with torch.no_grad():
        guess[:half] = expected_graph(model(x_t[:half], t[:half], None))
    logits = split_vector(model(x_t, t, guess))
    nats = 0
    for told, true in zip(logits, split_vector(x_0)):
        classes = true.argmax(-1)
        nats = nats + F.cross_entropy(told.flatten(0, 1), classes.flatten(), reduction="sum")
    return nats / len(x_0)


class _WatchedNetwork(torch.nn.Module):
    """A small network that notes what it is given, and whether gradients are kept."""

    def __init__(self):
        super().__init__()
        weights = torch.randn(3, 189, generator=torch.Generator().manual_seed(1))
        self.weights = torch.nn.Parameter(weights)
        self.calls = []

    def forward(self, x_t, t, guess=None):
        self.calls.append((x_t.detach().clone(), t, guess if guess is None else guess.detach().clone()))
        self.calls[-1] += (torch.is_grad_enabled(),)
        read = x_t * self.weights[0] + t[:, None] / 1000 * self.weights[1]
        return read if guess is None else read + guess * self.weights[2]


@exercise("03.6", graph_loss)
def _check_graph_loss(answer):
    draw = torch.Generator().manual_seed(0)
    classes = [torch.randint(5, (6, 9), generator=draw), torch.randint(4, (6, 36), generator=draw)]
    parts = [2.0 * F.one_hot(part, size) - 1 for part, size in zip(classes, (5, 4))]
    x_0 = torch.cat([part.flatten(1) for part in parts], 1)
    t, eps = torch.tensor([0, 1, 2, 2, 1, 0]), torch.randn(6, 189, generator=draw)
    alpha_bar = torch.tensor([0.9, 0.5, 0.1])
    network = _WatchedNetwork()
    got = answer(network, x_0.clone(), t, eps.clone(), alpha_bar)
    expect_something(got)
    if not torch.is_tensor(got) or got.shape != ():
        raise WrongAnswer(f"return one number, a tensor of shape (); {getattr(got, 'shape', type(got).__name__)} came")
    _expect_two_calls(network.calls, x_0, t, q_sample(x_0, t, eps, alpha_bar), eps)
    right = graph_loss(_WatchedNetwork(), x_0, t, eps, alpha_bar).item()
    logits = _WatchedNetwork()(*network.calls[-1][:3])
    told = [part.flatten(0, 1) for part in split_vector(logits)]
    true = [part.flatten() for part in classes]
    each = [F.cross_entropy(*pair, reduction="sum").item() for pair in zip(told, true)]
    twice = [F.cross_entropy(part.softmax(-1), wanted, reduction="sum").item() for part, wanted in zip(told, true)]
    hints = [
        (sum(each), "this is the sum over the batch; divide by the number of molecules"),
        (
            each[0] / 54 + each[1] / 216,
            "a mean over all entries: add up the nats of a molecule, and average over molecules",
        ),
        (each[0] / 6, "only the atoms are counted; the pairs are missing"),
        (each[1] / 6, "only the pairs are counted; the atoms are missing"),
        (sum(twice) / 6, "softmax is taken twice: `F.cross_entropy` wants the logits"),
        ((expected_graph(logits) - x_0).square().sum(1).mean().item(), "this is a squared error"),
        ((logits - x_0).square().mean().item(), "this is a squared error, and of the logits"),
        (-right, "the sign: nats are minus the logarithm of a probability"),
    ]
    expect(got.detach(), right, "a batch of six graphs", hints)
    if not got.requires_grad:
        raise WrongAnswer(
            "the result carries no gradient, so nothing could be learned: only the *first* call is without"
        )


def _expect_two_calls(calls, x_0, t, x_t, eps):
    """Raise WrongAnswer unless the network was asked for a first guess of half of the batch, and then for all of it."""
    for read, _, _, _ in calls:
        if read.shape[1:] == x_0.shape[1:] and _alike(read, x_0[: len(read)]):
            raise WrongAnswer("the network was shown the clean graph itself; it must see x_t")
    if len(calls) != 2:
        raise WrongAnswer(f"the network was called {len(calls)} times; two calls are needed: for a guess, then with it")
    (first, first_t, no_guess, kept), (second, second_t, guess, learned) = calls
    if len(first) != len(x_0) // 2:
        raise WrongAnswer(f"the first call was for {len(first)} of {len(x_0)} molecules; half of them make a guess")
    if not _alike(first, x_t[: len(first)]) or not _alike(second, x_t):
        raise WrongAnswer("x_t is not the jump of exercise 03.2 from x_0 with these t and eps")
    if not torch.equal(first_t, t[: len(first)]) or not torch.equal(second_t, t):
        raise WrongAnswer("each molecule goes with its own t, in both calls")
    if no_guess is not None and no_guess.any():
        raise WrongAnswer("in the first call there is no guess yet: give None")
    if kept:
        raise WrongAnswer("the first guess was made with gradients; put it under `torch.no_grad()`")
    if guess is None or not guess.any():
        raise WrongAnswer("the guess was made and not read: give it to the second call")
    if guess[len(first) :].any():
        raise WrongAnswer("the second half of the batch must read zeros, as at the first step of sampling")
    if not _alike(guess[: len(first)], expected_graph(_WatchedNetwork()(first, first_t)).detach()):
        raise WrongAnswer("the guess is the expected one-hot, between -1 and 1: `helpers.expected_graph` of the logits")


# ---------------------------------------------------------------------------------------------------------------------
# 03.9: a layer that knows no order
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


@exercise("03.9", graph_layer)
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
