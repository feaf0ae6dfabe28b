"""Molecules by a sentence: `helpers.search("a fluorinated ring with a nitrile")`; the index of molecules behind it."""

import functools
from dataclasses import dataclass, field

import numpy as np
import torch

from molecule_diffusion.captions import FACTS, check_query, facts_in, why
from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.checks import check_count, check_finite, check_smiles_list, quoted
from molecule_diffusion.files import DATA, MADE, atomic, read_json, read_npz
from molecule_diffusion.qm9 import shared_qm9
from molecule_diffusion.sentences import cached_embeddings, embed_sentences
from molecule_diffusion.viewers import show_grid

INDEX_CACHE = MADE / "molecule_index_v1.npz"

# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------


def build_index(points, kind="exact", nlist=256, nprobe=8, links=32, effort=64):
    """A FAISS index (Johnson, Douze & Jégou, arXiv:1702.08734) of points of length 1, searched by their cosine.

    Args:
        points: (N, dim).
        kind: "exact" compares a query with every point. "ivf" sorts the points into nlist cells around centres and
            looks into the nprobe cells nearest to the query. "hnsw" walks through a graph in which each point has
            about `links` neighbours, with `effort` candidates in hand (Malkov & Yashunin, arXiv:1603.09320).

    Returns: the index; `index.search(queries, k)` gives cosines and rows, each (Q, k).
    """
    import faiss

    points = np.ascontiguousarray(points, np.float32)
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(f"points of shape {points.shape}: expected (N, dim) with N of at least 1")
    check_finite("points of an index", torch.from_numpy(points))
    size = points.shape[1]
    if kind == "exact":
        index = faiss.IndexFlatIP(size)
    elif kind == "ivf":
        check_count("nlist", nlist)
        if nlist > len(points):
            raise ValueError(f"nlist={nlist}: {len(points)} points cannot be sorted into so many cells")
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, nlist, faiss.METRIC_INNER_PRODUCT)
        index.train(points)
        index.nprobe = nprobe
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(size, links, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efSearch = effort
    else:
        raise ValueError(f"kind={quoted(kind)}: expected 'exact', 'ivf' or 'hnsw'")
    index.add(points)
    return index


@dataclass
class MoleculeIndex:
    """Molecules as points of one retriever's space, ready to be searched.

    Attributes: smiles: N texts; vectors: their points, float (N, dim); mark: of the retriever; index: `build_index`'s.
    """

    smiles: list
    vectors: np.ndarray
    mark: str
    index: object = field(repr=False)

    def __len__(self):
        return len(self.smiles)

    def nearest(self, points, k):
        """Cosines and rows of the k molecules nearest to each point. Shapes: (Q, dim) -> two of (Q, k)."""
        check_count("k", k)
        if k > len(self):
            raise ValueError(f"k={k:,}: the index holds {len(self):,} molecules, so at most so many can be found")
        points = np.ascontiguousarray(points, np.float32)
        if points.ndim != 2 or points.shape[1] != self.vectors.shape[1]:
            raise ValueError(
                f"points of shape {points.shape}: the index holds points of {self.vectors.shape[1]} numbers"
            )
        return self.index.search(points, k)


def molecule_index(pipe=None, smiles=None, kind="exact"):
    """Embed molecules and index them.

    Args:
        pipe: a RetrieverPipeline; the shipped one by default.
        smiles: the molecules; by default all distinct ones of the training split. These take about a minute once; their
            points are then kept in data/molecule_index_v1.npz, and made again for another retriever.
        kind: of `build_index`.
    """
    if pipe is None:
        pipe = shipped_retriever()
    mark = pipe.mark()
    if smiles is not None:
        smiles = check_smiles_list("molecule_index", smiles)
        points = pipe.embed_molecules(smiles).numpy()
    else:
        qm9 = shared_qm9()
        smiles = sorted({qm9.smiles[i] for i in qm9.train})
        points = _kept_points(mark, len(smiles))
        if points is None:
            points = pipe.embed_molecules(smiles).numpy().astype(np.float16)
            with atomic(INDEX_CACHE) as part, open(part, "wb") as file:
                np.savez(file, points=points, mark=mark)
    return MoleculeIndex(smiles, points, mark, build_index(points, kind))


def _kept_points(mark, number):
    """The points in the cache, None where they are damaged or not this retriever's."""
    if not INDEX_CACHE.is_file():
        return None
    try:
        kept = read_npz(INDEX_CACHE, ["points", "mark"])
    except ValueError as error:
        print(f"The file of molecules' points is not usable ({error}); making it again.")
        return None
    fits = str(kept["mark"]) == mark and len(kept["points"]) == number
    return kept["points"] if fits else None


@functools.cache
def shipped_retriever():
    """The shipped RetrieverPipeline, loaded once."""
    return load_pipeline("retriever")


@functools.cache
def shipped_index():
    """The index of all distinct training molecules in the shipped retriever's space, made once."""
    return molecule_index(shipped_retriever())


# ---------------------------------------------------------------------------------------------------------------------
# Is the query about molecules at all?
# ---------------------------------------------------------------------------------------------------------------------

# A query whose words are known is about molecules. Any other is judged by its cosines to the known words on the one
# hand, to sentences about other things on the other. The border is the highest, in hundredths, that refuses none of 30
# validation queries about molecules; 4 of the 60 others pass it. Of the test queries it refuses 0 of 30, and 5 of 60
# others pass (`domain_errors`).
FAMILIARITY_BORDER = 0.08


@functools.cache
def _known_words():
    """The words that the course knows, and their embeddings (W, 384)."""
    words = sorted({phrase for fact in FACTS.values() for phrase in (*fact.words, *fact.unseen)})
    return words, cached_embeddings(words)


@functools.cache
def domain_sentences():
    """Sentences to judge by, data/domain.json: a dict of lists.

    "molecules" and "others" are compared with; "validation molecules", "validation others", "test molecules" and
    "test others" are what the border was chosen on and what it was tested on.
    """
    return read_json(DATA / "domain.json")


def familiarity(embeddings):
    """How much more like talk of molecules than like other talk sentences are.

    The mean of the three largest cosines to known words and to sentences about molecules, less the same for sentences
    about other things. Shapes: (Q, 384) -> float array (Q,).
    """
    _, words = _known_words()
    compared = domain_sentences()
    ours = torch.cat([words, cached_embeddings(compared["molecules"])])
    others = cached_embeddings(compared["others"])
    return (_closest(embeddings, ours) - _closest(embeddings, others)).numpy()


def _closest(embeddings, compared):
    return (embeddings @ compared.T).topk(3, dim=1).values.mean(1)


def domain_errors(border=FAMILIARITY_BORDER, part="validation"):
    """What a border does to queries that hold no known word: (molecules' that are refused, others' that pass), counts.

    Args: part: "validation" or "test".
    """
    texts = domain_sentences()
    refused = familiarity(embed_sentences(texts[f"{part} molecules"])) < border
    passed = familiarity(embed_sentences(texts[f"{part} others"])) >= border
    return int(refused.sum()), int(passed.sum())


def nearest_words(embedding, number=5):
    """The known words most like a sentence. Args: embedding: (384,). Returns: list of texts."""
    words, embeddings = _known_words()
    return [words[place] for place in (embeddings @ embedding).topk(number).indices]


# ---------------------------------------------------------------------------------------------------------------------
# Search
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class SearchResult:
    """What a search found, best first.

    Attributes:
        query: the text.
        facts: what of it has known words: names of FACTS. Only these can be checked.
        smiles: k texts; scores: k cosines.
        why: for each molecule a dict {fact: whether it has it}.
        nearest_words: the known words most like the query, for one that holds none.
    """

    query: str
    facts: list
    smiles: list
    scores: list
    why: list
    nearest_words: list

    def __len__(self):
        return len(self.smiles)

    @property
    def fits(self):
        """Which molecules have every fact that is asked for: list of booleans; None where no word is known."""
        return [all(found.values()) if found else None for found in self.why]

    def __str__(self):
        lines = [f"{self.query!r} asks for: {', '.join(self.facts) or 'nothing that has a known word'}"]
        if not self.facts:
            lines.append(f"most like it: {', '.join(self.nearest_words)}")
        for smiles, score, found in zip(self.smiles, self.scores, self.why):
            lines.append(f"{score:6.3f}  {smiles:24}  {_marks(found)}")
        return "\n".join(lines)

    def show(self, caption=None):
        """Draw the molecules, under each its cosine and what it has, and lacks, of what was asked for."""
        legends = [f"{score:.2f} {_in_words(found)}" for score, found in zip(self.scores, self.why)]
        alt = f"Molecules found for “{self.query}”: {', '.join(self.smiles)}"
        show_grid(self.smiles[:60], legends[:60], alt=alt, caption=caption)


def _marks(found):
    return "  ".join(f"{'✓' if holds else '✗'} {name}" for name, holds in found.items())


def _in_words(found):
    """The same without signs, which the font of molecule drawings does not have."""
    has = [name for name, holds in found.items() if holds]
    lacks = [name for name, holds in found.items() if not holds]
    parts = [f"{verb} {', '.join(names)}" for verb, names in (("has", has), ("lacks", lacks)) if names]
    return "; ".join(parts)


@torch.no_grad()
def search(query, k=12, pipe=None, index=None):
    """Find molecules by a sentence: `helpers.search("a fluorinated ring with a nitrile", k=12).show()`.

    Args:
        query: a text of at most 300 letters.
        k: how many molecules.
        pipe: a RetrieverPipeline; the shipped one by default.
        index: of `molecule_index` for this pipeline; by default of all distinct training molecules.

    Returns: SearchResult.
    Raises: ValueError for a query that is empty, too long or not about molecules, for k larger than the index, and for
        an index that was made with another retriever.
    """
    query = check_query(query)
    check_count("k", k)
    sentence = embed_sentences([query])
    facts = facts_in(query)
    words = nearest_words(sentence[0])
    if not facts and familiarity(sentence)[0] < FAMILIARITY_BORDER:
        raise ValueError(
            f"{quoted(query)} does not seem to be about molecules. The nearest words that are known here: "
            f"{', '.join(words)}"
        )
    if index is None:
        index = shipped_index() if pipe is None else molecule_index(pipe)
    if pipe is None:
        pipe = shipped_retriever()
    if index.mark != pipe.mark():
        raise ValueError(
            "the index was made with another retriever than the one that is asked: give that one as pipe=, or make the "
            "index anew, helpers.molecule_index(pipe)"
        )
    points = pipe.retriever.embed_texts(sentence.to(pipe.device)).cpu()
    scores, rows = index.nearest(points.numpy(), k)
    smiles = [index.smiles[row] for row in rows[0]]
    return SearchResult(query, facts, smiles, scores[0].tolist(), [why(query, text) for text in smiles], words)
