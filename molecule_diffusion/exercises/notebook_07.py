"""Notebook 07: scores of a retrieval, their curves, a loss, a query in its own index, words and rules, a filter.

SupCon, 07.5, and the arms to compare, 07.9, stand in notebook_07_lab.
"""

import numpy as np
import torch
from rdkit import Chem, rdBase
from torch.nn import functional as F

from molecule_diffusion.exercises.checking import WrongAnswer, exercise, expect, expect_pair, expect_something
from molecule_diffusion.exercises.predicting import Name, Number, prediction

prediction("07.p1", Number("mAP of a random order", lowest=0, highest=1))
prediction("07.p2", Name(("fingerprint", "latent")))
prediction("07.p3", Number("of the draws", lowest=0, highest=1))
prediction("07.p4", Number("AP of the group", lowest=0, highest=1))

# ---------------------------------------------------------------------------------------------------------------------
# 07.1: mean average precision
# ---------------------------------------------------------------------------------------------------------------------

# Two queries against five molecules, the case that the notebook works out on paper, and a third that nothing answers.
FIVE_SCORES = np.array([[0.9, 0.1, 0.8, 0.4, 0.3], [0.2, 0.7, 0.1, 0.6, 0.5], [0.3, 0.2, 0.1, 0.4, 0.5]])
FIVE_RIGHT = np.array([[1, 0, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)


def mean_average_precision(scores, relevant):
    """The mean over queries of average precision; queries that nothing answers are left out.

    Args: scores: how well each molecule fits each query, larger is better; relevant: which ones are right.
    Shapes: (queries, molecules) both; returns a number from 0 to 1.
    """
    averages = []
    for row, right in zip(scores, relevant):
        if not right.any():
            continue
        found, total = 0, 0.0
        for place, molecule in enumerate(np.argsort(-row, kind="stable"), start=1):
            if right[molecule]:
                found += 1
                total += found / place
        averages.append(total / right.sum())
    return float(np.mean(averages))


def _wrong_map(scores, relevant, mistake):
    """`mean_average_precision` with one of the mistakes that students make, to recognise it."""
    averages, totals, answers = [], 0.0, 0
    for row, right in zip(scores, relevant):
        order = np.argsort(row if mistake == "upside down" else -row, kind="stable")
        found = right[order]
        places = np.arange(1, len(row) + 1)
        if mistake == "from 0":
            places = np.arange(len(row)) + (places == 1)  # the first place would divide by 0
        precision = np.cumsum(found) / places
        if mistake == "scores":
            precision = row[order]
        if not found.any():
            if mistake == "nothing is 0":
                averages.append(0.0)
            continue
        if mistake == "everywhere":
            averages.append(precision.mean())
        elif mistake == "by all":
            averages.append((precision * found).mean())
        elif mistake == "first hit":
            averages.append(precision[found][0])
        elif mistake == "hits":
            averages.append(found[: found.sum()].mean())
        elif mistake == "ones":
            averages.append((found / places).sum() / found.sum())
        else:
            averages.append(precision[found].mean())
        totals, answers = totals + precision[found].sum(), answers + found.sum()
    if mistake == "pooled":
        return totals / answers
    return sum(averages) if mistake == "sum" else float(np.mean(averages))


_MAP_MISTAKES = {
    "upside down": "the ranking is upside down: a *larger* score is better, and argsort puts the smallest first",
    "nothing is 0": "a query that nothing answers counts as 0 here; it says nothing of the ranking, so leave it out",
    "everywhere": "this is the mean of the precision at *every* place; take it only where a right molecule stands",
    "by all": "the sum is divided by the number of all molecules; divide by the number of *right* ones",
    "first hit": "this is the reciprocal rank, which looks at the first right molecule only; go on to the last one",
    "hits": "this is the precision at k = number of right molecules (R-precision); average over the right ones",
    "pooled": "all right molecules of all queries are in one mean; average within each query first, then over queries",
    "from 0": "places count from 1, not from 0: the molecule in front stands at place 1",
    "ones": "at a right molecule the numerator is how many right ones were found *so far*, not 1",
    "scores": "these are means of scores; a precision counts right molecules",
    "sum": "this is the sum over the queries; take their mean",
}


@exercise("07.1", mean_average_precision)
def _check_mean_average_precision(answer):
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=(20, 200)), rng.random((20, 200)) < 0.05
    cases = {
        "the two queries on paper": (FIVE_SCORES[:2], FIVE_RIGHT[:2]),
        "the same with a third query that nothing answers": (FIVE_SCORES, FIVE_RIGHT),
        "20 queries on 200 molecules": (scores, right),
    }
    for name, (scores, right) in cases.items():
        given = scores.copy()
        got = answer(given, right.copy())
        expect_something(got)
        hints = [(_wrong_map(scores, right, mistake), said) for mistake, said in _MAP_MISTAKES.items()]
        if np.isnan(np.asarray(got, float)).any():
            raise WrongAnswer(f"{name}: NaN. A query that nothing answers divides by 0; leave it out")
        expect(got, mean_average_precision(scores, right), name, hints)
        if not np.array_equal(given, scores):
            raise WrongAnswer("the caller's `scores` were changed; work on a copy")


# ---------------------------------------------------------------------------------------------------------------------
# 07.2: precision and recall
# ---------------------------------------------------------------------------------------------------------------------


def precision_recall(scores, relevant, k):
    """Precision and recall of the k molecules in front, each the mean over queries; every query has a right answer."""
    front = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(relevant, front, axis=1).sum(1)
    return float((found / k).mean()), float((found / relevant.sum(1)).mean())


@exercise("07.2", precision_recall)
def _check_precision_recall(answer):
    rng = np.random.default_rng(1)
    large = rng.normal(size=(12, 60)), rng.random((12, 60)) < 0.2
    large[1][:, 0] = True  # every query has a right answer
    cases = {"12 queries on 60 molecules": large, "the two queries on paper": (FIVE_SCORES[:2], FIVE_RIGHT[:2])}
    for name, (scores, right) in cases.items():
        for k in (3, 5, 1):  # at 1, precision and share of hits are the same
            got = answer(scores.copy(), right.copy(), k)
            expect_pair(got, "the precision and the recall")
            good = precision_recall(scores, right, k)
            front = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            found = np.take_along_axis(right, front, axis=1).sum(1)
            back = np.take_along_axis(right, np.argsort(scores, axis=1)[:, :k], axis=1).sum(1)
            any_hit, pooled = (found > 0).mean(), found.sum() / right.sum()
            hints = [
                ((good[1], good[1]), "both numbers are the recall: a precision divides by what was *shown*, k"),
                ((good[1], any_hit), "both faults are still in it: what is called precision is the recall, and what is "
                 "called recall is the share of queries with at least one hit"),
                ((good[0], any_hit), "the precision is right. The second number is the share of queries with at least "
                 "one hit; the recall divides by the number of right molecules"),
                ((good[1], good[0]), "the two are exchanged: precision first, then recall"),
                ((good[0], pooled), "the recall pools all queries; divide within each query first, then take the mean"),
                ((good[0], good[0]), "both numbers are the precision: a recall divides by the number of right ones"),
                (((back / k).mean(), (back / right.sum(1)).mean()), "the ranking is upside down: larger is better"),
            ]  # fmt: skip
            expect([float(np.mean(part)) for part in got], good, f"{name}, k = {k}, (precision, recall)", hints)


# ---------------------------------------------------------------------------------------------------------------------
# 07.6: the query in its own index
# ---------------------------------------------------------------------------------------------------------------------


def neighbours(query_vectors, query_ids, index_vectors, index_ids, k):
    """The ids of the k molecules nearest to each query, the largest scalar product first, never the query itself.

    Shapes: (queries, d), (queries,), (molecules, d), (molecules,) -> (queries, k).
    """
    scores = query_vectors @ index_vectors.T
    scores = np.where(index_ids[None] == query_ids[:, None], -np.inf, scores)
    return index_ids[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def _twins():
    """Five molecules of which 10 and 12 have the same vector, and queries 12, 13 and 99, which is not in the index."""
    index = np.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    return np.array([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]), np.array([12, 13, 99]), index, np.array([10, 11, 12, 13, 14])


@exercise("07.6", neighbours)
def _check_neighbours(answer):
    rng = np.random.default_rng(2)
    many = rng.normal(size=(40, 6))
    many /= np.linalg.norm(many, axis=1, keepdims=True)
    rows = rng.permutation(40)[:12]
    cases = {
        "three queries, of which 99 is not in the index": (*_twins(), 2),
        "12 of 40 molecules as queries": (many[rows], rows + 100, many, np.arange(40) + 100, 5),
    }
    for name, (queries, query_ids, index, index_ids, k) in cases.items():
        good = neighbours(queries, query_ids, index, index_ids, k)
        order = np.argsort(-(queries @ index.T), axis=1, kind="stable")
        away = np.argsort(queries @ index.T, axis=1, kind="stable")
        positions = [[np.flatnonzero(index_ids == one)[0] for one in row] for row in good]
        hints = [
            (index_ids[order[:, :k]], "the query still finds itself"),
            (index_ids[order[:, 1 : k + 1]], "this drops whatever stands in front. Query 99 is not in the index and "
             "loses its best answer, and of two equal vectors the other one may stand in front; compare the *ids*"),
            (index_ids[away[:, :k]], "these are the molecules farthest away: a larger scalar product is nearer"),
            (positions, "these are positions in the index; return their ids, `index_ids[...]`"),
        ]  # fmt: skip
        got = answer(queries.copy(), query_ids.copy(), index.copy(), index_ids.copy(), k)
        expect_something(got)
        try:
            got = np.asarray(got, float)
        except ValueError:
            raise WrongAnswer(f"{name}: the rows have different lengths; every query gets {k} ids") from None
        if got.shape == (len(query_ids), k - 1):
            raise WrongAnswer(f"{name}: only {k - 1} ids per query; leave the query out first, then take k")
        recognised = any(np.array_equal(got, wrong) for wrong, _ in hints)
        if got.shape == good.shape and not recognised and (got == query_ids[:, None]).any():
            raise WrongAnswer(f"{name}: a query is still among its own answers")
        expect(got, good, name, hints)


# ---------------------------------------------------------------------------------------------------------------------
# 07.4: a contrastive loss that does not punish right answers
# ---------------------------------------------------------------------------------------------------------------------


def info_nce(scores, fits, temperature=0.07):
    """InfoNCE of a batch of captions, each with its own molecule on the diagonal; other right molecules are left out.

    Args: scores: cosines; fits: whether molecule j has everything that caption i names. Shapes: (B, B) -> ().
    """
    own = torch.eye(len(scores), dtype=torch.bool)
    logits = (scores / temperature).masked_fill(fits & ~own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(scores)))


def _wrong_info_nce(scores, fits, temperature, mistake):
    own = torch.eye(len(scores), dtype=torch.bool)
    logits = scores * temperature if mistake == "times" else scores / temperature
    if mistake == "no temperature":
        logits = scores
    left_out = {"all in": ~own & False, "wrong ones out": ~fits, "zero": ~own & False}.get(mistake, fits & ~own)
    logits = logits.masked_fill(left_out, -torch.inf)
    if mistake == "zero":
        logits = logits.masked_fill(fits & ~own, 0.0)
    if mistake == "columns":
        logits = logits.T
    log_share = logits.log_softmax(1).diagonal()
    if mistake == "without own":
        log_share = (scores / temperature).diagonal() - logits.masked_fill(own, -torch.inf).logsumexp(1)
    if mistake == "no log":
        return -log_share.exp().mean()
    if mistake == "sign":
        return log_share.mean()
    return -log_share.sum() if mistake == "sum" else -log_share.mean()


_NCE_MISTAKES = {
    "all in": "right molecules of other captions are still punished: leave those out where `fits` is True off the "
    "diagonal",
    "wrong ones out": "the *wrong* molecules were left out, the right ones were kept; it is the other way round",
    "zero": "a logit of 0 is not nothing: exp(0) = 1 still stands in the sum. Use -inf",
    "columns": "the softmax runs over the captions; it must run over the molecules, one row per caption",
    "times": "the scores are multiplied by the temperature; divide by it",
    "no temperature": "the temperature has no effect; divide the scores by it",
    "no log": "the logarithm is missing: these are shares, not their logarithms",
    "sign": "the sign: the loss is *minus* the logarithm of the own molecule's share",
    "sum": "this is the sum over the captions; take the mean",
    "without own": "the own molecule's term is missing in the sum below",
}


@exercise("07.4", info_nce)
def _check_info_nce(answer):
    scores = torch.tensor([[0.8, 0.4, 0.7], [0.1, 0.6, 0.2], [0.5, 0.3, 0.4]], dtype=torch.float64)
    fits = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 1, 1]], dtype=torch.bool)
    for temperature in (0.2, 0.07):
        given = scores.clone()
        got = answer(given, fits.clone(), temperature)
        expect_something(got)
        hints = [(_wrong_info_nce(scores, fits, temperature, mistake), said) for mistake, said in _NCE_MISTAKES.items()]
        case = f"three captions, temperature {temperature}"
        got = got.detach() if torch.is_tensor(got) else got
        if np.isnan(np.asarray(got)).any():
            raise WrongAnswer(f"{case}: NaN. If the own molecule is left out too, its row has nothing to choose from")
        if np.isinf(np.asarray(got)).any():
            raise WrongAnswer(f"{case}: infinity. The diagonal of `fits` is True: keep the own molecule in the sum")
        expect(got, info_nce(scores, fits, temperature), case, hints)
        if not torch.equal(given, scores):
            raise WrongAnswer("the caller's `scores` were changed; `masked_fill` without the _ makes a new tensor")
    learned = scores.clone().requires_grad_()
    loss = answer(learned, fits.clone(), 0.07)
    if not torch.is_tensor(loss) or not loss.requires_grad:
        raise WrongAnswer("the value is right, but it is cut off from the scores: return a tensor, without .item()")


