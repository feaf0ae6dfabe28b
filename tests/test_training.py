"""The losses, and the training loop with everything that can interrupt it."""

import errno
import itertools
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from shared import SIZES
from torch import nn

import helpers
from molecule_diffusion import training

RECIPE = dict(steps=300, batch_size=8, learning_rate=1e-2, warmup=10, ema_decay=0.9)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def test_diffusion_loss_asks_for_v_as_diffusers_defines_it():
    scheduler = DDPMScheduler(**helpers.NOISE_SCHEDULE)
    z = torch.randn(64, 9, 2)
    seen = {}

    def model(z_t, t):
        seen.update(z_t=z_t, t=t)
        return torch.zeros_like(z_t)

    torch.manual_seed(3)
    loss = helpers.diffusion_loss(model, z)
    torch.manual_seed(3)
    eps = torch.randn_like(z)
    t = seen["t"]
    alpha_bar = scheduler.alphas_cumprod[t][:, None, None]
    torch.testing.assert_close(seen["z_t"], alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * eps)
    v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * z
    torch.testing.assert_close(v, scheduler.get_velocity(z, eps, t))
    torch.testing.assert_close(loss, (v**2).mean())
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000 and len(t.unique()) > 30


def test_a_self_conditioned_loss_gives_a_guess_to_half_of_the_batch():
    scheduler, weight = DDPMScheduler(**helpers.NOISE_SCHEDULE), torch.ones((), requires_grad=True)
    z, calls = torch.randn(16, 9, 2), []

    def model(z_t, t, z_0=None):
        calls.append((z_t, t, z_0))
        return weight * z_t

    helpers.diffusion_loss(model, z, self_conditioned=True)
    (first, first_t, no_guess), (z_t, t, guess) = calls
    assert no_guess is None and torch.equal(first, z_t[:8]) and torch.equal(first_t, t[:8])
    alpha_bar = scheduler.alphas_cumprod[t[:8]][:, None, None]
    torch.testing.assert_close(guess[:8], alpha_bar.sqrt() * first - (1 - alpha_bar).sqrt() * first)
    assert not guess[8:].any(), "no guess for the other half"
    assert not guess.requires_grad, "the guess must not be trained"


def test_both_losses_fall_on_a_few_molecules(vae, graphs):
    recipe = RECIPE | dict(steps=120, batch_size=32)
    _, history = helpers.fit(vae, helpers.vae_loss, list(graphs), recipe, monitor_steps={1})
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    model = helpers.LatentDenoiser(latent_dim=2, width=64, hidden=64, depth=2, time_dim=16)
    _, history = helpers.fit(model, helpers.diffusion_loss, [torch.ones(32, 9, 2)], recipe, monitor_steps={1})
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]


UNIFORM = 9 * math.log(5) + 36 * math.log(4)  # nats of a graph that nothing is known about


def test_graph_loss_is_in_nats_per_molecule(graph_denoiser, x_0):
    torch.manual_seed(0)
    untrained = helpers.graph_diffusion_loss(graph_denoiser, x_0).item()
    assert UNIFORM < untrained < 1.2 * UNIFORM  # random logits are a little worse than none
    nn.init.zeros_(graph_denoiser.out.weight)
    nn.init.zeros_(graph_denoiser.out.bias)
    for x in (x_0, x_0[:3], x_0.to(torch.int8)):
        assert helpers.graph_diffusion_loss(graph_denoiser, x).item() == pytest.approx(UNIFORM, rel=1e-5)


def test_graph_loss_by_hand(x_0):
    """From logits that do not depend on the input: the mean over graphs of -log p of the classes they have."""
    row = torch.randn(189, generator=torch.Generator().manual_seed(0))
    p = (helpers.expected_graph(row[None]) + 1) / 2
    nats = -(p.log() * (x_0 == 1)).sum(1).mean()
    torch.testing.assert_close(helpers.graph_diffusion_loss(lambda x_t, t, x_0=None: row.expand_as(x_t), x_0), nats)


def test_graph_loss_asks_about_noisy_graphs_and_gives_half_of_them_a_guess(x_0):
    scheduler = DDPMScheduler(**helpers.GRAPH_NOISE_SCHEDULE)
    x_0, weight = x_0.repeat(8, 1), torch.ones((), requires_grad=True)
    half = len(x_0) // 2
    calls, times = [], []

    def model(x_t, t, x_0=None):
        calls.append((x_t, t, x_0))
        return 3 * weight * x_t

    for seed in range(60):
        calls.clear()
        torch.manual_seed(seed)
        helpers.graph_diffusion_loss(model, x_0)
        (first, first_t, no_guess), (x_t, t, guess) = calls
        alpha_bar = scheduler.alphas_cumprod[t][:, None]
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        assert eps.mean().abs() < 0.05 and (eps.std() - 1).abs() < 0.05  # 48,384 numbers
        times.append(t)
        assert no_guess is None and torch.equal(first, x_t[:half]) and torch.equal(first_t, t[:half])
        torch.testing.assert_close(guess[:half], helpers.expected_graph(3 * first))
        assert not guess[half:].any(), "no guess for the other half"
        assert not guess.requires_grad, "the guess must not be trained"
    t = torch.cat(times)
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000 and len(t.unique()) > 800
    assert t.float().median() > 550, "t leans to the noisy end"


