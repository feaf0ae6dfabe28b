"""Networks, losses, and the training loop with everything that can interrupt it."""

import errno
import itertools
import math
import subprocess
import sys

import numpy as np
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


@pytest.fixture
def graph_denoiser():
    torch.manual_seed(0)
    return helpers.GraphDenoiser(width=32, hidden=32, depth=1, time_dim=16)


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
# Graph vectors and diffusion on them
# ---------------------------------------------------------------------------------------------------------------------

UNIFORM = 9 * math.log(5) + 36 * math.log(4)  # nats of a graph that nothing is known about


@pytest.fixture(scope="module")
def x_0(graphs):
    return helpers.graph_vector(*graphs)


def test_a_graph_vector_by_hand():
    x = helpers.graph_vector(*helpers.to_graphs(["C=O"]))
    assert x.shape == (1, helpers.GRAPH_SIZE) == (1, 189) and x.dtype == torch.float32
    atoms, pairs = helpers.split_vector(x[0])
    assert atoms.shape == (9, 5) and pairs.shape == (36, 4)
    assert atoms.argmax(-1).tolist() == [0, 2, *[helpers.NO_ATOM] * 7]
    assert pairs.argmax(-1).tolist() == [2, *[0] * 35]  # the pair (0, 1) is the first one
    assert x.unique().tolist() == [-1, 1] and (x == 1).sum() == 9 + 36


def test_vectors_become_the_same_graphs_again(qm9):
    rows = np.random.default_rng(0).choice(len(qm9), 1000, replace=False)
    atoms, bonds = qm9.atoms[rows], qm9.bonds[rows]
    x = helpers.graph_vector(atoms, bonds)
    for vectors in (x, x.to(torch.int8), 0.1 * x, x.bfloat16()):
        again = helpers.vector_graph(vectors)
        assert [part.dtype for part in again] == [np.int8, np.int8]
        np.testing.assert_array_equal(again[0], atoms)
        np.testing.assert_array_equal(again[1], bonds)
    assert torch.equal(helpers.graph_vector(torch.from_numpy(atoms), torch.from_numpy(bonds)), x)


def test_no_graphs_are_no_vectors(qm9):
    assert helpers.graph_vector(qm9.atoms[:0], qm9.bonds[:0]).shape == (0, 189)
    assert [part.shape for part in helpers.vector_graph(torch.empty(0, 189))] == [(0, 9), (0, 9, 9)]


def with_bond(i, j, order, symmetric=True):
    def change(atoms, bonds):
        bonds[0, i, j] = order
        if symmetric:
            bonds[0, j, i] = order
        return atoms, bonds

    return change


def with_atom(value):
    def change(atoms, bonds):
        atoms[0, 0] = value
        return atoms, bonds

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (with_bond(0, 1, 1, symmetric=False), "not symmetric"),
        (with_bond(0, 0, 1), "on its diagonal"),
        (with_bond(0, 8, 1), "leads to a padded atom"),
        (with_bond(0, 1, 4), r"bonds holds 0\.\.4: expected 0\.\.3"),
        (with_bond(0, 1, -1), r"bonds holds -1\.\."),
        (with_atom(5), r"atoms holds 0\.\.5: expected 0\.\.4"),
        (with_atom(-1), r"atoms holds -1\.\."),
        (lambda a, b: (a.astype(np.float32), b), "atoms has dtype float32: expected integer classes"),
        (lambda a, b: (a, b.astype(bool)), "bonds has dtype bool: expected integer classes"),
        (lambda a, b: (torch.from_numpy(a).half(), b), "atoms has dtype float16"),
        (lambda a, b: (a[0], b[0]), r"atoms \(9,\) and bonds \(9, 9\): expected \(N, 9\)"),
        (lambda a, b: (a, b[:1]), "with the same N"),
        (lambda a, b: (np.eye(5, dtype=np.int8)[a], b), "expected .* with the same N"),
    ],
    ids="asymmetric diagonal padding bond-class negative-bond atom-class negative-atom float-atoms bool-bonds "
    "half-atoms one-graph fewer-bonds one-hots".split(),
)
def test_what_is_no_graph_has_no_vector(change, message):
    with pytest.raises(ValueError, match=message):
        helpers.graph_vector(*change(*helpers.to_graphs(["C=O", "CCO"])))


