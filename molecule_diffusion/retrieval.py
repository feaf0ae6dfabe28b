"""One space for sentences and molecules: the retriever's network, losses and miners, training pairs, pipeline."""

import functools

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from molecule_diffusion.captions import FACTS, caption_table, fact_table, write_captions
from molecule_diffusion.checks import check_count, check_seed, check_smiles_list, quoted
from molecule_diffusion.chemistry import MAX_ATOMS, to_graphs
from molecule_diffusion.files import MADE, atomic, read_npz
from molecule_diffusion.models import TokenVAE, encode_graphs
from molecule_diffusion.qm9 import checksum, shared_qm9
from molecule_diffusion.ranking import morgan
from molecule_diffusion.sentences import SENTENCE_SIZE, cached_embeddings, embed_sentences

# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------

MORGAN_SIZE, LATENT_SIZE = 1024, MAX_ATOMS * 8
FEATURE_SIZES = {"morgan": MORGAN_SIZE, "latent": LATENT_SIZE, "both": MORGAN_SIZE + LATENT_SIZE}


def molecule_features(kind, smiles, vae=None):
    """What the retriever reads of molecules.

    Args:
        kind: "morgan": 1,024 bits; "latent": the 72 numbers of a TokenVAE's mean; "both": one behind the other.
        smiles: list of N SMILES; for latents, of molecules that the course's graphs can hold.
        vae: a TokenVAE, for "latent" and "both".

    Returns: float tensor (N, size of the kind).
    """
    _check_kind(kind)
    parts = []
    if kind != "latent":
        parts.append(morgan(smiles, size=MORGAN_SIZE).float())
    if kind != "morgan":
        if vae is None:
            raise ValueError(f"kind={kind!r} needs a TokenVAE: vae=helpers.load_pipeline('token_vae').vae")
        parts.append(encode_graphs(vae, *to_graphs(smiles)).flatten(1))
    return torch.cat(parts, 1)


def _check_kind(kind):
    if kind not in FEATURE_SIZES:
        raise ValueError(f"kind={quoted(kind)}: expected one of {', '.join(FEATURE_SIZES)}")


class Retriever(ModelMixin, ConfigMixin):
    """Two small networks that end in one space: molecules and sentences become points on a sphere.

    A sentence lies near the molecules that fit it: their cosine is large (a two-tower model, as CLIP is, Radford et
    al., arXiv:2103.00020).

    Args: kind: of the molecules' features, see `molecule_features`; width: of the hidden layers; dim: of the space.
    """

    @register_to_config
    def __init__(self, kind: str = "both", width: int = 512, dim: int = 128):
        super().__init__()
        _check_kind(kind)
        self.molecules = _tower(FEATURE_SIZES[kind], width, dim)
        self.texts = _tower(SENTENCE_SIZE, width, dim)

    def embed_molecules(self, features):
        """Points of molecules. Shapes: (B, size of the kind) -> (B, dim), each of length 1."""
        return F.normalize(self.molecules(features.to(self.dtype)).float(), dim=-1)

    def embed_texts(self, sentences):
        """Points of sentences, from what the sentence model makes of them. Shapes: (B, 384) -> (B, dim), length 1."""
        return F.normalize(self.texts(sentences.to(self.dtype)).float(), dim=-1)

    def forward(self, features, sentences):
        """Both of the above: (points of the molecules, points of the sentences)."""
        return self.embed_molecules(features), self.embed_texts(sentences)


def _tower(size, width, dim):
    return nn.Sequential(
        nn.Linear(size, width),
        nn.GELU(),
        nn.LayerNorm(width),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, dim),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Losses. `fits[i, j]` says whether anchor i, such as a sentence, and partner j, such as a molecule, belong together
# ---------------------------------------------------------------------------------------------------------------------

# Distances are Euclidean between points of length 1, so from 0 to 2. The library's own settings are: triplet margin
# 0.05; margin loss 0.2 with a border beta of 1.2; contrastive 0 and 1, which would push pairs that have nothing in
# common no further than 60 degrees apart; SupCon's temperature 0.1, InfoNCE's (there NTXent) 0.07.
LOSSES = {
    "triplet": dict(margin=0.2),
    "margin": dict(margin=0.2, beta=1.0),
    "contrastive": dict(pos_margin=0.0, neg_margin=1.2),
    "supcon": dict(temperature=0.1),
    "infonce": dict(temperature=0.1),
}
MINERS = ("random", "semihard", "hard")


