"""Notebook 02: variational autoencoders, and the matching of graphs."""

import functools

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.chemistry import MAX_ATOMS, NO_ATOM, pairs_from_matrix, to_graphs, to_smiles, verdict
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_pair, expect_something
from molecule_diffusion.exercises.predicting import Name, Number, prediction
from molecule_diffusion.matching import SoftGraph, as_soft_graph, reorder
from molecule_diffusion.models import kl_divergence, reparameterise, slerp

prediction("02.p1", Number("of the fitted draws", lowest=0, highest=1))
prediction("02.p2", Number("of the molecules", lowest=0, highest=1))
prediction("02.p3", Number("of the draws", lowest=0, highest=1))
prediction("02.p4", Name(("size", "weight")))
prediction("02.p5", Number("nats", lowest=0))
prediction("02.p6", Number("of the validation molecules", lowest=0, highest=1))
prediction("02.p7", Number("(β)", lowest=0))
prediction("02.p8", Number("(row)", lowest=1, highest=7))
prediction("02.p9", Number("of the draws", lowest=0, highest=1))


# ---------------------------------------------------------------------------------------------------------------------
# 02.1: a cloud and its price
# ---------------------------------------------------------------------------------------------------------------------


def cloud(mean, logvar, eps):
    """A draw from every cloud N(mean, exp(logvar)), and its KL to N(0, I). Shapes: three (B, d) -> (B, d), (B,)."""
    return reparameterise(mean, logvar, eps), kl_divergence(mean, logvar)


@exercise("02.1", cloud)
def _check_cloud(answer):
    mean, logvar = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 0.0]]), torch.tensor([[0.5, -1.0, 2.0], [0.0, -2.0, 0.0]])
    eps = torch.tensor([[0.5, -3.0, 1.0], [1.0, 2.0, -1.0]])
    got = answer(mean.clone(), logvar.clone(), eps.clone())
    expect_pair(got, "the draws z (B, d) and the KLs (B,)")
    if torch.as_tensor(got[0]).shape == (2,) and torch.as_tensor(got[1]).shape == (2, 3):
        raise WrongAnswer("the two are exchanged: first the draws z, then the KLs")
    hints = [
        (mean + logvar * eps, "z: `logvar` is a logarithm, not σ"),
        (mean + logvar.exp() * eps, "z: exp(logvar) is the variance σ²; the noise is multiplied by σ"),
        (mean + logvar.sqrt() * eps, "z: √logvar is not σ: logvar is log σ² and may be negative; σ is exp(logvar / 2)"),
        (mean + (0.5 * logvar).exp(), "z: the noise `eps` is missing"),
        (mean + (-0.5 * logvar).exp() * eps, "z: the sign in the exponential: a larger logvar is a wider cloud"),
    ]
    if torch.as_tensor(got[0]).isnan().any():
        raise WrongAnswer("z holds NaN: the root of a negative number? logvar is log σ², so σ is exp(logvar / 2)")
    expect(got[0], reparameterise(mean, logvar, eps), "z of two molecules, three dimensions", hints)
    if torch.as_tensor(got[1]).isnan().any():
        raise WrongAnswer(
            "the KL holds NaN: a logarithm of `logvar`, which is a logarithm already, and may be negative"
        )
    terms = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    hints = [
        (-terms.sum(-1), "the KL: the sign is wrong, a KL is never negative"),
        (2 * terms.sum(-1), "the KL: the factor ½ is missing"),
        (terms.sum(), "the KL: one number for the whole batch; sum over the last axis only"),
        (terms.sum(0), "the KL: this sums over the batch; sum over the latent dimensions"),
        (terms.mean(-1), "the KL: this is a mean over dimensions; the KL is their sum"),
        (terms, "the KL: one number for every dimension; sum over the last axis"),
        (0.5 * (mean**2 + logvar**2 - 1 - logvar).sum(-1), "the KL: σ² is exp(logvar)"),
        (0.5 * (mean**2 + (0.5 * logvar).exp() - 1 - logvar).sum(-1), "the KL: σ² is exp(logvar), not exp(logvar / 2)"),
    ]
    expect(got[1], kl_divergence(mean, logvar), "the KL of two molecules, three dimensions", hints)


# ---------------------------------------------------------------------------------------------------------------------
# 02.2: a loss written in a hurry
# ---------------------------------------------------------------------------------------------------------------------


