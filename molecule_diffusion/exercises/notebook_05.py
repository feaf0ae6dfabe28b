"""Notebook 05: the diffusion prior."""

import numpy as np
import torch

from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.chemistry import describe, to_graph
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_something
from molecule_diffusion.pipelines import MoleculeOutput
from molecule_diffusion.schedules import alpha_bars, cosine_betas


def forget(encoded, groups, u, p):
    """Condition dropout: row b forgets group g where u[b, g] < p. Shapes: (B, size), (size,), (B, G), a number."""
    return encoded * (u >= p)[:, groups]


@exercise("05.1", forget)
def _check_forget(answer):
    generator = torch.Generator().manual_seed(0)
    groups, u = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([[0.1, 0.9], [0.6, 0.2], [0.7, 0.8]])
    encoded, p = torch.rand(3, 5, generator=generator) + 1, 0.3
    kept = (u >= p)[:, groups]
    hints = [
        (encoded * ~kept, "the other way round: what should be kept is forgotten"),
        (encoded * kept / (1 - p), "nothing is scaled up here: 0 means *unknown*, the other numbers stay as they are"),
        (encoded * (u[:, :1] >= p), "each group is forgotten on its own"),
        (encoded * kept[:1], "each molecule of the batch forgets on its own"),
        (encoded, "nothing was forgotten"),
        (kept.float(), "multiply the condition by the mask"),
    ]
    expect(answer(encoded.clone(), groups, u, p), encoded * kept, "3 molecules, groups 0 0 0 1 1, p = 0.3", hints)


def two_scales(denoiser, z_t, t, guess, nothing, asked, unwanted, s, w):
    """Guidance s times towards `asked` and, on its own scale, w times away from `unwanted`. Returns: the guided v."""
    v_nothing = denoiser(z_t, t, nothing, guess)
    towards = denoiser(z_t, t, asked, guess) - v_nothing
    away = denoiser(z_t, t, unwanted, guess) - v_nothing
    return v_nothing + s * towards - w * away


@exercise("05.2", two_scales)
def _check_two_scales(answer):
    def denoiser(z_t, t, condition, guess):
        seen = torch.zeros_like(z_t) if guess is None else guess
        return 0.5 * z_t + condition.square() * (1 + t / 1000) + 0.2 * seen  # not linear in the condition

    z_t, guess = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.3, 0.7]])
    nothing, asked, unwanted = torch.tensor([[0.5, -0.2]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 3.0]])

    def run(function, s, w, guess=guess):
        return function(denoiser, z_t.clone(), 100, guess, nothing, asked, unwanted, s, w)

    def said(condition):
        return denoiser(z_t, 100, condition, guess)

    s, w = 3.0, 0.5
    v_0, v_c, v_n = said(nothing), said(asked), said(unwanted)
    hints = [
        (v_0 + s * (v_c - v_0) + w * (v_n - v_0), "this goes *towards* what is unwanted: mind the sign of w"),
        (v_n + s * (v_c - v_n), "this is the negative condition from above; w has no effect"),
        (v_n + s * (v_c - v_n) - w * (v_n - v_0), "both arrows start at the answer for `nothing`"),
        (v_0 + s * (v_c - v_0) - w * v_n, "away from `unwanted` leads a *difference* of answers, not one answer"),
        (v_0 + s * (v_c - v_0) - w * (v_n - v_c), "both arrows start at the answer for `nothing`"),
        (v_c + s * (v_c - v_0) - w * (v_n - v_0), "start from the answer for `nothing`: s = w = 0 must leave it alone"),
        (s * (v_c - v_0) - w * (v_n - v_0), "these are the two arrows; they are added to the answer for `nothing`"),
        (said(nothing + s * (asked - nothing) - w * (unwanted - nothing)), "guide the answers, not the conditions"),
        (run(two_scales, s, w, None), "the network never sees the guess: hand it over as the fourth argument"),
    ]
    expect(run(answer, s, w), run(two_scales, s, w), "a known network, s = 3, w = 0.5", hints)
    expect(run(answer, 0.0, 0.0), v_0, "s = w = 0, where nothing is asked")
    expect(run(answer, 2.0, 1.0), v_n + 2 * (v_c - v_n), "s = 2, w = 1, the negative condition with scale 2")


