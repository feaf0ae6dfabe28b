"""The retriever: features, network, losses and miners against hand-made cases, pairs, pipeline, scores, recipe."""

import functools

import numpy as np
import pytest
import torch

import helpers
from molecule_diffusion import ranking, recipes, retrieval, scoring

SMILES = ["CCO", "C1CC1C#N", "c1ccccc1", "C1OC1C=O", "CC(=O)OC", "CCCC"]


def small(kind="morgan"):
    torch.manual_seed(0)
    return helpers.Retriever(kind=kind, width=32, dim=8)


@pytest.fixture(scope="module")
def token_vae():
    return helpers.load_pipeline("token_vae").vae


# ---------------------------------------------------------------------------------------------------------------------
# Features and network
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, size", [("morgan", 1024), ("latent", 72), ("both", 1096)])
def test_features_and_points(kind, size, token_vae):
    features = helpers.molecule_features(kind, SMILES, token_vae)
    assert features.shape == (6, size) and features.dtype == torch.float32
    molecules, texts = small(kind)(features, torch.randn(3, 384))
    assert molecules.shape == (6, 8) and texts.shape == (3, 8)
    for points in (molecules, texts):
        torch.testing.assert_close(points.norm(dim=1), torch.ones(len(points)), atol=1e-5, rtol=0)


def test_features_are_what_they_are_called(token_vae):
    both = helpers.molecule_features("both", SMILES, token_vae)
    assert torch.equal(both[:, :1024], helpers.morgan(SMILES).float())
    latents = helpers.encode_graphs(token_vae, *helpers.to_graphs(SMILES))
    torch.testing.assert_close(both[:, 1024:], latents.flatten(1))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: helpers.Retriever(kind="graph"), "expected one of morgan, latent, both"),
        (lambda: helpers.molecule_features("graph", SMILES), "expected one of morgan, latent, both"),
        (lambda: helpers.molecule_features("latent", SMILES), "needs a TokenVAE"),
        (lambda: helpers.metric_loss(*torch.eye(2)[None].repeat(2, 1, 1), torch.eye(2).bool(), "best"), "expected one"),
        (lambda: helpers.mine(torch.eye(2), torch.eye(2).bool(), "easy"), "random, semihard, hard"),
        (lambda: helpers.training_pairs(10**6), "molecules to draw from"),
        (lambda: helpers.retrieval_queries(0, 0), "at least 1"),
    ],
)
def test_bad_arguments_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------------------------------
# Losses and miners
# ---------------------------------------------------------------------------------------------------------------------

# One anchor and four partners: the first two fit. By similarity: fits .9, not .8, fits .5, not .2
SIMILARITY = torch.tensor([[0.9, 0.5, 0.8, 0.2]])
FITS = torch.tensor([[True, True, False, False]])


@pytest.mark.parametrize("miner, expected", [("hard", {(0, 2), (1, 2)}), ("semihard", {(0, 2), (1, 3)})])
def test_what_a_miner_chooses(miner, expected):
    anchor, fitting, other = helpers.mine(SIMILARITY, FITS, miner)
    assert anchor.tolist() == [0, 0]
    assert set(zip(fitting.tolist(), other.tolist())) == expected


def test_the_random_miner_takes_any_that_does_not_fit():
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        _, fitting, other = helpers.mine(SIMILARITY, FITS, "random")
        seen |= set(zip(fitting.tolist(), other.tolist()))
    assert seen == {(0, 2), (0, 3), (1, 2), (1, 3)}


def test_where_nothing_is_semihard_nothing_is_chosen():
    anchor, _, _ = helpers.mine(torch.tensor([[0.1, 0.5]]), torch.tensor([[True, False]]), "semihard")
    assert len(anchor) == 0
    anchor, _, _ = helpers.mine(
        torch.tensor([[0.1, 0.5]]), torch.tensor([[True, True]]), "hard"
    )  # nothing to tell apart
    assert len(anchor) == 0


def test_a_miner_takes_at_most_so_many():
    fits = torch.rand(100, 100) < 0.5
    assert len(helpers.mine(torch.rand(100, 100), fits, "hard", most=50)[0]) == 50