@functools.cache
def _library_loss(kind):
    from pytorch_metric_learning import losses

    classes = {
        "triplet": losses.TripletMarginLoss,
        "margin": losses.MarginLoss,
        "contrastive": losses.ContrastiveLoss,
        "supcon": losses.SupConLoss,
    }
    return classes[kind](**LOSSES[kind])


def metric_loss(anchors, partners, fits, kind="supcon", miner="semihard"):
    """How far the points are from lying as `fits` says.

    Args:
        anchors, partners: points (A, dim) and (B, dim), each of length 1.
        fits: bool (A, B). In a batch many molecules fit one sentence: none of them may be pushed away from it.
        kind: a key of LOSSES. "triplet", "margin" and "contrastive" are pytorch-metric-learning's and learn from
            triplets that the miner chooses. "supcon" (its too; Khosla et al., arXiv:2004.11362) learns from all pairs
            at once, and so does "infonce" (van den Oord et al., arXiv:1807.03748), for which partner i belongs to
            anchor i.
        miner: "random", "semihard" or "hard", see `mine`.

    Returns: a scalar.
    """
    if kind not in LOSSES:
        raise ValueError(f"kind={quoted(kind)}: expected one of {', '.join(LOSSES)}")
    if kind == "infonce":
        logits = anchors @ partners.T / LOSSES["infonce"]["temperature"]
        own = torch.eye(len(fits), dtype=torch.bool, device=fits.device)
        logits = logits.masked_fill(fits & ~own, -torch.inf)  # neither right nor wrong: left out
        return F.cross_entropy(logits, torch.arange(len(fits), device=fits.device))
    if kind == "supcon":
        chosen = (*torch.where(fits), *torch.where(~fits))
    else:
        chosen = mine(anchors.detach() @ partners.detach().T, fits, miner)
    return _library_loss(kind)(anchors, indices_tuple=chosen, ref_emb=partners)


def mine(similarity, fits, miner, most=4096):
    """Choose triplets to learn from: an anchor, a partner that fits it, and one that does not.

    The library's own miners know one class per point; here a sentence and a molecule fit or do not.

    Args:
        similarity: (A, B), cosines; fits: bool (A, B).
        miner: which partner that does not fit is taken for a pair that does: "random": any; "hard": the most similar
            one; "semihard": the most similar one that is less similar than the partner that fits (Schroff et al.,
            arXiv:1503.03832); pairs without such a one are left out.
        most: of more pairs that fit, this many random ones are taken.

    Returns: three tensors of equal length: rows of anchors, columns of partners that fit, columns of those that do not.
    """
    if miner not in MINERS:
        raise ValueError(f"miner={quoted(miner)}: expected one of {', '.join(MINERS)}")
    anchor, fitting = torch.where(fits & ~fits.all(1, keepdim=True))
    if len(anchor) > most:
        some = torch.randperm(len(anchor), device=anchor.device)[:most]
        anchor, fitting = anchor[some], fitting[some]
    if miner == "random":
        score = torch.rand(len(anchor), fits.shape[1], device=fits.device)
    else:
        score = similarity[anchor]
    allowed = ~fits[anchor]
    if miner == "semihard":
        allowed = allowed & (similarity[anchor] < similarity[anchor, fitting][:, None])
    other = score.masked_fill(~allowed, -torch.inf).argmax(1)
    keep = allowed.any(1)
    return anchor[keep], fitting[keep], other[keep]