def test_graph_loss_falls_on_64_graphs(graph_denoiser, qm9):
    data = helpers.graph_vector(qm9.atoms[1000:1064], qm9.bonds[1000:1064]).to(torch.int8)
    recipe = RECIPE | dict(steps=60, batch_size=64)
    _, history = helpers.fit(graph_denoiser, helpers.graph_diffusion_loss, [data], recipe, monitor_steps={1})
    assert history[0]["loss"] < 1.2 * UNIFORM
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only on a GPU is the step recorded")
def test_a_recorded_step_learns_what_a_usual_one_learns(monkeypatch):
    x = torch.randn(512, 4)

    def loss(model, batch):
        return (model(batch + torch.randn_like(batch)) - batch).pow(2).mean()

    found = []
    for recorded in (True, False):
        monkeypatch.setattr(training, "_may_record", lambda accelerator, settings, recorded=recorded: recorded)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 4))
        _, history = helpers.fit(model, loss, [x], RECIPE | dict(steps=60, batch_size=64))
        found.append([entry["loss"] for entry in history])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][-1] < found[0][0]


def test_settings_can_keep_a_gpu_from_recording():
    def accelerator(device, processes):
        return SimpleNamespace(device=torch.device(device), num_processes=processes)

    assert training._may_record(accelerator("cuda", 1), {})
    assert not training._may_record(accelerator("cuda", 1), {"recorded": False})
    assert not training._may_record(accelerator("cuda", 2), {}) and not training._may_record(accelerator("cpu", 1), {})


def squared_error(model, x, y):
    return (model(x) - y).pow(2).mean()


def tiny_data():
    x = torch.linspace(-1, 1, 160).reshape(40, 4)
    return [x, x.sum(1, keepdim=True)]


def tiny_fit(state=None, loss=squared_error, data=None, inputs=4, seed=0, settings=None, **changes):
    torch.manual_seed(0)
    model = nn.Linear(inputs, 1)
    settings = RECIPE | changes if settings is None else settings
    return helpers.fit(model, loss, tiny_data() if data is None else data, settings, seed, state)


def save_at_every_step():
    """Let every look at the clock be 100 s after the one before: `fit` saves when 30 s have passed."""
    training.time.monotonic = itertools.count(0, 100).__next__


@pytest.fixture
def saved_at_every_step(monkeypatch):
    monkeypatch.setattr(training.time, "monotonic", itertools.count(0, 100).__next__)


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import test_training
def loss(model, x, y):
    print("step", flush=True)
    return test_training.squared_error(model, x, y)
