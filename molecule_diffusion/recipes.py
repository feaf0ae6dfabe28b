"""How every checkpoint is made: one `Recipe` each, and `train`, which follows it from the data to the card.

A new checkpoint is a new entry of RECIPES (and its network in the room `models`); nothing else needs to know.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import nn

from molecule_diffusion.checkpoints import load_pipeline, save_checkpoint, update_card
from molecule_diffusion.checks import check_count, check_seed, this_process
from molecule_diffusion.conditions import CONDITION_TARGETS, ConditionEncoder, condition_table
from molecule_diffusion.encodings import graph_vector
from molecule_diffusion.files import CHECKPOINTS, RESULTS, TRAINING, write_json
from molecule_diffusion.graph_denoisers import GraphNetworkDenoiser, PixelDenoiser
from molecule_diffusion.graphvae import GraphVAE
from molecule_diffusion.models import GraphDenoiser, LatentDenoiser, TokenVAE, encode_graphs
from molecule_diffusion.oracle import PropertyOracle, graph_features
from molecule_diffusion.pipelines import (
    DiffusionPriorPipeline,
    GraphDDPMPipeline,
    GraphVAEPipeline,
    LatentDiffusionPipeline,
    PropertyOraclePipeline,
    TokenVAEPipeline,
)
from molecule_diffusion.qm9 import graph_tensors, shared_qm9
from molecule_diffusion.retrieval import (
    Retriever,
    RetrieverPipeline,
    molecule_features,
    retrieval_loss,
    training_pairs,
)
from molecule_diffusion.schedules import GRAPH_NOISE_SCHEDULE, NOISE_SCHEDULE, SAMPLER, PowerSpacedDPMSolver, sampler
from molecule_diffusion.scoring import (
    monitor_graphvae,
    monitor_property_oracle,
    monitor_retriever,
    monitor_token_vae,
    score_for_card,
    score_graphvae,
    score_on_the_way,
    score_property_oracle,
    score_retriever,
    score_token_vae,
)
from molecule_diffusion.training import (
    KL_WEIGHT,
    diffusion_loss,
    fit,
    graph_diffusion_loss,
    oracle_loss,
    prior_loss,
    vae_loss,
)


@dataclass
class Ingredients:
    """What `fit` trains, and what the finished pipeline holds beside it.

    Attributes:
        network: to be trained.
        loss: function (network, *batch) -> scalar.
        data: tensors of equal length, the batches' columns.
        parts: the pipeline's other networks, already trained or without trainable weights, by their names in it.
    """

    network: nn.Module
    loss: Callable
    data: list
    parts: dict = field(default_factory=dict)


@dataclass
class Recipe:
    """How one checkpoint is made.

    Attributes:
        settings: `model`, the sizes of the network; steps, batch_size, learning_rate, warmup, ema_decay and
            hold and again, as `fit` reads them; weights of the loss. They stand on the card.
        prepare: function (settings) -> Ingredients: network, loss, data.
        pipeline: its class.
        component: the trained network's name in it. The pipeline is made of this, of the parts and of its scheduler:
            `pipeline(denoiser=…, vae=…, scheduler=…)`.
        sampler: function () -> its scheduler; None for a pipeline without one.
        restarts: of the pipeline's config: what it does after the last step, see `read_restarts`.
        monitor: function (pipeline) -> dict, called at CURVE_POINTS of the training.
        score: function (pipeline, n, seed) -> dict, the metrics on the card; it takes the arguments of `fast` too.
        fast: arguments of a second, faster setting that the card reports too, chosen on validation; None for none.
    """

    settings: dict
    prepare: Callable
    pipeline: type
    component: str
    monitor: Callable
    score: Callable
    sampler: Callable | None = None
    restarts: list = field(default_factory=list)
    fast: dict | None = None

    def assemble(self, network, parts):
        """The pipeline around a trained network."""
        components = {self.component: network, **parts}
        if self.sampler is not None:
            components["scheduler"] = self.sampler()
            components["restarts"] = self.restarts
        return self.pipeline(**components)


# ---------------------------------------------------------------------------------------------------------------------
# Network, loss and data
# ---------------------------------------------------------------------------------------------------------------------


def prepare_token_vae(settings):
    """A TokenVAE, and the graphs of the training split."""
    qm9 = shared_qm9()
    loss = functools.partial(vae_loss, kl_weight=settings["kl_weight"])
    return Ingredients(TokenVAE(**settings["model"]), loss, graph_tensors(qm9.train))


def prepare_graphvae(settings):
    """A GraphVAE, and the graphs of the training split; its KL is averaged over the latent."""
    qm9 = shared_qm9()
    network = GraphVAE(**settings["model"])
    loss = functools.partial(vae_loss, kl_weight=1 / network.config.latent_dim)
    return Ingredients(network, loss, graph_tensors(qm9.train))


def prepare_graph_diffusion(settings, network=GraphDenoiser):
    """A network of graph diffusion, and the graph vectors of the training split."""
    qm9 = shared_qm9()
    x_0 = graph_vector(qm9.atoms[qm9.train], qm9.bonds[qm9.train]).to(torch.int8)  # a quarter of the memory
    return Ingredients(network(**settings["model"]), graph_diffusion_loss, [x_0])


def prepare_latent_diffusion(settings, vae=None):
    """A LatentDenoiser, and the latents of the training split in a TokenVAE, by default the shipped one."""
    if vae is None:
        vae = load_pipeline("token_vae").vae
    network = LatentDenoiser(**settings["model"])
    z = network.set_latents(vae, encode_graphs(vae, *graph_tensors(shared_qm9().train)))
    loss = functools.partial(diffusion_loss, self_conditioned=network.config.self_conditioning)
    return Ingredients(network, loss, [z], {"vae": vae})


def prepare_diffusion_prior(settings):
    """A LatentDenoiser with conditions, and latents and conditions of one half of the training split."""
    qm9 = shared_qm9()
    vae = load_pipeline("token_vae").vae
    rows, _ = qm9.halves()
    table = condition_table(qm9, rows)
    encoder = ConditionEncoder().set_targets(table)
    condition = encoder({key: table[key] for key in ("type", "part", *CONDITION_TARGETS)}, len(table))
    network = LatentDenoiser(**settings["model"], condition_dim=encoder.size)
    z = network.set_latents(vae, encode_graphs(vae, *graph_tensors(rows)))
    loss = functools.partial(prior_loss, encoder, self_conditioned=network.config.self_conditioning)
    return Ingredients(network, loss, [z, condition], {"vae": vae, "encoder": encoder})


def prepare_property_oracle(settings):
    """A PropertyOracle, and what it reads and learns of the half of the training split that the prior never sees."""
    qm9 = shared_qm9()
    _, rows = qm9.halves()
    network = PropertyOracle(**settings["model"])
    names = [*network.config.targets, *network.config.beside]
    values = torch.from_numpy(np.stack([qm9.target(name)[rows] for name in names], 1))
    network.mean.copy_(values.mean(0))
    network.std.copy_(values.std(0))
    graphs = [part.split(5000) for part in graph_tensors(rows)]
    features = [graph_features(*some) for some in zip(*graphs)]
    of_atoms, of_pairs = (torch.cat(parts) for parts in zip(*features))
    loss = functools.partial(oracle_loss, asked=len(network.config.targets), beside_weight=settings["beside_weight"])
    return Ingredients(network, loss, [of_atoms, of_pairs, (values - network.mean) / network.std])


def prepare_retriever(settings):
    """A Retriever, and random molecules of the training split with their captions."""
    qm9 = shared_qm9()
    vae = load_pipeline("token_vae").vae
    pairs = training_pairs(settings["pairs"])
    smiles = [qm9.smiles[i] for i in pairs["rows"]]
    features = molecule_features(settings["model"]["kind"], smiles, vae).half()  # half of the memory
    data = [features, pairs["sentences"].half(), pairs["asked"], pairs["facts"]]
    loss = functools.partial(retrieval_loss, kind=settings["loss"], miner=settings["miner"])
    return Ingredients(Retriever(**settings["model"]), loss, data, {"vae": vae})


# ---------------------------------------------------------------------------------------------------------------------
# The recipes
# ---------------------------------------------------------------------------------------------------------------------


def equal_steps():
    """The sampler of graph diffusion."""
    return DPMSolverMultistepScheduler(**GRAPH_NOISE_SCHEDULE, **SAMPLER)


def stock_steps():
    """diffusers' DDPMScheduler, whose `step` is the one that notebook 03 derives."""
    return sampler("DDPM", prediction_type="sample")


