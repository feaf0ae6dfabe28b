"""How good each generator is after how many minutes of training, from random weights: data/results/curve.json."""

import copy
import itertools

import torch

from molecule_diffusion.checkpoints import machine
from molecule_diffusion.drawing import COLOURS, figure_png
from molecule_diffusion.evaluation import evaluate
from molecule_diffusion.files import RESULTS, ROOT, atomic, read_json, write_json
from molecule_diffusion.recipes import RECIPES, prepare_latent_diffusion
from molecule_diffusion.training import fit

CURVE = RESULTS / "curve.json"
FIGURE = ROOT / "figs" / "curve.png"
MINUTES = (1, 2, 5, 10, 20, 60)
MODELS = {"graph_ddpm": "orange", "pixel_ddpm": "blue", "gnn_ddpm": "green", "latent_diffusion": "red"}  # and colours
SEEDS = (0, 1, 2)
BATCH_SIZE = 512  # on a CPU; the recipes' larger ones are for a GPU
VAE_SHARE = 0.4  # of the minutes that latent diffusion has, its TokenVAE gets


def make_curve(models=tuple(MODELS), minutes=MINUTES, seeds=SEEDS, num_molecules=2000):
    """Train every model anew for each number of minutes and each seed, and score it; write the file and figs/curve.png.

    Each training is whole: its learning rate falls to its end. All draw without restarts. Points that are there already
    are kept.
    """
    rows = read_json(CURVE)["rows"] if CURVE.exists() else []
    for seed, name, budget in itertools.product(seeds, models, minutes):
        key = {"model": name, "minutes": budget, "N": num_molecules, "seed": seed}
        if any(key.items() <= row.items() for row in rows):
            continue
        pipe, steps, spent = train_for(name, 60 * budget, seed)
        pipe.set_progress_bar_config(disable=True)
        score = evaluate(pipe(num_molecules, generator=torch.Generator().manual_seed(seed), restarts=[]))
        found = {metric: getattr(score, metric) for metric in ("valid", "unique", "novel", "fcd")}
        rows.append(key | {"steps": steps, "seconds": round(spent, 1)} | found)
        write_json(CURVE, {"machine": machine(), "rows": rows})
    with atomic(FIGURE) as part:
        part.write_bytes(figure_png(curve_figure()))


def train_for(name, seconds, seed=0):
    """Train a model, and the VAE that it needs, from random weights in a given time.

    Returns: its pipeline, the number of its steps, and the seconds that all steps took, the VAE's among them.
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
    """Train as many steps as the time allows. Returns: the network, the number of steps, and the seconds they took."""
    trial = dict(steps=20, batch_size=settings["batch_size"], learning_rate=1e-4, warmup=1, ema_decay=0.9)
    _, history = fit(copy.deepcopy(made.network), made.loss, made.data, trial, seed)
    steps = max(10, int(seconds / history[-1]["seconds"] * trial["steps"]))
    changes = {"steps": steps, "warmup": min(settings["warmup"], steps // 10)}
    changes["ema_decay"] = min(settings["ema_decay"], 1 - 20 / max(steps, 40))
    network, history = fit(made.network, made.loss, made.data, settings | changes, seed)
    return network.cpu(), steps, history[-1]["seconds"]


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
        axes.set(xscale="log", xlabel="training minutes, from random weights", ylabel=label)
        axes.set_xticks(table.minutes.unique(), table.minutes.unique())
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].legend(frameon=False)
    fig.suptitle(f"N = {table.N.max():,}; {content['machine']}", fontsize=9)
    fig.tight_layout()
    return fig