def guided_sampling(denoiser, z, timesteps, alpha_bar, asked, unwanted, scale):
    """DDIM without fresh noise (eq. 12 of arXiv:2010.02502), guided away from `unwanted` towards `asked`.

    denoiser(z_t, t, condition, guess) -> v; guess is the last guess of z_0, None before the first one. `unwanted` is a
    condition like `asked`: zeros for ordinary guidance, something else for a negative condition.
    timesteps fall and may leave steps out; after the last, ᾱ is 1.
    """
    guess = None
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        now, after = alpha_bar[t], torch.ones_like(alpha_bar[0]) if last else alpha_bar[timesteps[k + 1]]
        v_asked = denoiser(z, t, asked, guess)
        v_unwanted = denoiser(z, t, unwanted, guess)
        v = v_unwanted + scale * (v_asked - v_unwanted)
        guess = now.sqrt() * z - (1 - now).sqrt() * v
        eps = (1 - now).sqrt() * z + now.sqrt() * v
        z = after.sqrt() * guess + (1 - after).sqrt() * eps
    return z


def _wrong_sampling(denoiser, z, timesteps, alpha_bar, asked, unwanted, scale, mistake):
    """`guided_sampling` with one of the mistakes that students make, to recognise it."""
    guess = None
    for k, t in enumerate(timesteps):
        last = k == len(timesteps) - 1
        now, after = alpha_bar[t], torch.ones_like(alpha_bar[0]) if last else alpha_bar[timesteps[k + 1]]
        if mistake == "one step" and t > 0:
            after = alpha_bar[t - 1]
        if mistake == "end" and last:
            after = alpha_bar[-1]
        v_asked = denoiser(z, t, asked, guess)
        v_unwanted = denoiser(z, t, torch.zeros_like(unwanted) if mistake == "zeros" else unwanted, guess)
        v = v_unwanted + scale * (v_asked - v_unwanted)
        if mistake == "from asked":
            v = v_asked + scale * (v_asked - v_unwanted)
        if mistake == "no difference":
            v = v_unwanted + scale * v_asked
        if mistake == "exchanged":
            v = v_asked + scale * (v_unwanted - v_asked)
        if mistake == "mixed condition":
            v = denoiser(z, t, unwanted + scale * (asked - unwanted), guess)
        z_0, eps = now.sqrt() * z - (1 - now).sqrt() * v, (1 - now).sqrt() * z + now.sqrt() * v
        if mistake == "jump":
            return z_0
        if mistake != "no guess":
            guess = now.sqrt() * z - (1 - now).sqrt() * v_asked if mistake == "asked guess" else z_0
        z = after.sqrt() * z_0 + (1 - after).sqrt() * (v if mistake == "v as noise" else eps)
    return z


_SAMPLING_MISTAKES = {
    "from asked": "start from the answer for `unwanted`; with scale 1 the network with `asked` alone must remain",
    "no difference": "the *difference* of the two answers is scaled",
    "exchanged": "asked and unwanted are exchanged",
    "mixed condition": "guide the network's answers, not the conditions: two calls in every step",
    "zeros": "`unwanted` has no effect: its answer takes the place of the one for zeros",
    "no guess": "the network never sees its last guess of z_0: hand it over as the fourth argument",
    "asked guess": "the guess that is handed on is the *guided* one, from the guided v",
    "v as noise": "v is put back as if it were ε; compute ε from z and v",
    "one step": "the steps are far apart: the next level is that of the *next of `timesteps`*, not of t - 1",
    "end": "after the last step ᾱ is 1 (your index may have become -1, which Python reads as the last entry)",
    "jump": "this stops after the first guess of z_0; go on to the last timestep",
}


