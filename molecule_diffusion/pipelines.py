"""Every generator as a diffusers pipeline: noise -> steps of the scheduler -> graphs -> SMILES; and the oracle."""

import inspect
from dataclasses import dataclass
from typing import Union

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from molecule_diffusion.checks import (
    check_count,
    check_lengths,
    check_number,
    check_smiles_list,
    part_of,
    quoted,
    slices,
)
from molecule_diffusion.chemistry import MAX_ATOMS, to_graphs, to_smiles, verdict
from molecule_diffusion.conditions import ConditionEncoder
from molecule_diffusion.encodings import GRAPH_SIZE, expected_graph, vector_graph
from molecule_diffusion.graph_denoisers import GraphNetworkDenoiser, PixelDenoiser
from molecule_diffusion.graphvae import GraphVAE
from molecule_diffusion.models import GraphDenoiser, LatentDenoiser, TokenVAE
from molecule_diffusion.oracle import PropertyOracle, graph_features
from molecule_diffusion.schedules import (
    GRAPH_NOISE_SCHEDULE,
    NOISE_SCHEDULE,
    JumpScheduler,
    check_sampler,
    read_restarts,
    x_0_from_v,
)


@dataclass
class MoleculeOutput(BaseOutput):
    """What a pipeline returns.

    Attributes:
        smiles: N canonical SMILES; None where RDKit refuses the graph, a dot where it is in pieces. Never repaired.
        atoms, bonds: int8 arrays (N, 9) and (N, 9, 9).
        latents: what was decoded: float tensor (N, 9, latent_dim), or (N, 189) where the graph itself was diffused.
    """

    smiles: list
    atoms: np.ndarray
    bonds: np.ndarray
    latents: torch.Tensor

    def __len__(self):
        return len(self.smiles)

    @property
    def valid(self):
        """bool array (N,): which are strictly valid, one connected molecule without charges, as in `evaluate`."""
        return np.array([verdict(text) == "valid" for text in self.smiles], bool)

    @property
    def valid_smiles(self):
        """SMILES of the valid ones, in their order."""
        return [text for text, fine in zip(self.smiles, self.valid) if fine]


