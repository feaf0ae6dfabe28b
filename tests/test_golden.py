"""What the course showed before a change of its structure, it shows after it: molecules and arrays, by their hashes.

tests/golden.json was written by the code of the time when the course was one module, but for the draws with restarts,
which came later, and those of graph_ddpm, latent_diffusion and diffusion_prior, whose weights and steps were replaced
since. The hashes are of SMILES, atoms and bonds, which come out the same on CPUs with and without AVX2 or AVX-512; one
thread, so that sums have one order.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import helpers

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())


def sha256(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(name, *arguments, seed=0, **options):
    pipe = helpers.load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe(200, *arguments, generator=torch.Generator().manual_seed(seed), **options)


def varied():
    given = draw("latent_diffusion").latents
    return draw("latent_diffusion", seed=1, latents=given, strength=0.4, num_inference_steps=50, batch_size=70)


DRAWS = {
    "token_vae": lambda: draw("token_vae"),
    "graph_ddpm": lambda: draw("graph_ddpm", restarts=[]),
    "graph_ddpm, restarted": lambda: draw("graph_ddpm"),
    "latent_diffusion": lambda: draw("latent_diffusion"),
    "latent_diffusion, restarted": lambda: draw("latent_diffusion", restarts=[("jump", 0.3, 8)]),
    "diffusion_prior": lambda: draw("diffusion_prior", {"type": "carbonyl", "part": "ring 5", "gap": 6.0}),
    "varied": varied,
    "negative": lambda: draw(
        "diffusion_prior", {"type": "alcohol"}, 3.0, negative_condition={"type": "ether"}, seed=2, batch_size=70
    ),
}


@pytest.mark.parametrize("name", DRAWS)
def test_200_molecules(name, one_thread):
    output = DRAWS[name]()
    smiles = "\n".join(map(str, output.smiles)).encode()
    assert sha256(smiles, output.atoms.tobytes(), output.bonds.tobytes()) == GOLDEN["molecules"][name]


def test_every_golden_draw_is_made():
    assert DRAWS.keys() == GOLDEN["molecules"].keys()


@pytest.mark.parametrize("name", "atoms bonds targets index row train validation test".split())
def test_arrays_of_qm9(qm9, name):
    assert sha256(np.ascontiguousarray(getattr(qm9, name)).tobytes()) == GOLDEN["qm9"][name]


def test_smiles_of_qm9(qm9):
    assert sha256("\n".join(qm9.smiles).encode()) == GOLDEN["qm9"]["smiles"]
    assert qm9.dropped == GOLDEN["qm9"]["dropped"]
