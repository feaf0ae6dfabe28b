"""Trained pipelines on disk: loading with every check, saving, and their cards."""

import inspect
import json
import platform
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from molecule_diffusion import pipelines, retrieval
from molecule_diffusion.checks import quoted
from molecule_diffusion.files import CHECKPOINTS, atomic, read_json, recover, sha256, write_json
from molecule_diffusion.qm9 import SPLIT_SEED, shared_qm9
from molecule_diffusion.training import bf16_is_fast

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name for a network's weights

_ROOMS_OF_OLD_CLASSES = {"PowerSpacedDPMSolver": "schedules", "ConditionEncoder": "conditions"}

# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_pipeline(name, folder=CHECKPOINTS):
    """Load a shipped pipeline: `pipe = helpers.load_pipeline("latent_diffusion"); pipe(1000).smiles`.

    Args:
        name: of a folder in data/checkpoints.
        folder: that holds the checkpoint's folder; what `train` returned for a run of your own.

    Returns: a DiffusionPipeline in single precision, in evaluation mode, on the CPU; `.card` is its card (a dict).
    Raises: FileNotFoundError for an unknown name or a missing file, ValueError for a damaged one. Weights are read from
        safetensors files only, never from a pickle. Every file is the one that its card was written for.
    """
    if not isinstance(name, str):
        raise ValueError(f"name={quoted(name)}: expected a text, such as 'latent_diffusion'")
    folder = Path(folder)
    path = folder / name
    remedy = f"restore it (git checkout -- data/checkpoints/{name}) or train it: python helpers.py train {name}"
    remedy = remedy if len(name) <= 100 else "look at its name"
    is_plain = name not in ("", "..") and Path(name).name == name and len(name) <= 100
    if is_plain:
        recover(path)
    if not is_plain or not path.is_dir():
        there = ", ".join(sorted(card.parent.name for card in folder.glob("*/card.json")))
        raise FileNotFoundError(f"no checkpoint {quoted(name)}; here are: {there or 'none'}. If it was here, {remedy}")
    card = _read_card(path, remedy)
    try:
        with torch.random.fork_rng(devices=[]):  # networks are filled with random numbers before their weights come
            pipe = _from_pretrained(path)
    except (RuntimeError, ValueError, OSError, LookupError, TypeError) as error:
        said = f"{error}".splitlines()[0][:200]
        raise ValueError(f"checkpoint {name} does not fit this code ({said}); {remedy}") from None
    for key, network in networks(pipe).items():
        unlike = _unlike_weights(path / key / WEIGHTS, network)
        if unlike:
            raise ValueError(f"checkpoint {name} does not fit this code (unlike in {key}: {unlike[0]}, …); {remedy}")
        if not all(parameter.isfinite().all() for parameter in network.parameters()):
            raise ValueError(f"checkpoint {name} holds NaN or infinite weights in {key}; {remedy}")
        network.eval().requires_grad_(False)
    pipe.card = card
    return pipe


