"""Notebook 05: the diffusion prior."""

import numpy as np
import torch

from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.chemistry import describe, to_graph
from molecule_diffusion.evaluation import exact_match
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_something
from molecule_diffusion.schedules import alpha_bars


def one_hot_condition(type, part, types, parts):
    """One-hot type and one-hot part in one float32 vector (len(types) + len(parts),); None asks for nothing: zeros."""
    return np.array([*(name == type for name in types), *(name == part for name in parts)], np.float32)


@exercise("05.1", one_hot_condition)
def _check_one_hot_condition(answer):
    types, parts = ["alcohol", "ester", "ether"], ["chain", "ring 5"]
    ester = one_hot_condition("ester", "chain", types, parts)
    hints = [
        (ester[[3, 4, 0, 1, 2]], "type comes first, then part"),
        (np.eye(6, dtype=np.float32)[[1, 3]].sum(0), "there are as many numbers as types and parts together: 5"),
        (np.array([1, 3]), "these are positions; a one-hot vector has a 1 *at* the position"),
        (np.array([0, 1, 0], np.float32), "the part is missing"),
    ]
    expect(answer("ester", "chain", types, parts), ester, "an ester, chain", hints)
    for type, part in ((None, "ring 5"), ("alcohol", None), (None, None)):
        expected = one_hot_condition(type, part, types, parts)
        expect(answer(type, part, types, parts), expected, f"type={type}, part={part}, where None is all zeros")


def forget(encoded, groups, u, p):
    """Condition dropout: row b forgets group g where u[b, g] < p. Shapes: (B, size), (size,), (B, G), a number."""
    return encoded * (u >= p)[:, groups]


@exercise("05.2", forget)
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


def guided(denoiser, z_t, t, asked, without, scale):
    """Classifier-free guidance (arXiv:2207.12598): without + scale·(with - without), of two network calls."""
    v_with, v_without = denoiser(z_t, t, asked), denoiser(z_t, t, without)
    return v_without + scale * (v_with - v_without)


@exercise("05.3", guided)
def _check_guided(answer):
    def denoiser(z_t, t, condition):
        return 0.5 * z_t + condition.square() * (1 + t / 1000)  # not linear: guide outputs, not conditions

    z_t, asked, without = torch.tensor([[1.0, -2.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 0.5]])
    t, scale = torch.tensor(500), 3.0
    v_with, v_without = denoiser(z_t, t, asked), denoiser(z_t, t, without)
    hints = [
        (
            v_with + scale * (v_with - v_without),
            "start from `without`; with scale 1 the network with condition remains",
        ),
        (v_without + scale * v_with, "the *difference* of the two is scaled"),
        (v_with + scale * (v_without - v_with), "with and without are exchanged"),
        (scale * (v_with - v_without), "the difference is added to something"),
        (denoiser(z_t, t, without + scale * (asked - without)), "guide the network's outputs, not the condition"),
    ]
    for scale, case in (
        (3.0, "scale 3"),
        (0.0, "scale 0: nothing of the condition"),
        (1.0, "scale 1: no exaggeration"),
    ):
        expected = guided(denoiser, z_t, t, asked, without, scale)
        expect(answer(denoiser, z_t, t, asked, without, scale), expected, case, hints if scale == 3 else ())


def posterior_mean_from_eps(x_t, eps, t, betas):
    """Mean of p(x_{t-1} | x_t) from predicted noise (eq. 11 of arXiv:2006.11239); t is one whole number."""
    alpha, alpha_bar = 1 - betas, (1 - betas).cumprod(0)
    return (x_t - betas[t] / (1 - alpha_bar[t]).sqrt() * eps) / alpha[t].sqrt()


@exercise("05.4", posterior_mean_from_eps)
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


@exercise("05.5", exact_match)
def _check_exact_match(answer):
    true = np.eye(3)[[[[0, 1, 2, 2]], [[1, 1, 2, 2]], [[0, 0, 0, 2]], [[2, 0, 1, 2]]]]
    found = 0.8 * true + 0.2 / 3
    found[1, 0, 0] = [0.5, 0.3, 0.2]
    rows_right = (found.argmax(-1) == true.argmax(-1)).mean()
    hints = [
        (rows_right, "this is the share of *rows*; a sequence counts if all of its rows are right"),
        (1.0, "every row of a sequence must be right; one of the four sequences has a wrong one"),
        (0.25, "this is the share of sequences that are wrong"),
        (0.0, "the entries need not be 0 and 1: the *largest* of each row is the answer"),
        (3.0, "a share of the N sequences, not their number"),
    ]
    expect(answer(found.copy(), true.copy()), 0.75, "four sequences of which one has a wrong row", hints)


BRIEF = {"type": "nitrile", "part": "ring 5", "gap": (7.0, 8.0), "logP": (0.0, 1.0), "molecules": 10}


def design(pipe, oracle):
    """At least ten different molecules that fulfil BRIEF, as SMILES; gap by the oracle."""
    condition = {"type": BRIEF["type"], "part": BRIEF["part"], "gap": 7.5, "logP": 0.5}
    output = pipe(200, condition, generator=torch.Generator().manual_seed(0))
    table = describe(sorted(set(output.valid_smiles)))
    table["gap"] = oracle(table["smiles"])["gap"]
    fits = (table["type"] == BRIEF["type"]) & (table["part"] == BRIEF["part"])
    return table["smiles"][fits & table["gap"].between(*BRIEF["gap"]) & table["logP"].between(*BRIEF["logP"])].tolist()


@exercise("05.6", design)
def _check_design(answer):
    pipe, oracle = load_pipeline("diffusion_prior"), load_pipeline("property_oracle")
    pipe.set_progress_bar_config(disable=True)
    found = answer(pipe, oracle)
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
    if len(table) < BRIEF["molecules"]:
        raise WrongAnswer(f"{len(table)} molecules came, the brief asks for {BRIEF['molecules']}; draw more")
    table["gap"] = oracle(table["smiles"])["gap"]
    for key in ("type", "part"):
        if (wrong := table[table[key] != BRIEF[key]]).size:
            raise WrongAnswer(f"{wrong.iloc[0]['smiles']} has {key} {wrong.iloc[0][key]}; measure before you hand over")
    for key in ("gap", "logP"):
        low, high = BRIEF[key]
        if (wrong := table[~table[key].between(low, high)]).size:
            smiles, value = wrong.iloc[0][["smiles", key]]
            raise WrongAnswer(f"{smiles} has {key} {value:.2f}, outside {low} to {high}; measure before you hand over")
