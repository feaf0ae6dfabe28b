"""Predictions: what a student expects of a cell, kept until its result is there, and how far off it was.

A notebook asks with `helpers.predict("00.p1", ...)`; the cell with the result holds `helpers.compare("00.p1", result)`.
What is asked for is registered beside the notebook's exercises: `prediction("00.p1", Number("seconds", lowest=0))`.
"""

import math
from dataclasses import dataclass

from molecule_diffusion.checks import quoted

PREDICTIONS = {}  # id -> Number, Name or Ranking: what an answer must be, and how it is compared
GIVEN = {}  # id -> the student's answer; kept as long as the kernel runs


def prediction(number, kind):
    """Register a prediction. Args: number: such as "00.p1"; kind: a Number, Name or Ranking."""
    PREDICTIONS[number] = kind


def predict(number, answer):
    """Keep a prediction until the result is there: `helpers.predict("00.p1", 60)`.

    Args:
        number: of the prediction, such as "00.p1".
        answer: a number, a name or a list of names, whatever the notebook asks for. With `...`, as the notebook comes,
            nothing is predicted, and nothing is said.

    Raises: ValueError for an unknown number, and for an answer of another kind than asked for.
    """
    kind = _known(number)
    GIVEN.pop(number, None)
    if answer is None or answer is ...:
        return
    GIVEN[number] = kind.read(answer, f"prediction {number}")
    print(f"{number}: you predict {kind.text(GIVEN[number])}.")


def compare(number, result):
    """Say in one line what came out, and how far off the prediction was, if one was made.

    Args:
        number: of the prediction, such as "00.p1".
        result: what came out, of the same kind as the answer.

    Raises: ValueError for an unknown number, and for a result of another kind than the prediction's.
    """
    kind = _known(number)
    result = kind.read(result, f"the result of prediction {number}")
    if number not in GIVEN:
        print(f"{number}: it is {kind.text(result)}. (You made no prediction.)")
        return
    guess = GIVEN[number]
    print(f"{number}: you predicted {kind.text(guess)}, it is {kind.text(result)}: {kind.judged(guess, result)}.")


def _known(number):
    """What the prediction of this number asks for. Raises: ValueError, with the known ones, if there is none."""
    if number not in PREDICTIONS:
        raise ValueError(f"unknown prediction {quoted(number)}; known ones: {', '.join(sorted(PREDICTIONS))}")
    return PREDICTIONS[number]


# ---------------------------------------------------------------------------------------------------------------------
# The kinds of answers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """One number.

    Attributes: unit: what follows it in a sentence, such as "seconds" or "of the draws"; lowest, highest: what is
        possible at all.
    """

    unit: str
    lowest: float = -math.inf
    highest: float = math.inf

    def read(self, answer, name):
        """The answer as a float. Raises: ValueError for what is no number, or none that is possible."""
        try:
            value = math.nan if isinstance(answer, (bool, str)) else float(answer)
        except (TypeError, ValueError, RuntimeError, OverflowError):  # RuntimeError: a tensor of several numbers
            value = math.nan
        if not math.isfinite(value) or not self.lowest <= value <= self.highest:
            raise ValueError(f"{name} is {quoted(answer)}: expected {self._expected()}")
        return value

    def _expected(self):
        if (self.lowest, self.highest) == (0, 1):
            return f"a number from 0 to 1 ({self.unit}); write 90 % as 0.9"
        if self.highest < math.inf:
            return f"a number from {_short(self.lowest)} to {_short(self.highest)} ({self.unit})"
        if self.lowest > -math.inf:
            return f"a number of at least {_short(self.lowest)} ({self.unit})"
        return f"a number ({self.unit})"

    def text(self, value):
        return f"{_short(value)} {self.unit}"

    def judged(self, guess, result):
        """How far a guess is from the result: in units, and as a factor where that is 2 or more."""
        difference = guess - result
        if math.isclose(guess, result, rel_tol=1e-9, abs_tol=1e-12):
            return "exactly right"
        off = f"too {'high' if difference > 0 else 'low'} by {_short(abs(difference))}"
        if abs(difference) <= 0.1 * abs(result):
            return f"close, {off}"
        if min(guess, result) > 0:
            factor = max(guess, result) / min(guess, result)
            if factor >= 2:
                return f"{off}, a factor of {_short(factor)}"
        return off


@dataclass(frozen=True)
class Name:
    """One of several names; capital letters do not matter. Attributes: choices: the names."""

    choices: tuple

    def read(self, answer, name):
        """The choice that was meant. Raises: ValueError for anything else, with the choices."""
        for choice in self.choices:
            if isinstance(answer, str) and answer.strip().lower() == choice.lower():
                return choice
        raise ValueError(f"{name} is {quoted(answer)}: expected one of {_listed(self.choices)}")

    def text(self, value):
        return f"“{value}”"

    def judged(self, guess, result):
        return "right" if guess == result else "not right"


@dataclass(frozen=True)
class Ranking:
    """Several names in order, the first one first. Attributes: choices: the names, each of which must occur once."""

    choices: tuple

    def read(self, answer, name):
        """The names in their order. Raises: ValueError unless each choice stands there once."""
        expected = f"a list of these {len(self.choices)} names in your order: {_listed(self.choices)}"
        if not isinstance(answer, (list, tuple)) or len(answer) != len(self.choices):
            raise ValueError(f"{name} is {quoted(answer)}: expected {expected}")
        one = Name(self.choices)
        names = tuple(one.read(part, f"a part of {name}") for part in answer)
        if len(set(names)) < len(names):
            raise ValueError(f"{name} is {quoted(answer)}: expected {expected}; one of them occurs twice")
        return names

    def text(self, value):
        return ", ".join(value)

    def judged(self, guess, result):
        right = sum(mine == theirs for mine, theirs in zip(guess, result))
        return "right" if right == len(result) else f"{right} of {len(result)} in their places"


def _listed(names):
    return ", ".join(repr(name) for name in names)


def _short(value):
    """A number as a sentence shows it: whole ones in full, others with three digits."""
    if not math.isfinite(value):
        return str(value)
    if value == round(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