test_training.save_at_every_step()
test_training.tiny_fit(sys.argv[2], loss)
"""


def test_a_killed_and_resumed_run_ends_with_the_same_weights(tmp_path):
    state = tmp_path / "state.safetensors"
    command = [sys.executable, "-c", KILLED, helpers.ROOT / "tests", state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=helpers.ROOT) as process:
        for _ in range(20):
            assert process.stdout.readline().strip() == b"step"
        process.kill()
    assert state.exists()
    steps = itertools.count()

    def counted(model, x, y):
        next(steps)
        return squared_error(model, x, y)

    resumed, history = tiny_fit(state, counted)
    assert 0 < next(steps) < RECIPE["steps"] - 10, "the run did not resume"
    uninterrupted, expected = tiny_fit()
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [(entry["step"], entry["loss"]) for entry in history] == [(e["step"], e["loss"]) for e in expected]


def test_a_finished_run_is_not_trained_again(tmp_path):
    state = tmp_path / "state.safetensors"
    first, history = tiny_fit(state, steps=5)
    again, again_history = tiny_fit(state, steps=5, loss=lambda *_: pytest.fail("a step was made"))
    assert torch.equal(first.weight, again.weight) and history == again_history


def test_what_fit_returns_and_leaves_alone():
    model, seen = nn.Linear(4, 1), []
    before = torch.random.get_rng_state()
    ema, history = helpers.fit(
        model,
        squared_error,
        tiny_data(),
        RECIPE | dict(steps=250),
        monitor=lambda m: seen.append(m) or {"x": 1},
        monitor_steps={3},
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [entry["step"] for entry in history] == [3, *range(13, 250, 13), 250]
    assert history[0]["x"] == 1 and len(seen) == 1
    assert not ema.training
    assert not any(p.requires_grad for p in ema.parameters()), "the average drags the graph of every step along"
    assert squared_error(ema, *tiny_data()) < 0.01


def test_the_seed_decides_the_run():
    same, again, other = (tiny_fit(steps=5, seed=seed)[0].weight for seed in (0, 0, 1))
    assert torch.equal(same, again) and not torch.equal(same, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training_and_keeps_the_state(tmp_path, saved_at_every_step, bad):
    state = tmp_path / "state.safetensors"
    calls = itertools.count()

    def loss(model, x, y):
        return squared_error(model, x, y) * (bad if next(calls) == 3 else 1)

    message = rf"the loss is {bad} at step 3 with learning rate 0\.00\d+; the last good state is kept in state.safet"
    with pytest.raises(helpers.TrainingError, match=message + ".*Lower learning_rate"):
        tiny_fit(state, loss)
    resumed, _ = tiny_fit(state)
    assert torch.equal(resumed.weight, tiny_fit()[0].weight)


def test_a_loss_that_is_not_finite_without_a_state():
    with pytest.raises(helpers.TrainingError, match="at step 0 with learning rate [^;]*$"):
        tiny_fit(loss=lambda model, x, y: squared_error(model, x, y) * float("nan"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(batch_size=41), r"lengths \[40, 40\] with batch_size=41: expected equal lengths of at least one batch"),
        (dict(data=[torch.empty(0, 4), torch.empty(0, 1)]), r"lengths \[0, 0\] with batch_size=8"),
        (dict(data=[]), r"lengths \[\] with batch_size=8"),
        (dict(data=[torch.ones(40, 4), torch.ones(39, 1)]), r"lengths \[40, 39\]"),
        (dict(steps=0), "steps=0: expected a whole number of at least 1"),
        (dict(steps=-1), "steps=-1"),
        (dict(steps=2.5), "steps=2.5"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(settings=dict(steps=3)), "expected a dict with steps, batch_size, learning_rate, warmup, ema_decay"),
        (dict(settings=helpers.RECIPES["token_vae"]), "expected a dict with .*, a Recipe's .settings"),
    ],
)
def test_wrong_data_and_recipes_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_fit(**arguments)


def test_a_process_that_there_is_not_does_not_train(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK=2 and WORLD_SIZE=2: expected process RANK"):
        tiny_fit()


@pytest.mark.parametrize(
    "changes, damage, message",
    [
        (dict(learning_rate=1e-3), None, "belongs to another recipe or seed; delete it to start afresh"),
        (dict(seed=1), None, "belongs to another recipe or seed; delete it to start afresh"),
        (dict(inputs=3, data=[torch.ones(40, 3), torch.ones(40, 1)]), None, "(?s)is of another shape .*delete it"),
        ({}, lambda content: content[:100], "is damaged .*delete it to start afresh"),
        ({}, lambda content: b"", "is damaged .*delete it to start afresh"),
        ({}, lambda content: b"\xff" * 500, "is damaged .*delete it to start afresh"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_kept(tmp_path, changes, damage, message):
    state = tmp_path / "state.safetensors"
    tiny_fit(state, steps=5)
    if damage:
        state.write_bytes(damage(state.read_bytes()))
    content = state.read_bytes()
    with pytest.raises(ValueError, match=message):
        tiny_fit(state, steps=5, **changes)
    assert state.read_bytes() == content


def test_the_rate_is_held_before_it_falls():
    recipe = dict(steps=100, hold=0.7, learning_rate=1.0, warmup=10)
    rates = [training.learning_rate(recipe, step) for step in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3]) and rates[10:71] == [1.0] * 61
    assert all(a > b for a, b in zip(rates[70:], rates[71:])) and rates[-1] < 0.03


def test_the_rate_can_begin_again():
    recipe = dict(steps=100, hold=0.5, learning_rate=1.0, warmup=10, again=dict(after=40, learning_rate=0.5))
    rates = [training.learning_rate(recipe, step) for step in range(100)]
    assert rates[:40] == [training.learning_rate(dict(recipe, steps=40, again=None), step) for step in range(40)]
    assert rates[40:] == [training.learning_rate(dict(recipe, steps=60, again=None), step) / 2 for step in range(60)]
    short = [training.learning_rate(dict(recipe, steps=40), step) for step in range(40)]
    assert short == rates[:40], "a training that ends before has one schedule"


def test_a_resumed_average_has_the_buffers_that_it_was_trained_with(tmp_path):
    """Else a denoiser that was trained on one VAE's latents would, resumed, carry the mark of another."""
    state, settings = tmp_path / "state.safetensors", RECIPE | dict(steps=2)

    def prepared(seed):
        torch.manual_seed(seed)
        vae = helpers.TokenVAE(width=16, layers=1, latent_dim=8)
        denoiser = helpers.LatentDenoiser(**SIZES)
        return vae, denoiser, denoiser.set_latents(vae, (1 + seed) * torch.randn(50, 9, 8))

    first, denoiser, z = prepared(0)
    helpers.fit(denoiser, helpers.diffusion_loss, [z], settings, state=state)
    other, denoiser, z = prepared(1)
    resumed, _ = helpers.fit(denoiser, helpers.diffusion_loss, [z], settings, state=state)
    resumed.check_vae(first)
    with pytest.raises(ValueError, match="trained on the latents of another VAE"):
        resumed.check_vae(other)


