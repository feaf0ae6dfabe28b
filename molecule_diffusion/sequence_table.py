"""The one table of a sequence system: reconstruction, exact match, grammar and obedience of its three networks.

Beside them stand what knows nothing, and the faulty step of an earlier project, so that each number has a frame.
"""

import functools

import numpy as np
import torch

from molecule_diffusion import grammar
from molecule_diffusion.chemistry import to_smiles
from molecule_diffusion.conditions import save_conditions
from molecule_diffusion.encodings import sequence_graph
from molecule_diffusion.files import read_json, write_json
from molecule_diffusion.sequences import SequenceRun, decode_probabilities, encode_sequences

SEEDS = (0, 1, 2)  # of the draws
STEPS = 50
GUIDANCE = 1.5
RESTART = ("jump", 0.3, 10)  # a second visit to the last part of the way, see `Restart`
STRENGTH = 0.3  # how far the test sequences are noised in the row "there and back"


def train_sequences(h5, csv, folder=None, seed=0, scale=1.0):
    """Take a file of one-hot sequences through VAE, latent diffusion and prior; test each; draw from the prior.

    Called again after a stop, it goes on where it was. The folder then holds the three networks (`vae`, and two
    pipelines for `SequencePipeline.from_pretrained`), their curves, `table.json`, and `samples.h5` with `samples.csv`.

    Args:
        h5, csv: paths, as `load_conditions` takes them: N one-hot sequences of any length and width; type and part.
        folder: for the results; None for one in data/training.
        seed: of the split, the initial weights and every step.
        scale: of the number of training steps: 0.1 to try it out.

    Returns: the table, a DataFrame.
    Raises: what `load_conditions` raises; ValueError for a folder of another run, or fewer than 40 different sequences.
    """
    run = SequenceRun(h5, csv, folder, seed, scale)
    known = f"read as {run.judge.language}" if run.judge.language else "of no language that the course can read"
    print(
        f"{len(run.classes):,} sequences {run.conditions.data.shape[2:]}, {known}; {len(run.test):,} are for the test"
    )
    vae = run.vae()
    networks = {"vae": vae, "latent_diffusion": run.latent_diffusion(vae), "prior": run.prior(vae)}
    table = make_table(run, **networks)
    write_samples(run, networks["prior"])
    print(f"saved in {run.folder}")
    return table


# ---------------------------------------------------------------------------------------------------------------------
# The rows
# ---------------------------------------------------------------------------------------------------------------------


def make_table(run, vae, latent_diffusion, prior):
    """Every row, computed where table.json does not hold it yet. Returns: a DataFrame, one row per way."""
    import pandas as pd

    path = run.folder / "table.json"
    done = read_json(path) if path.exists() else {}
    ways = ways_that_know_nothing(run) | ways_of_networks(run, vae, latent_diffusion, prior)
    for name, (way, seeds) in ways.items():
        if name not in done:
            scores = [score(run, *way(seed)) for seed in seeds]
            done[name] = _mean_and_spread(scores)
            write_json(path, done)
    return pd.DataFrame.from_dict({name: done[name] for name in ways}, orient="index")


def ways_that_know_nothing(run):
    """What frames the table: for each name a function (seed) -> (classes, probabilities), and the seeds to ask for."""
    length, width = run.conditions.data.shape[2:]
    number = len(run.test)
    frequency = np.stack([np.bincount(rows, minlength=width) for rows in run.classes[run.train].T]) / len(run.train)
    one_hots = np.eye(width, dtype=np.float32)

    def constant(probabilities):
        everywhere = np.broadcast_to(probabilities.astype(np.float32), (number, length, width))
        return everywhere.argmax(-1), everywhere

    def shuffled(seed):
        shift = np.random.default_rng(seed).integers(1, number)  # so that none meets itself
        classes = run.classes[np.roll(run.test, shift)]
        return classes, one_hots[classes]

    return {
        "nothing: uniform": (lambda seed: constant(np.full((length, width), 1 / width)), (0,)),
        "nothing: each row's most frequent entry": (lambda seed: constant(one_hots[frequency.argmax(1)]), (0,)),
        "nothing: the training mean": (lambda seed: constant(frequency), (0,)),
        "another test sequence": (shuffled, SEEDS),
    }