def test_the_parts_of_a_vector_are_views():
    x = torch.zeros(2, 3, 189)
    atoms, pairs = helpers.split_vector(x)
    assert atoms.shape == (2, 3, 9, 5) and pairs.shape == (2, 3, 36, 4)
    atoms += 1
    pairs += 2
    assert x[..., :45].unique().tolist() == [1] and x[..., 45:].unique().tolist() == [2]


@pytest.mark.parametrize("shape", [(4, 188), (4, 190), (189, 4), (4, 9, 5), (4, 9, 41), (4, 0), (1,)])
def test_other_shapes_are_no_graph_vector(graph_denoiser, shape):
    x = torch.zeros(shape)
    readers = (
        helpers.split_vector,
        helpers.vector_graph,
        helpers.expected_graph,
        lambda x: graph_denoiser(x, torch.tensor(3)),
    )
    for read in readers:
        with pytest.raises(
            ValueError, match=r"a graph vector of shape \(.*\): expected \(..., 189\), see graph_vector"
        ):
            read(x)


def test_any_noise_becomes_a_symmetric_graph_without_bonds_to_padding(x_0):
    generator = torch.Generator().manual_seed(0)
    scheduler = DDPMScheduler(**helpers.GRAPH_NOISE_SCHEDULE)
    for t in (0, 300, 700, 999):
        noise = torch.randn(len(x_0), 189, generator=generator)
        for eps in (torch.zeros_like(noise), 100 * noise, noise.abs(), -noise.abs(), noise):
            x_t = scheduler.add_noise(x_0, eps, torch.full((len(x_0),), t))
            atoms, bonds = helpers.vector_graph(x_t)
            np.testing.assert_array_equal(bonds, bonds.transpose(0, 2, 1))
            assert not bonds[atoms == helpers.NO_ATOM].any()
            helpers.check_graphs(atoms, bonds)
    assert (atoms != helpers.vector_graph(x_0)[0]).any(), "nothing was noisy"


def test_expected_graph_by_hand():
    logits = torch.randn(3, 189, generator=torch.Generator().manual_seed(0)) * 3
    expected = np.empty((3, 189))
    for row, values in zip(expected, logits.double().numpy()):
        for start, classes in [(5 * i, 5) for i in range(9)] + [(45 + 4 * k, 4) for k in range(36)]:
            weights = np.exp(values[start : start + classes])
            row[start : start + classes] = 2 * weights / weights.sum() - 1
    np.testing.assert_allclose(helpers.expected_graph(logits), expected, atol=1e-6)
    assert helpers.expected_graph(logits.bfloat16()).dtype == torch.float32  # probabilities in full precision


def test_certain_logits_expect_the_graph_itself(x_0):
    torch.testing.assert_close(helpers.expected_graph(50 * x_0), x_0)


def test_graph_denoiser_shapes(graph_denoiser, x_0):
    nn.init.normal_(graph_denoiser.blocks[0].modulation.weight)  # t has no say before the first step of training
    x_t, t = x_0[:5], torch.arange(5)
    logits = graph_denoiser(x_t, t)
    assert logits.shape == (5, 189) and logits.dtype == torch.float32
    torch.testing.assert_close(graph_denoiser(x_t, torch.tensor(7)), graph_denoiser(x_t, torch.full((5,), 7)))
    torch.testing.assert_close(graph_denoiser(x_t, t)[3:], graph_denoiser(x_t[3:], t[3:]))
    assert not torch.allclose(logits, graph_denoiser(x_t, t + 500)), "t is not read"