def power_spaced_steps(power):
    """The sampler of diffusion on latents."""
    return PowerSpacedDPMSolver(power=power, **NOISE_SCHEDULE, **SAMPLER)


CURVE_POINTS = (0.03, 0.08, 0.16, 0.32, 0.56, 0.8, 1)  # shares of the steps after which the monitor looks

RECIPES = {
    "token_vae": Recipe(
        settings=dict(
            model=dict(width=128, layers=3, latent_dim=8),
            kl_weight=KL_WEIGHT,
            steps=2500,
            batch_size=512,
            learning_rate=1e-3,
            warmup=200,
            ema_decay=0.999,
        ),
        prepare=prepare_token_vae,
        pipeline=TokenVAEPipeline,
        component="vae",
        monitor=monitor_token_vae,
        score=score_token_vae,
    ),
    "graphvae": Recipe(
        settings=dict(
            model=dict(latent_dim=80),
            steps=24_000,
            batch_size=128,
            learning_rate=1e-3,
            warmup=200,
            ema_decay=0.999,
            recorded=False,  # the Hungarian algorithm works on the CPU
        ),
        prepare=prepare_graphvae,
        pipeline=GraphVAEPipeline,
        component="vae",
        monitor=monitor_graphvae,
        score=score_graphvae,
    ),
    "graph_ddpm": Recipe(
        settings=dict(
            model=dict(width=512, hidden=1024, depth=5, time_dim=128),
            steps=117_984,  # as many as nine minutes of a shared H200 allowed, and seven of another one
            hold=0.6,
            again=dict(after=50_000, learning_rate=7e-4),
            batch_size=2048,
            learning_rate=1e-3,
            warmup=500,
            ema_decay=0.9998,
        ),
        prepare=prepare_graph_diffusion,
        pipeline=GraphDDPMPipeline,
        component="denoiser",
        sampler=equal_steps,
        restarts=[("jump", 0.3, 10)],
        monitor=score_on_the_way,
        score=score_for_card,
        fast=dict(num_inference_steps=35, restarts=[]),
    ),
    "pixel_ddpm": Recipe(
        settings=dict(
            model=dict(widths=[48, 96], layers=1),
            steps=20_000,
            hold=0.6,
            batch_size=512,
            learning_rate=1e-3,
            warmup=500,
            ema_decay=0.9995,
        ),
        prepare=functools.partial(prepare_graph_diffusion, network=PixelDenoiser),
        pipeline=GraphDDPMPipeline,
        component="denoiser",
        sampler=stock_steps,
        monitor=score_on_the_way,
        score=score_for_card,
    ),
    "gnn_ddpm": Recipe(
        settings=dict(
            model=dict(nodes=128, edges=64, layers=5, heads=4, time_dim=128),
            steps=19_000,
            hold=0.6,
            batch_size=512,
            learning_rate=1e-3,
            warmup=500,
            ema_decay=0.9995,
        ),
        prepare=functools.partial(prepare_graph_diffusion, network=GraphNetworkDenoiser),
        pipeline=GraphDDPMPipeline,
        component="denoiser",
        sampler=equal_steps,
        monitor=score_on_the_way,
        score=score_for_card,
    ),
    "latent_diffusion": Recipe(
        settings=dict(
            model=dict(latent_dim=8, width=512, hidden=1024, depth=5, time_dim=128, self_conditioning=True),
            steps=52_000,
            hold=0.6,
            batch_size=2048,
            learning_rate=1e-3,
            warmup=500,
            ema_decay=0.9998,
        ),
        prepare=prepare_latent_diffusion,
        pipeline=LatentDiffusionPipeline,
        component="denoiser",
        sampler=functools.partial(power_spaced_steps, power=0.84),  # found in notebook 06
        monitor=score_on_the_way,
        score=score_for_card,
    ),
    "diffusion_prior": Recipe(
        settings=dict(
            model=dict(latent_dim=8, width=512, hidden=1024, depth=5, time_dim=128, self_conditioning=True),
            steps=45_000,
            hold=0.6,
            batch_size=1024,
            learning_rate=1e-3,
            warmup=500,
            ema_decay=0.9998,
        ),
        prepare=prepare_diffusion_prior,
        pipeline=DiffusionPriorPipeline,
        component="denoiser",
        sampler=functools.partial(power_spaced_steps, power=1.5),
        monitor=functools.partial(score_on_the_way, asked=("type", "part")),
        score=functools.partial(score_for_card, asked=("type", "part")),
    ),
    "property_oracle": Recipe(
        settings=dict(
            model=dict(nodes=128, edges=64, layers=4),
            beside_weight=0.2,
            steps=36_000,
            hold=0.3,
            batch_size=128,
            learning_rate=1e-3,
            warmup=500,
            ema_decay=0.9995,
        ),
        prepare=prepare_property_oracle,
        pipeline=PropertyOraclePipeline,
        component="oracle",
        monitor=monitor_property_oracle,
        score=score_property_oracle,
    ),
    "retriever": Recipe(
        settings=dict(
            model=dict(kind="both", width=512, dim=128),
            pairs=100_000,
            loss="supcon",
            miner=None,
            recorded=False,  # the number of pairs that fit changes from step to step
            steps=12_000,
            batch_size=512,
            learning_rate=1e-3,
            warmup=200,
            ema_decay=0.999,
        ),
        prepare=prepare_retriever,
        pipeline=RetrieverPipeline,
        component="retriever",
        monitor=monitor_retriever,
        score=score_retriever,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# From a recipe to a checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def _recipe(name):
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known ones: {', '.join(RECIPES)}")
    return RECIPES[name]


def train(name, seed=0, steps=None, batch_size=None):
    """Train a checkpoint by its recipe, save and score it; called again after an interrupt, it goes on where it was.

    The recipe with seed 0 replaces the shipped checkpoint when it is done; any other run is saved under data/training.

    Args:
        name: a key of RECIPES.
        seed: of the initial weights and of every step.
        steps, batch_size: instead of the recipe's. Large batches are for a GPU; on a CPU, 512 learns faster.

    Returns: the folder to give to `load_pipeline(name, folder)`.
    """
    recipe = _recipe(name)
    check_seed(seed)
    changes = {"steps": steps, "batch_size": batch_size}
    settings = recipe.settings | {key: value for key, value in changes.items() if value is not None}
    check_count("steps", settings["steps"])
    check_count("batch_size", settings["batch_size"])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = recipe.prepare(settings)

    def monitor(network):
        return recipe.monitor(recipe.assemble(network, made.parts).to(network.device))

    marks = {max(1, round(settings["steps"] * share)) for share in CURVE_POINTS}
    run = f"{name}_{settings['steps']}_steps_of_{settings['batch_size']}_seed_{seed}"
    state = TRAINING / f"{run}.safetensors"
    network, history = fit(made.network, made.loss, made.data, settings, seed, state, monitor, marks)
    shipped = settings == recipe.settings and seed == 0
    folder = CHECKPOINTS if shipped else TRAINING / run
    rank, _ = this_process()
    if rank == 0:  # one of several processes writes
        curve = [entry for entry in history if entry["step"] in marks]
        write_json((RESULTS if shipped else folder) / f"{name}_curve.json", curve)
        pipe = recipe.assemble(network.cpu(), made.parts)
        save_checkpoint(name, pipe, settings, seed, history[-1]["seconds"], folder)
        score_checkpoint(name, folder)
        print(f"saved to {folder / name}")
    return folder


def score_checkpoint(name, folder=CHECKPOINTS, num_molecules=10_000):
    """Score a checkpoint at its default settings, as it is loaded, and write the metrics to its card.

    A recipe with a fast setting gets a second set, `metrics_fast`. Returns: the metrics.
    """
    recipe = _recipe(name)
    pipe = load_pipeline(name, folder)
    pipe.set_progress_bar_config(disable=True)
    changes = {"metrics": recipe.score(pipe, n=num_molecules, seed=0)}
    if recipe.fast is not None:
        changes["metrics_fast"] = recipe.score(pipe, n=num_molecules, seed=0, **recipe.fast)
    update_card(name, folder, changes)
    return changes["metrics"]