def _read_card(path, remedy):
    """The card of a checkpoint of which every file is the one that the card was written for."""
    name = path.name
    try:
        card = read_json(path / "card.json")
        for file, expected in card["sha256"].items():
            if sha256(path / file) != expected:
                raise ValueError(f"{name}/{file} is damaged: its SHA-256 is not the one in card.json; {remedy}")
        if strange := sorted(_files_to_hash(path) - card["sha256"].keys()):
            raise ValueError(f"{name}/{strange[0]} is not of this checkpoint: card.json has no SHA-256 of it; {remedy}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"checkpoint {name}: {Path(error.filename).name} is missing; {remedy}") from None
    except IsADirectoryError as error:
        raise ValueError(f"checkpoint {name}: {Path(error.filename).name} is a folder; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {name}: card.json is damaged ({error}); {remedy}") from None
    return card


def _files_to_hash(folder):
    """The files that a card answers for, as it names them: all but itself and the page that is made from it.

    Cards from the time when the course was one module, helpers, answer for the weights alone.
    """
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    if '"helpers"' in (folder / "model_index.json").read_text(encoding="utf-8"):
        return {file for file in files if file.endswith(".safetensors")}
    return files - {"card.json", "README.md", ".DS_Store"}


def _from_pretrained(path):
    """The pipeline in a folder, of the class that its model_index.json names, as diffusers loads it."""
    index = read_json(path / "model_index.json")
    name = index.get("_class_name") if isinstance(index, dict) else None
    room = retrieval if name == "RetrieverPipeline" else pipelines
    kind = getattr(room, str(name), None)
    if not inspect.isclass(kind) or kind.__module__ != room.__name__:
        raise ValueError(f"model_index.json names no pipeline of this course: {name!r}")
    settings = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    current = {key: _current_entry(entry) for key, entry in index.items()}
    if index == current:
        return kind.from_pretrained(path, **settings)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the checkpoint itself stays as it is
        renewed = shutil.copytree(path, Path(folder) / path.name)
        write_json(renewed / "model_index.json", current)
        return kind.from_pretrained(renewed, **settings)


def _current_entry(entry):
    """An entry of a model_index.json: [module, class]. diffusers looks for the class in that module.

    In checkpoints from the time when the course was one module, helpers, it becomes the class's room of today.
    """
    if not isinstance(entry, list) or entry[:1] != ["helpers"]:
        return entry
    room = _ROOMS_OF_OLD_CLASSES.get(entry[1], "models")
    return [f"molecule_diffusion.{room}", entry[1]]


def _unlike_weights(path, network):
    """Names that are in a file of weights or in the network, but not in both; diffusers only warns of these."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return sorted(set(file.keys()) ^ network.state_dict().keys())


def networks(pipe):
    """The networks among a pipeline's components: a dict."""
    return {key: module for key, module in pipe.components.items() if isinstance(module, nn.Module)}


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(name, pipe, settings, seed, seconds, folder):
    """Save a pipeline in half precision with its card. Replaces the old one whole.

    Args: settings: of its recipe; seed, seconds: of its training; folder: in which the folder `name` is made.
    """
    card = {
        "name": name,
        "parameters": {key: sum(p.numel() for p in network.parameters()) for key, network in networks(pipe).items()},
        "recipe": settings,
        "seed": seed,
        "data": f"{shared_qm9()!r}; split seed {SPLIT_SEED}",
        "training_seconds": round(seconds),
        "machine": machine(),
    }
    with atomic(folder / name) as part:
        _save_networks(pipe, part)
        for path in [part / "model_index.json", *part.glob("*/config.json")]:  # where it was loaded from stays here
            config = read_json(path)
            config.pop("_name_or_path", None)
            write_json(path, config)
        card["sha256"] = {file: sha256(part / file) for file in sorted(_files_to_hash(part))}
        write_card(part, card)


def _save_networks(pipe, folder):
    """Save a pipeline in half precision, in files that every user of the machine can read."""
    from safetensors import SafetensorError

    try:
        pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    except SafetensorError as error:
        raise OSError(f"the weights could not be written ({error})") from None
    for path in folder.rglob("*.safetensors"):  # safetensors writes files that only their owner can read
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)


def update_card(name, folder, changes):
    """Put new entries on the card of a saved checkpoint."""
    with atomic(folder / name) as part:
        shutil.copytree(folder / name, part)
        write_card(part, read_json(part / "card.json") | changes)


def write_card(folder, card):
    """Write card.json and, for people, the same as a model card in README.md."""
    write_json(folder / "card.json", card)
    lines = [
        "---",
        "library_name: diffusers",
        "license: mit",
        "tags: [molecules, qm9, diffusion]",
        "---",
        "",
        f"# {card['name']}",
        "",
        f'`pipe = helpers.load_pipeline("{card["name"]}")`',
        "",
    ]
    for key, value in card.items():
        if isinstance(value, dict):
            lines += ["", f"## {key}", "", "| | |", "|---|---|"]
            lines += [f"| {name} | {entry} |" for name, entry in value.items()]
        elif key != "name":
            lines.append(f"- {key.replace('_', ' ')}: {value}")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def machine():
    """The machine in one line, as cards and studies name it."""
    dtype = "bf16" if bf16_is_fast() else "fp32"
    instructions = torch.backends.cpu.get_cpu_capability()  # such as AVX2 or AVX512: the second is twice as fast
    cpu = f"{platform.machine()} CPU ({instructions})"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device}, {torch.get_num_threads()} threads, {dtype} training, torch {torch.__version__.split('+')[0]}"
