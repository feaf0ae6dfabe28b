"""Recipes: what they learn from, and training by them."""

import inspect
import json

import numpy as np
import pytest
import torch
from shared import SIZES, draw

import helpers
from molecule_diffusion import recipes


def test_the_prior_learns_from_one_half_only(qm9, monkeypatch):
    first, _ = qm9.halves()
    monkeypatch.setattr(helpers.QM9, "halves", lambda self: (first[:300], first[300:600]))
    made = helpers.RECIPES["diffusion_prior"].prepare({"model": SIZES})
    model, (z, condition) = made.network, made.data
    assert z.shape == (300, 9, 8) and condition.shape == (300, model.config.condition_dim)
    vae = helpers.load_pipeline("token_vae").vae
    expected = helpers.encode_graphs(vae, qm9.atoms[first[:300]], qm9.bonds[first[:300]])
    torch.testing.assert_close(z * model.latent_scale + model.latent_mean, expected, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(made.loss(model, z[:8], condition[:8]))
    judge = {"model": dict(nodes=16, edges=8, layers=1), "beside_weight": 0.2}
    made = helpers.RECIPES["property_oracle"].prepare(judge)
    of_atoms, _, values = made.data
    assert (of_atoms[:, :, :5].argmax(-1).numpy() == qm9.atoms[first[300:600]]).all()
    torch.testing.assert_close(values.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    assert torch.isfinite(made.loss(made.network, *(column[:4] for column in made.data)))


def test_the_data_of_graph_diffusion_are_the_training_molecules(qm9):
    recipe = helpers.RECIPES["graph_ddpm"]
    made = recipe.prepare({"model": SIZES})
    model, [data] = made.network, made.data
    assert data.shape == (len(qm9.train), 189) and data.dtype == torch.int8
    rows = [0, 1, 50_000, -1]
    atoms, bonds = helpers.vector_graph(data[rows])
    np.testing.assert_array_equal(atoms, qm9.atoms[qm9.train[rows]])
    np.testing.assert_array_equal(bonds, qm9.bonds[qm9.train[rows]])
    assert made.loss is helpers.graph_diffusion_loss and model.config.width == 32
    pipe = recipe.assemble(model, made.parts)
    assert isinstance(pipe, helpers.GraphDDPMPipeline) and pipe.denoiser is model
    assert {key: pipe.scheduler.config[key] for key in helpers.GRAPH_NOISE_SCHEDULE} == helpers.GRAPH_NOISE_SCHEDULE


@pytest.mark.parametrize("command", [helpers.train, recipes.score_checkpoint])
def test_an_unknown_recipe_lists_the_known_ones(command):
    with pytest.raises(ValueError, match="unknown recipe 'nonsense'; known ones: " + ", ".join(helpers.RECIPES)):
        command("nonsense")


def test_the_vae_learns_with_its_recipe_s_kl_weight(qm9):
    recipe = helpers.RECIPES["token_vae"]
    made = recipe.prepare({"model": dict(width=16, layers=1), "kl_weight": 0.5})
    batch = [column[:8] for column in made.data]
    losses = []
    for loss in (made.loss, lambda *given: helpers.vae_loss(*given, kl_weight=0.5), helpers.vae_loss):
        torch.manual_seed(0)
        losses.append(loss(made.network, *batch).item())
    assert losses[0] == losses[1] != losses[2]
    default = inspect.signature(helpers.vae_loss).parameters["kl_weight"].default
    assert default == recipe.settings["kl_weight"], "the notebook's loss is not the recipe's"


# ---------------------------------------------------------------------------------------------------------------------
# A new checkpoint is one recipe and nothing else
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(qm9, tmp_path, monkeypatch):
    """A new recipe, called tiny: a small GraphDDPM; every file of its training goes to a folder of its own."""

    def prepare(settings):
        data = [helpers.graph_vector(qm9.atoms[:64], qm9.bonds[:64])]
        return recipes.Ingredients(helpers.GraphDenoiser(**settings["model"]), helpers.graph_diffusion_loss, data)

    settings = dict(model=SIZES, steps=4, batch_size=8, learning_rate=1e-3, warmup=1, ema_decay=0.9)
    recipe = helpers.Recipe(
        settings=settings,
        prepare=prepare,
        pipeline=helpers.GraphDDPMPipeline,
        component="denoiser",
        sampler=recipes.equal_steps,
        monitor=lambda pipe: {"molecules": len(draw(pipe, 3, num_inference_steps=2))},
        score=lambda pipe, n, seed, **arguments: {"N": n, "seed": seed, **arguments},
        fast=dict(num_inference_steps=7),
    )
    monkeypatch.setitem(helpers.RECIPES, "tiny", recipe)
    for name in ("CHECKPOINTS", "TRAINING", "RESULTS"):
        monkeypatch.setattr(recipes, name, tmp_path / name)
    return tmp_path


def test_the_recipe_with_seed_0_becomes_the_shipped_checkpoint(tiny, capsys):
    folder = helpers.train("tiny")
    assert folder == tiny / "CHECKPOINTS" and f"saved to {folder / 'tiny'}" in capsys.readouterr().out
    pipe = helpers.load_pipeline("tiny", folder)
    assert isinstance(pipe, helpers.GraphDDPMPipeline) and len(draw(pipe, 3)) == 3
    card = pipe.card
    assert card["recipe"] == json.loads(json.dumps(helpers.RECIPES["tiny"].settings)) and card["seed"] == 0
    assert card["metrics"] == {"N": 10_000, "seed": 0}
    assert card["metrics_fast"] == {"N": 10_000, "seed": 0, "num_inference_steps": 7}
    curve = json.loads((tiny / "RESULTS" / "tiny_curve.json").read_text())
    assert [entry["step"] for entry in curve] == [1, 2, 3, 4] and all(entry["molecules"] == 3 for entry in curve)


@pytest.mark.parametrize(
    "changes, run",
    [(dict(seed=1), "tiny_4_steps_of_8_seed_1"), (dict(steps=2, batch_size=4), "tiny_2_steps_of_4_seed_0")],
)
def test_other_runs_do_not_replace_the_shipped_one(tiny, changes, run):
    folder = helpers.train("tiny", **changes)
    assert folder == tiny / "TRAINING" / run
    assert (folder / "tiny_curve.json").exists() and not (tiny / "CHECKPOINTS").exists()
    assert helpers.load_pipeline("tiny", folder).card["recipe"]["steps"] == changes.get("steps", 4)


def test_a_trained_checkpoint_is_not_trained_again(tiny, monkeypatch):
    helpers.train("tiny")
    weights = helpers.load_pipeline("tiny", tiny / "CHECKPOINTS").denoiser.state_dict()
    monkeypatch.setattr(helpers.GraphDenoiser, "forward", lambda *_: pytest.fail("a step was made"))
    again = helpers.load_pipeline("tiny", helpers.train("tiny")).denoiser.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("steps", [0, -1, 1.5, True])
def test_wrong_steps_are_named(steps):
    with pytest.raises(ValueError, match=f"steps={steps!r}: expected a whole number of at least 1"):
        helpers.train("token_vae", steps=steps)


@pytest.mark.parametrize("name", helpers.RECIPES)
def test_every_recipe_is_whole(name):
    recipe = helpers.RECIPES[name]
    assert {"model", "steps", "batch_size", "learning_rate", "warmup", "ema_decay"} <= recipe.settings.keys()
    takes = inspect.signature(recipe.pipeline.__init__).parameters
    assert recipe.component in takes and ("scheduler" in takes) == (recipe.sampler is not None)
    if recipe.fast is not None:
        assert recipe.fast.keys() <= inspect.signature(recipe.pipeline.__call__).parameters.keys()