@exercise("05.3", guided_sampling)
def _check_guided_sampling(answer):
    def denoiser(z_t, t, condition, guess):
        seen = torch.zeros_like(z_t) if guess is None else guess
        return 0.5 * z_t + condition.square() * (1 + t / 1000) + 0.2 * seen  # not linear in the condition

    alpha_bar = alpha_bars(cosine_betas(1000).double())
    timesteps = [799, 599, 399, 199]
    start = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    asked, unwanted = torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 0.5]])

    def run(sampling, scale, unwanted, *extra):
        return sampling(denoiser, start.clone(), timesteps, alpha_bar, asked, unwanted, scale, *extra)

    hints = [(run(_wrong_sampling, 3.0, unwanted, mistake), said) for mistake, said in _SAMPLING_MISTAKES.items()]
    hints.append((start, "nothing changed: return the z of the last step"))
    expect(run(answer, 3.0, unwanted), run(guided_sampling, 3.0, unwanted), "a known network, 4 steps, scale 3", hints)
    zeros = torch.zeros_like(unwanted)
    expect(run(answer, 3.0, zeros), run(guided_sampling, 3.0, zeros), "the same with zeros for `unwanted`")
    expect(run(answer, 1.0, unwanted), run(guided_sampling, 1.0, zeros), "scale 1, where `unwanted` has no effect")
    expect(run(answer, 0.0, unwanted), run(guided_sampling, 0.0, unwanted), "scale 0, where `unwanted` is drawn")


# ---------------------------------------------------------------------------------------------------------------------
# 05.4: an obedience that fades
# ---------------------------------------------------------------------------------------------------------------------


def share_obeyed(output, asked):
    """Among the valid molecules, the share that is of the type it was asked to be; asked: an array of N types."""
    found = describe(output.valid_smiles)["type"].to_numpy()
    return (found == np.asarray(asked)[output.valid]).mean()


@exercise("05.4", share_obeyed)
def _check_share_obeyed(answer):
    asked = np.array(["alcohol", "ester", "ether", "amine", "nitrile", "alcohol"])
    smiles = ["CCO", None, "COC", "CN", "CC#N", "CCC"]  # the second is invalid, the last one is no alcohol
    output = MoleculeOutput(smiles=smiles, atoms=None, bonds=None, latents=None)
    hints = [
        (1 / 5, "this is what the faulty line gives: molecules are compared with others' wishes"),
        (4 / 6, "invalid molecules are left out here, of the number too: divide by how many are valid"),
        (4, "a share, not a number of molecules"),
        (1 / 6, "the shorter list was filled up, and everything behind the first invalid molecule is still shifted"),
    ]
    expect(answer(output, asked.copy()), 0.8, "six wishes, one invalid molecule, one that does not obey", hints)
    all_fine = MoleculeOutput(smiles=["CCO", "COC"], atoms=None, bonds=None, latents=None)
    expect(answer(all_fine, np.array(["alcohol", "ether"])), 1.0, "two molecules that are what was asked for")


# ---------------------------------------------------------------------------------------------------------------------
# 05.5: design to a brief
# ---------------------------------------------------------------------------------------------------------------------

BRIEF = {"part": "ring 5", "not of type": "aromatic", "molecules": 33, "draws": 40}


class _Counted:
    """A pipeline that counts the molecules it is asked for, and refuses more than BRIEF allows."""

    def __init__(self, pipe):
        self._pipe, self.draws = pipe, 0

    def __call__(self, num_molecules, *arguments, **options):
        self.draws += num_molecules
        if self.draws > BRIEF["draws"]:
            raise WrongAnswer(f"{self.draws} draws, where {BRIEF['draws']} are paid for; ask more exactly instead")
        return self._pipe(num_molecules, *arguments, **options)

    def __getattr__(self, name):
        return getattr(self._pipe, name)


def design(pipe, seed):
    """At least 33 different molecules that fulfil BRIEF, as SMILES, from 40 draws."""
    away = {"type": BRIEF["not of type"]}
    generator = torch.Generator().manual_seed(seed)
    output = pipe(BRIEF["draws"], {"part": BRIEF["part"]}, 3.0, negative_condition=away, generator=generator)
    table = describe(sorted(set(output.valid_smiles)))
    fits = (table["part"] == BRIEF["part"]) & (table["type"] != BRIEF["not of type"])
    return table["smiles"][fits].tolist()


@exercise("05.5", design)
def _check_design(answer):
    pipe = load_pipeline("diffusion_prior")
    pipe.set_progress_bar_config(disable=True)
    for seed in (0, 1):
        _check_order(answer(_Counted(pipe), seed), f"seed {seed}")