# ---------------------------------------------------------------------------------------------------------------------
# 07.3: reading precision-recall curves
# ---------------------------------------------------------------------------------------------------------------------

CURVE_STORIES = ("chance", "good start", "late start", "leak")  # what the four curves of the notebook may be
curve_answers = {"A": "good start", "B": "leak", "C": "chance", "D": "late start"}
_CURVE_ADVICE = {
    "A": "A begins at 1 and falls to the base rate early: its first answers are right, and the rest is in no order",
    "B": "B has one right answer in front for every query, and from then on the precision drops to that of chance",
    "C": "C lies near the share of right molecules everywhere, as an order without knowledge must",
    "D": "D begins low and *rises* before it falls: wrong molecules stand in front of many right ones",
}


def example_curves(queries=200, molecules=1000, share=0.05):
    """Made-up scores of four systems for exercise 07.3: {letter: (scores, relevant)}, shapes (queries, molecules)."""
    rng = np.random.default_rng(7)
    right = rng.random((queries, molecules)) < share
    noise = rng.normal(size=(queries, molecules))
    known = right & (rng.random(right.shape) < 0.3)  # what a system recognises of the right ones
    intruders = ~right & (rng.random(right.shape) < 0.02)
    own = np.zeros_like(right)
    own[:, 0] = True
    scores = {"A": noise + 20 * known, "B": noise + 20 * own, "C": noise}
    scores["D"] = noise + 3.5 * right + 20 * intruders
    return {name: (scores[name], right | own if name == "B" else right) for name in "ABCD"}


