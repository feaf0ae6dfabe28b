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
    pipe, spent = curve.train_for("latent_diffusion", 1000)
    assert isinstance(pipe, helpers.LatentDiffusionPipeline) and spent == 1000
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
        asked.append((name, seconds))
        return helpers.load_pipeline("token_vae"), seconds

    monkeypatch.setattr(curve, "train_for", train_for)
    curve.make_curve(minutes=(1, 2), num_molecules=30)
    rows = json.loads(curve.CURVE.read_text())["rows"]
    assert asked == [(name, 60 * minutes) for name in curve.MODELS for minutes in (1, 2)]
    assert [(row["model"], row["minutes"]) for row in rows] == [(name, m) for name in curve.MODELS for m in (1, 2)]
    assert all(0 < row["valid"] < 1 and row["N"] == 30 for row in rows)
    assert curve.FIGURE.read_bytes().startswith(b"\x89PNG")
    curve.make_curve(minutes=(1, 2, 5), num_molecules=30)
    assert asked[4:] == [(name, 300) for name in curve.MODELS]
