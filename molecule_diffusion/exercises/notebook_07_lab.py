"""Notebook 07: SupCon (07.5); a small retriever by miner, trained while one waits; which arms are compared (07.9)."""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from molecule_diffusion.captions import caption_table, fact_table, relevance, write_captions
from molecule_diffusion.checks import quoted
from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_something
from molecule_diffusion.qm9 import shared_qm9
from molecule_diffusion.ranking import average_precision, morgan, ranked_hits
from molecule_diffusion.sentences import embed_sentences

# ---------------------------------------------------------------------------------------------------------------------
# 07.5: SupCon
# ---------------------------------------------------------------------------------------------------------------------


def sup_con(scores, fits, temperature=0.1):
    """SupCon of a batch of captions: InfoNCE for each right molecule in turn, all molecules in the sum below.

    Args: scores: cosines; fits: whether molecule j has everything that caption i names. Shapes: (B, B) -> ().
    """
    log_shares = (scores / temperature).log_softmax(1)
    own_means = (log_shares * fits).sum(1) / fits.sum(1)
    return -own_means.mean()


def _wrong_sup_con(scores, fits, temperature, mistake):
    """`sup_con` with one of the mistakes that students make, to recognise it."""
    own = torch.eye(len(scores), dtype=torch.bool)
    logits = scores * temperature if mistake == "times" else scores / temperature
    if mistake == "no temperature":
        logits = scores
    log_shares = logits.log_softmax(0 if mistake == "columns" else 1)
    if mistake == "InfoNCE":
        return -logits.masked_fill(fits & ~own, -torch.inf).log_softmax(1).diagonal().mean()
    if mistake == "own":
        return -log_shares.diagonal().mean()
    if mistake == "wrong below":  # each right one against the wrong ones and itself
        wrong = logits.masked_fill(fits, -torch.inf).logsumexp(1, keepdim=True)
        log_shares = logits - torch.logaddexp(logits, wrong)
    if mistake == "log of mean":
        return -((log_shares.exp() * fits).sum(1) / fits.sum(1)).log().mean()
    if mistake == "log of sum":
        return -(log_shares.exp() * fits).sum(1).log().mean()
    if mistake == "no log":
        return -((log_shares.exp() * fits).sum(1) / fits.sum(1)).mean()
    if mistake == "sum of right":
        return -(log_shares * fits).sum(1).mean()
    if mistake == "all pairs":
        return -log_shares[fits].mean()
    if mistake == "by batch":
        return -(log_shares * fits).mean()
    per_caption = (log_shares * fits).sum(1) / fits.sum(1)
    if mistake == "sum":
        return -per_caption.sum()
    return per_caption.mean() if mistake == "sign" else -per_caption.mean()


_SUP_CON_MISTAKES = {
    "InfoNCE": "this is the loss of 07.4: the other right molecules are left out; here each has its turn above",
    "own": "only the own molecule has its turn above; every molecule that fits must have one",
    "wrong below": "below stand the wrong molecules and one right one; all molecules of the batch must stand there",
    "log of mean": "this is the logarithm of the mean share; take the mean of the logarithms. Else one right molecule "
    "with a large share would excuse the others",
    "log of sum": "this is the logarithm of the summed shares of the right ones: take the logarithm of each, then the "
    "mean. Else one right molecule with a large share would excuse the others",
    "no log": "the logarithm is missing: these are shares",
    "sum of right": "the sum over a caption's right molecules must be divided by their number |P|",
    "all pairs": "all right pairs of the batch are in one mean; average within each caption first, then over captions",
    "by batch": "the sum is divided by all molecules of the batch; divide by the number of *right* ones",
    "columns": "the softmax runs over the captions; it must run over the molecules, one row per caption",
    "times": "the scores are multiplied by the temperature; divide by it",
    "no temperature": "the temperature has no effect; divide the scores by it",
    "sum": "this is the sum over the captions; take the mean",
    "sign": "the sign: the loss is *minus* the mean logarithm",
}


