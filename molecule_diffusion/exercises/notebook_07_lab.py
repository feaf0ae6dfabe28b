"""Notebook 07, exercise 07.6: a miner to tune, on a retriever that is small enough to train while one waits."""

import functools

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from molecule_diffusion.captions import caption_table, fact_table, relevance, write_captions
from molecule_diffusion.checks import quoted
from molecule_diffusion.exercises.checking import WrongAnswer, exercise
from molecule_diffusion.qm9 import shared_qm9
from molecule_diffusion.ranking import average_precision, morgan, ranked_hits
from molecule_diffusion.sentences import embed_sentences

MINERS = ("hard", "semihard", "easy", "random")
MINER_STEPS = 200
MINER_SEEDS = (0, 1)
MINER_GOAL = 0.38  # with right ones spared and margin 0.2: 0.41 to 0.43; with none spared: at most 0.35

miner_setting = {"miner": "hard", "margin": 0.2, "spare_right": True}


@exercise("07.6", miner_setting)
def _check_miner(answer):
    if not isinstance(answer, dict):
        raise WrongAnswer(f"a dict was expected, {type(answer).__name__} came")
    for key in answer:
        if key not in miner_setting:
            raise WrongAnswer(f"there is no knob {quoted(key)}; the knobs are {', '.join(miner_setting)}")
    for key in miner_setting:
        if answer.get(key, ...) is ...:
            raise WrongAnswer(f"{key!r} is missing; the knobs are {', '.join(miner_setting)}")
    miner, margin, spare_right = answer["miner"], answer["margin"], answer["spare_right"]
    if miner not in MINERS:
        raise WrongAnswer(f"miner={quoted(miner)}: expected one of {', '.join(MINERS)}")
    if isinstance(margin, bool) or not isinstance(margin, (int, float, np.number)) or not 0 < margin <= 2:
        raise WrongAnswer(f"margin={quoted(margin)}: expected a number above 0, at most 2")
    if not isinstance(spare_right, (bool, np.bool_)):
        raise WrongAnswer(f"spare_right={quoted(spare_right)}: expected True or False")
    score = float(np.mean([try_miner(miner, float(margin), bool(spare_right), seed) for seed in MINER_SEEDS]))
    if score < MINER_GOAL:
        raise WrongAnswer(
            f"mAP {score:.3f} (mean of {len(MINER_SEEDS)} seeds), and at least {MINER_GOAL} was asked for."
            f"{_advice(miner, margin, spare_right)}"
        )


def _advice(miner, margin, spare_right):
    """What about a setting that is not good enough may be the reason: a text."""
    if miner == "easy":
        return " The loss of an easy negative is 0, so it has no gradient: nothing was learned"
    if not spare_right:
        return " Right molecules of other captions are among those that are pushed away; spare them"
    if margin < 0.1:
        return " With so small a margin a lead of a hair's breadth is enough; ask for more"
    return " Compare with another margin"


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
