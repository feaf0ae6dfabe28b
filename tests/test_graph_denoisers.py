"""The graph as an image and the graph as a graph: what both networks must keep, and what they are told."""

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from shared import draw

import helpers
from molecule_diffusion.encodings import graph_image, image_vector, split_vector
from molecule_diffusion.graph_denoisers import GraphNetworkDenoiser, PixelDenoiser, at, pair_numbers, structure

SMALL = {
    "pixel": lambda: PixelDenoiser(widths=[8, 16]),
    "graph network": lambda: GraphNetworkDenoiser(nodes=16, edges=8, layers=2, heads=2, time_dim=16),
}


@pytest.fixture(params=SMALL)
def network(request):
    torch.manual_seed(0)
    return SMALL[request.param]().eval()


def vectors(*smiles):
    return helpers.graph_vector(*helpers.to_graphs(list(smiles)))


def reordered(x, order):
    """Graph vectors with their atoms in another order."""
    atoms, pairs = split_vector(x)
    bonds = helpers.matrix_from_pairs(pairs.transpose(1, 2))[:, :, order][..., order]
    pairs = helpers.pairs_from_matrix(bonds).transpose(1, 2)
    return torch.cat([atoms[:, order].flatten(1), pairs.flatten(1)], 1)


@torch.no_grad()
def test_they_take_and_give_what_the_mlp_does(network):
    x_t, x_0 = torch.randn(3, 189), torch.randn(3, 189)
    t = torch.tensor([0, 500, 999])
    logits = network(x_t, t, x_0)
    assert logits.shape == (3, 189)
    torch.testing.assert_close(network(x_t[1:2], t[1:2], x_0[1:2]), logits[1:2])  # molecules do not mix
    torch.testing.assert_close(network(x_t, torch.tensor(500), x_0)[1], logits[1])
    torch.testing.assert_close(network(x_t, t), network(x_t, t, torch.zeros_like(x_t)))
    assert not torch.allclose(network(x_t, t), logits), "the last guess makes no difference"
    assert not torch.allclose(network(x_t, t.flip(0), x_0), logits), "the time makes no difference"
    with pytest.raises(ValueError, match="a graph vector of shape .* expected"):
        network(torch.randn(3, 188), t)


def test_they_learn_and_draw(network, qm9):
    data = [helpers.graph_vector(qm9.atoms[1000:1064], qm9.bonds[1000:1064]).to(torch.int8)]
    recipe = dict(steps=60, batch_size=64, learning_rate=3e-3, warmup=5, ema_decay=0.9)
    network.train()
    ema, history = helpers.fit(network, helpers.graph_diffusion_loss, data, recipe, monitor_steps={1})
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    pipe = helpers.GraphDDPMPipeline(ema, helpers.RECIPES["graph_ddpm"].sampler())
    pipe.set_progress_bar_config(disable=True)
    assert len(draw(pipe, 5, num_inference_steps=3)) == 5


@pytest.mark.parametrize(
    "name, network, scheduler",
    [
        ("pixel_ddpm", PixelDenoiser, DDPMScheduler),
        ("gnn_ddpm", GraphNetworkDenoiser, DPMSolverMultistepScheduler),
    ],
)
def test_the_shipped_ones_draw_molecules(name, network, scheduler):
    pipe = helpers.load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.denoiser) is network and type(pipe.scheduler) is scheduler
    output = draw(pipe, 60, num_inference_steps=25)
    assert output.valid.mean() >= 0.9 and len(set(output.valid_smiles)) >= 50