@exercise("07.5", sup_con)
def _check_sup_con(answer):
    scores = torch.tensor([[0.8, 0.4, 0.7], [0.1, 0.6, 0.2], [0.5, 0.3, 0.4]], dtype=torch.float64)
    fits = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)
    for temperature in (0.2, 0.1):
        given = scores.clone()
        got = answer(given, fits.clone(), temperature)
        expect_something(got)
        hints = [(_wrong_sup_con(scores, fits, temperature, name), said) for name, said in _SUP_CON_MISTAKES.items()]
        case = f"three captions, temperature {temperature}"
        got = got.detach() if torch.is_tensor(got) else got
        if not np.isfinite(np.asarray(got)).all():
            raise WrongAnswer(f"{case}: {float(np.ravel(got)[0])}. After a logit of -inf, -inf · 0 is no number")
        expect(got, sup_con(scores, fits, temperature), case, hints)
        if not torch.equal(given, scores):
            raise WrongAnswer("the caller's `scores` were changed")
    learned = scores.clone().requires_grad_()
    loss = answer(learned, fits.clone(), 0.1)
    if not torch.is_tensor(loss) or not loss.requires_grad:
        raise WrongAnswer("the value is right, but it is cut off from the scores: return a tensor, without .item()")


# ---------------------------------------------------------------------------------------------------------------------
# Miners, tried on a retriever that trains in a second
# ---------------------------------------------------------------------------------------------------------------------

MINERS = ("random", "semihard", "hard", "easy")
MINER_STEPS = 200


@functools.lru_cache(maxsize=64)
def try_miner(miner, margin, spare_right, seed, steps=MINER_STEPS, batch=128):
    """The mAP on validation molecules of a small retriever trained by the triplet loss: a number.

    Args: miner: of MINERS; margin: of the triplet loss, in cosines; spare_right: whether right molecules of other
        captions are never chosen as wrong ones; seed: of the first weights and of the batches.
    """
    fingerprints, sentences, asked, facts = _columns("train", 1500)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        towers = nn.ModuleList([nn.Linear(fingerprints.shape[1], 64), nn.Linear(sentences.shape[1], 64)])
    optimiser = torch.optim.AdamW(towers.parameters(), 3e-3)
    for _ in range(steps):
        rows = torch.randint(len(sentences), (batch,), generator=generator)
        scores = F.normalize(towers[1](sentences[rows])) @ F.normalize(towers[0](fingerprints[rows])).T
        fits = (asked[rows].float() @ (~facts[rows]).float().T) == 0
        if not spare_right:
            fits = rows[:, None] == rows[None]  # its own molecule alone counts as right
        captions, chosen = _mine(scores, fits, miner, margin, generator)
        if len(captions):
            loss = F.relu(scores[captions, chosen] - scores.diagonal()[captions] + margin).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return _mean_average_precision(towers)


def _mine(scores, fits, miner, margin, generator):
    """For every caption that has one, the hardest wrong molecule of a kind, or a random one: captions, molecules."""
    with torch.no_grad():
        own = scores.diagonal()[:, None]
        kinds = {"hard": torch.ones_like(fits), "random": torch.ones_like(fits), "easy": scores <= own - margin}
        kinds["semihard"] = (scores < own) & (scores > own - margin)
        allowed = ~fits & kinds[miner]
        captions = allowed.any(1).nonzero()[:, 0]
        order = torch.rand(scores.shape, generator=generator) if miner == "random" else scores
        return captions, order.masked_fill(~allowed, -torch.inf).argmax(1)[captions]


@torch.no_grad()
def _mean_average_precision(towers):
    fingerprints, sentences, asked, facts = _columns("validation", 1000)
    scores = F.normalize(towers[1](sentences[:150])) @ F.normalize(towers[0](fingerprints)).T
    right = relevance(asked[:150].numpy(), facts.numpy())
    return float(np.nanmean(average_precision(ranked_hits(scores.numpy(), right))))