class MoleculePipeline(DiffusionPipeline):
    """What the generators below share; their sampling loops stand in their `__call__`."""

    def stream(self, num_molecules, batch_size=1000, generator=None, **arguments):
        """Draw any number of molecules without keeping them: an iterator over outputs of at most batch_size each.

        Together they are the molecules that one call with the same generator and batch size returns.
        Args: as of the call. What is given for each molecule (latents, the values of a condition) is given for all.
        """
        batches = slices(num_molecules, batch_size)
        for name, value in arguments.items():
            check_lengths(name, value, num_molecules)
        for batch in batches:
            own = {name: part_of(value, batch) for name, value in arguments.items()}
            yield self(batch.stop - batch.start, batch_size=batch_size, generator=generator, **own)

    def batches(self, num_molecules, batch_size):
        """The molecules that are drawn together: a list of slices of 0 .. num_molecules - 1."""
        return list(slices(num_molecules, batch_size))

    def noise(self, batch, shape, generator):
        """Standard normal noise for one batch: (molecules, *shape)."""
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(
                f"generator={quoted(generator)}: expected a torch.Generator; a seed becomes one by "
                "torch.Generator().manual_seed(0)"
            )
        size = (batch.stop - batch.start, *shape)
        return randn_tensor(size, generator=generator, device=self.device, dtype=self.dtype)

    def stages(self, num_inference_steps, restarts, strength=1.0):
        """The way from noise to data and the restarts after it.

        Args: restarts: as of the call; strength: less than 1 leaves the first steps out.
        Returns: a list of (scheduler, how many steps its whole way has, how many of them, the last ones, are done).
        """
        stages = [(self.scheduler, num_inference_steps, round(strength * num_inference_steps))]
        for restart in read_restarts(self.config.restarts if restarts is None else restarts):
            scheduler = self.scheduler
            if restart.kind == "jump":
                kind_of_prediction = {"prediction_type": scheduler.config.prediction_type}
                scheduler = JumpScheduler(**NOISE_SCHEDULE | kind_of_prediction, clip_sample=False)
            stages.append((scheduler, round(restart.steps / restart.strength), restart.steps))
        return stages

    def set_steps(self, scheduler, num_inference_steps, done):
        """Set a scheduler's steps anew. Returns: the last `done` of its timesteps, falling, at which it begins.

        Raises: ValueError for those numbers of steps to which diffusers' spacing "trailing" appends a timestep -1.
        """
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        if scheduler.timesteps.min() < 0:
            raise ValueError(
                f"{num_inference_steps} steps: diffusers' spacing 'trailing' has a rounding error there and ends at "
                "t = -1; take one step more or less (in a restart, steps / strength is the number)"
            )
        skipped = num_inference_steps - done
        if hasattr(scheduler, "set_begin_index"):  # else it is looked up by t, which may occur twice
            scheduler.set_begin_index(skipped)
        return scheduler.timesteps[skipped:]

    @staticmethod
    def begin(scheduler, x_0, noise, timesteps):
        """x at the first of a stage's timesteps: noise alone where x_0 is None, else x_0 with the noise of that t."""
        if x_0 is None:
            return noise * scheduler.init_noise_sigma
        if not len(timesteps):
            return x_0
        return scheduler.add_noise(x_0, noise, timesteps[:1].expand(len(x_0)))

    @staticmethod
    def step_arguments(scheduler, generator, eta):
        """Generator and eta as a dict, for those schedulers whose step takes them; eta not if it is None."""
        wanted = {"generator": generator}
        if eta is not None:
            wanted["eta"] = min(float(eta), 1 - 1e-6)  # at 1, DDIM may take the root of -6e-8: 0 in exact numbers
        taken = inspect.signature(scheduler.step).parameters
        return {name: value for name, value in wanted.items() if name in taken}

    def end_step(self, callback_on_step_end, step, t, callback_kwargs):
        """Call the user's callback, if there is one. Returns: the latents to go on with."""
        latents = callback_kwargs["latents"]
        if callback_on_step_end is None:
            return latents
        returned = callback_on_step_end(self, step, int(t), callback_kwargs)
        if returned is None:  # it only looked on
            return latents
        if not isinstance(returned, dict):
            raise ValueError(f'the callback returned {quoted(returned)}: expected {{"latents": …}}, or nothing')
        if strange := sorted(map(str, returned.keys() - callback_kwargs.keys())):
            raise ValueError(f'the callback returned {quoted(strange[0])}: expected {{"latents": …}}, or nothing')
        changed = returned.get("latents", latents)
        if not torch.is_tensor(changed) or changed.shape != latents.shape:
            shape = tuple(changed.shape) if torch.is_tensor(changed) else quoted(changed)
            raise ValueError(f"the callback returned latents {shape}: expected a tensor of {tuple(latents.shape)}")
        return changed.to(latents)

    def empty_output(self, num_molecules, latent_shape):
        """An output with room for all molecules, which `keep` fills batch by batch.

        Its arrays are made before the first batch. Were each batch kept as it comes, its small arrays would lie between
        the large ones that the networks have freed, and these could not be used again.
        """
        return MoleculeOutput(
            smiles=[],
            atoms=np.zeros((num_molecules, MAX_ATOMS), np.int8),
            bonds=np.zeros((num_molecules, MAX_ATOMS, MAX_ATOMS), np.int8),
            latents=torch.zeros((num_molecules, *latent_shape), device=self.device, dtype=self.dtype),
        )

    def keep(self, output, batch, latents, graphs):
        """Put one batch, a slice of all molecules, into an output.

        Args: latents: (B, *latent_shape); graphs: its atoms (B, 9) and bonds (B, 9, 9), arrays or tensors.
        """
        atoms, bonds = (torch.as_tensor(part).cpu().numpy() for part in graphs)
        output.latents[batch] = latents
        output.atoms[batch] = atoms
        output.bonds[batch] = bonds
        output.smiles.extend(to_smiles(atoms, bonds))


class TokenVAEPipeline(MoleculePipeline):
    """Molecules from a TokenVAE's prior: z ~ N(0, I), decoded."""

    def __init__(self, vae: TokenVAE):
        super().__init__()
        self.register_modules(vae=vae)

    @torch.no_grad()
    def __call__(self, num_molecules=1000, generator=None, batch_size=1000):
        """Draw molecules. Returns: MoleculeOutput."""
        batches = self.batches(num_molecules, batch_size)
        shape = self.vae.latent_shape
        output = self.empty_output(num_molecules, shape)
        for batch in self.progress_bar(batches):
            z = self.noise(batch, shape, generator)
            self.keep(output, batch, z, self.vae.decode_graphs(z))
        return output