def _check_order(found, order):
    """Raise WrongAnswer unless a list of SMILES fulfils BRIEF."""
    expect_something(found)
    if isinstance(found, str) or not all(isinstance(text, str) for text in found):
        raise WrongAnswer("expected a list of SMILES; leave out the invalid ones, which are None")
    try:
        graphs = [to_graph(text) for text in found]
        table = describe([graph[2] for graph in graphs])
    except ValueError as error:
        raise WrongAnswer(f"not all of them are molecules: {error}") from None
    if table["smiles"].duplicated().any():
        raise WrongAnswer(f"{table['smiles'][table['smiles'].duplicated()].iloc[0]} occurs more than once")
    for smiles, type, part in table[["smiles", "type", "part"]].to_numpy():
        if part != BRIEF["part"]:
            raise WrongAnswer(f"{smiles} has the part {part}; measure before you hand over")
        if type == BRIEF["not of type"]:
            raise WrongAnswer(f"{smiles} is aromatic; measure before you hand over")
    if len(table) < BRIEF["molecules"]:
        raise WrongAnswer(
            f"{len(table)} molecules came ({order}), {BRIEF['molecules']} are needed of {BRIEF['draws']} draws. How "
            "many of your draws are aromatic, and how many have lost the ring? Change what is asked for, away from "
            "what, or the guidance"
        )


# ---------------------------------------------------------------------------------------------------------------------
# 05.6: a grammar mask
# ---------------------------------------------------------------------------------------------------------------------


def decode_with_grammar(scores, rules, start):
    """The likeliest rule of each row among those that the grammar allows there, a list of L numbers.

    The symbols that still have to be replaced wait on a stack, the next one on top. A rule replaces the top one by the
    symbols of its right side, of which the first must be next. Where nothing waits, only padding may stand.

    Args:
        scores: (L, R + 1) numbers, the last column for padding.
        rules: list of R pairs (left, right): a symbol, and a tuple of what replaces it.
        start: the symbol that waits at the beginning.
    """
    symbols = {left for left, right in rules}
    waiting, chosen = [start], []
    for row in scores:
        if not waiting:
            chosen.append(len(rules))
            continue
        symbol = waiting.pop()
        allowed = [number for number, (left, right) in enumerate(rules) if left == symbol]
        best = max(allowed, key=lambda number: row[number])
        chosen.append(best)
        _, right = rules[best]
        waiting.extend(part for part in reversed(right) if part in symbols)
    return chosen


_TOY_RULES = [
    ("S", ("A", "+", "B")),
    ("S", ("A",)),
    ("A", ("x",)),
    ("A", ("2", "*", "S")),
    ("B", ("y",)),
    ("B", ("z",)),
]


@exercise("05.6", decode_with_grammar)
def _check_decode_with_grammar(answer):
    def run(decode, scores):
        return [int(rule) for rule in decode(scores.copy(), list(_TOY_RULES), "S")]

    scores = np.random.default_rng(0).normal(size=(9, 7))
    scores[:6] += 4 * np.eye(7)[[0, 3, 0, 2, 5, 4]]
    scores[2, 6] = 9  # padding, where something still waits
    scores[7, 2] = 9  # a rule, where nothing waits any more
    expected = run(decode_with_grammar, scores)
    found = answer(scores.copy(), list(_TOY_RULES), "S")
    expect_something(found)
    found = [int(rule) for rule in found]
    if found == scores.argmax(1).tolist():
        raise WrongAnswer("this is the likeliest rule of each row, whatever the grammar says; some may not stand there")
    if len(found) < len(expected) and found == expected[: len(found)]:
        raise WrongAnswer(
            f"{len(found)} rules came for {len(expected)} rows; fill up with padding, number {len(_TOY_RULES)}"
        )
    if found[:2] == expected[:2] and found[2:3] == [6]:
        raise WrongAnswer("padding stands in row 2, where symbols still wait; it may stand only after the end")
    for row, (one, other) in enumerate(zip(found, expected)):
        if one != other:
            raise WrongAnswer(_about_row(row, one, other))
    expect(found, expected, "nine rows of scores for six rules")
    random = np.random.default_rng(1).normal(size=(12, 7))
    expect(run(answer, random), run(decode_with_grammar, random), "twelve rows of random scores")


