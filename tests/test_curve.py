"""Quality after so many minutes of training."""

import json
import os

import pytest

import helpers
from molecule_diffusion import curve


def test_a_budget_is_kept_and_shared_with_the_vae(monkeypatch):
    trained = []
    clock = [0.0]

    def fit(network, loss, data, settings, seed):
        trained.append((type(network).__name__, settings))
        clock[0] += settings["steps"] * 0.5  # a step takes half a second
        return network, []

    monkeypatch.setattr(curve, "fit", fit)
    monkeypatch.setattr(curve.time, "process_time", lambda: clock[0])
    pipe, steps, spent = curve.train_for("latent_diffusion", 1000)
    assert isinstance(pipe, helpers.LatentDiffusionPipeline) and (steps, spent) == (1200, 1000)
    names, settings = zip(*trained)
    assert names == ("TokenVAE", "TokenVAE", "LatentDenoiser", "LatentDenoiser")  # a trial before each
    assert [entry["steps"] for entry in settings] == [20, 800, 20, 1200]
    assert settings[1]["warmup"] == 80 and settings[1]["ema_decay"] == pytest.approx(0.975)
    assert "restart" not in settings[3]
    pipe.denoiser.check_vae(pipe.vae)  # on its latents


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What `train_for` was asked for; the curve's files lie in a folder of the test."""
    monkeypatch.setattr(curve, "CURVE", tmp_path / "curve.json")
    monkeypatch.setattr(curve, "FIGURE", tmp_path / "curve.png")
    monkeypatch.setattr(curve, "JOBS", tmp_path)
    asked = []

    def train_for(name, seconds, seed):
        asked.append((seed, name, seconds))
        return helpers.load_pipeline("latent_diffusion"), 7, seconds

    monkeypatch.setattr(curve, "train_for", train_for)
    return asked


MODELS = ("graph_ddpm", "gnn_ddpm")


def rows_of_the_curve():
    return json.loads(curve.CURVE.read_text())["rows"]


def test_points_that_are_there_are_kept(asked):
    curve.make_curve(MODELS, (0, 1), minutes=(1, 2), num_molecules=30)
    wanted = [(seed, name, minutes) for seed in (0, 1) for name in MODELS for minutes in (1, 2)]
    assert asked == [(seed, name, 60 * minutes) for seed, name, minutes in wanted]
    rows = rows_of_the_curve()
    assert sorted((row["seed"], row["model"], row["minutes"]) for row in rows) == sorted(wanted)
    assert all(0.5 < row["valid"] and row["N"] == 30 and row["steps"] == 7 for row in rows)
    assert curve.FIGURE.read_bytes().startswith(b"\x89PNG")
    curve.make_curve(MODELS, (0, 1), minutes=(1, 2, 5), num_molecules=30)
    assert asked[8:] == [(seed, name, 300) for seed in (0, 1) for name in MODELS]


def test_jobs_of_several_cores_are_merged(asked):
    for seed, name in [(0, "graph_ddpm"), (1, "graph_ddpm"), (0, "gnn_ddpm")]:  # each could run in a process of its own
        curve.run_job(name, seed, minutes=(1,), num_molecules=20)
    assert not curve.CURVE.exists()
    curve.merge_curve()
    merged = [(row["model"], row["seed"]) for row in rows_of_the_curve()]
    assert merged == [("graph_ddpm", 0), ("graph_ddpm", 1), ("gnn_ddpm", 0)]


def test_without_jobs_there_is_nothing_to_merge(asked):
    with pytest.raises(ValueError, match="run `python helpers.py curve` first"):
        curve.merge_curve()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no such call")
def test_a_core_that_is_not_there_is_refused(asked):
    with pytest.raises(ValueError, match="core 9999: expected one of"):
        curve.make_curve(core=9999)
    assert asked == []
