"""The prior: guidance, conditions, obedience; and the oracle that judges."""

import numpy as np
import pandas as pd
import pytest
import torch
from shared import SIZES

import helpers


@pytest.fixture
def encoder():
    table = pd.DataFrame(
        {"gap": [4.0, 6.0, 8.0], "mu": [0.0, 1.0, 5.0], "logP": [-1.0, 0.0, 1.0], "QED": [0.2, 0.4, 0.6]}
    )
    return helpers.ConditionEncoder().set_targets(table)


@pytest.fixture
def pipe(encoder):
    torch.manual_seed(0)
    vae = helpers.TokenVAE(width=16, layers=1, latent_dim=8)
    denoiser = helpers.LatentDenoiser(**SIZES, condition_dim=encoder.size)
    denoiser.set_latents(vae, torch.randn(50, 9, 8))
    torch.nn.init.normal_(denoiser.out.weight)
    scheduler = helpers.PowerSpacedDPMSolver(**helpers.NOISE_SCHEDULE, **helpers.SAMPLER)
    pipe = helpers.DiffusionPriorPipeline(vae, denoiser, scheduler, encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, condition=None, scale=2.0, n=7, **options):
    options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "batch_size": 3} | options
    return pipe(n, condition, scale, **options).latents


def test_guidance_is_a_mixture_of_two_predictions(pipe, encoder):
    seen = []
    draw(pipe, {"type": "ester"}, 3.0, n=2, callback_on_step_end=lambda *call: seen.append(call[2:]))
    asked, nothing = encoder({"type": "ester"}, 2), encoder({}, 2)
    for t, state in seen:
        with torch.no_grad():
            with_, without = (pipe.denoiser(state["x_t"], torch.tensor(t), c) for c in (asked, nothing))
        torch.testing.assert_close(state["prediction"], without + 3 * (with_ - without))
        assert not torch.allclose(with_, without)


def test_guidance_0_ignores_the_condition_and_1_is_the_condition_alone(pipe, encoder):
    wish = {"type": "ester", "gap": 7.0}
    torch.testing.assert_close(draw(pipe, wish, 0.0), draw(pipe, None))
    assert not torch.allclose(draw(pipe, wish, 1.0), draw(pipe, None))
    pipe.encoder.forward = lambda condition, n: encoder.__class__.forward(encoder, wish, n)  # also in place of nothing
    torch.testing.assert_close(draw(pipe, wish, 5.0), draw(pipe, wish, 1.0))


def test_a_negative_condition_takes_the_place_of_nothing(pipe):
    wish, away = {"type": "ester"}, {"type": "amide"}
    torch.testing.assert_close(draw(pipe, wish, 0.0, negative_condition=away), draw(pipe, away, 1.0))
    assert not torch.allclose(draw(pipe, wish, negative_condition=away), draw(pipe, wish))


def test_every_molecule_gets_its_own_condition_across_batches(pipe):
    """One of seven, in the last of three batches, differs; the others do not."""
    same, other = ["ester"] * 7, ["ester"] * 6 + ["cage"]
    with pytest.raises(ValueError, match="unknown type 'cage'"):
        draw(pipe, {"type": other})
    first, second = draw(pipe, {"type": same}), draw(pipe, {"type": ["ester"] * 6 + ["amide"]})
    torch.testing.assert_close(first[:6], second[:6])
    assert not torch.allclose(first[6], second[6])


@pytest.mark.parametrize("scale", [-1, -0.1, float("nan"), float("inf")])
def test_guidance_that_makes_no_sense(pipe, scale):
    with pytest.raises(ValueError, match=f"guidance_scale={scale}: expected 0 or more"):
        draw(pipe, {"type": "ester"}, scale)


def test_an_encoder_of_another_size_is_refused(pipe):
    other = helpers.ConditionEncoder(["a"], ["b"], [])
    with pytest.raises(ValueError, match="conditions of 30 numbers, the encoder makes 2"):
        helpers.DiffusionPriorPipeline(pipe.vae, pipe.denoiser, pipe.scheduler, other)


# ---------------------------------------------------------------------------------------------------------------------
# Quality
# ---------------------------------------------------------------------------------------------------------------------


def test_the_shipped_prior_obeys():
    prior = helpers.load_pipeline("diffusion_prior")
    asked = {"type": np.repeat(list(helpers.TYPES), 25)}
    output = prior(300, asked, generator=torch.Generator().manual_seed(0))
    assert output.valid.mean() >= 0.9 and helpers.obedience(output, asked)["type_obeyed"] >= 0.8
    nothing = prior(300, asked, 0.0, generator=torch.Generator().manual_seed(0))
    assert helpers.obedience(nothing, asked)["type_obeyed"] < 0.3


def test_the_gap_follows_the_wish_and_the_oracle_sees_it():
    prior, oracle = helpers.load_pipeline("diffusion_prior"), helpers.load_pipeline("property_oracle")
    low, high = (
        oracle(prior(100, {"gap": gap}, generator=torch.Generator().manual_seed(0)).valid_smiles)["gap"].mean()
        for gap in (5.0, 9.0)
    )
    assert abs(low - 5) < 0.6 and abs(high - 9) < 0.6


def test_the_oracle_is_right_about_test_molecules(qm9):
    oracle = helpers.load_pipeline("property_oracle")
    rows = qm9.test[:500]
    found = oracle([qm9.smiles[i] for i in rows])
    for name, spread in (("gap", 0.15), ("mu", 0.45)):
        assert np.abs(found[name] - qm9.target(name)[rows]).mean() < spread
    assert oracle([]).shape == (0, 2)


@pytest.mark.parametrize("scale", [None, "two", np.array([1.0, 2.0]), torch.ones(2)])
def test_guidance_is_one_number(pipe, scale):
    with pytest.raises(ValueError, match="guidance_scale=.*: expected 0 or more"):
        draw(pipe, {"type": "ester"}, scale)


def test_a_stream_takes_what_the_call_takes(pipe):
    wish = {"type": "ester", "gap": torch.tensor(6.0)}
    outputs = pipe.stream(4, batch_size=3, condition=wish, guidance_scale=torch.tensor(2.0), num_inference_steps=2)
    assert [len(output) for output in outputs] == [3, 1]


@pytest.mark.parametrize("size", [0, -1, True, None])
def test_the_oracles_batches_are_counted(size):
    with pytest.raises(ValueError, match=f"batch_size={size!r}: expected a whole number of at least 1"):
        helpers.load_pipeline("property_oracle")(["CCO"], batch_size=size)