def test_a_state_of_another_version_is_not_called_damaged(tmp_path):
    state = tmp_path / "state.safetensors"
    save_file({"model.weight": torch.zeros(1)}, state, metadata={"progress": "{}"})
    with pytest.raises(ValueError, match="is of another version of the course .*delete it to start afresh"):
        tiny_fit(state)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(ema_decay=float("nan")), "ema_decay=nan: expected at least 0 and less than 1"),
        (dict(ema_decay=1.0), "ema_decay=1.0"),
        (dict(learning_rate=float("nan")), "learning_rate=nan: expected a number above 0"),
        (dict(learning_rate=0), "learning_rate=0"),
        (dict(seed=True), "seed=True: expected a whole number"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(seed=-1), "seed=-1"),
    ],
)
def test_numbers_that_would_train_nonsense(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_fit(**changes)


INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_training
calls = []
def loss(model, x, y):
    calls.append(1)
    if len(calls) == 12:
        os.kill(os.getpid(), signal.SIGINT)
    return test_training.squared_error(model, x, y)
try:
    test_training.tiny_fit(sys.argv[2], loss)
except KeyboardInterrupt as stop:
    print(stop)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process there")
def test_ctrl_c_in_the_first_seconds_keeps_the_steps_that_were_made(tmp_path, run_python):
    state = tmp_path / "state.safetensors"
    result = run_python("-c", INTERRUPTED, helpers.ROOT / "tests", state)
    assert result.stdout.strip() == f"stopped after step 12 of {RECIPE['steps']}", result.stderr
    steps = itertools.count()

    def counted(model, x, y):
        next(steps)
        return squared_error(model, x, y)

    resumed, _ = tiny_fit(state, counted)
    assert next(steps) == RECIPE["steps"] - 12
    assert torch.equal(resumed.weight, tiny_fit()[0].weight)


def test_a_second_ctrl_c_stops_at_once_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGINT)

    def loss(model, x, y):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one was noted too")

    with pytest.raises(KeyboardInterrupt):
        tiny_fit(loss=loss)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes there")
def test_a_state_can_be_read_by_others(tmp_path):
    tiny_fit(tmp_path / "state.safetensors", steps=2)
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "state.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch, saved_at_every_step):
    state = tmp_path / "state.safetensors"
    write_bytes, writes = Path.write_bytes, itertools.count()

    def full(path, content):
        if next(writes) == 5:
            raise OSError(errno.ENOSPC, "no space left")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        tiny_fit(state)
    monkeypatch.undo()
    assert torch.equal(tiny_fit(state)[0].weight, tiny_fit()[0].weight)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


SEVERAL = """
import os, sys, torch, helpers
from torch import nn
from torch.nn import functional as F
from molecule_diffusion import training

training.bf16_is_fast = lambda: False  # its rounding would differ between one sum and two

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
    def forward(self, x):
        return self.layer(x)

torch.manual_seed(0)
x = torch.randn(200, 3)
model = Line()
settings = dict(steps=30, batch_size=int(sys.argv[2]), learning_rate=0.05, warmup=1, ema_decay=0.9)
state = sys.argv[1] + ".safetensors"
model, _ = helpers.fit(model, lambda model, x: F.mse_loss(model(x), x.sum(1, keepdim=True)), [x], settings, 0, state)
if int(os.environ.get("RANK", 0)) == 0:
    torch.save(model.state_dict(), sys.argv[1])
"""


def test_two_processes_learn_what_one_does_with_twice_the_batch(tmp_path, run_python):
    script = tmp_path / "several.py"
    script.write_text(SEVERAL)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 0, "--rdzv_backend", "c10d"]
    environment = os.environ | {"PYTHONPATH": str(helpers.ROOT), "OMP_NUM_THREADS": "1"}
    one = run_python(script, tmp_path / "one", 16, env=environment)
    two = run_python(*launch, script, tmp_path / "two", 8, env=environment)
    half = run_python(script, tmp_path / "half", 8, env=environment)
    for result in (one, two, half):
        assert result.returncode == 0, result.stderr
    one, two, half = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two", "half"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-3, rtol=1e-3)
        assert not torch.allclose(one[name], half[name], atol=1e-2)