@torch.no_grad()
def test_another_order_of_the_atoms_gives_the_same_answer_in_that_order():
    torch.manual_seed(0)
    network = SMALL["graph network"]().eval()
    x_t, x_0, t = torch.randn(20, 189), torch.tanh(torch.randn(20, 189)), torch.arange(0, 1000, 50)
    for order in (torch.randperm(9), torch.arange(9).flip(0)):
        answer = network(reordered(x_t, order), t, reordered(x_0, order))
        expected = reordered(network(x_t, t, x_0), order)
        torch.testing.assert_close(answer, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


@torch.no_grad()
def test_the_image_network_knows_the_places():
    torch.manual_seed(0)
    network, order = SMALL["pixel"]().eval(), torch.arange(9).flip(0)
    x_t, t = torch.randn(20, 189), torch.full((20,), 300)
    change = network(reordered(x_t, order), t) - reordered(network(x_t, t), order)
    assert change.abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def test_images_there_and_back():
    x = torch.randn(4, 189)
    image = graph_image(x)
    assert image.shape == (4, 9, 9, 9) and torch.equal(image, image.transpose(2, 3))
    assert torch.equal(image_vector(image), x)
    assert not image[:, :5][:, :, ~torch.eye(9, dtype=torch.bool)].any(), "atoms off the diagonal"
    assert not image[:, 5:].diagonal(dim1=2, dim2=3).any(), "bonds on the diagonal"
    with pytest.raises(ValueError, match="expected"):
        graph_image(torch.randn(4, 188))


def test_an_image_by_hand():
    image = graph_image(vectors("C#N"))[0]
    assert image[:5, 0, 0].tolist() == [1, -1, -1, -1, -1]  # C
    assert image[:5, 1, 1].tolist() == [-1, 1, -1, -1, -1]  # N
    assert image[5:, 0, 1].tolist() == image[5:, 1, 0].tolist() == [-1, -1, -1, 1]  # triple
    assert image[5:, 1, 2].tolist() == [1, -1, -1, -1]  # none


def test_the_two_halves_of_a_pair_are_averaged():
    image = torch.zeros(1, 9, 9, 9)
    image[0, 5, 0, 1] = 1
    assert split_vector(image_vector(image))[1][0, 0].tolist() == [0.5, 0, 0, 0]


# ---------------------------------------------------------------------------------------------------------------------
# What the graph network is told about its guess
# ---------------------------------------------------------------------------------------------------------------------


def facts(smiles):
    """Of a molecule, unscaled: its atoms' facts (9, 7) and its pairs' as matrices (9, 9, 7)."""
    of_atoms, of_pairs = structure(vectors(smiles))
    of_atoms[..., 4:] = torch.expm1(of_atoms[..., 4:])
    of_pairs[..., :5] = torch.expm1(of_pairs[..., :5])
    return of_atoms[0], at(of_pairs, pair_numbers()[2])[0]


def test_atoms_degrees_and_valences():
    of_atoms, _ = facts("CC(=O)O")
    assert of_atoms[:, 0].tolist() == [1] * 4 + [0] * 5
    degrees, valences = of_atoms[:4, 1].tolist(), of_atoms[:4, 2].tolist()
    assert sorted(zip(degrees, valences)) == [(1, 1), (1, 1), (1, 2), (3, 4)]


def test_rings_are_counted():
    triangle, square = facts("C1CC1")[0], facts("C1CCC1")[0]
    torch.testing.assert_close(triangle[:3, 4], torch.full((3,), 2.0))  # there and back: one ring, two ways round
    torch.testing.assert_close(square[:4, 4], torch.zeros(4))
    assert facts("CCC")[0][:3, 4].tolist() == [0, 0, 0]


def test_paths_are_counted():
    a = facts("CCCC")[1][..., 0]
    for k in range(5):
        torch.testing.assert_close(facts("CCCC")[1][..., k], torch.linalg.matrix_power(a, k + 1), atol=1e-4, rtol=1e-4)


def test_what_is_joined():
    of_atoms, of_pairs = facts("CCCCCCCCC")
    assert of_pairs[..., 5].eq(1).all(), "the ends of a chain of nine are joined"
    assert of_atoms[:, 3].eq(1).all()
    of_atoms, of_pairs = facts("CC.CCO")
    joined = of_pairs[:5, :5, 5]
    assert sorted(joined.sum(1).tolist()) == [2, 2, 3, 3, 3]
    torch.testing.assert_close(of_atoms[:5, 3].sort().values, torch.tensor([0.4, 0.4, 0.6, 0.6, 0.6]))


def test_the_weakest_bond_of_the_best_way_counts():
    x = vectors("CCC")
    _, pairs = split_vector(x)
    pairs[0, pair_numbers()[2][1, 2]] = torch.tensor([0.4, -0.4, -1, -1])  # a bond with probability 0.3
    _, of_pairs = structure(x)
    joined = at(of_pairs, pair_numbers()[2])[0, ..., 5]
    torch.testing.assert_close(joined[0, 2], torch.tensor(0.3))
    torch.testing.assert_close(joined[0, 1], torch.tensor(1.0))