@exercise("07.3", curve_answers)
def _check_curves(answer):
    if not isinstance(answer, dict):
        raise WrongAnswer(f"a dict was expected, {type(answer).__name__} came")
    for letter in curve_answers:
        if answer.get(letter, ...) is ...:
            raise WrongAnswer(f"{letter!r} is missing; write one story for each of A, B, C and D")
        if answer[letter] not in CURVE_STORIES:
            raise WrongAnswer(f"{letter}: {answer[letter]!r} is none of the stories {', '.join(CURVE_STORIES)}")
    wrong = [letter for letter in curve_answers if answer[letter] != curve_answers[letter]]
    if wrong:
        right = len(curve_answers) - len(wrong)
        raise WrongAnswer(f"{right} of 4 are right. Look again at {wrong[0]}: {_CURVE_ADVICE[wrong[0]]}")


# ---------------------------------------------------------------------------------------------------------------------
# 07.7: words and rules
# ---------------------------------------------------------------------------------------------------------------------


def fits_words(text):
    """Whether "an aromatic five-ring with a bond from oxygen to nitrogen" is true of a molecule, given as SMILES."""
    return Chem.MolFromSmiles(text).HasSubstructMatch(Chem.MolFromSmarts("o:n"))


# Molecules of which the words are true, and others, with what a wrong answer has overlooked.
WORDS_ARE_TRUE = {
    "Cc1ccno1": "this isoxazole has the bond",
    "o1cccn1": "the last n is bound to the first o, where the ring closes. Read the molecule, not the letters",
    "Cc1cnon1": "in this ring (an oxadiazole) oxygen is bound to nitrogen on both sides. The words do not "
    "forbid a second nitrogen, nor do they say that the other atoms are carbon; only the rule of isoxazole does",
    "Cc1ncno1": "this ring (an oxadiazole) has a second nitrogen, which the words neither ask for nor forbid",
    "c1ccc2nocc2c1": "a five-ring may be fused to another ring",
    "ONc1ccno1": "a second bond from oxygen to nitrogen, outside of the ring, does no harm",
}
WORDS_ARE_FALSE = {
    "c1cocn1": "in oxazole oxygen and nitrogen are in one ring, but not bound to each other",
    "Cc1nnco1": "here both nitrogens stand apart from the oxygen",
    "c1ccoc1": "furan has no nitrogen",
    "CC1=NOCC1": "this ring has the bond, but it is not aromatic. In SMARTS small letters are aromatic atoms",
    "CON": "there is a bond from oxygen to nitrogen, but no ring",
    "ONc1ccoc1": "the bond from oxygen to nitrogen stands outside of the aromatic ring",
    "Cc1cc[nH]n1": "pyrazole has no oxygen",
}


