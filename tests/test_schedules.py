"""Schedules by hand, against diffusers and with wrong input; the spacing of steps."""

import math
import re

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import helpers
from molecule_diffusion import schedules


@pytest.mark.parametrize("t", [0, 1, 10, 500, 998, 999])
def test_one_step_is_a_draw_from_the_posterior(x_0, t):
    scheduler = DDPMScheduler(**helpers.GRAPH_NOISE_SCHEDULE, clip_sample=False)
    x_t = scheduler.add_noise(x_0, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor(t))
    step = scheduler.step(x_0, t, x_t, generator=torch.Generator().manual_seed(1)).prev_sample
    betas = scheduler.betas.double()
    mean = helpers.posterior_mean(x_0.double(), x_t.double(), t, betas)
    alpha_bar = helpers.alpha_bars(betas)
    before = alpha_bar[t - 1] if t else 1.0
    sigma = (betas[t] * (1 - before) / (1 - alpha_bar[t])) ** 0.5  # eq. 7 of arXiv:2006.11239
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    # diffusers works in single precision, where 1 - ᾱ of the first steps has three digits
    torch.testing.assert_close(step.double(), mean + sigma * eps, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def scheduler():
    return DDPMScheduler(**helpers.GRAPH_NOISE_SCHEDULE)


def test_alpha_bars(scheduler):
    torch.testing.assert_close(helpers.alpha_bars([0.1, 0.2, 0.5]), torch.tensor([0.9, 0.72, 0.36]))
    torch.testing.assert_close(helpers.alpha_bars(scheduler.betas), scheduler.alphas_cumprod)
    assert helpers.alpha_bars(scheduler.betas.double()).dtype == torch.float64


@pytest.mark.parametrize(
    "betas, message",
    [
        ([0.0, 0.5], r"betas of shape \(2,\) from 0 to 0.5: expected \(T,\), all between 0 and 1"),
        ([0.5, 1.0], "from 0.5 to 1: expected"),
        ([-0.1, 0.5], "from -0.1 to 0.5: expected"),
        ([0.5, 1.5], "from 0.5 to 1.5: expected"),
        ([0, 1], "from 0 to 1: expected"),
        ([0.5, math.nan], "expected"),
        ([[0.1, 0.2]], r"betas of shape \(1, 2\) from 0.1 to 0.2: expected \(T,\)"),
        (0.5, r"betas of shape \(\) from 0.5 to 0.5: expected \(T,\)"),
    ],
)
def test_alpha_bars_explains_wrong_betas(betas, message):
    with pytest.raises(ValueError, match=message):
        helpers.alpha_bars(torch.tensor(betas))


ALPHA_BAR = torch.tensor([0.81, 0.5, 0.04])


def test_q_sample_by_hand():
    x, eps = torch.tensor([[1.0, -1.0], [1.0, 2.0]]), torch.tensor([[2.0, 0.0], [5.0, -1.0]])
    expected = [[0.9 + 2 * 0.19**0.5, -0.9], [0.2 + 5 * 0.96**0.5, 0.4 - 0.96**0.5]]
    torch.testing.assert_close(helpers.q_sample(x, torch.tensor([0, 2]), eps, ALPHA_BAR), torch.tensor(expected))
    torch.testing.assert_close(helpers.q_sample(x, 2, eps, ALPHA_BAR)[1], torch.tensor(expected[1]))


@pytest.mark.parametrize("shape", [(16,), (16, 189), (16, 9, 9), (16, 9, 9, 4)])
def test_q_sample_is_what_diffusers_adds(scheduler, shape):
    x, eps, t = torch.randn(shape), torch.randn(shape), torch.randint(1000, (16,))
    expected = scheduler.add_noise(x, eps, t)
    torch.testing.assert_close(helpers.q_sample(x, t, eps, scheduler.alphas_cumprod), expected)
    torch.testing.assert_close(helpers.q_sample(x, t.int(), eps, scheduler.alphas_cumprod.double()), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(t=3), "t from 3 to 3: the schedule has the steps 0 to 2"),
        (dict(t=-1), "t from -1 to -1: the schedule has the steps 0 to 2"),
        (dict(t=torch.tensor([0, 3])), "t from 0 to 3"),
        (dict(t=1.0), r"t of shape \(\) and dtype torch.float32: expected whole numbers \(B,\) or one of them"),
        (dict(t=torch.tensor([0.0, 1.0])), r"t of shape \(2,\) and dtype torch.float32"),
        (dict(t=torch.tensor([0, 1, 2])), r"t of shape \(3,\) and dtype torch.int64"),
        (dict(t=torch.tensor([[0], [1]])), r"t of shape \(2, 1\)"),
        (dict(eps=torch.zeros(2, 4)), r"x_0 \(2, 3\) torch.float32 and eps \(2, 4\): expected float tensors of one sh"),
        (dict(eps=torch.zeros(3)), r"eps \(3,\)"),  # would broadcast
        (dict(x_0=torch.ones(2, 3, dtype=torch.long)), r"x_0 \(2, 3\) torch.int64"),
        (
            dict(alpha_bar=[0.5, 0.5, 0.1]),
            "alpha_bar must fall at every step, from at most 1 to at least 0; see helpers",
        ),
        (dict(alpha_bar=[0.1, 0.5, 0.9]), "alpha_bar must fall"),
        (dict(alpha_bar=[1.1, 0.5, 0.1]), "alpha_bar must fall"),
        (dict(alpha_bar=[0.9, 0.5, -0.1]), "alpha_bar must fall"),
        (dict(alpha_bar=[0.9, math.nan, 0.1]), "alpha_bar must fall"),
        (dict(alpha_bar=[[0.9, 0.5, 0.1]]), "alpha_bar must fall"),
    ],
)
def test_q_sample_explains_wrong_input(changes, message):
    given = dict(x_0=torch.ones(2, 3), t=1, eps=torch.zeros(2, 3), alpha_bar=ALPHA_BAR) | changes
    with pytest.raises(ValueError, match=message):
        helpers.q_sample(**given)


