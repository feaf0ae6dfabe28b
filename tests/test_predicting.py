"""Predictions: kept, compared, refused where of the wrong kind; and each stands in its notebook as it should."""

import re

import nbformat
import numpy as np
import pytest
import torch

import helpers
from molecule_diffusion.exercises import predicting
from molecule_diffusion.exercises.predicting import Name, Number, Ranking

KINDS = {
    "98.p1": Number("seconds", lowest=0),
    "98.p2": Number("of the draws", lowest=0, highest=1),
    "98.p3": Name(("valid", "novel", "FCD")),
    "98.p4": Ranking(("vector", "image", "graph")),
    "98.p5": Number("eV"),
}


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(predicting, "PREDICTIONS", dict(KINDS))
    monkeypatch.setattr(predicting, "GIVEN", {})


@pytest.mark.parametrize(
    "number, answer, result, said",
    [
        ("98.p1", 60, 7.3128, "predicted 60 seconds, it is 7.31 seconds: too high by 52.7, a factor of 8.2."),
        ("98.p1", 5, 7.5, "predicted 5 seconds, it is 7.5 seconds: too low by 2.5."),
        ("98.p1", 0, 7.5, "predicted 0 seconds, it is 7.5 seconds: too low by 7.5."),
        ("98.p1", 3, 0, "predicted 3 seconds, it is 0 seconds: too high by 3."),
        (
            "98.p1",
            130_251,
            np.int64(130_165),
            "predicted 130,251 seconds, it is 130,165 seconds: close, too high by 86.",
        ),
        ("98.p2", 0.9, np.float32(0.5), "predicted 0.9 of the draws, it is 0.5 of the draws: too high by 0.4."),
        ("98.p2", torch.tensor(0.99), 0.996, "it is 0.996 of the draws: close, too low by 0.006."),
        ("98.p2", 1, 1.0, "predicted 1 of the draws, it is 1 of the draws: exactly right."),
        ("98.p3", " NOVEL ", "novel", "predicted “novel”, it is “novel”: right."),
        ("98.p3", "valid", "novel", "predicted “valid”, it is “novel”: not right."),
        ("98.p4", ["vector", "image", "graph"], ("vector", "graph", "image"), ": 1 of 3 in their places."),
        ("98.p4", ("graph", "Image", "vector"), ["graph", "image", "vector"], "it is graph, image, vector: right."),
        ("98.p5", -3, 2, "predicted -3 eV, it is 2 eV: too low by 5."),
    ],
)
def test_a_prediction_is_kept_and_compared(number, answer, result, said, capsys):
    assert helpers.predict(number, answer) is None
    kept = capsys.readouterr().out
    assert kept.startswith(f"{number}: you predict ") and kept.count("\n") == 1
    assert helpers.compare(number, result) is None
    line = capsys.readouterr().out
    assert line.startswith(f"{number}: you predicted ") and line.endswith(said + "\n") and line.count("\n") == 1


@pytest.mark.parametrize("answer", [None, ...])
def test_an_unanswered_one_costs_nothing(answer, capsys):
    helpers.predict("98.p1", 60)
    helpers.predict("98.p1", answer)  # taken back
    assert capsys.readouterr().out == "98.p1: you predict 60 seconds.\n"
    helpers.compare("98.p1", 7.3128)
    assert capsys.readouterr().out == "98.p1: it is 7.31 seconds. (You made no prediction.)\n"


def test_the_last_answer_counts(capsys):
    helpers.predict("98.p1", 60)
    helpers.predict("98.p1", 8)
    helpers.compare("98.p1", 8)
    helpers.compare("98.p1", 9)  # the cell was run again, with another result
    assert capsys.readouterr().out.splitlines()[2:] == [
        "98.p1: you predicted 8 seconds, it is 8 seconds: exactly right.",
        "98.p1: you predicted 8 seconds, it is 9 seconds: too low by 1.",
    ]


@pytest.mark.parametrize("function", [helpers.predict, helpers.compare])
def test_an_unknown_prediction_is_explained(function):
    with pytest.raises(ValueError, match="unknown prediction '98.p9'; known ones: 98.p1, 98.p2, 98.p3"):
        function("98.p9", 1)


@pytest.mark.parametrize(
    "number, answer, message",
    [
        ("98.p1", "a minute", r"is 'a minute': expected a number of at least 0 \(seconds\)"),
        ("98.p1", "60", "is '60': expected a number"),
        ("98.p1", -1, "is -1: expected a number of at least 0"),
        ("98.p1", float("nan"), "is nan: expected a number of at least 0"),
        ("98.p1", float("inf"), "is inf: expected a number of at least 0"),
        ("98.p1", [1, 2], r"is \[1, 2\]: expected a number"),
        ("98.p1", torch.ones(2), "expected a number"),
        ("98.p1", True, "is True: expected a number"),
        ("98.p2", 90, r"is 90: expected a number from 0 to 1 \(of the draws\); write 90 % as 0.9"),
        ("98.p3", "unique", "is 'unique': expected one of 'valid', 'novel', 'FCD'"),
        ("98.p3", 2, "is 2: expected one of 'valid'"),
        ("98.p4", "vector", "expected a list of these 3 names in your order: 'vector', 'image', 'graph'"),
        ("98.p4", ["vector", "image"], "expected a list of these 3 names"),
        ("98.p4", ["vector", "image", "image"], "one of them occurs twice"),
        ("98.p4", ["vector", "image", "gnn"], "a part of .*98.p4 is 'gnn': expected one of"),
        ("98.p5", "low", r"expected a number \(eV\)"),
    ],
)
def test_an_answer_of_the_wrong_kind_is_explained(number, answer, message, capsys):
    for function, what in ((helpers.predict, "prediction"), (helpers.compare, "the result of prediction")):
        with pytest.raises(ValueError, match=message) as error:
            function(number, answer)
        assert f"{what} {number} is" in str(error.value)
    assert predicting.GIVEN == {} and capsys.readouterr().out == ""


def calls(cell, name):
    return re.findall(rf'helpers\.{name}\("(\d\d\.p\d+)", ?(.*?)\)', cell.source)


@pytest.mark.parametrize("path", sorted((helpers.ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_ask_before_they_compare(path, monkeypatch):
    monkeypatch.undo()  # the real predictions
    asked, compared = [], []
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        for number, answer in calls(cell, "predict"):
            assert answer == "...", f"{number} is answered in the notebook"
            asked.append(number)
        for number, _ in calls(cell, "compare"):
            assert number in asked and not calls(cell, "predict"), f"{number} is compared before it is asked for"
            compared.append(number)
    registered = [number for number in predicting.PREDICTIONS if number.startswith(f"{path.stem[:2]}.")]
    assert asked == compared == registered