def test_the_triplet_loss_by_hand():
    """Distances from an anchor at 0 degrees: 60 degrees is 1 away, 90 degrees is the root of 2 away; margin 0.2."""
    angles = torch.deg2rad(torch.tensor([90.0, 60.0]))
    partners = torch.stack([angles.cos(), angles.sin()], 1)
    anchors = torch.tensor([[1.0, 0.0]])
    loss = helpers.metric_loss(anchors, partners, torch.tensor([[True, False]]), "triplet", "hard")
    assert loss.item() == pytest.approx(2**0.5 - 1 + 0.2, abs=1e-4)


def test_infonce_by_hand():
    """Partner 1 fits anchor 0 too, so it is left out there; for anchor 1 both partners count."""
    anchors = partners = torch.eye(2)
    loss = helpers.metric_loss(anchors, partners, torch.tensor([[True, True], [False, True]]), "infonce")
    expected = (0 + np.log(1 + np.exp(-1 / helpers.LOSSES["infonce"]["temperature"]))) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", helpers.LOSSES)
def test_a_right_space_costs_less_than_a_wrong_one(kind):
    fits = torch.eye(4, dtype=torch.bool)
    points = torch.eye(4)
    right = helpers.metric_loss(points, points, fits, kind, "hard")
    wrong = helpers.metric_loss(points, points.roll(1, 0), fits, kind, "hard")
    assert torch.isfinite(right) and right < 0.1 < wrong


@pytest.mark.parametrize("kind", helpers.LOSSES)
def test_gradients_reach_both_towers(kind):
    model = small()
    table = torch.from_numpy(helpers.fact_table(SMILES))
    asked = torch.from_numpy(helpers.caption_table(helpers.write_captions(table, 0)))
    loss = helpers.retrieval_loss(model, helpers.morgan(SMILES), torch.randn(6, 384), asked, table, kind, "hard")
    loss.backward()
    for tower in (model.molecules, model.texts):
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in tower.parameters())


def test_a_molecule_that_fits_is_not_pushed_away_from_another_s_sentence():
    """Every molecule here has what every sentence asks for: there is nothing to learn."""
    model, ones = small(), torch.ones(6, len(helpers.FACTS), dtype=torch.bool)
    loss = helpers.retrieval_loss(model, helpers.morgan(SMILES), torch.randn(6, 384), ones, ones, "triplet", "hard")
    assert loss.item() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Pairs and queries
# ---------------------------------------------------------------------------------------------------------------------


def test_the_facts_of_qm9_are_kept_and_made_again_when_the_facts_change(qm9, tmp_path, monkeypatch):
    rows = np.random.default_rng(0).choice(len(qm9), 50, replace=False)
    assert (helpers.qm9_facts()[rows] == helpers.fact_table([qm9.smiles[i] for i in rows])).all()
    path = tmp_path / "facts.npz"
    monkeypatch.setattr(retrieval, "FACTS_CACHE", path)
    made = []

    def fact_table(smiles):
        made.append(len(smiles))
        return helpers.qm9_facts()

    monkeypatch.setattr(retrieval, "fact_table", fact_table)
    fresh = helpers.qm9_facts.__wrapped__
    assert (fresh() == fresh()).all() and made == [len(qm9)]
    path.write_bytes(b"damaged")
    fresh()
    monkeypatch.setattr(retrieval, "FACTS", dict(list(helpers.FACTS.items())[:-1]) | {"new": helpers.FACTS["ring"]})
    fresh()
    assert made == [len(qm9)] * 3


@pytest.mark.parametrize("make, split", [(helpers.training_pairs, "train"), (helpers.retrieval_queries, "validation")])
def test_pairs_belong_together(make, split, qm9):
    pairs = make(40, seed=3)
    assert np.isin(pairs["rows"], getattr(qm9, split)).all()
    assert torch.equal(pairs["facts"], torch.from_numpy(helpers.fact_table([qm9.smiles[i] for i in pairs["rows"]])))
    assert (pairs["facts"] | ~pairs["asked"]).all()
    texts = [caption.text for caption in pairs["captions"]]
    torch.testing.assert_close(pairs["sentences"], helpers.embed_sentences(texts), atol=1e-3, rtol=0)
    again, other = make(40, seed=3), make(40, seed=4)
    assert again["captions"] == pairs["captions"] != other["captions"]