def test_no_guess_is_a_guess_of_zeros(graph_denoiser, x_0):
    t = torch.tensor(500)
    logits = graph_denoiser(x_0, t)
    assert torch.equal(logits, graph_denoiser(x_0, t, None))
    assert torch.equal(logits, graph_denoiser(x_0, t, torch.zeros_like(x_0)))
    assert not torch.allclose(logits, graph_denoiser(x_0, t, x_0)), "the guess is not read"


def test_graph_loss_is_in_nats_per_molecule(graph_denoiser, x_0):
    torch.manual_seed(0)
    untrained = helpers.graph_diffusion_loss(graph_denoiser, x_0).item()
    assert UNIFORM < untrained < 1.2 * UNIFORM  # random logits are a little worse than none
    nn.init.zeros_(graph_denoiser.out.weight), nn.init.zeros_(graph_denoiser.out.bias)
    for x in (x_0, x_0[:3], x_0.to(torch.int8)):
        assert helpers.graph_diffusion_loss(graph_denoiser, x).item() == pytest.approx(UNIFORM, rel=1e-5)


def test_graph_loss_by_hand(x_0):
    """From logits that do not depend on the input: the mean over graphs of -log p of the classes they have."""
    row = torch.randn(189, generator=torch.Generator().manual_seed(0))
    p = (helpers.expected_graph(row[None]) + 1) / 2
    nats = -(p.log() * (x_0 == 1)).sum(1).mean()
    torch.testing.assert_close(helpers.graph_diffusion_loss(lambda x_t, t, x_0=None: row.expand_as(x_t), x_0), nats)


def test_graph_loss_asks_about_noisy_graphs_and_in_half_of_the_steps_gives_a_guess(x_0):
    scheduler = DDPMScheduler(**helpers.GRAPH_NOISE_SCHEDULE)
    x_0, weight = x_0.repeat(8, 1), torch.ones((), requires_grad=True)
    calls, guesses, times = [], 0, []

    def model(x_t, t, x_0=None):
        calls.append((x_t, t, x_0))
        return 3 * weight * x_t

    for seed in range(60):
        calls.clear()
        torch.manual_seed(seed)
        helpers.graph_diffusion_loss(model, x_0)
        x_t, t, guess = calls[-1]
        alpha_bar = scheduler.alphas_cumprod[t][:, None]
        eps = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        assert eps.mean().abs() < 0.05 and (eps.std() - 1).abs() < 0.05  # 48,384 numbers
        times.append(t)
        if guess is None:
            assert len(calls) == 1
            continue
        guesses += 1
        assert len(calls) == 2 and calls[0][2] is None
        assert torch.equal(calls[0][0], x_t) and torch.equal(calls[0][1], t)
        torch.testing.assert_close(guess, helpers.expected_graph(3 * x_t))
        assert not guess.requires_grad, "the guess must not be trained"
    t = torch.cat(times)
    assert 15 <= guesses <= 45
    assert t.dtype == torch.int64 and 0 <= t.min() and t.max() < 1000 and len(t.unique()) > 800
    assert t.float().median() > 550, "t leans to the noisy end"


def test_graph_loss_falls_on_64_graphs(graph_denoiser, qm9):
    data = helpers.graph_vector(qm9.atoms[1000:1064], qm9.bonds[1000:1064]).to(torch.int8)
    recipe = RECIPE | dict(steps=60, batch_size=64)
    _, history = helpers.fit(graph_denoiser, helpers.graph_diffusion_loss, [data], recipe, monitor_steps={1})
    assert history[0]["loss"] < 1.2 * UNIFORM
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]


