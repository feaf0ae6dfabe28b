"""Quality after so many minutes of training."""

import json

import pytest

import helpers
from molecule_diffusion import curve


def test_a_budget_is_kept_and_shared_with_the_vae(monkeypatch):
    trained = []

    def fit(network, loss, data, settings, seed):
        trained.append((type(network).__name__, settings))
        return network, [{"seconds": settings["steps"] * 0.5}]  # a step takes half a second

    monkeypatch.setattr(curve, "fit", fit)
    pipe, steps, spent = curve.train_for("latent_diffusion", 1000)
    assert isinstance(pipe, helpers.LatentDiffusionPipeline) and (steps, spent) == (1200, 1000)
    names, settings = zip(*trained)
    assert names == ("TokenVAE", "TokenVAE", "LatentDenoiser", "LatentDenoiser")  # a trial before each
    assert [entry["steps"] for entry in settings] == [20, 800, 20, 1200]
    assert settings[1]["warmup"] == 80 and settings[1]["ema_decay"] == pytest.approx(0.975)
    assert "restart" not in settings[3]
    pipe.denoiser.check_vae(pipe.vae)  # on its latents


def test_points_that_are_there_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(curve, "CURVE", tmp_path / "curve.json")
    monkeypatch.setattr(curve, "FIGURE", tmp_path / "curve.png")
    asked = []

    def train_for(name, seconds, seed):
        asked.append((seed, name, seconds))
        return helpers.load_pipeline("latent_diffusion"), 7, seconds

    monkeypatch.setattr(curve, "train_for", train_for)
    models = ("graph_ddpm", "gnn_ddpm")
    curve.make_curve(models, minutes=(1, 2), seeds=(0, 1), num_molecules=30)
    rows = json.loads(curve.CURVE.read_text())["rows"]
    wanted = [(seed, name, minutes) for seed in (0, 1) for name in models for minutes in (1, 2)]
    assert asked == [(seed, name, 60 * minutes) for seed, name, minutes in wanted]
    assert [(row["seed"], row["model"], row["minutes"]) for row in rows] == wanted
    assert all(0.5 < row["valid"] and row["N"] == 30 and row["steps"] == 7 for row in rows)
    assert curve.FIGURE.read_bytes().startswith(b"\x89PNG")
    curve.make_curve(models, minutes=(1, 2, 5), seeds=(0, 1), num_molecules=30)
    assert asked[8:] == [(seed, name, 300) for seed in (0, 1) for name in models]
