"""The command line: `python helpers.py --help`."""

import argparse
import json
from pathlib import Path

from molecule_diffusion.benchmark import make_benchmark
from molecule_diffusion.conditions import CONDITION_TARGETS, make_conditions
from molecule_diffusion.curve import MINUTES, MODELS, SEEDS, make_curve, merge_curve
from molecule_diffusion.evaluation import evaluate, make_framing, make_reference, text_table
from molecule_diffusion.notebooks import run_notebook, run_study
from molecule_diffusion.recipes import RECIPES, score_checkpoint, train
from molecule_diffusion.sampling import sample_to_file
from molecule_diffusion.search import search
from molecule_diffusion.sequence_table import train_sequences
from molecule_diffusion.sequences import make_expressions
from molecule_diffusion.smiles_files import smiles_in_file
from molecule_diffusion.training import TrainingError
from molecule_diffusion.viewers import make_figures


def main(arguments=None):
    """Run one command. Args: arguments: a list of texts; None takes those of the program."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        COMMANDS[options.command](options)
    except (ValueError, OSError, TrainingError) as error:
        parser.exit(1, f"{type(error).__name__}: {error}\n")
    except KeyboardInterrupt as stop:
        parser.exit(130, f"{stop or 'stopped'}\n")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python helpers.py", description="Draw molecules, score molecules, and make what the course ships."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("sample", help="draw molecules to a file; repeated after a stop, it goes on")
    command.add_argument("name", help="of a generator, such as latent_diffusion")
    command.add_argument("number", type=int, help="how many molecules")
    command.add_argument("--out", required=True, metavar="FILE", help="ending in .csv, .smi or .sdf")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, help="network calls per molecule; the pipeline's default if left out")
    command.add_argument("--guidance", type=float, help="diffusion_prior: how much the wishes count, 1.5 by default")
    for wish in ("type", "part"):
        command.add_argument(f"--{wish}", help=f"diffusion_prior: the {wish} asked for")
    for wish in CONDITION_TARGETS:
        command.add_argument(f"--{wish}", type=float, help=f"diffusion_prior: the {wish} asked for")
    command = commands.add_parser("evaluate", help="score the molecules of a file strictly, between the framing rows")
    command.add_argument("file", help=".csv with a column named smiles, or one SMILES a line")
    command.add_argument("--json", action="store_true", help="print the numbers as JSON")
    command = commands.add_parser("search", help="find training molecules by a sentence; the first time takes a minute")
    command.add_argument("query", help="such as 'a fluorinated ring with a nitrile'")
    command.add_argument("-k", type=int, default=12, help="how many molecules")
    command = commands.add_parser("train", help="train a checkpoint by its recipe (resumes), save it and score it")
    command.add_argument("name", choices=RECIPES)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, help="instead of the recipe's")
    command.add_argument("--batch-size", type=int, help="instead of the recipe's: 512 on a CPU")
    command = commands.add_parser("score", help="score a shipped checkpoint at N = 10,000 and write it to its card")
    command.add_argument("name", choices=RECIPES)
    command = commands.add_parser("notebook", help="run notebooks top to bottom and save them clean")
    command.add_argument("paths", nargs="+")
    command = commands.add_parser("study", help="repeat a notebook's study, the tables in data/results")
    command.add_argument("number", help="of the notebook, such as 02")
    command.add_argument("parts", nargs="*", help="of the study; all by default")
    commands.add_parser("reference", help="make data/reference.npz and data/results/framing.json")
    commands.add_parser("conditions", help="write QM9 as data/qm9_conditions.h5 and .csv, about three minutes")
    command = commands.add_parser("expressions", help="write random expressions as data/expressions.h5 and .csv")
    command.add_argument("number", type=int, nargs="?", default=40_000, help="how many, 40,000 by default")
    command = commands.add_parser(
        "sequences", help="VAE, latent diffusion and prior for any one-hot sequences: train (resumes), test, save, draw"
    )
    command.add_argument("h5", help="HDF5 file with `data`: (N, 1, length, width), one-hot along width")
    command.add_argument("csv", help="CSV file with the columns type and part, N rows in the same order")
    command.add_argument("--out", metavar="FOLDER", help="for the results; by default one in data/training")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--scale", type=float, default=1.0, help="of the number of training steps: 0.1 to try it out")
    commands.add_parser(
        "benchmark", help="score every shipped generator over five seeds: README's table, about an hour"
    )
    command = commands.add_parser(
        "curve",
        help="quality after 1 to 20 minutes of training on one core, three seeds: 10 core-hours in 12 jobs",
    )
    command.add_argument("name", nargs="?", choices=MODELS, help="one model's jobs; all by default")
    command.add_argument("--seed", type=int, help="one seed's job; 0, 1 and 2 by default")
    command.add_argument("--minutes", type=int, nargs="+", default=MINUTES, help="1 2 5 10 20 by default")
    command.add_argument("--core", type=int, help="the core to keep to, so that two jobs can run side by side")
    command.add_argument("--merge", action="store_true", help="train nothing; put together the jobs that are there")
    commands.add_parser("figures", help="make the figures in figs/")
    return parser


def _sample(options):
    wishes = {key: getattr(options, key) for key in ("type", "part", *CONDITION_TARGETS)}
    wishes = {key: value for key, value in wishes.items() if value is not None}
    arguments = {"num_inference_steps": options.steps, "guidance_scale": options.guidance, "condition": wishes or None}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    print(sample_to_file(options.name, options.number, options.out, options.seed, **arguments))


def _evaluate(options):
    score = evaluate(smiles_in_file(options.file), Path(options.file).stem)
    rows = [score, *score.framing]
    if options.json:
        print(json.dumps([row.as_dict() for row in rows], indent=1))
    else:
        print(text_table(rows))


def _notebook(options):
    for path in options.paths:
        run_notebook(path)


def _curve(options):
    if options.merge:
        return merge_curve()
    models = tuple(MODELS) if options.name is None else (options.name,)
    seeds = SEEDS if options.seed is None else (options.seed,)
    make_curve(models, seeds, options.minutes, core=options.core)


def _sequences(options):
    table = train_sequences(options.h5, options.csv, options.out, options.seed, options.scale)
    print(table.round(4).to_string())


def _reference(options):
    make_reference()
    make_framing()


COMMANDS = {
    "sample": _sample,
    "evaluate": _evaluate,
    "search": lambda options: print(search(options.query, options.k)),
    "train": lambda options: train(options.name, options.seed, options.steps, options.batch_size),
    "score": lambda options: print(json.dumps(score_checkpoint(options.name), indent=1)),
    "notebook": _notebook,
    "study": lambda options: run_study(options.number, options.parts),
    "reference": _reference,
    "conditions": lambda options: make_conditions(),
    "expressions": lambda options: make_expressions(options.number),
    "sequences": _sequences,
    "benchmark": lambda options: make_benchmark(),
    "curve": _curve,
    "figures": lambda options: make_figures(),
}
