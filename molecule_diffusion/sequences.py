"""A system for any one-hot sequences: VAE -> latent diffusion -> diffusion prior, trained, and judged.

The sequences come in an HDF5 and a CSV file as `load_conditions` reads them, of any length and width.
`train_sequences`, in the next room, does it all.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import BaseOutput
from torch.nn import functional as F

from molecule_diffusion import grammar
from molecule_diffusion.checks import check_finite, check_number, check_seed
from molecule_diffusion.chemistry import ATOM_TYPES, MAX_ATOMS, describe, to_smiles, verdict
from molecule_diffusion.conditions import ConditionEncoder, load_conditions, save_conditions
from molecule_diffusion.encodings import sequence_graph
from molecule_diffusion.files import MADE, TRAINING, atomic, read_json, sha256, write_json
from molecule_diffusion.models import LatentDenoiser, SequenceVAE
from molecule_diffusion.pipelines import DiffusionPriorPipeline
from molecule_diffusion.schedules import NOISE_SCHEDULE, SAMPLER, PowerSpacedDPMSolver
from molecule_diffusion.training import KL_WEIGHT, diffusion_loss, fit, prior_loss, vae_loss

# ---------------------------------------------------------------------------------------------------------------------
# The pipeline
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class SequenceOutput(BaseOutput):
    """What a SequencePipeline returns.

    Attributes:
        classes: uint8 (N, length), the likeliest class of each row. Never repaired.
        latents: what was decoded: float tensor (N, tokens, latent_dim).
    """

    classes: np.ndarray
    latents: torch.Tensor

    def __len__(self):
        return len(self.classes)


class SequencePipeline(DiffusionPriorPipeline):
    """Sequences on request, or without one where the encoder knows no categories: the diffusion prior's sampling loop.

    `pipe(12, {"type": "sum"}, guidance_scale=1.5)`; all arguments are those of `DiffusionPriorPipeline`.
    """

    def __init__(
        self,
        vae: SequenceVAE,
        denoiser: LatentDenoiser,
        scheduler: DPMSolverMultistepScheduler,
        encoder: ConditionEncoder,
        restarts: list = (),
    ):
        super().__init__(vae, denoiser, scheduler, encoder, restarts)

    def decode(self, z):
        """The likeliest classes of latents: (B, tokens, latent_dim) -> uint8 (B, length)."""
        logits = self.vae.decode(z)
        check_finite("what the SequenceVAE decoded", logits)
        return logits.argmax(-1).to(torch.uint8)

    def empty_output(self, number, latent_shape):
        """An output with room for all sequences."""
        latents = torch.zeros((number, *latent_shape), device=self.device, dtype=self.dtype)
        return SequenceOutput(classes=np.zeros((number, self.vae.config.length), np.uint8), latents=latents)

    def keep(self, output, batch, latents, classes):
        """Put one batch, a slice of all sequences, into an output."""
        output.latents[batch] = latents
        output.classes[batch] = classes.cpu().numpy()


@torch.no_grad()
def encode_sequences(vae, classes, batch_size=1000):
    """Posterior means of many sequences, what diffusion learns: uint8 (N, length) -> float (N, tokens, latent_dim)."""
    batches = torch.as_tensor(classes).split(batch_size)
    return torch.cat([vae.encode(batch.to(vae.device))[0].float().cpu() for batch in batches])


@torch.no_grad()
def decode_probabilities(vae, z, batch_size=1000):
    """Probabilities of all classes, what an MSE is measured on: (N, tokens, latent_dim) -> (N, length, classes)."""
    batches = [vae.decode(some.to(vae.device)).float().softmax(-1).cpu() for some in z.split(batch_size)]
    return torch.cat(batches).numpy()


def make_expressions(number):
    """Write random expressions as sequences: data/expressions.h5 and .csv, with the columns type, part and expr."""
    table = grammar.random_expressions(number)
    data = grammar.expression_sequences(table["expr"])
    save_conditions(MADE / "expressions.h5", MADE / "expressions.csv", data, table)


# ---------------------------------------------------------------------------------------------------------------------
# Who judges: the rules of a language, or the nearest training sequence
# ---------------------------------------------------------------------------------------------------------------------


def read_expressions(classes):
    """Type and part of each sequence of rules, None where it breaks the grammar. Shapes: (N, 72) -> list of N."""
    return [
        None if grammar.spell_expression(rules) is None else grammar.describe_expression(rules) for rules in classes
    ]


def read_molecules(classes):
    """Type and part of each molecule written by `graph_sequence`, None where it is none. Shapes: (N, 45) -> list of N.

    A row must be of its kind, atom or bond, and the molecule strictly valid.
    """
    classes = np.asarray(classes)
    is_atom = classes < len(ATOM_TYPES)
    right_kinds = is_atom[:, :MAX_ATOMS].all(1) & ~is_atom[:, MAX_ATOMS:].any(1)
    one_hots = np.eye(9, dtype=np.uint8)[classes][:, None]
    smiles = to_smiles(*sequence_graph(one_hots))
    valid = right_kinds & np.array([verdict(text) == "valid" for text in smiles], bool)
    table = describe([text for text, fine in zip(smiles, valid) if fine])
    found = iter(zip(table["type"], table["part"]))
    return [next(found) if fine else None for fine in valid]


LANGUAGES = {  # the sequences that the course can read: length, width, and how
    "expressions": (grammar.LENGTH, grammar.WIDTH, read_expressions),
    "molecules": (45, 9, read_molecules),
}


@dataclass
class Judge:
    """Says of sequences whether they are grammatical, and which type and part they are of.

    Attributes:
        language: a key of LANGUAGES, whose rules say what is grammatical; None where the sequences are of none of them.
        rules_describe: whether types and parts, too, are those of the language's rules. If not, a sequence is taken for
            what the most similar training sequence is.
        classes, types, parts: the training sequences, (N, length), and what they are.
    """

    language: str | None
    rules_describe: bool
    classes: np.ndarray
    types: np.ndarray
    parts: np.ndarray

    def __call__(self, classes):
        """Returns: a bool array, grammatical (None where unknown), and lists of types and of parts (None for none)."""
        fine = None
        if self.language is not None:
            _, _, read = LANGUAGES[self.language]
            found = read(classes)
            fine = np.array([pair is not None for pair in found], bool)
            if self.rules_describe:
                return fine, [pair and pair[0] for pair in found], [pair and pair[1] for pair in found]
        nearest = self._nearest(classes)
        return fine, list(self.types[nearest]), list(self.parts[nearest])

    def _nearest(self, classes, most=20_000):
        """The number of the training sequence that has most rows in common with each of these."""
        width = int(max(self.classes.max(), classes.max())) + 1
        known = F.one_hot(torch.from_numpy(self.classes[:most]).long(), width).float().flatten(1)
        nearest = []
        for some in torch.as_tensor(classes).split(200):
            equal_rows = F.one_hot(some.long(), width).float().flatten(1) @ known.T
            nearest.append(equal_rows.argmax(1))
        return torch.cat(nearest).numpy()


def judge_for(classes, table):
    """The judge for training sequences (N, length) and their table.

    A language is recognised where the shape is its own and its rules read each of the first 500 sequences. Types and
    parts are judged by the rules only where these say what the table says.
    """
    types, parts = table["type"].to_numpy(str), table["part"].to_numpy(str)
    for name, (length, width, read) in LANGUAGES.items():
        if classes.shape[1] == length and classes.max() < width:
            found = read(classes[:500])
            if None not in found:
                return Judge(name, found == list(zip(types[:500], parts[:500])), classes, types, parts)
    return Judge(None, False, classes, types, parts)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------

TESTED = 0.1  # share of the sequences that is kept for the test, at most TEST_SIZE
TEST_SIZE = 2000
FULL_SIZE = 20_000  # sequences from which on the full number of steps is trained
SETTINGS = {
    "vae": dict(
        model=dict(width=128, layers=3, latent_dim=8),
        steps=8000,
        batch_size=256,
        learning_rate=1e-3,
        warmup=200,
        ema_decay=0.999,
    ),
    "latent_diffusion": dict(
        model=dict(width=512, hidden=1024, depth=5, time_dim=128, self_conditioning=True),
        steps=6000,
        hold=0.5,
        batch_size=512,
        learning_rate=1e-3,
        warmup=200,
        ema_decay=0.999,
    ),
}
SETTINGS["prior"] = SETTINGS["latent_diffusion"] | {"steps": 12_000}
TOKENS = 12  # about how many tokens a sequence's rows are divided among


def settings_for(stage, number, scale=1.0):
    """How a stage is trained on so many sequences: fewer steps and smaller batches for a small file.

    Args: stage: a key of SETTINGS; number: of training sequences; scale: of the number of steps.
    """
    settings = dict(SETTINGS[stage])
    share = min(1, number / FULL_SIZE) ** 0.6
    settings["steps"] = max(20, round(settings["steps"] * share * scale))
    settings["batch_size"] = min(settings["batch_size"], max(1, number // 4))
    settings["warmup"] = min(settings["warmup"], settings["steps"] // 10)
    settings["ema_decay"] = min(settings["ema_decay"], 1 - 5 / settings["steps"])
    return settings


def split_sequences(classes, seed=0):
    """Row numbers for training and for the test; a sequence that occurs several times is never tested.

    Shapes: (N, length) -> two arrays.
    Raises: ValueError where fewer than 40 sequences are different from each other.
    """
    _, first, counts = np.unique(classes, axis=0, return_index=True, return_counts=True)
    single = np.random.default_rng(seed).permutation(np.sort(first[counts == 1]))
    if len(single) < 40:
        raise ValueError(f"{len(single)} of {len(classes)} sequences occur only once: expected at least 40 of them")
    test = np.sort(single[: min(TEST_SIZE, max(10, round(TESTED * len(single))))])
    return np.setdiff1d(np.arange(len(classes)), test), test


class SequenceRun:
    """A folder in which a file's three networks are trained, one after the other, each kept as soon as it is ready.

    Attributes:
        folder: where everything lies.
        conditions: what `load_conditions` read.
        classes: uint8 (N, length), the same sequences as class numbers.
        train, test: row numbers.
        judge: a Judge.
    """

    def __init__(self, h5, csv, folder=None, seed=0, scale=1.0):
        check_seed(seed)
        self.seed = seed
        self.scale = check_number("scale", scale, "a number above 0", lambda value: 0 < value < math.inf)
        self.conditions = load_conditions(h5, csv)
        self.folder = Path(folder) if folder is not None else TRAINING / f"sequences_{Path(h5).stem}"
        self.classes = self.conditions.data[:, 0].argmax(-1).astype(np.uint8)
        self.train, self.test = split_sequences(self.classes, seed)
        self.judge = judge_for(self.classes[self.train], self.conditions.table.iloc[self.train])
        self._claim_folder({"h5": sha256(h5), "csv": sha256(csv), "seed": seed, "scale": self.scale} | SETTINGS)

    def _claim_folder(self, run):
        """Note in the folder what is trained there. Raises: ValueError where it holds something else."""
        note = self.folder / "run.json"
        if note.exists() and read_json(note) != run:
            raise ValueError(
                f"{self.folder.name} holds the networks of other files, another seed, scale or version of the course; "
                "take another folder (--out), or delete it"
            )
        write_json(note, run)

    def asked(self, rows):
        """The conditions of these rows, as the prior is asked for them."""
        table = self.conditions.table.iloc[rows]
        return {"type": list(table["type"]), "part": list(table["part"])}

    def vae(self):
        """The SequenceVAE, trained where it is not there yet."""
        classes = self.classes[self.train]
        length, width = self.conditions.data.shape[2:]
        settings = settings_for("vae", len(classes), self.scale)
        torch.manual_seed(self.seed)
        network = SequenceVAE(length, width, rows=max(1, round(length / TOKENS)), **settings["model"])
        loss = functools.partial(vae_loss, kl_weight=KL_WEIGHT)
        return self._trained("vae", network, loss, [torch.from_numpy(classes)], settings)

    def latent_diffusion(self, vae):
        """Latent diffusion on the VAE's means: a SequencePipeline that takes no condition."""
        return self._pipeline("latent_diffusion", vae, ConditionEncoder(types=[], parts=[], targets=[]))

    def prior(self, vae):
        """The diffusion prior: a SequencePipeline that takes type and part."""
        encoder = ConditionEncoder(types=self.conditions.types, parts=self.conditions.parts, targets=[])
        return self._pipeline("prior", vae, encoder)

    def _pipeline(self, stage, vae, encoder):
        settings = settings_for(stage, len(self.train), self.scale)
        tokens, latent_dim = vae.latent_shape
        torch.manual_seed(self.seed)
        sizes = dict(latent_dim=latent_dim, tokens=tokens, condition_dim=encoder.size)
        network = LatentDenoiser(**sizes, **settings["model"])
        data = [network.set_latents(vae, encode_sequences(vae, self.classes[self.train]))]
        loss = functools.partial(diffusion_loss, self_conditioned=True)
        if encoder.size:
            loss = functools.partial(prior_loss, encoder, self_conditioned=True)
            data.append(torch.from_numpy(self.conditions.vectors[self.train]))
        denoiser = self._trained(stage, network, loss, data, settings)
        scheduler = PowerSpacedDPMSolver(power=1.5, **NOISE_SCHEDULE, **SAMPLER)
        pipe = SequencePipeline(vae=vae, denoiser=denoiser, scheduler=scheduler, encoder=encoder)
        with atomic(self.folder / f"{stage}_pipeline") as part:
            pipe.save_pretrained(part, safe_serialization=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _trained(self, stage, network, loss, data, settings):
        """The network of a stage: loaded where it was finished, else trained, from where a stopped training stood."""
        folder = self.folder / stage
        if not folder.exists():
            print(f"{stage}: {settings['steps']} steps of {settings['batch_size']} on {len(data[0]):,} sequences")
            state = self.folder / f"{stage}_state.safetensors"
            with torch.random.fork_rng():
                network, history = fit(network, loss, data, settings, self.seed, state)
            write_json(self.folder / f"{stage}_curve.json", history)
            with atomic(folder) as part:
                network.cpu().save_pretrained(part, safe_serialization=True)
            state.unlink(missing_ok=True)
        return type(network).from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)
