"""The command line: `python helpers.py --help`."""

import argparse
import json

from molecule_diffusion.conditions import make_conditions
from molecule_diffusion.evaluation import make_framing, make_reference
from molecule_diffusion.notebooks import run_notebook, run_study
from molecule_diffusion.recipes import RECIPES, score_checkpoint, train
from molecule_diffusion.training import TrainingError
from molecule_diffusion.viewers import make_figures


def main(arguments=None):
    """Run one command. Args: arguments: a list of texts; None takes those of the program."""
    parser = argparse.ArgumentParser(
        prog="python helpers.py", description="Molecules by diffusion: make what the course ships."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a checkpoint by its recipe (resumes), save it and score it")
    command.add_argument("name", choices=RECIPES)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, help="instead of the recipe's")
    command = commands.add_parser("score", help="score a shipped checkpoint at N = 10,000 and write it to its card")
    command.add_argument("name", choices=RECIPES)
    command = commands.add_parser("notebook", help="run notebooks top to bottom and save them clean")
    command.add_argument("paths", nargs="+")
    command = commands.add_parser("study", help="repeat a notebook's study, the tables in data/results")
    command.add_argument("number", help="of the notebook, such as 02")
    command.add_argument("parts", nargs="*", help="of the study; all by default")
    commands.add_parser("reference", help="make data/reference.npz and data/results/framing.json")
    commands.add_parser("conditions", help="write QM9 as data/qm9_conditions.h5 and .csv, about three minutes")
    commands.add_parser("figures", help="make the figures in figs/")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, TrainingError) as error:
        parser.exit(1, f"{type(error).__name__}: {error}\n")


def _run(options):
    if options.command == "train":
        train(options.name, options.seed, options.steps)
    elif options.command == "score":
        print(json.dumps(score_checkpoint(options.name), indent=1))
    elif options.command == "notebook":
        for path in options.paths:
            run_notebook(path)
    elif options.command == "study":
        run_study(options.number, options.parts)
    elif options.command == "reference":
        make_reference()
        make_framing()
    elif options.command == "conditions":
        make_conditions()
    elif options.command == "figures":
        make_figures()