def negative_elbo(logits, bonded, mean, logvar):
    """-ELBO in nats per molecule, of one draw. Shapes: logits, bonded (B, 36), mean, logvar (B, d) -> ()."""
    nats = F.binary_cross_entropy_with_logits(logits, bonded, reduction="none").sum(1)
    return (nats + kl_divergence(mean, logvar)).mean()


@exercise("02.2", negative_elbo)
def _check_negative_elbo(answer):
    generator = torch.Generator().manual_seed(0)
    logits, mean, logvar = (torch.randn(5, size, generator=generator) for size in (36, 4, 4))
    bonded = (torch.rand(5, 36, generator=generator) < 0.3).float()
    nats = F.binary_cross_entropy_with_logits(logits, bonded, reduction="none")
    kl = kl_divergence(mean, logvar)
    sign = "the sign of the KL: the negative ELBO is −reconstruction *plus* KL, and both are prices"
    batch = "the KL is summed over the batch while the rest is averaged: symptom (b)"
    average = "the reconstruction is averaged over the 36 pairs; a molecule's nats are their sum: symptom (c)"
    dimensions = "the KL is averaged over the latent numbers; in the ELBO it is their sum"
    hints = [
        (nats.mean() - kl.sum(), "nothing is mended yet: all three faults are still there"),
        (nats.mean() + kl.sum(), f"one fault is mended; {batch}"),
        (nats.mean() - kl.mean(), sign),
        (nats.sum(1).mean() - kl.sum(), sign),
        (nats.sum(1).mean() - kl.mean(), sign),
        (nats.mean() + kl.mean(), f"two faults are mended; {average}"),
        (nats.sum(1).mean() + kl.sum(), batch),
        (nats.sum() + kl.sum(), "this is the sum over the batch; average it"),
        (nats.sum() + kl.mean(), "the reconstruction is summed over the batch, too; average over the molecules"),
        (nats.sum(1).mean() + kl.mean() / 4, dimensions),
        (nats.mean() + kl.mean() / 4, f"{average}; {dimensions}"),
        (nats.sum(1) + kl, "one number per molecule; average over the batch"),
    ]
    expect(answer(logits, bonded, mean, logvar), negative_elbo(logits, bonded, mean, logvar), "five molecules", hints)


# ---------------------------------------------------------------------------------------------------------------------
# 02.3: matching
# ---------------------------------------------------------------------------------------------------------------------


def match(atoms, bonds, soft, rounds, mistake=None):
    """Max-pooling matching and assignment of one graph, in loops.

    Args: atoms (9,), bonds (9, 9); soft: SoftGraph of one graph; rounds: of matching; mistake: one that students make.
    Returns: beliefs (9 atoms, 9 places) of length 1, and order (9,): the true atom at each place.
    """
    x = torch.ones(MAX_ATOMS, MAX_ATOMS)
    for _ in range(rounds):
        new = x if mistake == "in place" else torch.zeros(MAX_ATOMS, MAX_ATOMS)
        for i in range(MAX_ATOMS):
            for a in range(MAX_ATOMS):
                own = 0.0
                if atoms[i] != NO_ATOM:
                    own = x[i, a] * soft.elements[a, atoms[i]] * (1 if mistake == "exists" else soft.exists[a])
                support = sum(_best_partner(x[j], bonds[i, j], soft, a, mistake) for j in bonds[i].nonzero()[:, 0])
                new[i, a] = support if mistake == "own" else own + support
        x = new if mistake == "length" else new / new.norm()
    cost = x if mistake == "smallest" else -x
    order = linear_sum_assignment(cost if mistake == "transposed" else cost.T)[1]
    return x, torch.from_numpy(order)


def _best_partner(x_j, bond, soft, a, mistake):
    """max over b ≠ a of x_jb · S_ia,jb, for one bond and one place a."""
    fits = x_j * soft.kinds[a, :, bond - 1] * soft.bonded[a]
    if mistake != "both exist":
        fits = fits * soft.exists[a] * soft.exists
    if mistake != "itself":
        fits = fits * (torch.arange(MAX_ATOMS) != a)
    return fits.sum() if mistake == "sum" else fits.max()