class GraphVAEPipeline(MoleculePipeline):
    """Molecules from a GraphVAE's prior: z ~ N(0, I), decoded (Simonovsky & Komodakis, arXiv:1802.03480)."""

    def __init__(self, vae: GraphVAE):
        super().__init__()
        self.register_modules(vae=vae)

    @torch.no_grad()
    def __call__(self, num_molecules=1000, generator=None, batch_size=1000, spanning_tree=True):
        """Draw molecules. Args: spanning_tree: see `GraphVAE.decode_graphs`. Returns: MoleculeOutput."""
        batches = self.batches(num_molecules, batch_size)
        shape = (self.vae.config.latent_dim,)
        output = self.empty_output(num_molecules, shape)
        for batch in self.progress_bar(batches):
            z = self.noise(batch, shape, generator)
            self.keep(output, batch, z, self.vae.decode_graphs(z, spanning_tree))
        return output


class GraphDDPMPipeline(MoleculePipeline):
    """Molecules by diffusion on the graph itself (Ho et al., arXiv:2006.11239), x_0 predicted, self-conditioned.

    Other schedulers fit too, see `SCHEDULERS` in the room schedules:
    `pipe.scheduler = DDPMScheduler(**helpers.GRAPH_NOISE_SCHEDULE, clip_sample=False)`.
    """

    def __init__(
        self,
        denoiser: Union[GraphDenoiser, PixelDenoiser, GraphNetworkDenoiser],  # noqa: UP007, which diffusers can read
        scheduler: Union[DPMSolverMultistepScheduler, DDPMScheduler],  # noqa: UP007
        restarts: list = (),
    ):
        super().__init__()
        read_restarts(restarts)  # refuses what are none
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(restarts=restarts)

    @torch.no_grad()
    def __call__(
        self,
        num_molecules=1000,
        num_inference_steps=50,
        generator=None,
        batch_size=1000,
        callback_on_step_end=None,
        restarts=None,
        eta=None,
    ):
        """Draw molecules; arguments as in `LatentDiffusionPipeline`, whose "prediction" is x_0 here.

        Returns: MoleculeOutput; its `latents` are the last x_0, graph vectors (N, 189).
        """
        check_sampler(self.scheduler, num_inference_steps, GRAPH_NOISE_SCHEDULE["prediction_type"], eta)
        batches = self.batches(num_molecules, batch_size)
        stages = self.stages(num_inference_steps, restarts)
        output = self.empty_output(num_molecules, (GRAPH_SIZE,))
        with self.progress_bar(total=len(batches) * sum(done for _, _, done in stages)) as bar:
            for batch in batches:
                x = guess = None
                step = 0
                for scheduler, num_steps, done in stages:
                    noise = self.noise(batch, (GRAPH_SIZE,), generator)
                    timesteps = self.set_steps(scheduler, num_steps, done)
                    extra = self.step_arguments(scheduler, generator, eta)
                    x = self.begin(scheduler, x, noise, timesteps)
                    for t in timesteps:
                        # 1. what was x_0? the network reads x_t and its own last guess
                        logits = self.denoiser(scheduler.scale_model_input(x, t), t, guess)
                        guess = expected_graph(logits).to(x.dtype)
                        # 2. x_t -> x_{t-1}
                        x_t = x
                        x = scheduler.step(guess, t, x_t, **extra).prev_sample
                        seen = {"latents": x, "x_t": x_t, "prediction": guess}
                        x = self.end_step(callback_on_step_end, step, t, seen)
                        step += 1
                        bar.update()
                self.keep(output, batch, x, vector_graph(x))
        return output


