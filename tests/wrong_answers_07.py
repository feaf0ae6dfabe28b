"""Wrong answers to the exercises of notebook 07, each with words that answer it; `test_exercises` tries them."""

import numpy as np
import torch
from rdkit import Chem

from molecule_diffusion.exercises import notebook_07, notebook_07_lab

# ---------------------------------------------------------------------------------------------------------------------
# 07.1 and 07.2: scores
# ---------------------------------------------------------------------------------------------------------------------


def each_query(score, empty=None):
    """An answer to 07.1: the mean of `score(found, places)` over queries; `empty` counts where none is right."""

    def answer(scores, relevant):
        values = []
        for row, right in zip(scores, relevant):
            found = right[np.argsort(-row, kind="stable")]
            if found.any():
                values.append(score(found, np.arange(1, len(row) + 1)))
            elif empty is not None:
                values.append(empty)
        return float(np.mean(values))

    return answer


def average_precision(found, places):
    return (np.cumsum(found) / places)[found].mean()


def sum_of_queries(scores, relevant):
    kept = relevant.any(1)
    return notebook_07.mean_average_precision(scores, relevant) * kept.sum()


def pooled(scores, relevant):
    parts = []
    for row, right in zip(scores, relevant):
        found = right[np.argsort(-row)]
        parts.extend((np.cumsum(found) / np.arange(1, len(row) + 1))[found])
    return np.mean(parts)


def sorts_in_place(scores, relevant):
    good = notebook_07.mean_average_precision(scores, relevant)
    scores.sort(axis=1)
    return good


MEAN_AVERAGE_PRECISION = [
    (each_query(average_precision, empty=0.0), "counts as 0 here.*leave it out"),
    (each_query(average_precision, empty=np.nan), "NaN. A query that nothing answers"),
    (lambda scores, relevant: notebook_07.mean_average_precision(-scores, relevant), "upside down"),
    (each_query(lambda found, places: (np.cumsum(found) / places).mean()), "at \\*every\\* place"),
    (each_query(lambda found, places: (np.cumsum(found) / places * found).mean()), "number of all molecules"),
    (each_query(lambda found, places: 1 / places[found][0]), "reciprocal rank"),
    (each_query(lambda found, places: found[: found.sum()].mean()), "R-precision"),
    (each_query(lambda found, places: (found / places).sum() / found.sum()), "found \\*so far\\*"),
    (pooled, "average within each query first"),
    (sum_of_queries, "take their mean"),
    (sorts_in_place, "work on a copy"),
    (lambda scores, relevant: None, "returns nothing"),
]


def shown(scores, relevant, k):
    """How many of the first k are right, for each query."""
    front = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(relevant, front, axis=1).sum(1)


def as_the_colleague(scores, relevant, k):
    found = shown(scores, relevant, k)
    return (found / relevant.sum(1)).mean(), (found > 0).mean()


