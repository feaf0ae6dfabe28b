"""Every shipped generator and setting, scored over several seeds: the table in README, the figure beside it."""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from molecule_diffusion.checkpoints import load_pipeline, machine
from molecule_diffusion.checks import check_count
from molecule_diffusion.drawing import COLOURS, figure_png
from molecule_diffusion.evaluation import evaluate, random_graphs, training_molecules
from molecule_diffusion.files import CHECKPOINTS, RESULTS, ROOT, atomic, read_json, write_json
from molecule_diffusion.pipelines import MoleculePipeline
from molecule_diffusion.recipes import RECIPES
from molecule_diffusion.schedules import sampler

BENCHMARK = RESULTS / "benchmark.json"
FIGURE = ROOT / "figs" / "benchmark.png"
README = ROOT / "README.md"
MARKS = ("<!-- made by: python helpers.py benchmark -->", "<!-- end of what the benchmark made -->")


@dataclass
class Setting:
    """One row of the benchmark.

    Attributes:
        label: in the table.
        checkpoint: its name; None for the rows that frame the table.
        arguments: of the pipeline's call.
        scheduler: function () -> scheduler in place of the checkpoint's own; None keeps it.
    """

    label: str
    checkpoint: str | None = None
    arguments: dict = field(default_factory=dict)
    scheduler: Callable | None = None


def stock_scheduler():
    """What a textbook takes for latent diffusion: diffusers' DDPMScheduler, without clipping."""
    return sampler("DDPM")


TRAINING_MOLECULES, RANDOM_GRAPHS = "training molecules (the floor)", "random graphs"


def settings():
    """The rows of the benchmark, in order: a list of Setting."""
    rows = [Setting(TRAINING_MOLECULES)]
    for name, recipe in RECIPES.items():
        if not issubclass(recipe.pipeline, MoleculePipeline):  # it generates nothing
            continue
        rows.append(Setting(name, name))
        if recipe.fast is not None:
            rows.append(Setting(f"{name}, fast setting", name, recipe.fast))
        if name == "latent_diffusion":
            arguments = {"num_inference_steps": 100, "restarts": []}
            rows.append(Setting(f"{name}, stock DDPMScheduler", name, arguments, stock_scheduler))
    return [*rows, Setting(RANDOM_GRAPHS)]


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def make_benchmark(num_molecules=10_000, num_guard=1000, num_seeds=5):
    """Score every setting with the seeds 0, 1, …; write data/results/benchmark.json, the figure and README's table.

    Each setting is also scored at N = num_guard: the tests draw as many and compare, and the table takes the CPU times
    from these rows, see `summaries`. Scores that are there already, of the same weights and arguments, are kept, so a
    run that was stopped goes on. For times of one machine, delete the rows of N = num_guard before, and leave it idle.
    """
    from tqdm.auto import tqdm

    check_count("num_molecules", num_molecules)
    check_count("num_guard", num_guard)
    check_count("num_seeds", num_seeds)
    known = read_json(BENCHMARK)["rows"] if BENCHMARK.exists() else []
    rows = []
    for setting in tqdm(settings(), desc="benchmark", unit="setting"):
        made_of = fingerprint(setting)
        for n, seed in itertools.product((num_molecules, num_guard), range(num_seeds)):
            key = {"label": setting.label, "N": n, "seed": seed, "made_of": made_of}
            row = next((row for row in known if key.items() <= row.items()), None)
            if row is None:
                row = measure(setting, n, seed) | key
                known.append(row)
                write_json(BENCHMARK, {"machine": machine(), "rows": known})
            rows.append(row)
    write_json(BENCHMARK, {"machine": machine(), "rows": rows})  # without those of former weights
    with atomic(FIGURE) as part:
        part.write_bytes(figure_png(benchmark_figure()))
    write_readme()


