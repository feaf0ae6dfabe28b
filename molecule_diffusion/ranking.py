"""How good a ranking is: precision and recall at k, average precision, curves, intervals; and baselines."""

import numpy as np
import torch

from molecule_diffusion.checks import check_count, check_smiles_list, quoted
from molecule_diffusion.chemistry import read_smiles

# ---------------------------------------------------------------------------------------------------------------------
# Measures. `hits` says for each query, best first, whether the molecule at each rank is one that was asked for
# ---------------------------------------------------------------------------------------------------------------------


def ranked_hits(similarity, relevant):
    """Sort each query's molecules by similarity, the most similar first, and say which of them are relevant.

    Shapes: similarity (Q, N), relevant bool (Q, N) -> bool (Q, N).
    Raises: ValueError for shapes that differ, and for similarities that are not finite.
    """
    similarity, relevant = np.asarray(similarity, np.float32), np.asarray(relevant)
    if similarity.ndim != 2 or similarity.shape != relevant.shape:
        raise ValueError(f"similarity {similarity.shape} and relevant {relevant.shape}: expected two of shape (Q, N)")
    if relevant.dtype != bool:
        raise ValueError(f"relevant has dtype {relevant.dtype}: expected booleans")
    if not np.isfinite(similarity).all():
        raise ValueError("similarity holds NaN or infinite values")
    order = np.argsort(-similarity, axis=1, kind="stable")
    return np.take_along_axis(relevant, order, axis=1)


def precision_at(hits, k):
    """Share of the first k that are relevant. Shapes: bool (Q, N), N at least k -> (Q,)."""
    return _first(hits, k).mean(1)


def recall_at(hits, k):
    """Share of all relevant molecules that are among the first k, NaN where there is none. Shapes: (Q, N) -> (Q,)."""
    found = _first(hits, k).sum(1)
    return _ratio(found, np.asarray(hits).sum(1))


def average_precision(hits):
    """Mean, over the relevant molecules, of the precision at the rank of each; NaN where none is relevant.

    Shapes: bool (Q, N), the whole ranking -> (Q,). The mean over queries is the mAP.
    """
    hits = np.asarray(hits, bool)
    ranks = np.arange(1, hits.shape[1] + 1)
    precision = hits.cumsum(1) / ranks
    return _ratio((precision * hits).sum(1), hits.sum(1))


def pr_curve(hits, points=101, interpolated=True):
    """Precision at levels of recall, a mean over queries.

    Args:
        hits: bool (Q, N), the whole ranking.
        points: the number of levels, from 0 to 1.
        interpolated: whether to take the highest precision at this recall or beyond, as textbooks often do. Otherwise
            it is the precision at the place where this recall is reached; at recall 0, that of the first place.

    Returns: recall (points,), precision (points,).
    """
    hits = np.asarray(hits, bool)
    hits = hits[hits.any(1)]
    levels = np.linspace(0, 1, points)
    precision = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    recall = hits.cumsum(1) / hits.sum(1, keepdims=True)
    if interpolated:
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    curves = [one[np.searchsorted(reached, levels - 1e-9)] for one, reached in zip(precision, recall)]
    return levels, np.mean(curves, axis=0)


def retrieval_scores(similarity, relevant):
    """P@1, P@5, recall@100 and AP for each query for which something is relevant.

    Shapes: (Q, N), bool (Q, N) -> dict of arrays, each (Q,), with NaN where nothing is relevant. `np.nanmean` of the
    last one is the mAP.
    """
    hits = ranked_hits(similarity, relevant)
    some = hits.any(1)
    scores = {
        "P@1": precision_at(hits, 1),
        "P@5": precision_at(hits, min(5, hits.shape[1])),
        "recall@100": recall_at(hits, min(100, hits.shape[1])),
        "AP": average_precision(hits),
    }
    return {name: np.where(some, values, np.nan) for name, values in scores.items()}


def interval(values, seed=0, draws=2000):
    """Mean of values and its 95 % interval by the bootstrap: (mean, low, high); NaN are left out.

    The values are drawn again, with replacement, `draws` times; the interval holds the middle 95 % of the means.
    """
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return np.nan, np.nan, np.nan
    rows = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[rows].mean(1), [0.025, 0.975])
    return values.mean(), low, high


def _first(hits, k):
    check_count("k", k)
    hits = np.asarray(hits, bool)
    if hits.ndim != 2 or hits.shape[1] < k:
        raise ValueError(f"hits {hits.shape} and k={k}: expected (Q, N) with N of at least k")
    return hits[:, :k]


def _ratio(part, whole):
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines
# ---------------------------------------------------------------------------------------------------------------------


def morgan(smiles, radius=2, size=1024):
    """Morgan fingerprints (Rogers & Hahn, doi:10.1021/ci100050t): each bit stands for neighbourhoods of atoms.

    Args: radius: bonds from the centre of a neighbourhood to its border; size: number of bits.
    Returns: uint8 tensor (N, size) of zeros and ones.
    """
    from rdkit.Chem import rdFingerprintGenerator

    check_count("size", size)
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=size)
    rows = []
    for text in check_smiles_list("morgan", smiles):
        mol = read_smiles(text)
        if mol is None:
            raise ValueError(f"{quoted(text)} is not a valid SMILES (syntax or valence)")
        rows.append(generator.GetFingerprintAsNumPy(mol))
    return torch.from_numpy(np.array(rows, np.uint8).reshape(-1, size))


def tanimoto(a, b):
    """Tanimoto similarity of fingerprints: bits in common over bits in either.

    Shapes: (A, bits), (B, bits) -> (A, B).
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    common = a @ b.T
    either = a.sum(1)[:, None] + b.sum(1)[None] - common
    return common / np.maximum(either, 1)


def random_similarity(queries, molecules, seed):
    """Similarities that know nothing: uniform random numbers (queries, molecules)."""
    return np.random.default_rng(seed).random((queries, molecules), np.float32)


def trigram_similarity(queries, descriptions):
    """Cosine between counts of three-letter pieces: what words alone tell, without any learning.

    Args: queries: Q texts; descriptions: N texts, such as `describe_facts` makes.
    Returns: float array (Q, N).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    counter = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3))
    known = counter.fit_transform(descriptions)
    return (counter.transform(queries) @ known.T).toarray().astype(np.float32)


def scaffold_split(smiles, share, seed):
    """Hold out whole scaffolds (Bemis & Murcko, doi:10.1021/jm9602928), so that held-out ring systems are new.

    A scaffold is what is left of a molecule without its side chains; all molecules without rings share the empty one,
    which is never held out.

    Args: share: about how many of the molecules are held out; seed: decides which scaffolds.
    Returns: (rows that stay, rows held out), two sorted arrays.
    """
    from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmilesFromSmiles

    if not 0 < share < 1:
        raise ValueError(f"share={share!r}: expected a number between 0 and 1")
    members = {}
    for row, text in enumerate(check_smiles_list("scaffold_split", smiles)):
        members.setdefault(MurckoScaffoldSmilesFromSmiles(text), []).append(row)
    total = sum(len(rows) for rows in members.values())
    names = sorted(name for name in members if name)
    held_out = []
    for place in np.random.default_rng(seed).permutation(len(names)):
        rows = members[names[place]]
        if len(held_out) + len(rows) <= share * total:
            held_out += rows
    held_out = np.array(sorted(held_out), int)
    return np.setdiff1d(np.arange(total), held_out), held_out
