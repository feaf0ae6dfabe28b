"""GraphVAE: its layers against torch_geometric's, its loss by hand, what it decodes, its recipe."""

import math

import numpy as np
import pytest
import torch
from shared import draw

import helpers
from molecule_diffusion import graphvae, recipes, scoring


@pytest.fixture
def batch(qm9):
    rows = qm9.validation[:24]
    return torch.from_numpy(qm9.atoms[rows]), torch.from_numpy(qm9.bonds[rows])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return helpers.GraphVAE(latent_dim=6, hidden=(16, 32)).eval()


def test_the_convolution_is_nnconv(batch):
    from torch_geometric.nn import NNConv

    torch.manual_seed(0)
    nodes, edges, kinds, _ = graphvae.sparse_graphs(*batch)
    ours = graphvae.EdgeConditionedConvolution(4, 8)
    theirs = NNConv(4, 8, torch.nn.Linear(3, 32, bias=False), aggr="mean")
    with torch.no_grad():
        theirs.lin.weight.copy_(ours.own.weight)
        theirs.bias.copy_(ours.own.bias)
        matrices = ours.neighbour.weight.view(3, 8, 4)  # kind, out, in
        theirs.nn.weight.copy_(matrices.transpose(1, 2).reshape(3, 32).T)
        one_hot = torch.nn.functional.one_hot(kinds, 3).float()
        torch.testing.assert_close(ours(nodes, edges, kinds), theirs(nodes, edges, one_hot))


def test_the_encoder_does_not_see_the_order(model, batch):
    atoms, bonds = batch
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(k)) for k in range(len(atoms))])
    first, again = model.encode(atoms, bonds), model.encode(*helpers.reorder(atoms, bonds, order))
    for one, other in zip(first, again):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert first[0].shape == (24, 6) and first[0].std(0).max() > 0


def test_graphs_are_not_mixed_up_in_a_batch(model, batch):
    together, _ = model.encode(*batch)
    for k in (0, 11, 23):
        torch.testing.assert_close(model.encode(batch[0][k : k + 1], batch[1][k : k + 1])[0][0], together[k])


def test_methane_has_no_bond_and_still_a_loss(model):
    atoms, bonds = map(torch.from_numpy, helpers.to_graphs(["C", "CC"]))
    parts = model.losses(atoms, bonds)
    assert all(torch.isfinite(value) for value in parts.values())


@pytest.mark.parametrize("matching", [True, False])
def test_the_loss_by_hand(matching, monkeypatch):
    """A decoder that knows nothing pays log 2 for what exists, log 4 for an element and log 3 for a bond."""
    model = helpers.GraphVAE(latent_dim=3, hidden=(8,), matching=matching).eval()
    atoms, bonds = map(torch.from_numpy, helpers.to_graphs(["CC=O", "N#CC1CC1O"]))

    def knows_nothing(z):
        return torch.zeros(2, 9), torch.zeros(2, 36), torch.zeros(2, 9, 4), torch.zeros(2, 36, 3)

    monkeypatch.setattr(model, "decode", knows_nothing)
    parts = model.losses(atoms, bonds)
    expected = {"exists": math.log(2), "bonded": math.log(2), "elements": math.log(4), "kinds": math.log(3)}
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value)
    total = sum(expected.values())
    assert model(atoms, bonds, 0.0).item() == pytest.approx(total)
    assert model(atoms, bonds, 0.5).item() == pytest.approx(total + 0.5 * parts["KL"].item())


def test_matching_makes_the_loss_blind_to_the_order(batch):
    """A decoder that writes the truth in another order pays nothing with matching, much without."""
    atoms, bonds = map(torch.from_numpy, helpers.to_graphs(["N#CC1CC1O"]))
    order = torch.tensor([[3, 0, 5, 1, 4, 2, 6, 7, 8]])
    there = helpers.as_soft_graph(*helpers.reorder(atoms, bonds, order))
    row, column = helpers.PAIRS

    def certain(z):
        logits = 20 * there.exists - 10, 20 * there.bonded[:, row, column] - 10
        return *logits, 10 * there.elements, 10 * there.kinds[:, row, column]

    losses = {}
    for matching in (True, False):
        model = helpers.GraphVAE(latent_dim=3, hidden=(8,), matching=matching).eval()
        model.decode = certain
        losses[matching] = model(atoms, bonds, 0.0).item()
    assert losses[True] < 0.01 < 1 < losses[False]