def test_the_data_of_graph_diffusion_are_the_training_molecules(qm9):
    recipe = {"model": dict(width=32, hidden=32, depth=1, time_dim=16)}
    model, loss, [data], _, finish = helpers._graph_ddpm_setup(recipe)
    assert data.shape == (len(qm9.train), 189) and data.dtype == torch.int8
    rows = [0, 1, 50_000, -1]
    atoms, bonds = helpers.vector_graph(data[rows])
    np.testing.assert_array_equal(atoms, qm9.atoms[qm9.train[rows]])
    np.testing.assert_array_equal(bonds, qm9.bonds[qm9.train[rows]])
    assert loss is helpers.graph_diffusion_loss and model.config.width == 32
    pipe = finish(model)
    assert isinstance(pipe, helpers.GraphDDPMPipeline) and pipe.denoiser is model
    assert {key: pipe.scheduler.config[key] for key in helpers.GRAPH_NOISE_SCHEDULE} == helpers.GRAPH_NOISE_SCHEDULE


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


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 9, 8)])
def test_kl_divergence_is_that_of_torch(shape):
    mean, logvar = torch.randn(shape), torch.randn(shape)
    q, prior = torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0, 1)
    kl = helpers.kl_divergence(mean, logvar)
    assert kl.shape == shape[:-1] and (kl >= 0).all()
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(q, prior).sum(-1))
    assert (helpers.kl_divergence(torch.zeros(shape), torch.zeros(shape)) == 0).all()


def test_reparameterised_draws_are_normal_and_pass_gradients():
    mean, logvar = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([0.0, 2.0], requires_grad=True)
    eps = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    z = helpers.reparameterise(mean, logvar, eps)
    torch.testing.assert_close(z.mean(0), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(z.var(0), logvar.exp(), atol=0, rtol=0.03)
    z[0].sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones(2))
    torch.testing.assert_close(logvar.grad, 0.5 * (0.5 * logvar).exp().detach() * eps[0])


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


def test_the_second_cosine_starts_from_half_the_rate():
    recipe = dict(steps=100, restart=60, learning_rate=1.0, warmup=10)
    rates = [helpers._learning_rate(recipe, step) for step in range(100)]
    plain = [helpers._learning_rate(recipe | {"restart": 100}, step) for step in range(100)]
    assert rates[59] < 0.03 < 0.49 < rates[60] <= 0.5 and rates[99] < 0.02
    assert all(a >= b for a, b in zip(rates[9:59], rates[10:60])) and all(
        a >= b for a, b in zip(rates[60:], rates[61:])
    )
    assert plain == [helpers._learning_rate(dict(steps=100, learning_rate=1.0, warmup=10), step) for step in range(100)]


def test_standardised_latents(vae):
    z = torch.randn(400, 9, 8) * torch.tensor([2.0, 1, 1, 1, 1, 1, 1, 0.01]) + 3
    denoiser = helpers.LatentDenoiser(width=16, hidden=16, depth=1, time_dim=16)
    ours = denoiser.set_latents(vae, z)
    torch.testing.assert_close(ours * denoiser.latent_scale + denoiser.latent_mean, z)
    torch.testing.assert_close(ours.mean(0), torch.zeros(9, 8), atol=1e-5, rtol=0)
    assert abs(denoiser.latent_scale - 8 / 7) < 0.1, "the dimension without information must not count"
    assert ours[..., 7].std() < 0.02


def test_a_denoiser_with_a_condition():
    torch.manual_seed(0)
    denoiser = helpers.LatentDenoiser(width=16, hidden=16, depth=1, time_dim=16, condition_dim=5)
    torch.nn.init.normal_(denoiser.out.weight)
    z, t = torch.randn(3, 9, 8), torch.tensor([1, 500, 999])
    first, second = denoiser(z, t, torch.zeros(3, 5)), denoiser(z, t, torch.eye(3, 5))
    assert first.shape == z.shape and not torch.allclose(first, second)
    torch.testing.assert_close(denoiser(z[:1], t[:1], torch.zeros(1, 5)), first[:1])
