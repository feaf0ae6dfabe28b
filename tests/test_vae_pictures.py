"""Pictures of notebook 02."""

import numpy as np
import pytest
from shared import check_picture

import helpers
from molecule_diffusion import vae_pictures


@pytest.mark.parametrize("name", vae_pictures.NETWORKS)
def test_every_network_is_drawn(name, shown):
    helpers.show_network(name)
    data, metadata = shown[0]
    check_picture(data, metadata, f"Diagram of {name}: ")


def test_an_unknown_network_is_refused():
    with pytest.raises(ValueError, match="unknown network 'U-Net'; known ones: VAE"):
        helpers.show_network("U-Net")


def test_beliefs_and_their_assignment(shown):
    helpers.show_beliefs(np.eye(3)[::-1], ["1 C", "2 C", "3 O"], ["a", "b", "c"], chosen=[2, 1, 0], caption="Solved.")
    data, metadata = shown[0]
    check_picture(data, metadata, "a is 3 O, b is 2 C, c is 1 C")


def test_beliefs_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"beliefs of shape \(3, 3\) for 2 atoms"):
        helpers.show_beliefs(np.eye(3), ["1", "2"], ["a", "b", "c"])
