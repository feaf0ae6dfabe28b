"""Networks, losses, and the training loop with everything that can interrupt it."""

import errno
import itertools
import math
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

import helpers

RECIPE = dict(steps=300, batch_size=8, learning_rate=1e-2, warmup=10, ema_decay=0.9)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return helpers.TokenVAE(width=16, layers=1, latent_dim=2)


@pytest.fixture(scope="module")
def graphs(qm9):
    return torch.from_numpy(qm9.atoms[1000:1032]), torch.from_numpy(qm9.bonds[1000:1032])


# ---------------------------------------------------------------------------------------------------------------------
# Networks and losses
# ---------------------------------------------------------------------------------------------------------------------


def test_tokens_by_hand():
    atoms, bonds, _ = helpers.to_graph("C=O")
    tokens = helpers.one_hot_graphs(torch.from_numpy(atoms)[None], torch.from_numpy(bonds)[None])
    assert tokens.shape == (1, 9, 41) and tokens.dtype == torch.float32
    carbon, oxygen, padding = tokens[0, 0], tokens[0, 1], tokens[0, 2]
    # place 0-4: the atom's class; then 4 places for the bond to each of the 9 atoms
    assert carbon.nonzero().flatten().tolist() == [0, 5, 5 + 4 + 2, *range(13, 41, 4)]
    assert oxygen.nonzero().flatten().tolist() == [2, 5 + 2, *range(9, 41, 4)]
    assert padding.nonzero().flatten().tolist() == [4, *range(5, 41, 4)]


def test_token_vae_shapes_and_symmetry(vae, graphs):
    mean, logvar = vae.encode(*graphs)
    assert mean.shape == logvar.shape == (32, 9, 2)
    atom_logits, bond_logits = vae.decode(mean)
    assert atom_logits.shape == (32, 9, 5) and bond_logits.shape == (32, 36, 4)
    atoms, bonds = vae.decode_graphs(torch.randn(32, 9, 2) * 5)
    helpers.check_graphs(atoms, bonds)  # symmetric, nothing on the diagonal, no bond to padding
    assert atoms.dtype == bonds.dtype == torch.int8
    torch.testing.assert_close(helpers.encode_graphs(vae, *graphs, batch_size=7), mean)
    accuracy = helpers.reconstruction_accuracy(vae, *graphs)
    assert isinstance(accuracy, float) and 0 <= accuracy <= 1


def test_bond_logits_do_not_depend_on_the_order_of_a_pair():
    head = helpers.PairHead(8)
    tokens = torch.randn(4, 9, 8)
    swapped = head(tokens.flip(1))  # atom i becomes atom 8 - i, so pair (i, j) is asked for as (8 - j, 8 - i)
    matrix = helpers.matrix_from_pairs(head(tokens).permute(0, 2, 1))
    torch.testing.assert_close(helpers.matrix_from_pairs(swapped.permute(0, 2, 1)), matrix.flip(2, 3))


def test_kl_against_monte_carlo(vae, graphs):
    with torch.no_grad():
        nn.init.normal_(vae.to_latent.weight, std=0.5)
        losses = []
        for weight in (0, 1):
            torch.manual_seed(1)
            losses.append(vae.loss(*graphs, kl_weight=weight))
        mean, logvar = vae.encode(*graphs)
        q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
        z = q.sample((4000,))
        difference = q.log_prob(z) - torch.distributions.Normal(0, 1).log_prob(z)
    assert (losses[1] - losses[0]).item() == pytest.approx(difference.sum((-2, -1)).mean().item(), rel=0.01)


def test_reconstruction_loss_is_in_nats_per_molecule(vae, graphs):
    with torch.no_grad():
        for head in (vae.atom_head, vae.bond_head.out):
            nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        loss = vae.loss(*graphs, kl_weight=0).item()
    assert loss == pytest.approx(9 * math.log(5) + 36 * math.log(4), rel=1e-5)  # uniform over all classes


def test_latent_denoiser_shapes():
    model = helpers.LatentDenoiser(latent_dim=2, width=16, hidden=16, depth=2, time_dim=8)
    z = torch.randn(5, 9, 2)
    assert model(z, torch.arange(5)).shape == (5, 9, 2)
    torch.testing.assert_close(model(z, torch.tensor(7)), model(z, torch.full((5,), 7)))
    assert model(z, torch.arange(5)).abs().max() == 0  # it starts from predicting nothing
    assert {"latent_mean", "latent_scale"} <= set(model.state_dict())