def ways_of_networks(run, vae, latent_diffusion, prior):
    """The three networks, each as it should be used, and as the earlier project used it; as above."""
    z = encode_sequences(vae, run.classes[run.test])
    number = len(run.test)
    draw = functools.partial(drawn, vae)

    def from_normal(seed):
        return draw(torch.randn(z.shape, generator=_generator(seed)))

    def there_and_back(seed):
        return draw(latent_diffusion(number, None, 1, None, STEPS, _generator(seed), latents=z, strength=STRENGTH))

    def from_noise(seed):
        return draw(latent_diffusion(number, None, 1, None, STEPS, _generator(seed)))

    def asked(seed, guidance=GUIDANCE, restarts=None):
        return draw(prior(number, run.asked(run.test), guidance, None, STEPS, _generator(seed), restarts=restarts))

    def by_grammar(seed):
        _, probabilities = asked(seed)
        return grammar.follow_grammar(probabilities), probabilities

    ways = {
        "VAE, there and back": (lambda seed: draw(z), (0,)),
        "VAE, from N(0, I)": (from_normal, SEEDS),
        f"latent diffusion, there and back ({STRENGTH})": (there_and_back, SEEDS),
        "latent diffusion, from noise": (from_noise, SEEDS),
        "latent diffusion, one faulty step": (lambda seed: draw(faulty_step(latent_diffusion, z, seed)), SEEDS),
        "prior, guidance 1": (functools.partial(asked, guidance=1.0), SEEDS),
        f"prior, guidance {GUIDANCE}": (asked, SEEDS),
        f"prior, guidance {GUIDANCE}, and a restart": (functools.partial(asked, restarts=[RESTART]), SEEDS),
        "prior, its noise read as a latent": (lambda seed: draw(noise_as_latent(prior, run, seed)), SEEDS),
    }
    if run.judge.language == "expressions":
        ways[f"prior, guidance {GUIDANCE}, and the grammar's mask"] = (by_grammar, SEEDS)
    return ways


def drawn(vae, latents):
    """What latents, or a pipeline's output, decode to: the likeliest classes and the probabilities of all."""
    probabilities = decode_probabilities(vae, getattr(latents, "latents", latents))
    return probabilities.argmax(-1).astype(np.uint8), probabilities


@torch.no_grad()
def faulty_step(pipe, z, seed):
    """What an earlier project evaluated: latents noised to a random t, and one reverse step with two mistakes in it.

    (z_t - β_t/(1 - ᾱ_t)·ε) / (1/sqrt(ᾱ_t)) stands where (z_t - β_t/sqrt(1 - ᾱ_t)·ε) / sqrt(α_t) should.
    Shapes: z (N, tokens, latent_dim) -> the same.
    """
    generator, denoiser, schedule = _generator(seed), pipe.denoiser, pipe.scheduler
    z = (z - denoiser.latent_mean) / denoiser.latent_scale
    t = torch.randint(len(schedule.betas), (len(z),), generator=generator)
    kept, beta = (values[t].reshape(-1, 1, 1) for values in (schedule.alphas_cumprod, schedule.betas))
    z_t = kept.sqrt() * z + (1 - kept).sqrt() * torch.randn(z.shape, generator=generator)
    eps = kept.sqrt() * denoiser(z_t, t) + (1 - kept).sqrt() * z_t  # what the network's v says about the noise
    mean = (z_t - beta / (1 - kept) * eps) / (1 / kept.sqrt())
    return mean * denoiser.latent_scale + denoiser.latent_mean