def retrieval_loss(model, features, sentences, asked, facts, kind="supcon", miner="semihard"):
    """Mean of `metric_loss` from sentences to molecules and from molecules to sentences.

    Shapes: features (B, size of the kind); sentences (B, 384); asked, facts bool (B, number of FACTS): what each
    sentence asks for, and what holds for each molecule. Molecule j fits sentence i if it has all that is asked for.
    """
    molecules, texts = model(features.float(), sentences.float())
    fits = (asked.float() @ (~facts).float().T) == 0
    with torch.autocast(texts.device.type, enabled=False):  # cosines need more than bfloat16's three digits
        to_molecules = metric_loss(texts, molecules, fits, kind, miner)
        return (to_molecules + metric_loss(molecules, texts, fits.T, kind, miner)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Facts of QM9, and training pairs
# ---------------------------------------------------------------------------------------------------------------------

FACTS_CACHE = MADE / "qm9_facts_v1.npz"


@functools.cache
def qm9_facts():
    """The fact table of all of QM9: bool (130,251, facts), in its order; half a minute once, then from a file.

    The file is data/qm9_facts_v1.npz; one that was made of other facts or molecules is made again.
    """
    qm9 = shared_qm9()
    rules = [f"{name} {fact.smarts} {fact.absent}" for name, fact in FACTS.items()]
    of = checksum({"rules": np.array(rules), "index": qm9.index})
    if FACTS_CACHE.is_file():
        try:
            kept = read_npz(FACTS_CACHE, ["table", "of"])
            if str(kept["of"]) == of:
                return np.unpackbits(kept["table"], axis=1, count=len(FACTS)).astype(bool)
        except ValueError as error:
            print(f"The file of QM9's facts is not usable ({error}); making it again.")
    table = fact_table(qm9.smiles)
    with atomic(FACTS_CACHE) as part, open(part, "wb") as file:
        np.savez_compressed(file, table=np.packbits(table, axis=1), of=of)
    return table


def training_pairs(number, seed=0, rows=None):
    """Random molecules of the training split, each with a caption of its own.

    Args: number: how many, without repetition; seed: decides which, and their captions; rows: of QM9, to draw from
        in place of the training split.
    Returns: dict: rows (N,); captions, a list; sentences float (N, 384), from `cached_embeddings`; asked and facts,
        bool tensors (N, facts).
    """
    check_count("number", number)
    check_seed(seed)
    rows = shared_qm9().train if rows is None else np.asarray(rows)
    if number > len(rows):
        raise ValueError(f"number={number:,}: there are {len(rows):,} molecules to draw from")
    rows = np.random.default_rng(seed).choice(rows, number, replace=False)
    table = qm9_facts()[rows]
    captions = write_captions(table, seed)
    return {
        "rows": rows,
        "captions": captions,
        "sentences": cached_embeddings([caption.text for caption in captions]),
        "asked": torch.from_numpy(caption_table(captions)),
        "facts": torch.from_numpy(table),
    }


def retrieval_queries(number, seed, words="known", rows=None):
    """Captions to ask with, of random validation molecules, or of others.

    Args: words: as in `write_captions`; rows: of QM9, to draw from in place of the validation split.
    Returns: dict as `training_pairs` returns it; molecules may occur twice.
    """
    check_count("number", number)
    rows = shared_qm9().validation if rows is None else np.asarray(rows)
    rows = np.random.default_rng(seed).choice(rows, number)
    table = qm9_facts()[rows]
    captions = write_captions(table, seed, words)
    return {
        "rows": rows,
        "captions": captions,
        "sentences": cached_embeddings([caption.text for caption in captions]),
        "asked": torch.from_numpy(caption_table(captions)),
        "facts": torch.from_numpy(table),
    }


@torch.no_grad()
def similarities(model, sentences, features):
    """Cosines between sentences and molecules in the retriever's space.

    Shapes: sentences (Q, 384), features (N, size of the kind) -> float array (Q, N).
    """
    molecules, texts = model.eval()(features, sentences)
    return (texts @ molecules.T).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline
# ---------------------------------------------------------------------------------------------------------------------


class RetrieverPipeline(DiffusionPipeline):
    """The retriever with the TokenVAE whose latents it reads; the sentence model comes from its own package."""

    def __init__(self, retriever: Retriever, vae: TokenVAE):
        super().__init__()
        self.register_modules(retriever=retriever, vae=vae)

    @torch.no_grad()
    def embed_molecules(self, smiles, batch_size=2000):
        """Points of molecules in the shared space. Args: smiles: N SMILES. Returns: float tensor (N, dim)."""
        smiles = check_smiles_list("embed_molecules", smiles)
        check_count("batch_size", batch_size)
        points = [torch.zeros(0, self.retriever.config.dim)]
        for start in range(0, len(smiles), batch_size):
            some = smiles[start : start + batch_size]
            features = molecule_features(self.retriever.config.kind, some, self.vae)
            points.append(self.retriever.embed_molecules(features.to(self.device)).cpu())
        return torch.cat(points)

    @torch.no_grad()
    def embed_texts(self, texts):
        """Points of sentences in the shared space. Args: texts: N texts. Returns: float tensor (N, dim)."""
        return self.retriever.embed_texts(embed_sentences(texts).to(self.device)).cpu()

    def mark(self):
        """A text that tells this retriever from any other: a checksum of its weights."""
        weights = self.retriever.state_dict()
        return checksum({name: weights[name].float().cpu().numpy() for name in weights})[:16]
