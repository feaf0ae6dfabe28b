"""Wrong answers to the exercises of notebook 02, each with words that answer it; `test_exercises` tries them."""

import functools

import torch
from torch.nn import functional as F

import helpers
from molecule_diffusion.exercises import notebook_02


def cloud_with(z=None, kl=None):
    """An answer to 02.1 with another z or another KL."""

    def answer(mean, logvar, eps):
        right_z, right_kl = notebook_02.cloud(mean, logvar, eps)
        return (z(mean, logvar, eps) if z else right_z), (kl(mean, logvar) if kl else right_kl)

    return answer


def terms(mean, logvar):
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar)


def elbo_with(sign=1, nats="sum", kl="mean", latent="sum"):
    """An answer to 02.2 with some of the faults: how the pairs, the batch of the KL and the latent are reduced."""

    def answer(logits, bonded, mean, logvar):
        each = F.binary_cross_entropy_with_logits(logits, bonded, reduction="none")
        price = terms(mean, logvar)
        price = price.sum(1) if latent == "sum" else price.mean(1)
        return getattr(each, nats)(1).mean() + sign * getattr(price, kl)()

    return answer


def matched_with(mistake):
    return functools.partial(notebook_02.match, mistake=mistake)


def matched_in_one_round(atoms, bonds, soft, rounds):
    return notebook_02.match(atoms, bonds, soft, 1)


def transposed_beliefs(atoms, bonds, soft, rounds):
    x, order = notebook_02.match(atoms, bonds, soft, rounds)
    return x.T, order


def shares_with(valid=None, unique=None, novel=None):
    """An answer to 02.4 that counts one share in another way: functions of (smiles, valid ones, known)."""

    def answer(smiles, known):
        good = [text for text in smiles if text and "." not in text]
        right = list(notebook_02.strict_count(smiles, known))
        for place, other in enumerate((valid, unique, novel)):
            if other is not None and good:
                right[place] = other(smiles, good, known)
        return tuple(right)

    return answer


def largest_pieces(smiles, good, known):
    return sum(text is not None for text in smiles) / len(smiles)


def divides_by_zero(smiles, known):
    good = [text for text in smiles if text and "." not in text]
    return len(good) / len(smiles), len(set(good)) / len(good), len(set(good) - set(known)) / len(set(good))


def nats_with(change):
    """An answer to 02.6: `change` gets the nats of atoms (B, 9) and of pairs (B, 36), and which atoms are real."""

    def answer(atom_logits, bond_logits, atoms, bonds):
        pairs = helpers.pairs_from_matrix(bonds).long()
        atom = F.cross_entropy(atom_logits.transpose(1, 2), atoms.long(), reduction="none")
        bond = F.cross_entropy(bond_logits.transpose(1, 2), pairs, reduction="none")
        return change(atom, bond, (atoms != helpers.NO_ATOM).float())

    return answer


def logarithm_of_logits(atom_logits, bond_logits, atoms, bonds):
    return -atom_logits.log().sum((1, 2))


def slerp_with(angle):
    """An answer to 02.8 that takes the angle from `angle(a, b)`."""

    def answer(a, b, s):
        theta = angle(a, b)
        return (torch.sin((1 - s) * theta) * a + torch.sin(s * theta) * b) / torch.sin(theta)

    return answer


def right_angle(a, b):
    return torch.arccos((a @ b) / (a.norm() * b.norm()))


def without_division(a, b, s):
    theta = right_angle(a, b)
    return torch.sin((1 - s) * theta) * a + torch.sin(s * theta) * b