@exercise("07.7", fits_words)
def _check_fits_words(answer):
    for truth, cases in ((True, WORDS_ARE_TRUE), (False, WORDS_ARE_FALSE)):
        for text, said in cases.items():
            got = answer(text)
            expect_something(got)
            if not isinstance(got, (bool, np.bool_)):
                raise WrongAnswer(f"{text}: expected True or False, {type(got).__name__} came")
            if bool(got) != truth:
                raise WrongAnswer(f"{text}: expected {truth}, got {bool(got)}: {said}")


# ---------------------------------------------------------------------------------------------------------------------
# 07.8: what may be added to the training
# ---------------------------------------------------------------------------------------------------------------------


def keep_new(drawn, obeys, known):
    """The draws that may be added to a training set, each once, as canonical SMILES, in the order of their first draw.

    Args:
        drawn: SMILES, or None for an invalid draw; not always canonical, and with a dot where a draw is in pieces.
        obeys: a function of a canonical SMILES: whether it belongs to the group that was asked for.
        known: canonical SMILES of every molecule of QM9, with those held out for validation and test.
    """
    kept = {}
    for text in drawn:
        if text is None or "." in text:
            continue
        mol = Chem.MolFromSmiles(text)
        if mol is None:
            continue
        smiles = Chem.MolToSmiles(mol)
        if smiles not in known and obeys(smiles):
            kept[smiles] = True
    return list(kept)