def test_what_is_decoded_is_a_graph_and_connected_with_the_tree(model):
    z = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    for tree in (True, False):
        atoms, bonds = model.decode_graphs(z, spanning_tree=tree)
        helpers.check_graphs(atoms, bonds)
    atoms, bonds = model.decode_graphs(z)
    for exists, graph in zip(atoms != helpers.NO_ATOM, bonds > 0):
        number = int(exists.sum())
        reached = torch.linalg.matrix_power(graph[exists][:, exists].float() + torch.eye(number), 9)
        assert (reached > 0).all(), "not connected"


def test_the_tree_is_the_most_probable_one():
    bonded = torch.zeros(1, 9, 9)
    for i, j, p in ((0, 1, 0.3), (1, 2, 0.4), (0, 2, 0.2), (2, 3, 0.1), (0, 3, 0.05), (4, 0, 0.9)):
        bonded[0, i, j] = bonded[0, j, i] = p
    exists = torch.tensor([[True, True, True, True, *[False] * 5]])
    tree = graphvae.largest_tree(bonded, exists)[0]
    assert sorted(map(tuple, tree.triu().nonzero().tolist())) == [(0, 1), (1, 2), (2, 3)]
    assert not graphvae.largest_tree(bonded, torch.zeros(1, 9, dtype=torch.bool)).any()


def test_damaged_latents_are_refused(model):
    with pytest.raises(ValueError, match="NaN"):
        model.decode_graphs(torch.full((2, 6), torch.nan))


def test_the_pipeline_draws_the_same_molecules_for_a_seed(model):
    pipe = helpers.GraphVAEPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    first, again = draw(pipe, 20), draw(pipe, 20)
    assert first.smiles == again.smiles and first.latents.shape == (20, 6)
    assert draw(pipe, 20, batch_size=7).latents.shape == (20, 6)
    np.testing.assert_array_equal(first.atoms, model.decode_graphs(first.latents)[0].numpy())


def test_the_scores_of_the_paper(model):
    found = scoring.graphvae_scores(model, n=30, seed=0)
    assert found.keys() >= {"paper_valid", "paper_unique", "paper_novel", "strict", "exact", "KL", "bonded"}
    assert 0 <= found["strict"] <= found["paper_valid"] <= 1
    assert found == scoring.graphvae_scores(model, n=30, seed=0)


def test_a_few_steps_lower_the_loss_and_the_average_keeps_batch_norm(batch):
    torch.manual_seed(0)
    recipe = recipes.RECIPES["graphvae"].settings | dict(steps=60, batch_size=16, warmup=1, ema_decay=0.9)
    model, history = helpers.fit(
        helpers.GraphVAE(latent_dim=6), lambda m, *graph: helpers.vae_loss(m, *graph, kl_weight=1 / 6), batch, recipe
    )
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert not model.training
    [norm] = [layer for layer in model.encoder.norms if layer.num_features == 32]
    assert norm.num_batches_tracked == 60 and norm.running_mean.abs().sum() > 0


def test_the_recipe_averages_the_kl_over_the_latent(batch, monkeypatch):
    monkeypatch.setattr(recipes, "graph_tensors", lambda rows: list(batch))
    made = recipes.RECIPES["graphvae"].prepare({"model": dict(latent_dim=5, hidden=(8,))})
    network = made.network.eval()
    torch.manual_seed(0)
    found = made.loss(network, *made.data).item()
    torch.manual_seed(0)
    assert found == pytest.approx(network(*batch, 1 / 5).item())
