"""Networks: shapes, symmetry, by hand and against torch."""

import math

import pytest
import torch
from torch import nn

import helpers

# ---------------------------------------------------------------------------------------------------------------------
# The TokenVAE
# ---------------------------------------------------------------------------------------------------------------------


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
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        loss = vae.loss(*graphs, kl_weight=0).item()
    assert loss == pytest.approx(9 * math.log(5) + 36 * math.log(4), rel=1e-5)  # uniform over all classes


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
# Denoisers
# ---------------------------------------------------------------------------------------------------------------------


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


def test_a_denoiser_that_reads_its_guess():
    torch.manual_seed(0)
    denoiser = helpers.LatentDenoiser(width=16, hidden=16, depth=1, time_dim=16, self_conditioning=True)
    torch.nn.init.normal_(denoiser.out.weight)
    z, t = torch.randn(3, 9, 8), torch.tensor([1, 500, 999])
    assert not torch.allclose(denoiser(z, t), denoiser(z, t, z_0=z))
    torch.testing.assert_close(denoiser(z, t), denoiser(z, t, z_0=torch.zeros_like(z)))
    deaf = helpers.LatentDenoiser(width=16, hidden=16, depth=1, time_dim=16)
    torch.testing.assert_close(deaf(z, t), deaf(z, t, z_0=z))


@pytest.mark.parametrize("a, b", [([1.0, 2.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 6.0]), ([1.0, 0.0], [-1.0, 0.0])])
def test_slerp_between_parallel_vectors_is_straight(a, b):
    a, b = torch.tensor(a), torch.tensor(b)
    torch.testing.assert_close(helpers.slerp(a, b, 0.25), 0.75 * a + 0.25 * b)
    assert helpers.slerp(a, b, 0.5).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_decoded(vae, bad):
    z = torch.zeros(2, 9, 2)
    z[1, 3] = bad
    with pytest.raises(ValueError, match="what the TokenVAE decoded: NaN or infinite values"):
        vae.decode_graphs(z)
    with torch.no_grad():
        vae.atom_head.weight[0, 0] = bad
    with pytest.raises(ValueError, match="weights, latents or vectors are damaged"):
        vae.decode_graphs(torch.randn(2, 9, 2))


def test_kl_needs_a_variance_for_each_mean():
    with pytest.raises(ValueError, match=r"mean \(2, 8\) and logvar \(8,\): expected tensors of one shape"):
        helpers.kl_divergence(torch.zeros(2, 8), torch.zeros(8))


def test_one_molecule_has_no_spread():
    with pytest.raises(ValueError, match="latents of 1 molecules: their spread needs at least 2"):
        helpers.standardise(torch.zeros(1, 9, 8))


@pytest.mark.parametrize(
    "a, b, share", [((9, 8), (9, 8), 0.5), ((8,), (7,), 0.5), ((8,), (8,), torch.tensor([0.0, 1.0]))]
)
def test_slerp_goes_from_one_vector_to_another(a, b, share):
    with pytest.raises(ValueError, match=r"expected two vectors \(d,\) and one number; flatten latents first"):
        helpers.slerp(torch.ones(a), torch.ones(b), share)


def test_only_graphs_are_encoded(vae, graphs):
    atoms, bonds = graphs
    for wrong in ((bonds, atoms), (atoms, bonds[:2]), (atoms + 5, bonds)):
        with pytest.raises(ValueError, match="atoms"):
            helpers.encode_graphs(vae, *wrong)
        with pytest.raises(ValueError, match="atoms"):
            helpers.reconstruction_accuracy(vae, *wrong)
    with pytest.raises(ValueError, match="batch_size=0: expected a whole number of at least 1"):
        helpers.encode_graphs(vae, atoms, bonds, 0)
    with pytest.raises(ValueError, match="no graphs: expected at least one"):
        helpers.reconstruction_accuracy(vae, atoms[:0], bonds[:0])