def test_time_embedding_by_hand():
    embedded = helpers.timestep_embedding(torch.tensor([0, 3]), 4)
    expected = [[1, 1, 0, 0], [math.cos(3), math.cos(0.03), math.sin(3), math.sin(0.03)]]
    torch.testing.assert_close(embedded, torch.tensor(expected))


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


def test_both_losses_fall_on_a_few_molecules(vae, graphs):
    recipe = RECIPE | dict(steps=120, batch_size=32)
    _, history = helpers.fit(vae, helpers.vae_loss, list(graphs), recipe, monitor_steps={1})
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    model = helpers.LatentDenoiser(latent_dim=2, width=64, hidden=64, depth=2, time_dim=16)
    _, history = helpers.fit(model, helpers.diffusion_loss, [torch.ones(32, 9, 2)], recipe, monitor_steps={1})
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def squared_error(model, x, y):
    return (model(x) - y).pow(2).mean()


def tiny_data():
    x = torch.linspace(-1, 1, 160).reshape(40, 4)
    return [x, x.sum(1, keepdim=True)]


def tiny_fit(state=None, loss=squared_error, data=None, inputs=4, seed=0, **changes):
    torch.manual_seed(0)
    model = nn.Linear(inputs, 1)
    return helpers.fit(model, loss, tiny_data() if data is None else data, RECIPE | changes, seed, state)


def save_at_every_step():
    """Let every look at the clock be 100 s after the one before: `fit` saves when 30 s have passed."""
    helpers.time.monotonic = itertools.count(0, 100).__next__


@pytest.fixture
def saved_at_every_step(monkeypatch):
    monkeypatch.setattr(helpers.time, "monotonic", itertools.count(0, 100).__next__)


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import test_models
def loss(model, x, y):
    print("step", flush=True)
    return test_models.squared_error(model, x, y)
test_models.save_at_every_step()
test_models.tiny_fit(sys.argv[2], loss)
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
    assert [entry["step"] for entry in history] == [3, 100, 200, 250]
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
    ],
)
def test_wrong_data_and_recipes_are_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_fit(**arguments)


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


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------

INTERRUPTS = [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left")]


def write(path, kind, text):
    if kind == "folder":
        path.mkdir()
        path = path / "content"
    path.write_text(text)


def read(path, kind):
    return (path / "content" if kind == "folder" else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", INTERRUPTS)
@pytest.mark.parametrize("moment", ["while writing", "at the first rename", "at the last rename"])
def test_an_interrupt_leaves_what_stood_there(tmp_path, monkeypatch, kind, error, moment):
    path = tmp_path / "target"
    write(path, kind, "old")
    replace = helpers.os.replace
    renames = itertools.count(1)
    last = {"at the first rename": 1, "at the last rename": {"file": 1, "folder": 2}[kind]}.get(moment)

    def interrupted_replace(source, target):
        if next(renames) == last:
            raise error
        replace(source, target)

    monkeypatch.setattr(helpers.os, "replace", interrupted_replace)
    with pytest.raises(type(error)):
        with helpers.atomic(path) as part:
            write(part, kind, "new")
            if moment == "while writing":
                raise error
    assert read(path, kind) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_finished_write_replaces_what_stood_there(tmp_path, kind):
    path = tmp_path / "new folder" / "target"
    for text in ("old", "new"):
        (path.parent / "target.part").mkdir(parents=True, exist_ok=True)  # left over from a killed process
        with helpers.atomic(path) as part:
            write(part, kind, text)
        assert read(path, kind) == text
    assert [p.name for p in path.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("error", INTERRUPTS)
def test_an_interrupted_checkpoint_leaves_the_old_one(vae, tmp_path, monkeypatch, error):
    folder = tmp_path / "token_vae"
    folder.mkdir()
    (folder / "old").write_text("old")

    def interrupted(part, card):
        assert (part / "vae" / "diffusion_pytorch_model.safetensors").exists()
        raise error

    monkeypatch.setattr(helpers, "_write_card", interrupted)
    with pytest.raises(type(error)):
        helpers.save_checkpoint("token_vae", helpers.TokenVAEPipeline(vae), {}, 0, 1.0, tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["token_vae", "token_vae/old"]
