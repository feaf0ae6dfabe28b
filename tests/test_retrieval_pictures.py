"""The two drawings of notebook 07: what they show, and whether their arrows point the right way."""

import torch
from torch.nn import functional as F

import helpers
from molecule_diffusion.retrieval_pictures import NAMES, SCORES, loss_slopes


def test_both_show_a_picture_and_say_what_it_shows(shown):
    helpers.show_towers("two towers")
    helpers.show_pulls("pulls and pushes")
    pictures = [(data, metadata) for data, metadata in shown if "image/png" in data]
    assert len(pictures) == 2
    alts = [metadata["image/png"]["alt"] for _, metadata in pictures]
    assert "molecule tower" in alts[0] and "loss" in alts[0]
    assert all(name in alts[1] for name in ("contrastive", "triplet", "margin", "InfoNCE", "SupCon"))
    assert len(SCORES) == len(NAMES)


def test_a_right_molecule_is_never_pushed_except_by_supcon():
    for name, slopes in loss_slopes().items():
        assert min(slopes[2:]) >= -1e-9, f"{name} pulls a wrong molecule"
        assert slopes[1] <= 0, f"{name} pushes the right one that lies far off"
        assert (slopes[0] > 0) == (name == "SupCon")


def test_slopes_are_those_of_the_formulas():
    """InfoNCE: p_n / T for a wrong molecule; SupCon: (p_j - 1/|P|) / T for a right one."""
    temperature = helpers.LOSSES["supcon"]["temperature"]
    slopes = loss_slopes((0.8, 0.7, 0.4), right=2)
    shares = (torch.tensor([0.8, 0.7, 0.4], dtype=torch.float64) / temperature).softmax(0)
    expected = [(shares[0] - 0.5) / temperature, (shares[1] - 0.5) / temperature, shares[2] / temperature]
    assert torch.allclose(torch.tensor(slopes["SupCon"], dtype=torch.float64), torch.stack(expected))
    wrong = (torch.tensor([0.8, 0.4], dtype=torch.float64) / temperature).softmax(0)[1] / temperature
    assert abs(slopes["InfoNCE"][2] - wrong) < 1e-9 and slopes["InfoNCE"][1] == 0


def test_slopes_point_as_the_librarys_losses_do():
    """The signs are those of `helpers.metric_loss` on one sentence whose molecules lie at these cosines."""
    slopes = loss_slopes()
    cosines = torch.tensor(SCORES)
    fits = torch.tensor([[True, True, False, False, False]])
    for kind, name in {
        "contrastive": "contrastive",
        "triplet": "triplet",
        "margin": "margin",
        "supcon": "SupCon",
    }.items():
        learned = cosines.clone().requires_grad_()
        rest = torch.diag(torch.sqrt(1 - learned**2))  # each molecule in a direction of its own
        sentence = F.one_hot(torch.tensor([0]), len(SCORES) + 1).float()
        helpers.metric_loss(sentence, torch.cat([learned[:, None], rest], 1), fits, kind).backward()
        for ours, theirs in zip(slopes[name], learned.grad.tolist()):
            assert abs(ours) < 0.05 or ours * theirs > 0, name
            assert ours != 0 or abs(theirs) < 1e-6, name