def _about_row(row, found, expected):
    """What is wrong with the first row that is not as it should be."""
    if expected == len(_TOY_RULES):
        return f"row {row} must be padding: nothing waits any more. Do symbols stay on your stack, or do + and * wait?"
    left = _TOY_RULES[expected][0]
    if found == len(_TOY_RULES) or _TOY_RULES[found][0] != left:
        return (
            f"in row {row} it is {left} that waits on top, and rule {found} does not replace it. Of a right side the "
            "*first* symbol must be next, so it is put on the stack last"
        )
    return f"in row {row} rule {expected} is the likeliest of those that replace {left}, not rule {found}"


# ---------------------------------------------------------------------------------------------------------------------
# 05.7: the step that shrinks
# ---------------------------------------------------------------------------------------------------------------------


def posterior_mean_from_eps(x_t, eps, t, betas):
    """Mean of p(x_{t-1} | x_t) from predicted noise (eq. 11 of arXiv:2006.11239); t is one whole number."""
    alpha, alpha_bar = 1 - betas, (1 - betas).cumprod(0)
    return (x_t - betas[t] / (1 - alpha_bar[t]).sqrt() * eps) / alpha[t].sqrt()


@exercise("05.7", posterior_mean_from_eps)
def _check_posterior_mean_from_eps(answer):
    betas = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)
    x_t, eps = torch.tensor([0.3, 0.4], dtype=torch.float64), torch.tensor([1.0, -0.5], dtype=torch.float64)
    t, alpha, alpha_bar = 2, 1 - betas, alpha_bars(betas)
    rooted = x_t - betas[t] / (1 - alpha_bar[t]).sqrt() * eps
    rootless = x_t - betas[t] / (1 - alpha_bar[t]) * eps
    hints = [
        (rootless / (1 / alpha_bar[t].sqrt()), "both bugs are still in it"),
        (rooted / (1 / alpha_bar[t].sqrt()), "one bug is gone; the factor in front still shrinks where it should grow"),
        (rooted * alpha[t].sqrt(), "the factor in front still shrinks where it should grow"),
        (rootless / alpha[t].sqrt(), "one bug is gone; compare the weight of the noise with q_sample's"),
        (rootless / alpha_bar[t].sqrt(), "compare the weight of the noise with q_sample's"),
        (rooted / alpha_bar[t].sqrt(), "one step back undoes α_t, not all steps, ᾱ_t"),
    ]
    expected = posterior_mean_from_eps(x_t, eps, t, betas)
    expect(answer(x_t, eps, t, betas), expected, "β = 0.1, 0.2, 0.5 at t = 2", hints)
    expect(answer(x_t, eps, 0, betas), posterior_mean_from_eps(x_t, eps, 0, betas), "t = 0")


# ---------------------------------------------------------------------------------------------------------------------
# 05.8: what an MSE tells of a generator
# ---------------------------------------------------------------------------------------------------------------------


def share_explained(drawn, mean):
    """R², the share of the variance that the conditions explain, from a perfect prior's MSE and that of the mean.

    With x and x' independent draws from p(x | c), E|x - x'|² = 2 E Var(x | c), so drawn / mean = 2 (1 - R²).
    """
    return 1 - drawn / (2 * mean)


@exercise("05.8", share_explained)
def _check_share_explained(answer):
    drawn, mean = 0.05, 0.04
    hints = [
        (1 - drawn / mean, "so it would be with the mean given c as the answer. But a prior *draws*: x' scatters, too"),
        (drawn / (2 * mean), "this is what the conditions leave open; what they explain is the rest"),
        (drawn / mean, "this is the ratio of the two; put it into the case where nothing is asked: it must give 0"),
        (2 - drawn / mean, "where the conditions say everything, x' is x and the MSE is 0; the share must then be 1"),
        (1 - 2 * drawn / mean, "a perfect prior asked for nothing has twice the MSE of the mean, not half of it"),
        (1 - (drawn / (2 * mean)) ** 2, "an MSE is a square already"),
    ]
    expect(answer(drawn, mean), share_explained(drawn, mean), "an MSE of 0.05, the mean's 0.04", hints)
    expect(answer(0.08, 0.04), 0.0, "twice the MSE of the mean: nothing is explained")
    expect(answer(0.0, 0.04), 1.0, "an MSE of 0: all is explained")