WRONG = {
    "02.1": [
        (cloud_with(z=lambda m, v, e: m + v * e), "is a logarithm, not σ"),
        (cloud_with(z=lambda m, v, e: m + v.exp() * e), "the noise is multiplied by σ"),
        (cloud_with(z=lambda m, v, e: m + v.sqrt() * e), "the root of a negative number"),
        (cloud_with(z=lambda m, v, e: m + v.abs().sqrt() * e), "expected"),
        (cloud_with(z=lambda m, v, e: m + (0.5 * v).exp()), "the noise `eps` is missing"),
        (cloud_with(z=lambda m, v, e: m + (-0.5 * v).exp() * e), "a larger logvar is a wider cloud"),
        (cloud_with(kl=lambda m, v: -terms(m, v).sum(-1)), "a KL is never negative"),
        (cloud_with(kl=lambda m, v: 2 * terms(m, v).sum(-1)), "the factor ½ is missing"),
        (cloud_with(kl=lambda m, v: terms(m, v).sum()), "one number for the whole batch"),
        (cloud_with(kl=lambda m, v: terms(m, v).mean(-1)), "a mean over dimensions"),
        (cloud_with(kl=lambda m, v: terms(m, v)), "one number for every dimension"),
        (cloud_with(kl=lambda m, v: terms(m, v).sum(0)), "this sums over the batch"),
        (cloud_with(kl=lambda m, v: 0.5 * (m**2 + v.exp() - 1 - v.log()).sum(-1)), "which is a logarithm already"),
        (lambda m, v, e: notebook_02.cloud(m, v, e)[::-1], "the two are exchanged"),
        (lambda m, v, e: notebook_02.cloud(m, v, e)[0], "return two things"),
    ],
    "02.2": [
        (elbo_with(sign=-1, nats="mean", kl="sum"), "nothing is mended yet"),
        (elbo_with(nats="mean", kl="sum"), "one fault is mended"),
        (elbo_with(sign=-1), "the sign of the KL"),
        (elbo_with(kl="sum"), "symptom .b."),
        (elbo_with(nats="mean"), "symptom .c."),
        (elbo_with(latent="mean"), "averaged over the latent numbers"),
        (lambda *given: -notebook_02.negative_elbo(*given), "expected"),
    ],
    "02.3": [
        (matched_with("in place"), "write into a fresh array"),
        (matched_with("exists"), "fits nobody"),
        (matched_with("both exist"), "both places must exist"),
        (matched_with("own"), "the own score is missing"),
        (matched_with("sum"), "not the sum over b"),
        (matched_with("itself"), "two atoms cannot stand at one place"),
        (matched_with("length"), "divide them by their norm"),
        (matched_with("smallest"), "the cost is −x"),
        (matched_with("transposed"), "a place for every atom"),
        (matched_in_one_round, "the result of one round"),
        (transposed_beliefs, "yours are exchanged"),
        (lambda *given: notebook_02.match(*given)[0], "return two things"),
    ],
    "02.4": [
        (shares_with(valid=largest_pieces), "its largest piece is not what was drawn"),
        (shares_with(valid=lambda s, good, k: len(good) / 8), "divide by all draws"),
        (shares_with(valid=lambda s, good, k: len(good)), "valid: this is a count"),
        (shares_with(unique=lambda s, good, k: len(set(good)) / len(s)), "symptom .b."),
        (shares_with(unique=lambda s, good, k: sum(good.count(x) == 1 for x in good) / len(good)), "occur once"),
        (shares_with(novel=lambda s, good, k: len(set(good) - set(k)) / len(good)), "symptom .c."),
        (shares_with(novel=lambda s, good, k: len(set(good) - set(k)) / len(s)), "novel: this divides by all draws"),
        (divides_by_zero, "where nothing can be counted"),
        (lambda smiles, known: notebook_02.strict_count(smiles, known)[:2], "return three things"),
    ],
    "02.5": [
        ([0.9, 0.9], "Lower tau_bond"),
        ([0.01, 0.5], "Raise tau_bond"),
        ([50, 50], "between 0 and 1"),
        (0.35, "return two things"),
        (["low", "high"], "two numbers are expected"),
    ],
    "02.6": [
        (nats_with(lambda atom, bond, real: -(atom.sum(1) + bond.sum(1))), "never negative"),
        (nats_with(lambda atom, bond, real: atom.sum() + bond.sum()), "one number for the whole batch"),
        (nats_with(lambda atom, bond, real: (atom.sum(1) + bond.sum(1)).mean()), "the mean over the batch"),
        (nats_with(lambda atom, bond, real: atom.mean(1) + bond.mean(1)), "a molecule's nats are sums"),
        (nats_with(lambda atom, bond, real: atom.sum(1)), "the 36 pairs are missing"),
        (nats_with(lambda atom, bond, real: bond.sum(1)), "the nine atoms are missing"),
        (nats_with(lambda atom, bond, real: atom.sum(1) + 2 * bond.sum(1)), "counted twice"),
        (nats_with(lambda atom, bond, real: (atom * real).sum(1) + bond.sum(1)), "must say 'none'"),
        (logarithm_of_logits, "Logits may be negative"),
    ],
    "02.7": [
        ({"A": 20, "B": 0.1, "C": 0.001, "D": 1}, "its posterior has collapsed"),
        ({"A": 0.001, "B": 20, "C": 0.1, "D": 1}, "a nat cost next to nothing"),
        ({"A": 1, "B": 20, "C": 0.001, "D": 0.1}, "A and D are exchanged"),
        ({"A": 0.1, "B": 20, "C": 0.001, "D": 2}, "give each of the four values"),
        ({"A": 0.1}, "with the letters A, B, C and D"),
    ],
    "02.8": [
        (lambda a, b, s: (1 - s) * a + s * b, "the straight line"),
        (lambda a, b, s: helpers.slerp(b, a, s), "the ends are exchanged"),
        (without_division, "divide by sin"),
        (slerp_with(lambda a, b: torch.arccos((a @ b / 27).clamp(-1, 1))), "divide a·b by both lengths"),
        (slerp_with(lambda a, b: torch.arccos(a @ b)), "an arccos of more than 1"),
    ],
}