@torch.no_grad()
def noise_as_latent(pipe, run, seed):
    """The earlier project's prior: what it predicts is noise, but it was decoded as if it were the latent."""
    denoiser, last = pipe.denoiser, len(pipe.scheduler.betas) - 1
    z_t = torch.randn((len(run.test), *pipe.vae.latent_shape), generator=_generator(seed))
    kept = pipe.scheduler.alphas_cumprod[last]
    v = denoiser(z_t, torch.tensor(last), pipe.encoder(run.asked(run.test), len(z_t)))
    eps = kept.sqrt() * v + (1 - kept).sqrt() * z_t
    return eps * denoiser.latent_scale + denoiser.latent_mean


def _generator(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# The columns
# ---------------------------------------------------------------------------------------------------------------------


def score(run, classes, probabilities):
    """One row's numbers, of as many sequences as the test has: a dict. Nothing is repaired or left out before counting.

    - MSE: of the probabilities, to the test sequence of the same number; exact: every row of it is right.
    - grammatical: only where the course can read the language. Types and parts are compared among the grammatical ones.
    - unique: share of different sequences; new: share of these that training did not hold.

    Shapes: classes (N, length), probabilities (N, length, width).
    """
    true = run.classes[run.test]
    distance = (probabilities.astype(np.float64) ** 2).sum(-1) + 1
    distance -= 2 * np.take_along_axis(probabilities, true[..., None].astype(int), -1)[..., 0]
    fine, types, parts = run.judge(classes)
    asked = run.asked(run.test)
    counted = np.ones(len(classes), bool) if fine is None else fine
    found = {row.tobytes() for row in classes.astype(np.uint8)}
    known = {row.tobytes() for row in run.classes[run.train]}
    return {
        "MSE": float(distance.mean() / probabilities.shape[-1]),
        "exact": float((classes == true).all(1).mean()),
        "grammatical": None if fine is None else float(fine.mean()),
        "type obeyed": _share_equal(types, asked["type"], counted),
        "part obeyed": _share_equal(parts, asked["part"], counted),
        "unique": len(found) / len(classes),
        "new": len(found - known) / len(found),
        "N": len(classes),
    }


def _share_equal(found, asked, counted):
    """Among the sequences that count, the share that is what was asked for; None where none counts."""
    equal = [a == b for a, b, counts in zip(found, asked, counted) if counts]
    return sum(equal) / len(equal) if equal else None


def _mean_and_spread(scores):
    """The mean of several seeds' scores; a column "± …" holds their standard deviation where there are several."""
    row = {}
    for name in scores[0]:
        values = [score[name] for score in scores if score[name] is not None]
        row[name] = float(np.mean(values)) if values else None
        if len(scores) > 1 and name not in ("N", "unique", "new"):
            row[f"± {name}"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row | {"N": scores[0]["N"], "seeds": len(scores)}


def write_samples(run, prior, number=1000):
    """Draw from the prior for the first test conditions, to samples.h5 and .csv: asked, found, and how they read."""
    import pandas as pd

    if (run.folder / "samples.csv").exists():
        return
    rows = run.test[:number]
    classes = prior(len(rows), run.asked(rows), GUIDANCE, None, STEPS, _generator(0)).classes
    fine, types, parts = run.judge(classes)
    table = pd.DataFrame(run.asked(rows) | {"found type": types, "found part": parts})
    if fine is not None:
        table["text"] = read_aloud(run.judge.language, classes)
    width = run.conditions.data.shape[-1]
    data = np.eye(width, dtype=np.uint8)[classes][:, None]
    save_conditions(run.folder / "samples.h5", run.folder / "samples.csv", data, table)


def read_aloud(language, classes):
    """Sequences as texts: expressions or SMILES, None where they cannot be read. Shapes: (N, length) -> list of N."""
    if language == "expressions":
        return [grammar.spell_expression(rules) for rules in classes]
    return to_smiles(*sequence_graph(np.eye(9, dtype=np.uint8)[classes][:, None]))
