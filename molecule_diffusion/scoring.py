"""Scores of whole pipelines: points of a training's curve, and the metrics that stand on a card."""

import inspect
import time

import numpy as np
import torch

from molecule_diffusion.captions import WORDS, relevance
from molecule_diffusion.checkpoints import machine
from molecule_diffusion.chemistry import describe
from molecule_diffusion.evaluation import evaluate, obedience, reconstruction_accuracy
from molecule_diffusion.qm9 import graph_tensors, shared_qm9
from molecule_diffusion.ranking import retrieval_scores
from molecule_diffusion.retrieval import qm9_facts, retrieval_queries

# ---------------------------------------------------------------------------------------------------------------------
# Generators
# ---------------------------------------------------------------------------------------------------------------------


def condition_to_score(asked, rows, n, seed):
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
    """A point of a training's curve, without restarts; `asked` as in `condition_to_score`, of validation molecules."""
    pipe.set_progress_bar_config(disable=True)
    arguments = condition_to_score(asked, shared_qm9().validation, n, seed)
    output = pipe(n, generator=torch.Generator(pipe.device).manual_seed(seed), restarts=[], **arguments)
    score = evaluate(output)
    algorithm = pipe.scheduler.config.get("algorithm_type", type(pipe.scheduler).__name__)
    sampler = f"{algorithm}, {default_argument(pipe, 'num_inference_steps')} steps"
    result = {"sampler": sampler} | {key: getattr(score, key) for key in ("N", "valid", "unique", "novel", "fcd")}
    if asked:
        obeyed = obedience(output, arguments["condition"])
        result |= {f"{key}_obeyed": obeyed[f"{key}_obeyed"] for key in asked}
    return result


def score_for_card(pipe, n, seed, asked=(), **arguments):
    """All metrics of a finished pipeline, for its card; `asked` as in `condition_to_score`, of test molecules.

    Args: n, seed: how many molecules are drawn, and with which seed; arguments: of the pipeline, such as its steps.
    """
    arguments |= condition_to_score(asked, shared_qm9().test, n, seed)
    cpu, wall = time.process_time(), time.perf_counter()
    output = pipe(n, generator=torch.Generator().manual_seed(seed), **arguments)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    metrics = evaluate(output, pipe.card["name"]).as_dict()
    metrics |= {"sampling_seed": seed, "sampling_seconds": round(wall, 1)}
    if asked:
        metrics["asked"] = f"{' and '.join(asked)} of test molecules"
        metrics |= obedience(output, arguments["condition"])
    for key in ("num_inference_steps", "guidance_scale"):
        value = arguments.get(key, default_argument(pipe, key))
        if value is not None:
            metrics[key] = value
    if "scheduler" in pipe.components:
        stages = pipe.stages(metrics["num_inference_steps"], arguments.get("restarts"))
        metrics["network_calls"] = sum(done for _, _, done in stages)
    return metrics | {"cpu_ms_per_molecule": round(1000 * cpu / n, 2), "sampling_machine": machine()}


def default_argument(pipe, argument):
    """The default of one of a pipeline's arguments, None where it takes no such argument."""
    parameter = inspect.signature(pipe.__call__).parameters.get(argument)
    return None if parameter is None else parameter.default


# ---------------------------------------------------------------------------------------------------------------------
# The TokenVAE as an autoencoder, and the oracle
# ---------------------------------------------------------------------------------------------------------------------


def monitor_token_vae(pipe):
    """Share of the validation molecules that come back exactly."""
    return {"exact": reconstruction_accuracy(pipe.vae, *graph_tensors(shared_qm9().validation))}


def score_token_vae(pipe, n, seed):
    """Samples of the prior, and the share of the test molecules that come back exactly."""
    test = shared_qm9().test
    exact = reconstruction_accuracy(pipe.vae, *graph_tensors(test))
    metrics = score_for_card(pipe, n, seed)
    return metrics | {"exact_reconstruction_test": exact, "N_reconstruction": len(test)}


def monitor_property_oracle(pipe):
    """Mean absolute errors on the validation molecules."""
    return _oracle_errors(pipe, shared_qm9().validation)


def score_property_oracle(pipe, n, seed):
    """Mean absolute errors on the first n test molecules."""
    rows = shared_qm9().test[:n]
    return _oracle_errors(pipe, rows) | {"N": len(rows)}


def _oracle_errors(pipe, rows):
    """Mean absolute errors on QM9's molecules `rows`, which neither half of the training split holds."""
    qm9 = shared_qm9()
    found = pipe([qm9.smiles[i] for i in rows])
    return {f"mae_{name}": float(np.abs(found[name] - qm9.target(name)[rows]).mean()) for name in found}


# ---------------------------------------------------------------------------------------------------------------------
# The retriever
# ---------------------------------------------------------------------------------------------------------------------


def monitor_retriever(pipe):
    """Scores of 500 captions of validation molecules, in known words, on 2,000 random validation molecules."""
    rows = np.random.default_rng(1).choice(shared_qm9().validation, 2000, replace=False)
    return _retriever_scores(pipe, rows, number=500, seed=1, kinds=("known",))


def score_retriever(pipe, n, seed):
    """Scores on the first n test molecules of 1,000 captions each: of known words, other sentences, unseen words."""
    rows = shared_qm9().test[:n]
    return _retriever_scores(pipe, rows, number=1000, seed=seed, kinds=WORDS) | {"N": len(rows), "queries": 1000}


def _retriever_scores(pipe, rows, number, seed, kinds):
    """Means of `retrieval_scores` on QM9's molecules `rows`, for captions of each kind of words."""
    qm9 = shared_qm9()
    molecules = pipe.embed_molecules([qm9.smiles[i] for i in rows])
    scores = {}
    for kind in kinds:
        queries = retrieval_queries(number, seed, kind, rows)
        similarity = pipe.retriever.embed_texts(queries["sentences"].to(pipe.device)).cpu() @ molecules.T
        found = retrieval_scores(similarity, relevance(queries["asked"], qm9_facts()[rows]))
        for name, values in found.items():
            scores[f"{kind} {name}"] = round(float(np.nanmean(values)), 4)
    return scores