def test_posterior_mean_of_the_first_step_is_x_0():
    x_0, x_t = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(helpers.posterior_mean(x_0, x_t, 0, [0.1, 0.2, 0.5]), x_0)
    torch.testing.assert_close(helpers.posterior_mean(x_0, x_0 * 0.9**0.5, 0, torch.tensor([0.1])), x_0)


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.5, 1.0], [[0.1, 0.2]]])
def test_posterior_mean_explains_wrong_betas(betas):
    with pytest.raises(ValueError, match="betas of shape"):
        helpers.posterior_mean(torch.ones(2), torch.ones(2), 1, betas)


@pytest.mark.parametrize("t", [True, 0.5, 3, -1, math.inf, math.nan])
def test_posterior_mean_is_of_a_step_that_there_is(t):
    with pytest.raises(ValueError, match="expected a whole number; the schedule has the steps 0 to 2"):
        helpers.posterior_mean(torch.ones(2), torch.ones(2), t, [0.1, 0.2, 0.5])


@pytest.mark.parametrize("steps", [0, -1, 2.5, None])
def test_a_cosine_schedule_has_steps(steps):
    with pytest.raises(ValueError, match="steps=.*: expected a whole number of at least 1"):
        helpers.cosine_betas(steps)


def test_q_sample_reads_numpy_arrays():
    x_0, eps = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    assert torch.equal(
        helpers.q_sample(x_0, np.array([0, 1]), eps, np.array(ALPHA_BAR)),
        helpers.q_sample(torch.ones(2, 3), torch.tensor([0, 1]), torch.zeros(2, 3), ALPHA_BAR),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Power spacing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 0.84, 1.5])
@pytest.mark.parametrize("steps", [1, 2, 20, 333, 1000])
def test_the_power_spaced_steps(steps, power):
    scheduler = helpers.PowerSpacedDPMSolver(power=power, **helpers.NOISE_SCHEDULE, **helpers.SAMPLER)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps
    assert len(times) == steps and times[0] == 999 and times[-1] >= 0 and (times.diff() < 0).all()
    if steps == 20:
        assert times[10] == round(1000 * 0.5**power) - 1