_MATCHING_MISTAKES = {
    "in place": "all of a round must read the beliefs of the round before: write into a fresh array",
    "exists": "Â_aa is missing in the own score S_ia,ia: a place that does not exist fits nobody",
    "both exist": "S_ia,jb contains Â_aa and Â_bb: both places must exist",
    "own": "the own score is missing: x_ia · S_ia,ia",
    "sum": "for each neighbour j the *best* b counts, not the sum over b",
    "itself": "b ≠ a: two atoms cannot stand at one place",
    "length": "the beliefs have another length: divide them by their norm after every round",
}


@functools.cache
def _matching_case():
    """A true graph, and a prediction in which every probability matters, those of a place with itself too."""
    atoms, bonds = to_graphs(["CC(=O)CC#N"])
    generator = torch.Generator().manual_seed(3)
    bonded, kinds = torch.rand(9, 9, generator=generator), torch.rand(9, 9, 3, generator=generator)
    exists, elements = torch.rand(9, generator=generator), torch.rand(9, 4, generator=generator).softmax(-1)
    soft = SoftGraph(exists, (bonded + bonded.T) / 2, elements, (kinds + kinds.transpose(0, 1)) / 2)
    return torch.from_numpy(atoms[0]).long(), torch.from_numpy(bonds[0]).long(), soft


@exercise("02.3", match)
def _check_match(answer):
    atoms, bonds, soft = _matching_case()
    got = answer(atoms.clone(), bonds.clone(), soft, 3)
    expect_pair(got, "the beliefs x (9, 9) and the order (9,)")
    beliefs, order = match(atoms, bonds, soft, 3)
    x = torch.as_tensor(np.asarray(got[0])).float()
    if x.isnan().any():
        raise WrongAnswer("the beliefs hold NaN: is a whole table 0, and divided by its length?")
    hints = [(match(atoms, bonds, soft, 3, mistake)[0], said) for mistake, said in _MATCHING_MISTAKES.items()]
    hints += [
        (beliefs.T, "rows are true atoms, columns are places; yours are exchanged"),
        (match(atoms, bonds, soft, 1)[0], "this is the result of one round; go on for `rounds` of them"),
        (torch.ones(9, 9), "these are the beliefs before the first round"),
    ]
    expect(x, beliefs, "three rounds on a graph of six atoms", hints)
    hints = [
        (match(atoms, bonds, soft, 3, "smallest")[1], "this assignment has the *smallest* sum; the cost is −x"),
        (
            match(atoms, bonds, soft, 3, "transposed")[1],
            "order names an atom for every place; yours a place for every atom",
        ),
    ]
    expect(got[1], order, "the order of the same graph", hints)
    certain = as_soft_graph(*reorder(atoms[None], bonds[None], torch.tensor([[3, 0, 5, 1, 4, 2, 6, 7, 8]])))
    one = SoftGraph(certain.exists[0], certain.bonded[0], certain.elements[0], certain.kinds[0])
    found = np.asarray(answer(atoms.clone(), bonds.clone(), one, 10)[1])
    expect(found[:6], [3, 0, 5, 1, 4, 2], "a graph that was shuffled by [3, 0, 5, 1, 4, 2], ten rounds")


# ---------------------------------------------------------------------------------------------------------------------
# 02.4: counting
# ---------------------------------------------------------------------------------------------------------------------


def strict_count(smiles, known):
    """Shares valid (of all), unique (of the valid) and novel (of the distinct) of canonical SMILES; None is refused."""
    valid = [text for text in smiles if text and "." not in text]
    distinct = set(valid)
    unique = len(distinct) / len(valid) if valid else 0.0
    novel = len(distinct - set(known)) / len(distinct) if distinct else 0.0
    return len(valid) / len(smiles), unique, novel