def _wrong_filter(drawn, obeys, known, mistake):
    kept = []
    for text in drawn:
        if text is None or ("." in text and mistake != "pieces"):
            continue
        mol = Chem.MolFromSmiles(text)
        if mol is None:
            continue
        smiles = Chem.MolToSmiles(mol)
        name = text if mistake == "spelling" else smiles
        if (name in known and mistake != "known") or (not obeys(smiles) and mistake != "any"):
            continue
        kept.append(name)
    if mistake == "doubles":
        return kept
    kept = list(dict.fromkeys(kept))
    return sorted(kept) if mistake == "sorted" else kept


_FILTER_MISTAKES = {
    "known": "a molecule of QM9 was kept: it may be one that is held out for the test",
    "any": "a molecule was kept that does not belong to the group: ask `obeys`",
    "pieces": "a draw in pieces was kept: a dot in a SMILES separates two molecules",
    "doubles": "the same molecule was kept twice",
    "spelling": "a molecule can be spelled in several ways: make the SMILES canonical before you compare it",
    "sorted": "keep the order of the first draw; a set loses it",
}


@exercise("07.8", keep_new)
def _check_keep_new(answer):
    drawn = ["OCCO", "OC1CO1", None, "C1OC1O", "CC(", "NCC", "CNC"]
    drawn += ["CO.CO", "OC(F)CO", "C(O)(CO)F", "CCO", "OCC(O)F", "FC1CO1", "FCCO"]
    known = {Chem.CanonSmiles(text) for text in ("CCO", "CCN", "OCCF")}

    def obeys(smiles):
        return "O" in smiles

    with rdBase.BlockLogs():  # one of the draws cannot be read, on purpose
        got = answer(list(drawn), obeys, set(known))
        expect_something(got)
        if isinstance(got, (set, frozenset)):
            raise WrongAnswer("a set has no order; return a list in the order of the first draw")
        if not isinstance(got, list) or not all(isinstance(text, str) for text in got):
            raise WrongAnswer("return a list of SMILES; an invalid draw, None or one that RDKit cannot read, is none")
        good = keep_new(drawn, obeys, known)
        for mistake, said in _FILTER_MISTAKES.items():
            if got == _wrong_filter(drawn, obeys, known, mistake) != good:
                raise WrongAnswer(said)
    if got != good:
        missing, extra = sorted(set(good) - set(got)), sorted(set(got) - set(good))
        raise WrongAnswer(f"of {len(drawn)} draws, {missing or 'none'} are missing and {extra or 'none'} are too many")
