"""What several test files use: small pipelines with random weights, pictures, molecules that RDKit refuses."""

import base64

import torch
from diffusers import DPMSolverMultistepScheduler

import helpers

SIZES = dict(width=32, hidden=32, depth=1, time_dim=16)
GENERATORS = ["token_vae", "graph_ddpm", "latent_diffusion", "diffusion_prior"]
SCHEDULES = {
    "graph_ddpm": helpers.GRAPH_NOISE_SCHEDULE,
    "latent_diffusion": helpers.NOISE_SCHEDULE,
    "diffusion_prior": helpers.NOISE_SCHEDULE,
}


def untrained(name):
    """A small pipeline with random weights, for what does not depend on them."""
    torch.manual_seed(0)
    vae = helpers.TokenVAE(width=16, layers=1, latent_dim=8)
    encoder = helpers.ConditionEncoder()
    parts = {
        "token_vae": {"vae": vae},
        "graph_ddpm": {"denoiser": helpers.GraphDenoiser(**SIZES)},
        "latent_diffusion": {"vae": vae, "denoiser": helpers.LatentDenoiser(latent_dim=8, **SIZES)},
        "diffusion_prior": {
            "vae": vae,
            "denoiser": helpers.LatentDenoiser(latent_dim=8, **SIZES, condition_dim=encoder.size),
            "encoder": encoder,
        },
    }[name]
    if name in SCHEDULES:
        parts["scheduler"] = DPMSolverMultistepScheduler(**SCHEDULES[name], **helpers.SAMPLER)
    pipe = helpers.RECIPES[name].pipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, n=20, seed=0, **options):
    return pipe(n, generator=torch.Generator().manual_seed(seed), **options)


def check_picture(data, metadata, alt):
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG\r\n")
    assert alt in metadata["image/png"]["alt"]
    assert data["text/plain"] == metadata["image/png"]["alt"]


def refused_molecules():
    """Graphs that RDKit refuses: a carbon with five bonds, a fluorine with two, no atom at all."""
    atoms, bonds = helpers.to_graphs(["FC(F)(F)F", "CF", "C"])
    bonds[0, 0, 1:4] = bonds[0, 1:4, 0] = 2
    bonds[1, [0, 1], [1, 0]] = 2
    atoms[2] = helpers.NO_ATOM
    assert helpers.to_smiles(atoms, bonds) == [None] * 3
    return helpers.to_mols(atoms, bonds)


# code for a process of its own, whose peak memory in bytes is asked for
PEAK_MEMORY = """
def peak_memory():
    import sys
    from pathlib import Path
    if sys.platform == "linux":  # getrusage would also count this process's parent, whose memory it was forked from
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    if sys.platform == "darwin":
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import psutil
    return psutil.Process().memory_info().peak_wset
"""