@exercise("02.4", strict_count)
def _check_strict_count(answer):
    smiles = ["CCO", None, "C.C", "CCO", "C#N", None, "CCO", "O", "CN.CCO", "CF"]
    got = _three_shares(answer(list(smiles), ["CCO", "N"]))
    hints = [
        (8 / 10, "valid: a SMILES with a dot is in pieces, and its largest piece is not what was drawn"),
        (6 / 8, "valid: this divides by those that RDKit took; divide by all draws, None included"),
        (6, "valid: this is a count; return a share"),
    ]
    expect(got[0], 6 / 10, "valid: six of ten", hints)
    hints = [
        (4 / 10, "unique: this divides by all draws; unique is a share of the valid ones: symptom (b)"),
        (5 / 8, "unique: the pieces are counted; unique is a share of the valid ones"),
        (4, "unique: this is a count; return a share"),
        (3 / 6, "unique: this counts those that occur once; count distinct ones"),
    ]
    expect(got[1], 4 / 6, "unique: CCO, C#N, O and CF of six valid ones", hints)
    hints = [
        (3 / 6, "novel: this divides by the valid ones; novel is a share of the *distinct* ones: symptom (c)"),
        (3 / 10, "novel: this divides by all draws; novel is a share of the distinct ones"),
        (1 / 4, "novel: this is the share that is known"),
    ]
    expect(got[2], 3 / 4, "novel: C#N, O and CF of four distinct ones", hints)
    try:
        got = answer([None, "C.O"], [])
    except ZeroDivisionError:
        raise WrongAnswer(
            "a division by 0, for draws of which none is valid; where nothing can be counted, return 0"
        ) from None
    expect(_three_shares(got), (0, 0, 0), "no valid one")


def _three_shares(got):
    expect_something(got)
    if not isinstance(got, (tuple, list)) or len(got) != 3:
        raise WrongAnswer("return three things: the shares valid, unique and novel")
    return got


# ---------------------------------------------------------------------------------------------------------------------
# 02.5: thresholds
# ---------------------------------------------------------------------------------------------------------------------


BOND_THRESHOLDS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6)


def drawn_with(thresholds, n=1000, seed=7):
    """Of n draws of the shipped GraphVAE without its tree: distinct valid ones, and shares in pieces and refused."""
    model = load_pipeline("graphvae").vae
    z = torch.randn(n, model.config.latent_dim, generator=torch.Generator().manual_seed(seed))
    tau_bond, tau_atom = thresholds
    graphs = model.decode_graphs(z, spanning_tree=False, tau_bond=tau_bond, tau_atom=tau_atom)
    smiles = to_smiles(*(part.numpy() for part in graphs))
    found = [verdict(text) for text in smiles]
    distinct = {text for text, state in zip(smiles, found) if state == "valid"}
    return len(distinct), found.count("fragmented") / n, found.count("refused") / n


@functools.cache
def _best_of_the_grid():
    """The most distinct valid ones that the thresholds for bonds in BOND_THRESHOLDS give, and with which one."""
    found = [(drawn_with((tau_bond, 0.5))[0], tau_bond) for tau_bond in BOND_THRESHOLDS]
    return max(found)


THRESHOLDS = [0.35, 0.5]  # for bonds, for atoms


@exercise("02.5", THRESHOLDS)
def _check_thresholds(answer):
    expect_pair(answer, "(tau_bond, tau_atom)")
    try:
        tau_bond, tau_atom = (float(value) for value in answer)
    except (TypeError, ValueError):
        raise WrongAnswer("two numbers are expected, (tau_bond, tau_atom)") from None
    if not (0 < tau_bond < 1 and 0 < tau_atom < 1):
        raise WrongAnswer("thresholds of probabilities lie between 0 and 1")
    goal = 0.8 * _best_of_the_grid()[0]
    distinct, pieces, refused = drawn_with((tau_bond, tau_atom))
    if distinct >= goal:
        return
    told = f"{distinct} of 1,000 draws are valid and distinct, {goal:.0f} are asked for"
    if drawn_with((tau_atom, tau_bond))[0] >= goal:
        raise WrongAnswer(f"{told}; exchanged, the two would do: the threshold for bonds stands first")
    if pieces > refused:
        raise WrongAnswer(f"{told}; {pieces:.0%} are in pieces: there are too few bonds. Lower tau_bond")
    raise WrongAnswer(f"{told}; {refused:.0%} are refused by RDKit: there are too many bonds, or atoms. Raise tau_bond")


# ---------------------------------------------------------------------------------------------------------------------
# 02.6: nats of a molecule
# ---------------------------------------------------------------------------------------------------------------------


def molecule_nats(atom_logits, bond_logits, atoms, bonds):
    """-log p(x | z) of every molecule in nats. Shapes: (B, 9, 5), (B, 36, 4), (B, 9), (B, 9, 9) -> (B,)."""
    pairs = pairs_from_matrix(bonds)
    atom_nats = F.cross_entropy(atom_logits.float().transpose(1, 2), atoms.long(), reduction="none")
    bond_nats = F.cross_entropy(bond_logits.float().transpose(1, 2), pairs.long(), reduction="none")
    return atom_nats.sum(1) + bond_nats.sum(1)


