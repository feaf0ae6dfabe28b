"""Scores of whole pipelines: points of a training's curve, and the metrics that stand on a card."""

import inspect
import time

import numpy as np
import torch

from molecule_diffusion.captions import WORDS, relevance
from molecule_diffusion.checkpoints import machine
from molecule_diffusion.chemistry import describe, to_smiles, verdict
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
# The two VAEs as autoencoders, and the oracle
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


def monitor_graphvae(pipe):
    """The loss on validation molecules in its parts, and draws of the prior; see `graphvae_scores`."""
    return graphvae_scores(pipe.vae, n=2000, seed=1)


def score_graphvae(pipe, n, seed):
    """Samples of the prior as the paper draws them, its own counts of them, and what is known of the posterior."""
    return score_for_card(pipe, n, seed) | graphvae_scores(pipe.vae, n, seed)


def graphvae_scores(vae, n, seed):
    """What a GraphVAE's table needs, from n draws of its prior: a dict of floats.

    The shares are those of arXiv:1802.03480: valid of the draws, unique of the valid ones, novel of the distinct ones,
    where novel means: not in QM9. "strict" is the share that is valid without the bonds of the spanning tree. KL, in
    nats, and the parts of the loss are means over the validation molecules; exact is the share of these that comes back
    from the posterior's mean as the same molecule, in whatever order.
    """
    qm9 = shared_qm9()
    atoms, bonds = graph_tensors(qm9.validation)
    z = torch.randn(n, vae.config.latent_dim, generator=torch.Generator().manual_seed(seed)).to(vae.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        parts = vae.losses(atoms.to(vae.device), bonds.to(vae.device))
        means, _ = vae.encode(atoms.to(vae.device), bonds.to(vae.device))
    found = {name: float(value) for name, value in parts.items()}
    back = _smiles_of(vae, means, True)
    found["exact"] = float(np.mean([text == qm9.smiles[i] for text, i in zip(back, qm9.validation)]))
    valid = [text for text in _smiles_of(vae, z, True) if verdict(text) == "valid"]
    distinct = set(valid)
    found["paper_valid"] = len(valid) / n
    found["paper_unique"] = len(distinct) / max(1, len(valid))
    found["paper_novel"] = len(distinct - set(qm9.smiles)) / max(1, len(distinct))
    found["strict"] = float(np.mean([verdict(text) == "valid" for text in _smiles_of(vae, z, False)]))
    return found


def _smiles_of(vae, z, spanning_tree):
    return to_smiles(*(part.cpu().numpy() for part in vae.decode_graphs(z, spanning_tree)))


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
