"""How good each generator is after how many minutes of training on one core: data/results/curve.json.

The work falls into jobs, one per model and seed, which several cores or machines can share: each job has a file of its
own, data/training/curve_MODEL_SEED.json, and `merge_curve` puts together those that are there.
"""

import copy
import itertools
import os
import time

import torch

from molecule_diffusion.checkpoints import machine
from molecule_diffusion.drawing import COLOURS, figure_png
from molecule_diffusion.evaluation import evaluate
from molecule_diffusion.files import RESULTS, ROOT, TRAINING, atomic, read_json, write_json
from molecule_diffusion.recipes import RECIPES, prepare_latent_diffusion
from molecule_diffusion.training import fit

CURVE = RESULTS / "curve.json"
JOBS = TRAINING  # where each job keeps its rows
FIGURE = ROOT / "figs" / "curve.png"
MINUTES = (1, 2, 5, 10, 20)  # of one core
MODELS = {"graph_ddpm": "orange", "pixel_ddpm": "blue", "gnn_ddpm": "green", "latent_diffusion": "red"}  # and colours
SEEDS = (0, 1, 2)
BATCH_SIZE = 512  # on a CPU; the recipes' larger ones are for a GPU
VAE_SHARE = 0.4  # of the minutes that latent diffusion has, its TokenVAE gets


def make_curve(models=tuple(MODELS), seeds=SEEDS, minutes=MINUTES, num_molecules=2000, core=None):
    """Run the jobs of these models and seeds one after the other, then merge all that are there.

    Args: core: the number of the core to keep to; None leaves the choice to the system. One thread calculates.
    """
    if core is not None:
        _keep_to(core)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for seed, name in itertools.product(seeds, models):
            run_job(name, seed, minutes, num_molecules)
    finally:
        torch.set_num_threads(threads)
    merge_curve()


def _keep_to(core):
    """Let this process calculate on one core only. Raises: ValueError for a core that it may not use."""
    if not hasattr(os, "sched_setaffinity"):
        raise ValueError("this system cannot keep a process to one core; leave --core out")
    allowed = os.sched_getaffinity(0)
    if core not in allowed:
        raise ValueError(f"core {core}: expected one of {sorted(allowed)}")
    os.sched_setaffinity(0, {core})


def job_file(name, seed):
    """Where the rows of one job stand."""
    return JOBS / f"curve_{name}_{seed}.json"


def run_job(name, seed, minutes=MINUTES, num_molecules=2000):
    """Train a model anew for each number of minutes, with one seed, and score it; each row is written when it is made.

    Each training is whole: its learning rate falls to its end. All draw without restarts. Rows that are there already
    are kept.
    """
    path = job_file(name, seed)
    rows = read_json(path)["rows"] if path.exists() else []
    for budget in minutes:
        key = {"model": name, "minutes": budget, "N": num_molecules, "seed": seed}
        if any(key.items() <= row.items() for row in rows):
            continue
        pipe, steps, spent = train_for(name, 60 * budget, seed)
        pipe.set_progress_bar_config(disable=True)
        score = evaluate(pipe(num_molecules, generator=torch.Generator().manual_seed(seed), restarts=[]))
        found = {metric: getattr(score, metric) for metric in ("valid", "unique", "novel", "fcd")}
        rows.append(key | {"steps": steps, "seconds": round(spent, 1)} | found)
        write_json(path, {"machine": machine(), "rows": rows})


def merge_curve():
    """Write data/results/curve.json and figs/curve.png from the jobs' files. Raises: ValueError if there are none."""
    paths = [path for name in MODELS for path in sorted(JOBS.glob(f"curve_{name}_*.json"))]
    contents = [read_json(path) for path in paths]
    if not contents:
        raise ValueError(f"no job of the curve has a row in {JOBS.name} yet; run `python helpers.py curve` first")
    machines = dict.fromkeys(content["machine"] for content in contents)
    rows = [row for content in contents for row in content["rows"]]
    write_json(CURVE, {"machine": "; ".join(machines), "rows": rows})
    with atomic(FIGURE) as part:
        part.write_bytes(figure_png(curve_figure()))


def train_for(name, seconds, seed=0):
    """Train a model, and the VAE that it needs, from random weights in a given time of one core.

    Returns: its pipeline, the number of its steps, and the CPU seconds that all steps took, the VAE's among them.
    """
    recipe = RECIPES[name]
    settings = recipe.settings | {"batch_size": BATCH_SIZE}
    spent = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if name == "latent_diffusion":
            vae_recipe = RECIPES["token_vae"]
            made = vae_recipe.prepare(vae_recipe.settings)
            vae, _, spent = _fit_for(made, vae_recipe.settings, VAE_SHARE * seconds, seed)
            made = prepare_latent_diffusion(settings, vae)
        else:
            made = recipe.prepare(settings)
        network, steps, own_seconds = _fit_for(made, settings, seconds - spent, seed)
    return recipe.assemble(network, made.parts), steps, spent + own_seconds


def _fit_for(made, settings, seconds, seed):
    """Train as many steps as the time allows. Returns: the network, the number of steps, and their CPU seconds.

    CPU seconds, not those of the clock: what else the core does meanwhile does not count.
    """
    trial = dict(steps=20, batch_size=settings["batch_size"], learning_rate=1e-4, warmup=1, ema_decay=0.9)
    _, trial_seconds = _timed_fit(copy.deepcopy(made.network), made, trial, seed)
    steps = max(10, int(seconds / trial_seconds * trial["steps"]))
    changes = {"steps": steps, "warmup": min(settings["warmup"], steps // 10)}
    changes["ema_decay"] = min(settings["ema_decay"], 1 - 20 / max(steps, 40))
    network, spent = _timed_fit(made.network, made, settings | changes, seed)
    return network.cpu(), steps, spent


def _timed_fit(network, made, settings, seed):
    """Train a network with the loss and the data of these ingredients. Returns: its average, and the CPU seconds."""
    started = time.process_time()
    network, _ = fit(network, made.loss, made.data, settings, seed)
    return network, time.process_time() - started


def curve_figure():
    """Validity and FCD against training minutes, all models in one figure: means, and bands that span the seeds."""
    import pandas as pd
    from matplotlib import pyplot as plt

    content = read_json(CURVE)
    table = pd.DataFrame(content["rows"]).astype({"fcd": float})  # None where no molecule was valid
    table["valid"] *= 100
    fig, panels = plt.subplots(1, 2, figsize=(9, 3))
    for axes, metric, label in zip(panels, ("valid", "fcd"), ("strictly valid, %", "FCD")):
        for name, rows in table.groupby("model", sort=False):
            seeds = rows.groupby("minutes")[metric].agg(["mean", "min", "max"])
            colour = COLOURS[MODELS[name]]
            axes.plot(seeds.index, seeds["mean"], "o-", color=colour, label=name.replace("_", " "))
            axes.fill_between(seeds.index, seeds["min"], seeds["max"], color=colour, alpha=0.2)
        axes.set(xscale="log", xlabel="training minutes of one core, from random weights", ylabel=label)
        axes.set_xticks(table.minutes.unique(), table.minutes.unique())
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].legend(frameon=False)
    fig.suptitle(f"N = {table.N.max():,}; {content['machine']}", fontsize=9)
    fig.tight_layout()
    return fig
