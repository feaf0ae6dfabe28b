"""How exercises answer back: the register of checks, `checked`, `solved`, and what the checks are written with."""

import sysconfig
import traceback
from pathlib import Path

import numpy as np
import torch

from molecule_diffusion.files import ROOT

EXERCISES = {}  # number -> (check, reference answer)
SOLVED = set()  # numbers of those that were solved since the kernel was started


class WrongAnswer(Exception):
    """Raised by a check: its text tells the student what is wrong."""


def exercise(number, reference):
    """Register the decorated function as the check of an exercise; `reference` stands in for an unsolved one."""

    def register(check):
        EXERCISES[number] = (check, reference)
        return check

    return register


def checked(number, answer):
    """Check an exercise's answer. Returns it if it is right; else says what is wrong and returns the reference.

    `one_hot = helpers.checked("01.1", one_hot)`: Run All goes on with a working function whatever was written.
    """
    if number not in EXERCISES:
        raise ValueError(f"unknown exercise {number!r}; known ones: {', '.join(EXERCISES)}")
    check, reference = EXERCISES[number]
    try:
        if answer is None or answer is ...:
            raise WrongAnswer("there is no answer yet. Replace the `...`")
        if answer is reference:
            raise WrongAnswer("this is the reference solution; run the cell with your own answer first, then this one")
        if callable(reference) and not callable(answer):
            raise WrongAnswer(f"a function was expected, {type(answer).__name__} came")
        check(answer)
    except WrongAnswer as wrong:
        problem = str(wrong)
    except Exception as error:  # whatever the student's code raises is shown to the student, in full
        problem = _own_line(error)
    else:
        SOLVED.add(number)
        print(f"✓ {number} solved.")
        return answer
    SOLVED.discard(number)
    print(f"✗ {number}: {problem}.\n  The notebook goes on with the reference solution.")
    return reference


def solved(notebook):
    """Say how many of a notebook's exercises are solved: `helpers.solved("01")`."""
    numbers = [number for number in EXERCISES if number.startswith(f"{notebook}.")]
    numbers.sort(key=lambda number: int(number.partition(".")[2]))
    if not numbers:
        notebooks = sorted({number[:2] for number in EXERCISES})
        raise ValueError(f"no exercises for notebook {notebook!r}; there are some for {notebooks}")
    left = [number for number in numbers if number not in SOLVED]
    message = f"{len(numbers) - len(left)} of {len(numbers)} solved."
    if left:
        message += f" Still open: {', '.join(left)}."
    print(message)


def _own_line(error):
    """The student's line at which an error was raised, in one sentence."""
    said = f"{type(error).__name__}: {error}"
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    if not own:
        return f"your answer could not be used ({said})"
    frame = own[-1]
    return f"your code stopped at line {frame.lineno}, `{frame.line}`, with {said}"


def _is_library(filename):
    """Whether a file is Python's, an installed package's or the course's, not the student's."""
    path = Path(filename).resolve()
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), ROOT / "molecule_diffusion"]
    return any(Path(folder).resolve() in path.parents for folder in folders)


# ---------------------------------------------------------------------------------------------------------------------
# What checks are written with
# ---------------------------------------------------------------------------------------------------------------------


def expect_something(got):
    """Raise WrongAnswer where a function returned nothing."""
    if got is None or got is ...:
        raise WrongAnswer("the function returns nothing yet. Replace the `...`, and use `return`")


def expect_pair(got, what):
    """Raise WrongAnswer unless a function returned two things; `what` names them."""
    expect_something(got)
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise WrongAnswer(f"return two things: {what}")


def expect(got, expected, case, hints=()):
    """Raise WrongAnswer unless `got` equals `expected` in shape and values.

    Args: hints: (wrong value, what went wrong); one whose value happens to be the expected one says nothing.
    """
    expect_something(got)
    got = got.numpy() if torch.is_tensor(got) else np.asarray(got)
    expected = np.asarray(expected)
    for wrong, hint in hints:
        wrong = np.asarray(wrong)
        if _alike(got, wrong) and not _alike(expected, wrong):
            raise WrongAnswer(hint)
    if got.shape != expected.shape:
        raise WrongAnswer(f"{case}: expected shape {expected.shape}, got {got.shape}")
    if not np.allclose(got, expected):
        where = tuple(int(k) for k in np.argwhere(~np.isclose(got, expected))[0])
        place = f" at {list(where)}" if where else ""
        raise WrongAnswer(f"{case}: expected {expected[where]:.6g}{place}, got {got[where]:.6g}")


def _alike(one, other):
    return one.shape == other.shape and np.allclose(one, other)


def known_network(alpha_bar):
    """The exact v for latents whose numbers are all 1 or -1: a function (z_t, t) -> v."""

    def predict_v(z_t, t):
        a, s = alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
        return (a * z_t - torch.tanh(a * z_t / s**2)) / s

    return predict_v