PRECISION_RECALL = [
    (as_the_colleague, "both faults are still in it"),
    (lambda s, r, k: (shown(s, r, k).mean() / k, (shown(s, r, k) > 0).mean()), "the precision is right.*at least one"),
    (lambda s, r, k: 2 * ((shown(s, r, k) / r.sum(1)).mean(),), "both numbers are the recall"),
    (lambda s, r, k: 2 * (shown(s, r, k).mean() / k,), "both numbers are the precision"),
    (lambda s, r, k: notebook_07.precision_recall(s, r, k)[::-1], "exchanged: precision first"),
    (lambda s, r, k: (shown(s, r, k).mean() / k, shown(s, r, k).sum() / r.sum()), "pools all queries"),
    (lambda s, r, k: notebook_07.precision_recall(-s, r, k), "upside down"),
    (lambda s, r, k: shown(s, r, k).mean() / k, "return two things: the precision and the recall"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 07.6: the query in its own index
# ---------------------------------------------------------------------------------------------------------------------


def as_found(queries, query_ids, index, index_ids, k):
    return index_ids[np.argsort(-(queries @ index.T), axis=1, kind="stable")[:, :k]]


def without_the_first(queries, query_ids, index, index_ids, k):
    return index_ids[np.argsort(-(queries @ index.T), axis=1, kind="stable")[:, 1 : k + 1]]


def lists_of_ids(queries, query_ids, index, index_ids, k, more=1):
    found = as_found(queries, query_ids, index, index_ids, k + more)
    return [[one for one in row if one != own][: k if more else None] for row, own in zip(found, query_ids)]


def positions(queries, query_ids, index, index_ids, k):
    scores = np.where(index_ids[None] == query_ids[:, None], -np.inf, queries @ index.T)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def farthest(queries, query_ids, index, index_ids, k):
    return index_ids[np.argsort(queries @ index.T, axis=1, kind="stable")[:, :k]]


def one_short(queries, query_ids, index, index_ids, k):
    return notebook_07.neighbours(queries, query_ids, index, index_ids, k)[:, : k - 1]


NEIGHBOURS = [
    (as_found, "the query still finds itself"),
    (without_the_first, "compare the \\*ids\\*"),
    (lambda *given: lists_of_ids(*given, more=0), "different lengths"),
    (positions, "these are positions"),
    (farthest, "farthest away"),
    (one_short, "only 1 ids per query"),
    (lambda *given: None, "returns nothing"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 07.4: a loss
# ---------------------------------------------------------------------------------------------------------------------


def nce(left_out=lambda fits, own: fits & ~own, scale=lambda s, t: s / t, value=-torch.inf, read=None):
    def answer(scores, fits, temperature):
        own = torch.eye(len(scores), dtype=torch.bool)
        logits = scale(scores, temperature).masked_fill(left_out(fits, own), value)
        return read(logits) if read else -logits.log_softmax(1).diagonal().mean()

    return answer


def changes_scores(scores, fits, temperature):
    own = torch.eye(len(scores), dtype=torch.bool)
    right = notebook_07.info_nce(scores, fits, temperature)
    scores.masked_fill_(fits & ~own, -torch.inf)
    return right


INFO_NCE = [
    (nce(left_out=lambda fits, own: torch.zeros_like(fits)), "right molecules of other captions are still punished"),
    (nce(left_out=lambda fits, own: ~fits), "it is the other way round"),
    (nce(left_out=lambda fits, own: fits), "NaN. If the own molecule|infinity. The diagonal"),
    (nce(value=0.0), "a logit of 0 is not nothing"),
    (nce(scale=lambda s, t: s), "the temperature has no effect"),
    (nce(scale=lambda s, t: s * t), "divide by it"),
    (nce(read=lambda logits: -logits.log_softmax(0).diagonal().mean()), "runs over the captions"),
    (nce(read=lambda logits: -logits.softmax(1).diagonal().mean()), "the logarithm is missing"),
    (nce(read=lambda logits: logits.log_softmax(1).diagonal().mean()), "the sign"),
    (nce(read=lambda logits: -logits.log_softmax(1).diagonal().sum()), "take the mean"),
    (nce(read=lambda logits: -logits.log_softmax(1).diagonal().mean().item()), "cut off from the scores"),
    (changes_scores, "were changed"),
]

# ---------------------------------------------------------------------------------------------------------------------
# 07.3, 07.7 and 07.8: curves, words and rules, the filter
# ---------------------------------------------------------------------------------------------------------------------

STORIES = {"A": "good start", "B": "leak", "C": "chance", "D": "late start"}

CURVES = [
    (STORIES | {"A": "leak", "B": "good start"}, "2 of 4 are right. Look again at A"),
    (STORIES | {"B": "late start", "D": "leak"}, "2 of 4 are right. Look again at B: .*one right answer in front"),
    (STORIES | {"C": "late start"}, "3 of 4 are right. Look again at C"),
    (STORIES | {"D": "good start"}, "3 of 4 are right. Look again at D: .*rises"),
    ({"A": "leak"}, "'B' is missing"),
    (STORIES | {"A": "perfect"}, "'perfect' is none of the stories"),
    (list(STORIES.values()), "a dict was expected"),
]


def filtered(read=Chem.CanonSmiles, held_out=True, ask=True, once=True, whole=True, finish=list):
    """An answer to 07.8 that leaves one of its steps out."""

    def answer(drawn, obeys, known):
        kept = []
        for text in drawn:
            if text is None or (whole and "." in text) or Chem.MolFromSmiles(text) is None:
                continue
            smiles = read(text)
            if held_out and smiles in known or ask and not obeys(smiles) or once and smiles in kept:
                continue
            kept.append(smiles)
        return finish(kept)

    return answer


def matches(smarts):
    return lambda text: Chem.MolFromSmiles(text).HasSubstructMatch(Chem.MolFromSmarts(smarts))


FITS_WORDS = [
    (matches("o1nccc1"), "Cc1cnon1: expected True, got False.*only the rule"),
    (matches("o1ncnc1"), "Cc1ccno1: expected True, got False: this isoxazole"),
    (matches("[#7,#8]~[#7,#8]"), "Cc1nnco1: expected False.*apart from the oxygen"),
    (matches("[#8]~[#7]"), "CC1=NOCC1: expected False.*not aromatic"),
    (matches("o.n"), "c1cocn1: expected False.*not bound to each other"),
    (matches("[#8;R]~[#7;R]"), "CC1=NOCC1: expected False"),
    (lambda text: "no" in text or "on" in text, "o1cccn1: expected True.*not the letters"),
    (lambda text: matches("o:n")(text) and "N" not in text, "ONc1ccno1: expected True.*does no harm"),
    (lambda text: Chem.MolFromSmarts("o:n"), "expected True or False, Mol came"),
    (lambda text: None, "returns nothing"),
]

KEEP_NEW = [
    (filtered(held_out=False), "it may be one that is held out"),
    (filtered(ask=False), "does not belong to the group"),
    (filtered(once=False), "kept twice"),
    (filtered(whole=False), "in pieces was kept"),
    (filtered(read=str), "make the SMILES canonical"),
    (filtered(finish=sorted), "keep the order"),
    (filtered(finish=set), "a set has no order"),
    (filtered(finish=len), "return a list of SMILES"),
    (lambda drawn, obeys, known: [text for text in drawn if text not in known], "is none"),
    (lambda drawn, obeys, known: [], "are missing and none are too many"),
]


def con(read=lambda shares, fits: -((shares * fits).sum(1) / fits.sum(1)).mean(), scale=lambda s, t: s / t, over=1):
    """An answer to 07.5 with another reading of the logarithms of the shares, another scale or direction."""
    return lambda scores, fits, temperature: read(scale(scores, temperature).log_softmax(over), fits)


def against_the_wrong(scores, fits, temperature):
    logits = scores / temperature
    wrong = (logits.exp() * ~fits).sum(1, keepdim=True)
    return -(((logits.exp() / (logits.exp() + wrong)).log() * fits).sum(1) / fits.sum(1)).mean()


SUP_CON = [
    (lambda *given: notebook_07.info_nce(*given), "this is the loss of 07.4"),
    (con(lambda shares, fits: -shares.diagonal().mean()), "only the own molecule has its turn"),
    (against_the_wrong, "below stand the wrong molecules"),
    (con(lambda shares, fits: -((shares.exp() * fits).sum(1) / fits.sum(1)).log().mean()), "the mean share"),
    (con(lambda shares, fits: -(shares.exp() * fits).sum(1).log().mean()), "the summed shares"),
    (con(lambda shares, fits: -((shares.exp() * fits).sum(1) / fits.sum(1)).mean()), "the logarithm is missing"),
    (con(lambda shares, fits: -(shares * fits).sum(1).mean()), "divided by their number"),
    (con(lambda shares, fits: -shares[fits].mean()), "average within each caption first"),
    (con(lambda shares, fits: -(shares * fits).mean()), "divide by the number of \\*right\\* ones"),
    (con(over=0), "runs over the captions"),
    (con(scale=lambda s, t: s * t), "divide by it"),
    (con(scale=lambda s, t: s), "the temperature has no effect"),
    (con(lambda shares, fits: ((shares * fits).sum(1) / fits.sum(1)).mean()), "the sign"),
    (con(lambda shares, fits: -((shares * fits).sum(1) / fits.sum(1)).sum()), "take the mean"),
    (lambda *given: notebook_07_lab.sup_con(*given).item(), "cut off from the scores"),
    (lambda scores, fits, t: notebook_07_lab.sup_con(scores, fits, t) * torch.nan, "nan. After a logit"),
]

RIGHT_CLAIMS = notebook_07_lab.claims

CLAIMS = [
    (RIGHT_CLAIMS | {"A": ("again", "before")}, "A: again and before differ in the group told of and the group seen"),
    (RIGHT_CLAIMS | {"B": ("again", "repeat")}, "B: again and repeat differ in sentences. .*how often"),
    (RIGHT_CLAIMS | {"C": ("generated", "before")}, "C: generated and before differ in .* and molecules"),
    (RIGHT_CLAIMS | {"D": ("mutated", "generated")}, "D: the right two, in the wrong order"),
    (RIGHT_CLAIMS | {"E": ("repeat", "before")}, "E: repeat and before differ in the group told of"),
    (RIGHT_CLAIMS | {"E": ("before", "longer")}, "E: the right two, in the wrong order"),
    (RIGHT_CLAIMS | {"E": None}, "E: there are two arms that differ in this alone"),
    (RIGHT_CLAIMS | {"F": ("named", "before")}, "F: named and before differ in the group told of and sentences"),
    (RIGHT_CLAIMS | {"F": ("repeat", "before")}, "F: repeat and before differ in .*the group seen"),
    (RIGHT_CLAIMS | {"A": ("again", "again")}, "A: again and again are the same arm"),
    (RIGHT_CLAIMS | {"A": ("again", "twice")}, "A: 'twice' is none of the arms"),
    (RIGHT_CLAIMS | {"A": "again"}, "A: two arms in brackets were expected"),
    ({"A": ("again", "repeat")}, "'B' is missing"),
    (list(RIGHT_CLAIMS), "a dict was expected, list came"),
]

WRONG = {
    "07.1": MEAN_AVERAGE_PRECISION,
    "07.2": PRECISION_RECALL,
    "07.3": CURVES,
    "07.4": INFO_NCE,
    "07.5": SUP_CON,
    "07.6": NEIGHBOURS,
    "07.7": FITS_WORDS,
    "07.8": KEEP_NEW,
    "07.9": CLAIMS,
}