def fingerprint(setting):
    """What a setting's scores depend on, in 16 letters: the checkpoint's files and the arguments."""
    content = [setting.arguments]
    if setting.checkpoint is not None:
        files = read_json(CHECKPOINTS / setting.checkpoint / "card.json")["sha256"]
        if setting.scheduler is not None:  # the checkpoint's own is replaced
            files.pop("scheduler/scheduler_config.json")
        content.append(files)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def measure(setting, n, seed):
    """The scores of one setting with one seed: a dict."""
    if setting.label == TRAINING_MOLECULES:
        return evaluate(training_molecules(n, seed)).as_dict()
    if setting.label == RANDOM_GRAPHS:
        return evaluate(random_graphs(n, seed)).as_dict()
    pipe = load_pipeline(setting.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    if setting.scheduler is not None:
        pipe.scheduler = setting.scheduler()
    return RECIPES[setting.checkpoint].score(pipe, n=n, seed=seed, **setting.arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


def summaries(n=None):
    """The benchmark's rows, one for each setting: label -> {metric: (mean, standard deviation over the seeds)}.

    n: of which number of molecules; None takes the largest. CPU times are those of the smallest number: these rows
        are few minutes of work, so that all can be measured on one idle machine.
    """
    rows = read_json(BENCHMARK)["rows"]
    n = max(row["N"] for row in rows) if n is None else n
    n_timed = min(row["N"] for row in rows)
    found = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == label and row["N"] == n]
        timed = [row for row in rows if row["label"] == label and row["N"] == n_timed]
        found[label] = {"N": n, "seeds": len(own)}
        for metric in ("valid", "unique", "novel", "fcd", "cpu_ms_per_molecule", "network_calls"):
            chosen = timed if metric == "cpu_ms_per_molecule" else own
            values = [row[metric] for row in chosen if row.get(metric) is not None]
            if values:
                found[label][metric] = float(np.mean(values)), float(np.std(values, ddof=1)) if values[1:] else 0.0
    return found


def _cell(summary, metric, factor, digits):
    """A mean and its spread as a cell; one seed has no spread; a dash where nothing was measured."""
    if metric not in summary:
        return "–"
    mean, spread = (f"{factor * value:.{digits}f}" for value in summary[metric])
    return f"{mean} ± {spread}" if summary["seeds"] > 1 else mean


def benchmark_table():
    """README's table as Markdown."""
    found = summaries()
    first = next(iter(found.values()))
    content = read_json(BENCHMARK)
    n_timed = min(row["N"] for row in content["rows"])
    lines = [
        f"Strict scores at N = {first['N']:,}, mean ± standard deviation over the seeds: nothing is repaired, every "
        f"draw is counted. CPU times: N = {n_timed:,}, {content['machine']}.",
        "",
        "| molecules | valid % | unique % | novel % | FCD | seeds | network calls | CPU-ms per molecule "
        "| training minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    minutes = {name: _training_minutes(name) for name in RECIPES}
    for label, summary in found.items():
        cells = [_cell(summary, metric, 100, 1) for metric in ("valid", "unique", "novel")]
        cells += [_cell(summary, "fcd", 1, 3), str(summary["seeds"])]
        cells.append(f"{summary['network_calls'][0]:.0f}" if "network_calls" in summary else "–")
        cells.append(f"{summary['cpu_ms_per_molecule'][0]:.1f}" if "cpu_ms_per_molecule" in summary else "–")
        name, comma, rest = label.partition(",")
        cells.append(minutes.get(name, "–"))
        shown = f"`{name}`{comma}{rest}" if name in RECIPES else label
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _training_minutes(name):
    return f"{read_json(CHECKPOINTS / name / 'card.json')['training_seconds'] / 60:.0f}"


def write_readme():
    """Put the table between its two marks in README.md."""
    text = README.read_text(encoding="utf-8")
    head, start, rest = text.partition(MARKS[0])
    _, end, tail = rest.partition(MARKS[1])
    if not start or not end:
        raise ValueError(f"README.md lacks the lines {MARKS[0]} and {MARKS[1]}, between which the table stands")
    with atomic(README) as part:
        part.write_text(f"{head}{start}\n{benchmark_table()}\n{end}{tail}", encoding="utf-8")


def benchmark_figure():
    """Invalid molecules and FCD against CPU time, ours filled, published ones open, as a matplotlib figure."""
    from matplotlib import pyplot as plt

    found = summaries()
    generators = {label: summary for label, summary in found.items() if "cpu_ms_per_molecule" in summary}
    colours = dict(zip(RECIPES, COLOURS.values()))  # one for all settings of a checkpoint
    published = [row for row in read_json(RESULTS / "published.json") if "cpu_ms_per_molecule" in row]
    fig, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for axes, metric, title in zip(panels, ("invalid", "fcd"), ("not valid, %", "FCD")):
        for label, summary in generators.items():
            name, comma, _ = label.partition(",")
            mean, spread = _as_drawn(summary, metric)
            style = dict(fmt="s" if comma else "o", color=colours[name], capsize=3)  # a square: not the default setting
            axes.errorbar(summary["cpu_ms_per_molecule"][0], mean, spread, label=label, **style)
        for row in published:
            if row["fcd" if metric == "fcd" else "valid"] is None:
                continue
            mean, _ = _as_drawn({key: (row[key], 0) for key in ("valid", "fcd")}, metric)
            axes.plot(row["cpu_ms_per_molecule"], mean, "o", mfc="none", color="#777777")
            name = row["model"].replace(", ", "\n") + f"\nN = {row['N']:,}"
            point = (row["cpu_ms_per_molecule"], mean)
            axes.annotate(name, point, (-6, 0), textcoords="offset points", fontsize=8, ha="right", va="center")
        if metric == "fcd":  # all training molecules are valid, and 0 has no place on this axis
            floor, _ = found[TRAINING_MOLECULES]["fcd"]
            axes.axhline(floor, color="#777777", ls=":", label=TRAINING_MOLECULES)
        axes.set(xscale="log", yscale="log", xlabel="CPU-milliseconds per molecule", ylabel=title)
        axes.grid(alpha=0.3, which="both")
    handles, labels = panels[1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="upper center", ncols=3, bbox_to_anchor=(0.5, 0), frameon=False)
    return fig


def _as_drawn(summary, metric):
    """Mean and spread of a metric as the figure shows it."""
    if metric == "invalid":
        mean, spread = summary["valid"]
        return 100 * (1 - mean), 100 * spread
    return summary[metric]