@functools.cache
def _columns(part, n):
    """Fingerprints, the captions' vectors, facts asked for and facts there, of n molecules of a part of the split."""
    qm9 = shared_qm9()
    rows = np.random.default_rng(76).choice(getattr(qm9, part), n, replace=False)
    smiles = [qm9.smiles[row] for row in rows]
    table = fact_table(smiles)
    captions = write_captions(table, seed=76)
    sentences = embed_sentences([caption.text for caption in captions])
    asked = torch.as_tensor(caption_table(captions))
    return morgan(smiles).float(), sentences, asked, torch.as_tensor(table)


# ---------------------------------------------------------------------------------------------------------------------
# 07.9: which two arms does a claim compare?
# ---------------------------------------------------------------------------------------------------------------------

# What is changed in each arm, against "before". Two arms answer a question if they differ in nothing else.
ARMS = {
    "before": {},
    "longer": {"steps": "twice as many"},
    "longest": {"steps": "five times as many"},
    "repeat": {"the group told of": "more often", "the group seen": "more often"},
    "named": {"the group told of": "more often", "sentences": "new"},
    "again": {"the group told of": "more often", "the group seen": "more often", "sentences": "new"},
}
ARMS["mutated"] = ARMS["again"] | {"molecules": "new, mutated"}
ARMS["generated"] = ARMS["again"] | {"molecules": "new, generated"}

# Claims of exercise 07.9, each "the first arm is better than the second", and the two arms that differ in that alone;
# None where there are no such two.
claims = {
    "A": ("again", "repeat"),
    "B": ("again", "named"),
    "C": ("generated", "again"),
    "D": ("generated", "mutated"),
    "E": ("longest", "before"),
    "F": None,
}
_CLAIM_QUESTIONS = {
    "A": "the sentences alone: both arms tell of the group and show it equally often",
    "B": "how often the molecules are seen: both arms tell of the group equally often, and in new sentences",
    "C": "whether the added molecules are new: both arms add as many, with new sentences",
    "D": "where the new molecules come from: both arms add as many new ones",
    "E": "the length of the training alone, on the same pairs",
    "F": "being told alone, in old sentences",
}


def differences(one, other):
    """In what two arms differ, in words: a list."""
    names = [*dict.fromkeys([*ARMS[one], *ARMS[other]])]
    return [name for name in names if ARMS[one].get(name) != ARMS[other].get(name)]


@exercise("07.9", claims)
def _check_claims(answer):
    if not isinstance(answer, dict):
        raise WrongAnswer(f"a dict was expected, {type(answer).__name__} came")
    for letter, right in claims.items():
        if letter not in answer or answer[letter] is ...:
            raise WrongAnswer(f"{letter!r} is missing; write two arms, or None, for each of {', '.join(claims)}")
        pair = answer[letter]
        if pair != right and not (letter == "E" and pair == ("longer", "before")):
            raise WrongAnswer(f"{letter}: {_wrong_pair(letter, pair, right)}")


def _wrong_pair(letter, pair, right):
    """What is wrong with the two arms given for a claim: a text."""
    about = f"The claim is about {_CLAIM_QUESTIONS[letter]}"
    if pair is None:
        return f"there are two arms that differ in this alone. {about}"
    if not isinstance(pair, tuple) or len(pair) != 2:
        return 'two arms in brackets were expected, such as ("again", "before"), or None'
    for arm in pair:
        if arm not in ARMS:
            return f"{quoted(arm)} is none of the arms {', '.join(ARMS)}"
    if pair[::-1] == right or (letter == "E" and pair == ("before", "longer")):
        return "the right two, in the wrong order: the arm that should be better comes first"
    found = differences(*pair)
    return f"{pair[0]} and {pair[1]} {'differ in ' + ' and '.join(found) if found else 'are the same arm'}. {about}"
