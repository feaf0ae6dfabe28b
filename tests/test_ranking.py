"""Measures of rankings, on cases small enough to compute on paper; baselines."""

import numpy as np
import pytest
import torch

import helpers
from molecule_diffusion import ranking

HITS = np.array([[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0, 0, 0, 0, 0]], bool)


def test_the_ranking_is_by_falling_similarity():
    similarity = np.array([[0.1, 0.9, 0.5]])
    assert ranking.ranked_hits(similarity, np.array([[True, False, True]])).tolist() == [[False, True, True]]
    tied = ranking.ranked_hits(np.zeros((1, 3)), np.array([[True, False, False]]))
    assert tied.tolist() == [[True, False, False]]  # what is equally similar stays in its order


def test_precision_recall_and_average_precision_by_hand():
    assert helpers.precision_at(HITS, 1).tolist() == [1, 0, 0]
    np.testing.assert_allclose(helpers.precision_at(HITS, 3), [2 / 3, 1 / 3, 0])
    np.testing.assert_array_equal(helpers.recall_at(HITS, 3), [1, 1 / 2, np.nan])
    # relevant at ranks 1 and 3; at ranks 2 and 5
    np.testing.assert_allclose(helpers.average_precision(HITS), [(1 + 2 / 3) / 2, (1 / 2 + 2 / 5) / 2, np.nan])


def test_average_precision_is_scikit_learn_s():
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    similarity, relevant = random.random((20, 50)), random.random((20, 50)) < 0.2
    ours = helpers.average_precision(ranking.ranked_hits(similarity, relevant))
    theirs = [average_precision_score(row, scores) for row, scores in zip(relevant, similarity)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_curve_never_rises_and_starts_at_the_best_precision():
    recall, precision = helpers.pr_curve(HITS[:2], points=11)
    assert recall[0] == 0 and recall[-1] == 1 and (np.diff(precision) <= 0).all()
    np.testing.assert_allclose(precision[0], (1 + 1 / 2) / 2)
    np.testing.assert_allclose(precision[-1], (2 / 3 + 2 / 5) / 2)
    np.testing.assert_allclose(helpers.pr_curve(HITS, points=11)[1], precision)  # a query without an answer is left out


def test_the_curve_that_is_not_interpolated_may_rise_and_has_the_average_precision_as_area():
    hits = np.array([[0, 0, 1, 1, 0, 1], [1, 0, 0, 0, 1, 0]], bool)
    levels, precision = helpers.pr_curve(hits[:1], points=4, interpolated=False)
    np.testing.assert_allclose(precision, [0, 1 / 3, 2 / 4, 3 / 6])
    precision = helpers.pr_curve(hits, points=601, interpolated=False)[1]
    np.testing.assert_allclose(precision[1:].mean(), helpers.average_precision(hits).mean())


def test_scores_of_a_perfect_and_of_a_random_ranking():
    random = np.random.default_rng(0)
    relevant = random.random((200, 300)) < 0.1
    perfect = helpers.retrieval_scores(relevant.astype(float), relevant)
    assert all(np.nanmean(perfect[name]) == 1 for name in ("P@1", "P@5", "AP"))
    guessed = helpers.retrieval_scores(ranking.random_similarity(200, 300, 0), relevant)
    assert abs(np.nanmean(guessed["P@5"]) - 0.1) < 0.03 and abs(np.nanmean(guessed["AP"]) - 0.1) < 0.05
    nothing = helpers.retrieval_scores(np.zeros((1, 5)), np.zeros((1, 5), bool))
    assert all(np.isnan(values).all() for values in nothing.values())


def test_the_interval_holds_the_mean_and_shrinks():
    random = np.random.default_rng(0)
    few, many = random.random(20), random.random(2000)
    mean, low, high = helpers.interval(few)
    assert low < mean < high and mean == pytest.approx(few.mean())
    assert np.diff(helpers.interval(many)[1:]) < high - low
    assert helpers.interval([*few, np.nan]) == helpers.interval(few)
    assert np.isnan(helpers.interval([np.nan])).all()


def test_fingerprints_and_tanimoto():
    bits = helpers.morgan(["CCO", "CCO", "c1ccccc1"])
    assert bits.shape == (3, 1024) and bits.dtype == torch.uint8
    similarity = helpers.tanimoto(bits, bits)
    assert similarity[0, 1] == 1 and 0 <= similarity[0, 2] < 0.2
    assert helpers.tanimoto([[1, 1, 0]], [[1, 0, 1]]).tolist() == [[pytest.approx(1 / 3)]]


def test_trigrams_find_what_shares_letters():
    similarity = helpers.trigram_similarity(["a nitrile"], ["a ring, a nitrile", "a ring", "an ester"])
    assert similarity.shape == (1, 3) and similarity[0].argmax() == 0


def test_a_scaffold_is_on_one_side_only(qm9):
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmilesFromSmiles

    rows = np.random.default_rng(0).choice(qm9.train, 1000, replace=False)
    smiles = [qm9.smiles[i] for i in rows]
    stay, held_out = helpers.scaffold_split(smiles, 0.3, 0)
    assert sorted([*stay, *held_out]) == list(range(1000)) and 200 < len(held_out) <= 300
    scaffolds = [{MurckoScaffoldSmilesFromSmiles(smiles[row]) for row in side} for side in (stay, held_out)]
    assert not scaffolds[0] & scaffolds[1] and "" not in scaffolds[1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: ranking.ranked_hits(np.zeros((2, 3)), np.zeros((2, 4), bool)),
        lambda: ranking.ranked_hits(np.zeros((2, 3)), np.zeros((2, 3))),
        lambda: ranking.ranked_hits(np.full((2, 3), np.nan), np.zeros((2, 3), bool)),
        lambda: helpers.precision_at(HITS, 6),
        lambda: helpers.precision_at(HITS, 0),
        lambda: helpers.morgan("CCO"),
        lambda: helpers.morgan(["C1CC"]),
        lambda: helpers.scaffold_split(["C"], 1.0, 0),
    ],
)
def test_bad_arguments_are_explained(call):
    with pytest.raises(ValueError):
        call()