class LatentDiffusionPipeline(MoleculePipeline):
    """Molecules by diffusion in the latent space of a TokenVAE (Rombach et al., arXiv:2112.10752).

    Other schedulers fit too, see `SCHEDULERS` in the room schedules:
    `pipe.scheduler = DDIMScheduler(**helpers.NOISE_SCHEDULE, clip_sample=False)`.
    """

    def __init__(
        self, vae: TokenVAE, denoiser: LatentDenoiser, scheduler: DPMSolverMultistepScheduler, restarts: list = ()
    ):
        super().__init__()
        denoiser.check_vae(vae)
        read_restarts(restarts)  # refuses what are none
        self.register_modules(vae=vae, denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(restarts=restarts)

    @torch.no_grad()
    def __call__(
        self,
        num_molecules=1000,
        num_inference_steps=28,
        generator=None,
        batch_size=1000,
        callback_on_step_end=None,
        latents=None,
        strength=1.0,
        restarts=None,
        eta=None,
    ):
        """Draw molecules, or vary given ones.

        Args:
            num_molecules: how many, at least 1.
            num_inference_steps: network calls per molecule, 1 to 1000.
            generator: torch.Generator; the same seed and batch size give the same molecules.
            batch_size: molecules denoised together.
            callback_on_step_end: function (pipe, step, t, {"latents": z after the step, "x_t": z_t before it,
                "prediction": v}), called after each step. If it returns a dict, its "latents" take the place of z.
            latents: molecules to vary, as an output's `latents`: (num_molecules, 9, latent_dim). None: from pure noise.
            strength: how much of the way they are noised and denoised again: 0 returns them, 1 keeps next to nothing
                (SDEdit, Meng et al., arXiv:2108.01073).
            restarts: what to do after the last step: triples (kind, strength, steps), see `Restart` in the room
                schedules; [] for nothing. None takes those of the pipeline's config, or none where latents are given.
            eta: η of DDIM, how much fresh noise each step adds: 0 none, 1 as much as DDPM (eq. 16 of arXiv:2010.02502).
                None takes the scheduler's own, for DDIM 0.

        Returns: MoleculeOutput.
        """
        check_sampler(self.scheduler, num_inference_steps, NOISE_SCHEDULE["prediction_type"], eta)
        self.denoiser.check_vae(self.vae)
        batches = self.batches(num_molecules, batch_size)
        self._check_start(latents, strength, num_molecules)
        if latents is not None and restarts is None:
            restarts = []
        stages = self.stages(num_inference_steps, restarts, strength)
        shape = self.vae.latent_shape
        output = self.empty_output(num_molecules, shape)
        with self.progress_bar(total=len(batches) * sum(done for _, _, done in stages)) as bar:
            for batch in batches:
                z = None if latents is None else self._standardised(latents[batch])
                guess = None
                step = 0
                for scheduler, num_steps, done in stages:
                    noise = self.noise(batch, shape, generator)
                    timesteps = self.set_steps(scheduler, num_steps, done)
                    extra = self.step_arguments(scheduler, generator, eta)
                    z = self.begin(scheduler, z, noise, timesteps)
                    for t in timesteps:
                        # 1. what does the network say about z_t? the diffusion prior replaces this method
                        scaled = scheduler.scale_model_input(z, t)
                        v = self.predict(scaled, t, batch, guess)
                        guess = x_0_from_v(scaled, t, v, scheduler.alphas_cumprod)
                        # 2. z_t -> z_{t-1}
                        z_t = z
                        z = scheduler.step(v, t, z_t, **extra).prev_sample
                        z = self.end_step(callback_on_step_end, step, t, {"latents": z, "x_t": z_t, "prediction": v})
                        step += 1
                        bar.update()
                z = z * self.denoiser.latent_scale + self.denoiser.latent_mean  # no longer standardised
                self.keep(output, batch, z, self.decode(z))
        return output

    def predict(self, z_t, t, batch, guess):
        """The network's v for the molecules of one batch; the loop in `__call__` calls it.

        Args: batch: a slice of all molecules, each with its own condition; guess: of z_0, None before the first one.
        Shapes: z_t, guess (B, 9, latent_dim), t () -> v (B, 9, latent_dim).
        """
        return self.denoiser(z_t, t, z_0=guess)

    def decode(self, z):
        """What latents (B, 9, latent_dim) decode to, as `keep` takes it: atoms and bonds."""
        return self.vae.decode_graphs(z)

    def _standardised(self, latents):
        latents = latents.to(device=self.device, dtype=self.dtype)
        return (latents - self.denoiser.latent_mean) / self.denoiser.latent_scale

    def _check_start(self, latents, strength, num_molecules):
        check_number("strength", strength, "0 (nothing is changed) to 1 (from noise)", lambda share: 0 <= share <= 1)
        if latents is None:
            if strength != 1:
                raise ValueError(f"strength={strength} without latents: give the molecules to vary, latents=…")
            return
        if not torch.is_tensor(latents):
            raise ValueError(f"latents={quoted(latents)}: expected a tensor, such as an output's latents")
        shape = (num_molecules, *self.vae.latent_shape)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: expected {shape}, one for each molecule")
        if not latents.isfinite().all():
            raise ValueError("latents hold NaN or infinite values")


class DiffusionPriorPipeline(LatentDiffusionPipeline):
    """Molecules on request: condition -> latent (by diffusion) -> graph (Ramesh et al., arXiv:2204.06125)."""

    def __init__(
        self,
        vae: TokenVAE,
        denoiser: LatentDenoiser,
        scheduler: DPMSolverMultistepScheduler,
        encoder: ConditionEncoder,
        restarts: list = (),
    ):
        super().__init__(vae, denoiser, scheduler, restarts)
        if denoiser.config.condition_dim != encoder.size:
            raise ValueError(
                f"the denoiser takes conditions of {denoiser.config.condition_dim} numbers, the encoder makes "
                f"{encoder.size}; take both from one pipeline"
            )
        self.register_modules(encoder=encoder)

    def __call__(
        self,
        num_molecules=1000,
        condition=None,
        guidance_scale=1.5,
        negative_condition=None,
        num_inference_steps=25,
        generator=None,
        batch_size=1000,
        callback_on_step_end=None,
        latents=None,
        strength=1.0,
        restarts=None,
        eta=None,
    ):
        """Draw molecules that obey a condition: `pipe(12, {"type": "carbonyl", "part": "ring 5", "gap": 6.0})`.

        The sampling loop is that of `LatentDiffusionPipeline`. It calls `predict`, which this class replaces and which
        reads the conditions that are kept here first.

        Args:
            condition: dict with any of type, part, gap (eV), mu (Debye), logP, QED; see `ConditionEncoder`.
            guidance_scale: 0 ignores the condition, 1 is the conditional network alone, more exaggerates.
            negative_condition: what to steer away from: takes the place of "nothing asked for" in v_without.
            others: as in `LatentDiffusionPipeline`.

        Returns: MoleculeOutput.
        """
        expected = "0 or more; to steer away, use negative_condition"
        guidance_scale = check_number("guidance_scale", guidance_scale, expected, lambda scale: 0 <= scale < np.inf)
        self.batches(num_molecules, batch_size)  # refuses wrong counts
        self._guidance_scale = guidance_scale
        self._asked = self.encoder(condition, num_molecules).to(self.device)
        self._without = self.encoder(negative_condition, num_molecules).to(self.device)
        others = (num_inference_steps, generator, batch_size, callback_on_step_end, latents, strength, restarts, eta)
        return super().__call__(num_molecules, *others)

    def predict(self, z_t, t, batch, guess):
        """Classifier-free guidance (Ho & Salimans, arXiv:2207.12598), in place of the network's own v.

        v = v_without + guidance_scale · (v_with - v_without), both from one call of the network, on twice the batch.
        One prediction is enough where guidance_scale is 1, and where nothing is asked for, so that both are equal.
        """
        asked, without = self._asked[batch], self._without[batch]
        if self._guidance_scale == 1 or torch.equal(asked, without):
            return self.denoiser(z_t, t, asked, guess)
        guesses = None if guess is None else guess.repeat(2, 1, 1)
        v_with, v_without = self.denoiser(z_t.repeat(2, 1, 1), t, torch.cat([asked, without]), guesses).chunk(2)
        return v_without + self._guidance_scale * (v_with - v_without)


class PropertyOraclePipeline(DiffusionPipeline):
    """A judge of molecules, trained on the half of QM9's training split that the diffusion prior never saw."""

    def __init__(self, oracle: PropertyOracle):
        super().__init__()
        self.register_modules(oracle=oracle)

    @torch.no_grad()
    def __call__(self, smiles, batch_size=2000):
        """Predict properties of valid molecules. Returns: DataFrame with the oracle's targets, gap (eV) and mu (D)."""
        import pandas as pd

        oracle = self.oracle
        smiles = check_smiles_list("the oracle", smiles)
        check_count("batch_size", batch_size)
        atoms, bonds = map(torch.from_numpy, to_graphs(smiles))
        values = [oracle.mean.new_zeros(0, len(oracle.mean))]
        for some_atoms, some_bonds in zip(atoms.split(batch_size), bonds.split(batch_size)):
            values.append(oracle(*graph_features(some_atoms.to(self.device), some_bonds.to(self.device))))
        values = torch.cat(values) * oracle.std + oracle.mean
        names = list(oracle.config.targets)
        return pd.DataFrame(values[:, : len(names)].float().cpu().numpy(), columns=names)
