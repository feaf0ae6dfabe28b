"""Scores of pipelines: what is asked for, what stands on the curve and on the card."""

import pytest
from diffusers import DDIMScheduler
from shared import SCHEDULES, untrained

import helpers
from molecule_diffusion import scoring


def test_a_prior_is_asked_for_what_some_molecules_are(qm9):
    assert scoring.condition_to_score((), qm9.test, 5, 0) == {}
    condition = scoring.condition_to_score(("type", "part"), qm9.test, 50, 0)["condition"]
    assert condition.keys() == {"type", "part"} and {len(values) for values in condition.values()} == {50}
    assert set(condition["type"]) <= set(helpers.TYPES) and set(condition["part"]) <= set(helpers.PARTS)
    assert condition == scoring.condition_to_score(("type", "part"), qm9.test, 50, 0)["condition"]
    assert condition != scoring.condition_to_score(("type", "part"), qm9.test, 50, 1)["condition"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_point_of_the_curve(name):
    asked = ("type", "part") if name == "diffusion_prior" else ()
    point = scoring.score_on_the_way(untrained(name), asked, n=20)
    assert point["N"] == 20 and {"valid", "unique", "novel", "fcd"} <= point.keys()
    steps = {"graph_ddpm": 50, "latent_diffusion": 28, "diffusion_prior": 25}[name]
    assert point["sampler"] == f"sde-dpmsolver++, {steps} steps"
    assert {"type_obeyed", "part_obeyed"} <= point.keys() or not asked


def test_any_scheduler_has_a_name_on_the_curve():
    pipe = untrained("latent_diffusion")
    pipe.scheduler = DDIMScheduler(**helpers.NOISE_SCHEDULE, clip_sample=False)
    assert scoring.score_on_the_way(pipe, n=5)["sampler"] == "DDIMScheduler, 28 steps"


def test_the_curve_is_of_the_network_without_restarts():
    pipe = untrained("latent_diffusion")
    plain = scoring.score_on_the_way(pipe, n=20)
    pipe.register_to_config(restarts=[("jump", 0.9, 5)])
    assert scoring.score_on_the_way(pipe, n=20) == plain


def test_the_metrics_of_a_card():
    pipe = untrained("diffusion_prior")
    pipe.card = {"name": "diffusion_prior"}
    metrics = scoring.score_for_card(pipe, 20, 3, asked=("type",), num_inference_steps=4)
    assert metrics["name"] == "diffusion_prior" and metrics["N"] == 20 and metrics["sampling_seed"] == 3
    assert metrics["num_inference_steps"] == 4 and metrics["guidance_scale"] == 1.5
    assert metrics["asked"] == "type of test molecules" and "type_obeyed" in metrics and "part_obeyed" not in metrics
    assert metrics["cpu_ms_per_molecule"] > 0 and "torch" in metrics["sampling_machine"]