def test_a_minute_of_training_beats_chance(qm9):
    pairs = helpers.training_pairs(600)
    features = helpers.morgan([qm9.smiles[i] for i in pairs["rows"]])
    settings = dict(steps=120, batch_size=128, learning_rate=2e-3, warmup=10, ema_decay=0.9)
    data = [features, pairs["sentences"], pairs["asked"], pairs["facts"]]
    torch.manual_seed(0)
    model = helpers.Retriever(kind="morgan", width=64, dim=32)
    model, _ = helpers.fit(model, functools.partial(helpers.retrieval_loss, kind="supcon"), data, settings)
    rows = np.random.default_rng(0).choice(qm9.validation, 500, replace=False)
    queries = helpers.retrieval_queries(100, 0, rows=rows)
    similarity = retrieval.similarities(model, queries["sentences"], helpers.morgan([qm9.smiles[i] for i in rows]))
    relevant = helpers.relevance(queries["asked"], helpers.qm9_facts()[rows])
    learned = np.nanmean(helpers.retrieval_scores(similarity, relevant)["AP"])
    chance = np.nanmean(helpers.retrieval_scores(ranking.random_similarity(100, 500, 0), relevant)["AP"])
    assert learned > chance + 0.15


# ---------------------------------------------------------------------------------------------------------------------
# Pipeline, scores, recipe
# ---------------------------------------------------------------------------------------------------------------------


def test_the_pipeline_embeds_in_any_batches(token_vae):
    pipe = helpers.RetrieverPipeline(small("both"), token_vae)
    together = pipe.embed_molecules(SMILES)
    torch.testing.assert_close(pipe.embed_molecules(SMILES, batch_size=4), together, atol=1e-5, rtol=0)
    assert pipe.embed_molecules([]).shape == (0, 8)
    assert pipe.embed_texts(["a ring", "a chain"]).shape == (2, 8)


def test_a_mark_tells_retrievers_apart(token_vae):
    marks = {helpers.RetrieverPipeline(model, token_vae).mark() for model in (small(), small())}
    assert len(marks) == 1
    other = small()
    with torch.no_grad():
        other.texts[0].bias += 1
    assert helpers.RetrieverPipeline(other, token_vae).mark() not in marks


def test_the_recipe_trains_saves_and_scores(tmp_path, monkeypatch, qm9):
    recipe = helpers.RECIPES["retriever"]
    tiny = recipe.settings | {"model": dict(kind="both", width=32, dim=16), "pairs": 300}
    monkeypatch.setattr(recipe, "settings", tiny)
    monkeypatch.setattr(recipes, "TRAINING", tmp_path)
    monkeypatch.setattr(recipes, "CURVE_POINTS", (1,))
    few = functools.partial(scoring._retriever_scores, rows=qm9.test[:200], number=20, seed=0)
    monkeypatch.setattr(recipe, "monitor", lambda pipe: few(pipe, kinds=("known",)))
    monkeypatch.setattr(recipe, "score", lambda pipe, n, seed: few(pipe, kinds=("known", "unseen")) | {"N": 200})
    folder = helpers.train("retriever", steps=3, batch_size=64)
    pipe = helpers.load_pipeline("retriever", folder)
    assert isinstance(pipe, helpers.RetrieverPipeline)
    assert pipe.card["recipe"]["steps"] == 3 and 0 <= pipe.card["metrics"]["known P@1"] <= 1
    assert pipe.embed_molecules(SMILES).shape == (6, 16)
    again = helpers.train("retriever", steps=3, batch_size=64)  # goes on from its state, which is at the end
    assert helpers.load_pipeline("retriever", again).mark() == pipe.mark()


def test_the_pairs_of_the_recipe_are_training_molecules(monkeypatch, qm9):
    recipe = helpers.RECIPES["retriever"]
    settings = recipe.settings | {"model": dict(kind="morgan", width=32, dim=8), "pairs": 50}
    made = recipe.prepare(settings)
    assert [len(column) for column in made.data] == [50] * 4
    assert torch.isfinite(made.loss(made.network, *(column[:20] for column in made.data)))