# ---------------------------------------------------------------------------------------------------------------------
# Restarts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_a_jump_is_a_draw_from_q_given_the_guess(prediction_type):
    settings = helpers.NOISE_SCHEDULE | {"prediction_type": prediction_type}
    scheduler = schedules.JumpScheduler(**settings, clip_sample=False)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    x_0, eps = torch.randn(5, 9), torch.randn(5, 9)
    x_t = helpers.q_sample(x_0, 499, eps, scheduler.alphas_cumprod)
    prediction = x_0
    if prediction_type == "v_prediction":
        prediction = scheduler.get_velocity(x_0, eps, torch.full((5,), 499))
    found = scheduler.step(prediction, torch.tensor(499), x_t, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    expected = helpers.q_sample(x_0, 249, noise, scheduler.alphas_cumprod)
    torch.testing.assert_close(found.prev_sample, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pred_original_sample, x_0, atol=1e-5, rtol=1e-4)


def test_the_last_jump_ends_at_the_guess():
    scheduler = schedules.JumpScheduler(**helpers.GRAPH_NOISE_SCHEDULE, clip_sample=False)
    scheduler.set_timesteps(4)
    guess = torch.randn(5, 9)
    assert torch.equal(scheduler.step(guess, torch.tensor(249), torch.randn(5, 9)).prev_sample, guess)


def test_restarts_are_read_as_a_config_file_holds_them():
    found = schedules.read_restarts([["solver", 0.4, 20], ("jump", 1, 1)])
    assert found == [schedules.Restart("solver", 0.4, 20), schedules.Restart("jump", 1, 1)]
    assert schedules.read_restarts([]) == schedules.read_restarts(()) == []


@pytest.mark.parametrize(
    "restarts, message",
    [
        ("jump", "restarts='jump': expected a list of triples"),
        (3, "restarts=3: expected a list of triples"),
        (("jump", 0.4, 15), "'jump' among the restarts: expected a list of triples"),
        ([("jump", 0.4)], "among the restarts: expected a list of triples"),
        ([("hop", 0.4, 15)], "a restart of kind 'hop': expected 'solver' or 'jump'"),
        ([("jump", 0, 15)], "a restart's strength=0: expected above 0, at most 1"),
        ([("jump", 400, 15)], "a restart's strength=400: expected above 0, at most 1"),
        ([("jump", math.nan, 15)], "a restart's strength=nan"),
        ([("jump", "much", 15)], "a restart's strength='much'"),
        ([("jump", 0.4, 0)], "a restart's steps=0: expected a whole number of at least 1"),
        ([("jump", 0.4, 1.5)], "a restart's steps=1.5"),
        ([("jump", 0.4, 401)], "a restart of strength 0.4 has at most 400 steps, not 401"),
    ],
)
def test_what_is_no_restart_is_explained(restarts, message):
    with pytest.raises(ValueError, match=message):
        schedules.read_restarts(restarts)


@pytest.mark.parametrize("t", [7, torch.tensor(7), torch.tensor([0, 500, 999])])
def test_x_0_from_v(t):
    scheduler = DDPMScheduler(**helpers.NOISE_SCHEDULE)
    x_0, eps = torch.randn(3, 9, 8), torch.randn(3, 9, 8)
    x_t = scheduler.add_noise(x_0, eps, torch.as_tensor(t).expand(3))
    v = scheduler.get_velocity(x_0, eps, torch.as_tensor(t).expand(3))
    found = schedules.x_0_from_v(x_t, t, v, scheduler.alphas_cumprod)
    torch.testing.assert_close(found, x_0, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Samplers by name
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules.SAMPLERS)
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_sampler_by_its_name_fits_the_networks(name, kind):
    made = helpers.sampler(name, prediction_type=kind)
    torch.testing.assert_close(helpers.alpha_bars(made.betas), helpers.alpha_bars(helpers.cosine_betas(1000)))
    assert made.config.timestep_spacing == "trailing"
    schedules.check_sampler(made, schedules.HEUN_STEPS, kind)


def test_a_sampler_takes_settings_of_its_class():
    made = helpers.sampler("SDE-DPM-Solver++", use_karras_sigmas=True, timestep_spacing="leading")
    assert made.config.use_karras_sigmas and made.config.timestep_spacing == "leading"
    assert made.config.algorithm_type == "sde-dpmsolver++"


@pytest.mark.parametrize("name", ["ddim", "DDIMScheduler", None, 3, ["DDIM"]])
def test_an_unknown_sampler_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=re.escape(f"unknown sampler {name!r}; known ones: DDPM, DDIM, DPM-Solver++")):
        helpers.sampler(name)


def test_a_setting_that_a_sampler_does_not_have_is_named():
    with pytest.raises(ValueError, match="DDPMScheduler has no setting 'use_karras_sigmas'; see help"):
        helpers.sampler("DDPM", use_karras_sigmas=True)
