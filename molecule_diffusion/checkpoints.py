"""Trained pipelines on disk: loading with every check, saving, their cards, and the metrics that stand on them."""

import inspect
import json
import platform
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from molecule_diffusion import pipelines
from molecule_diffusion.chemistry import describe
from molecule_diffusion.evaluation import evaluate, obedience
from molecule_diffusion.files import CHECKPOINTS, atomic, read_json, sha256, write_json
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
    Raises: ValueError for an unknown name or a damaged file, FileNotFoundError for a missing one. Weights are read from
        safetensors files only, never from a pickle.
    """
    path = Path(folder) / name
    shipped = sorted(card.parent.name for card in CHECKPOINTS.glob("*/card.json"))
    if name not in shipped and not path.is_dir():
        raise ValueError(f"unknown checkpoint {name!r}; known ones: {', '.join(shipped)}")
    remedy = f"restore it (git checkout -- data/checkpoints/{name}) or train it: python helpers.py train {name}"
    card = _read_card(path, remedy)
    try:
        pipe = _from_pretrained(path)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"checkpoint {name} does not fit this code ({str(error).splitlines()[0]}); {remedy}") from None
    for key, network in networks(pipe).items():
        unlike = _unlike_weights(path / key / WEIGHTS, network)
        if unlike:
            raise ValueError(f"checkpoint {name} does not fit this code (unlike in {key}: {unlike[0]}, …); {remedy}")
        network.eval().requires_grad_(False)
    pipe.card = card
    return pipe


def _read_card(path, remedy):
    """The card of a checkpoint whose weights are those that the card was written for."""
    name = path.name
    try:
        card = read_json(path / "card.json")
        for file, expected in card["sha256"].items():
            if sha256(path / file) != expected:
                raise ValueError(f"{name}/{file} is damaged: its SHA-256 is not the one in card.json; {remedy}")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"checkpoint {name}: {Path(error.filename).name} is missing; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {name}: card.json is damaged ({error}); {remedy}") from None
    return card


def _from_pretrained(path):
    """The pipeline in a folder, of the class that its model_index.json names, as diffusers loads it."""
    index = read_json(path / "model_index.json")
    name = index.get("_class_name") if isinstance(index, dict) else None
    kind = getattr(pipelines, str(name), None)
    if not inspect.isclass(kind) or kind.__module__ != pipelines.__name__:
        raise ValueError(f"model_index.json names no pipeline of this course: {name!r}")
    settings = {"dtype": torch.float32, "use_safetensors": True, "local_files_only": True}
    current = {key: _current_entry(entry) for key, entry in index.items()}
    if index == current:
        return kind.from_pretrained(path, **settings)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the checkpoint itself stays as it is
        copy = shutil.copytree(path, Path(folder) / path.name)
        write_json(copy / "model_index.json", current)
        return kind.from_pretrained(copy, **settings)


def _current_entry(entry):
    """An entry of a model_index.json from the time when the course was one module, with its class's room of today.

    diffusers looks for the class of ["helpers", "TokenVAE"] in the module that stands first.
    """
    if not isinstance(entry, list) or entry[0] != "helpers":
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
        pipe.to(torch.float16).save_pretrained(part, safe_serialization=True)
        for path in [part / "model_index.json", *part.glob("*/config.json")]:  # where it was loaded from stays here
            config = read_json(path)
            config.pop("_name_or_path", None)
            write_json(path, config)
        weights = sorted(part.rglob("*.safetensors"))
        card["sha256"] = {path.relative_to(part).as_posix(): sha256(path) for path in weights}
        write_card(part, card)


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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return f"{device}, {torch.get_num_threads()} threads, {dtype} training, torch {torch.__version__.split('+')[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# Scores of pipelines
# ---------------------------------------------------------------------------------------------------------------------


def request(asked, rows, n, seed):
    """The condition under which n molecules are drawn when a pipeline is scored.

    Args: asked: names among type and part, or none; rows: QM9's molecules, of which n random ones are the model.
    Returns: dict of arguments of the pipeline: nothing, or its `condition`.
    """
    if not asked:
        return {}
    rows = np.random.default_rng(seed).choice(rows, n)
    table = describe([shared_qm9().smiles[i] for i in rows])
    return {"condition": {key: table[key].tolist() for key in asked}}


def score_on_the_way(pipe, asked=(), n=2000, seed=1):
    """The score of a pipeline in training, for its curve; `asked` as in `request`, of validation molecules."""
    pipe.set_progress_bar_config(disable=True)
    arguments = request(asked, shared_qm9().validation, n, seed)
    output = pipe(n, generator=torch.Generator(pipe.device).manual_seed(seed), **arguments)
    score = evaluate(output)
    sampler = f"{pipe.scheduler.config.algorithm_type}, {default(pipe, 'num_inference_steps')} steps"
    result = {"sampler": sampler} | {key: getattr(score, key) for key in ("N", "valid", "unique", "novel", "fcd")}
    if asked:
        obeyed = obedience(output, arguments["condition"])
        result |= {f"{key}_obeyed": obeyed[f"{key}_obeyed"] for key in asked}
    return result


def score_for_card(pipe, n, seed, asked=(), **arguments):
    """All metrics of a finished pipeline, for its card; `asked` as in `request`, of test molecules.

    Args: n, seed: how many molecules are drawn, and with which seed; arguments: of the pipeline, such as its steps.
    """
    arguments |= request(asked, shared_qm9().test, n, seed)
    cpu, wall = time.process_time(), time.perf_counter()
    output = pipe(n, generator=torch.Generator().manual_seed(seed), **arguments)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    metrics = evaluate(output, pipe.card["name"]).as_dict()
    metrics |= {"sampling_seed": seed, "sampling_seconds": round(wall, 1)}
    if asked:
        metrics["asked"] = f"{' and '.join(asked)} of test molecules"
        metrics |= obedience(output, arguments["condition"])
    for key in ("num_inference_steps", "guidance_scale"):
        value = arguments.get(key, default(pipe, key))
        if value is not None:
            metrics[key] = value
    return metrics | {"cpu_ms_per_molecule": round(1000 * cpu / n, 2), "sampling_machine": machine()}


def default(pipe, argument):
    """The default of one of a pipeline's arguments, None where it takes no such argument."""
    parameter = inspect.signature(pipe.__call__).parameters.get(argument)
    return None if parameter is None else parameter.default