@exercise("02.6", molecule_nats)
def _check_molecule_nats(answer):
    atoms, bonds = (torch.from_numpy(part) for part in to_graphs(["CC=O", "N#CC1CC1O", "C"]))
    generator = torch.Generator().manual_seed(0)
    atom_logits, bond_logits = torch.randn(3, 9, 5, generator=generator), torch.randn(3, 36, 4, generator=generator)
    pairs = pairs_from_matrix(bonds).long()
    atom = F.cross_entropy(atom_logits.transpose(1, 2), atoms.long(), reduction="none")
    bond = F.cross_entropy(bond_logits.transpose(1, 2), pairs, reduction="none")
    real = (atoms != NO_ATOM).float()
    exact = atom.sum(1) + bond.sum(1)
    hints = [
        (-exact, "the sign: −log p is a price, never negative"),
        (exact.sum(), "one number for the whole batch; sum over the places of each molecule only"),
        (exact.mean(), "this is the mean over the batch; return one number per molecule"),
        (atom.mean(1) + bond.mean(1), "averages over 9 places and 36 pairs; a molecule's nats are sums"),
        (atom.sum(1), "only the atoms are counted; the 36 pairs are missing"),
        (bond.sum(1), "only the pairs are counted; the nine atoms are missing"),
        (atom.sum(1) + 2 * bond.sum(1), "every bond is counted twice; sum over the pairs i < j"),
        (
            (atom * real).sum(1) + bond.sum(1),
            "the padded places are left out; the decoder must say 'none' there, and pays",
        ),
    ]
    got = answer(atom_logits.clone(), bond_logits.clone(), atoms.clone(), bonds.clone())
    expect_something(got)
    if torch.as_tensor(got).isnan().any():
        raise WrongAnswer("NaN: a logarithm of a logit? Logits may be negative; cross_entropy takes them as they are")
    expect(got, exact, "three molecules with random logits", hints)


# ---------------------------------------------------------------------------------------------------------------------
# 02.7: reading, 02.8: slerp
# ---------------------------------------------------------------------------------------------------------------------

PRICES = {"A": 0.1, "B": 20, "C": 0.001, "D": 1}


@exercise("02.7", PRICES)
def _check_prices(answer):
    if not isinstance(answer, dict) or answer.keys() != PRICES.keys():
        raise WrongAnswer("a dictionary with the letters A, B, C and D is expected")
    if sorted(answer.values()) != sorted(PRICES.values()):
        raise WrongAnswer("give each of the four values 0.001, 0.1, 1 and 20 to one letter")
    if answer["B"] != 20:
        raise WrongAnswer(
            "B stores 0.0 nats: its posterior has collapsed, so a nat was dearest there. Nearly all valid draws are "
            "one molecule"
        )
    if answer["C"] != 0.001:
        raise WrongAnswer("C stores most nats and gives back most molecules: there a nat cost next to nothing")
    if answer != PRICES:
        raise WrongAnswer("A and D are exchanged: the dearer a nat, the fewer are stored, and the fewer come back")


@exercise("02.8", slerp)
def _check_slerp(answer):
    a, b = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 2.0])
    theta = torch.arccos((a @ b) / (a.norm() * b.norm()))
    cosine = torch.arccos(((a @ b) / 27).clamp(-1, 1))
    hints = [
        (0.75 * a + 0.25 * b, "this is the straight line"),
        (slerp(b, a, 0.25), "the ends are exchanged: s = 0 must give a"),
        (torch.sin(0.75 * theta) * a + torch.sin(0.25 * theta) * b, "divide by sin(θ)"),
        (
            (torch.sin(0.75 * cosine) * a + torch.sin(0.25 * cosine) * b) / torch.sin(cosine),
            "the angle is off: divide a·b by both lengths",
        ),
    ]
    got = answer(a, b, 0.25)
    expect_something(got)
    if torch.as_tensor(got).isnan().any():
        raise WrongAnswer("NaN: an arccos of more than 1. Divide a·b by both lengths before you take the arccos")
    expect(got, slerp(a, b, 0.25), "a quarter of the way", hints)
    expect(answer(a, b, 1.0), b, "s = 1")
