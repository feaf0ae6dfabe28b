"""Noise schedules: ᾱ, the forward process, its posterior, and the settings of the samplers."""

import inspect
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers import SchedulerMixin as SchedulerMixin  # `from_pretrained` looks for it beside a scheduler of our own
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from molecule_diffusion.checks import check_count, check_number, quoted

# The noise schedule of every model here. Spelled out, by name: `from_config` hands on only what was given by name, and
# for the rest the new class takes its own defaults.
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
GRAPH_NOISE_SCHEDULE = NOISE_SCHEDULE | {"prediction_type": "sample"}  # the GraphDenoiser predicts x_0

# The default sampler: second-order DPM-Solver++ with fresh noise at every step (arXiv:2211.01095).
# Chosen on validity and on FCD to the validation molecules. With 20 or more steps, noise
# leaves fewer invalid draws; but a planted mistake is mended nearly as often without it (notebook 03, section 10).
SAMPLER = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}


# The schedulers of diffusers that fit, by what the network predicts; each is tested on the shipped weights. The others
# have another noise schedule (flow matching, EDM), know no such prediction, or need packages that the course does not.
SCHEDULERS = {
    "sample": (
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
        LMSDiscreteScheduler,
        SASolverScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
    )
}
SCHEDULERS["v_prediction"] = (
    *SCHEDULERS["sample"],
    EulerAncestralDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)
HEUN_STEPS = 50  # with fewer, its first step is too long for this schedule: 18 % valid latent samples at 20 steps


# Schedulers by the names that papers give them, for sampling without looking up the class: `sampler`.
SAMPLERS = {
    "DDPM": (DDPMScheduler, {"clip_sample": False}),
    "DDIM": (DDIMScheduler, {"clip_sample": False}),
    "DPM-Solver++": (DPMSolverMultistepScheduler, {}),
    "SDE-DPM-Solver++": (DPMSolverMultistepScheduler, SAMPLER),
    "UniPC": (UniPCMultistepScheduler, {}),
    "Euler": (EulerDiscreteScheduler, {}),
    "Heun": (HeunDiscreteScheduler, {}),
}


def sampler(name, **settings):
    """A scheduler by its name, with the course's noise schedule: `pipe.scheduler = helpers.sampler("DDIM")`.

    Args:
        name: a key of SAMPLERS.
        settings: of the scheduler's class, such as timestep_spacing="leading"; `prediction_type="sample"` for a network
            that predicts x_0.

    Raises: ValueError for another name or a setting that the class does not have.
    """
    if not isinstance(name, str) or name not in SAMPLERS:
        raise ValueError(f"unknown sampler {quoted(name)}; known ones: {', '.join(SAMPLERS)}")
    kind, own = SAMPLERS[name]
    chosen = NOISE_SCHEDULE | own | settings
    if strange := sorted(chosen.keys() - inspect.signature(kind).parameters.keys()):
        raise ValueError(f"{kind.__name__} has no setting {quoted(strange[0])}; see help({kind.__name__})")
    return kind(**chosen)


def check_sampler(scheduler, num_inference_steps, prediction_type, eta=None):
    """Raises: ValueError for a scheduler, steps or eta that do not fit a network that predicts `prediction_type`."""
    check_count("num_inference_steps", num_inference_steps)
    if isinstance(scheduler, type):
        name = scheduler.__name__
        raise ValueError(f"pipe.scheduler is the class {name}: make one of it, {name}(**helpers.NOISE_SCHEDULE)")
    if not isinstance(scheduler, SCHEDULERS[prediction_type]):
        known = ", ".join(kind.__name__.removesuffix("Scheduler") for kind in SCHEDULERS[prediction_type])
        raise ValueError(
            f"{type(scheduler).__name__} does not fit this network, which predicts {prediction_type!r}; "
            f"schedulers that do: {known}"
        )
    config = scheduler.config
    if isinstance(scheduler, HeunDiscreteScheduler) and num_inference_steps < HEUN_STEPS:
        raise ValueError(
            f"num_inference_steps={num_inference_steps}: Heun's first step is too long below {HEUN_STEPS} steps here"
        )
    if num_inference_steps > config.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps}: the noise schedule has only {config.num_train_timesteps} steps"
        )
    if config.prediction_type != prediction_type:
        raise ValueError(
            f"the scheduler's prediction_type is {config.prediction_type!r}, the network's is {prediction_type!r}; "
            f'make the scheduler with **helpers.NOISE_SCHEDULE | {{"prediction_type": "{prediction_type}"}}'
        )
    if config.get("clip_sample"):
        raise ValueError("the scheduler clips to [-1, 1], which ruins the samples; make it with clip_sample=False")
    if eta is not None:
        check_number("eta", eta, "0 (no fresh noise) to 1 (as much as DDPM)", lambda share: 0 <= share <= 1)
        if "eta" not in inspect.signature(scheduler.step).parameters:
            raise ValueError(f"eta={eta}: a step of {type(scheduler).__name__} has no such knob; DDIMScheduler's has")


def cosine_betas(steps):
    """β of the cosine schedule, at most 0.999 (Nichol & Dhariwal, arXiv:2102.09672). Returns a tensor (steps,)."""
    check_count("steps", steps)
    time_left = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((time_left + 0.008) / 1.008 * torch.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).float()


def alpha_bars(betas):
    """ᾱ_t = Π_{s≤t} (1 - β_s), how much of x_0's variance is left after step t (eq. 4 of arXiv:2006.11239).

    Shapes: (T,) -> (T,). Raises: ValueError unless every β is between 0 and 1.
    """
    betas = torch.as_tensor(betas)
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"betas of shape {tuple(betas.shape)} from {betas.min():.3g} to {betas.max():.3g}: expected (T,), all "
            "between 0 and 1"
        )
    return (1 - betas).cumprod(0)


def q_sample(x_0, t, eps, alpha_bar):
    """x_t = sqrt(ᾱ_t)·x_0 + sqrt(1 - ᾱ_t)·ε, a draw from q(x_t | x_0) in one step (eq. 4 of arXiv:2006.11239).

    Args:
        x_0, eps: float tensors (B, ...) of one shape.
        t: whole numbers (B,) or (), 0 to T - 1.
        alpha_bar: (T,), falling from near 1.

    Raises: ValueError for other shapes, dtypes, a t out of range or a schedule that does not fall.
    """
    x_0, t, eps, alpha_bar = (torch.as_tensor(value) for value in (x_0, t, eps, alpha_bar))
    if x_0.shape != eps.shape or not x_0.is_floating_point():
        raise ValueError(
            f"x_0 {tuple(x_0.shape)} {x_0.dtype} and eps {tuple(eps.shape)}: expected float tensors of one shape"
        )
    if t.is_floating_point() or t.dtype == torch.bool or t.shape not in {(), x_0.shape[:1]}:
        raise ValueError(f"t of shape {tuple(t.shape)} and dtype {t.dtype}: expected whole numbers (B,) or one of them")
    if not _falls(alpha_bar):
        raise ValueError("alpha_bar must fall at every step, from at most 1 to at least 0; see helpers.alpha_bars")
    if t.numel() and not (t.min() >= 0 and t.max() < len(alpha_bar)):
        raise ValueError(f"t from {t.min()} to {t.max()}: the schedule has the steps 0 to {len(alpha_bar) - 1}")
    kept = _kept(alpha_bar, t, x_0)
    return kept.sqrt() * x_0 + (1 - kept).sqrt() * eps


def x_0_from_v(x_t, t, v, alpha_bar):
    """x_0 = sqrt(ᾱ_t)·x_t - sqrt(1 - ᾱ_t)·v, which is what a prediction of v says about x_0 (arXiv:2202.00512).

    Shapes: x_t, v (B, ...), t whole numbers (B,) or (), alpha_bar (T,) -> (B, ...).
    """
    kept = _kept(alpha_bar, t, x_t)
    return kept.sqrt() * x_t - (1 - kept).sqrt() * v


def _kept(alpha_bar, t, x):
    """ᾱ_t in the dtype of x (B, ...), one for each of its rows or one for all: (B, 1, ...) or (1, 1, ...)."""
    return alpha_bar.to(x)[torch.as_tensor(t).long()].reshape(-1, *[1] * (x.ndim - 1))


def _falls(alpha_bar):
    """Whether a tensor is a schedule (T,) that falls at every step, within 0 and 1."""
    if alpha_bar.ndim != 1 or not len(alpha_bar):
        return False
    return bool(alpha_bar[0] <= 1 and alpha_bar[-1] >= 0 and (alpha_bar.diff() < 0).all())


def posterior_mean(x_0, x_t, t, betas):
    """Mean of q(x_{t-1} | x_t, x_0) (eq. 7 of arXiv:2006.11239); t is one whole number, x_0 and x_t of one shape."""
    betas = torch.as_tensor(betas)
    alpha_bar = alpha_bars(betas)
    if isinstance(t, bool) or not 0 <= t < len(betas) or int(t) != t:
        raise ValueError(f"t={t}: expected a whole number; the schedule has the steps 0 to {len(betas) - 1}")
    before = alpha_bar[t - 1] if t > 0 else alpha_bar.new_ones(())
    weight_0 = before.sqrt() * betas[t] / (1 - alpha_bar[t])
    weight_t = (1 - betas[t]).sqrt() * (1 - before) / (1 - alpha_bar[t])
    return weight_0 * x_0 + weight_t * x_t


class PowerSpacedDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ (arXiv:2211.01095) whose steps may lie closer together near the data, or near the noise.

    Step k = 0, 1, … of n starts at t = T·(1 - k/n)^power - 1, rounded, T being the number of training steps.
    Notebooks 04 and 06 compare it with equal steps. Otherwise it is diffusers' scheduler.

    Args:
        power: 1 for equal steps, more for steps that crowd near t = 0, less for steps that crowd near t = T.
            It stands in the scheduler's config.
        kwargs: the settings of `DPMSolverMultistepScheduler`.
    """

    def __init__(self, *, power: float = 1.5, **kwargs):
        if not power > 0:
            raise ValueError(f"power={power!r}: expected a number above 0")
        super().__init__(**kwargs)
        self.register_to_config(power=power)

    @staticmethod
    def _get_init_keys(input_class):
        """The names of a class's settings, which diffusers reads off its signature; our kwargs are the solver's own."""
        keys = DPMSolverMultistepScheduler._get_init_keys(input_class)
        if issubclass(input_class, PowerSpacedDPMSolver):
            keys |= DPMSolverMultistepScheduler._get_init_keys(DPMSolverMultistepScheduler)
        return keys

    def set_timesteps(self, num_inference_steps=None, device=None, timesteps=None, **others):
        """As in diffusers; `timesteps` replaces the spacing."""
        if timesteps is None:
            timesteps = self._power_spaced(num_inference_steps)
        super().set_timesteps(device=device, timesteps=timesteps, **others)

    def _power_spaced(self, num_inference_steps):
        """The timesteps, falling, all different: a list of whole numbers."""
        steps = np.arange(num_inference_steps)
        rising = self.config.num_train_timesteps * ((steps + 1) / num_inference_steps) ** self.config.power
        rising = np.maximum(rising.round().astype(int) - 1, 0)
        rising = np.maximum.accumulate(rising - steps) + steps  # each at least one above the one before
        highest = self.config.num_train_timesteps - num_inference_steps + steps  # what leaves room for those above it
        rising = np.minimum(rising, highest)
        return rising[::-1].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Restarts
# ---------------------------------------------------------------------------------------------------------------------


class JumpScheduler(DDPMScheduler):
    """A sampler that trusts the guess of x_0 alone: each step forgets x_t and noises the guess anew, by q(x_s | x_0).

    Consistency models sample so (algorithm 1 of Song et al., arXiv:2303.01469). Settings as in `DDPMScheduler`.
    """

    def set_timesteps(self, *arguments, **others):
        """As in diffusers, without the timestep -1 that its spacing "trailing" appends for some numbers of steps."""
        super().set_timesteps(*arguments, **others)
        self.timesteps = self.timesteps[self.timesteps >= 0]

    def step(self, model_output, timestep, sample, generator=None):
        """One step. Shapes: model_output, sample (B, ...), timestep () -> prev_sample (B, ...)."""
        x_0 = model_output
        if self.config.prediction_type == "v_prediction":
            x_0 = x_0_from_v(sample, timestep, model_output, self.alphas_cumprod)
        later = self.timesteps[self.timesteps < timestep]
        if len(later):
            noise = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
            previous = q_sample(x_0, later[0], noise, self.alphas_cumprod)
        else:
            previous = x_0
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x_0)


@dataclass(frozen=True)
class Restart:
    """Noise what was drawn, up to a part of the way, and denoise it again (Xu et al., arXiv:2306.14878).

    What went wrong in the last steps gets a second chance, and what was decided early stays.

    Attributes:
        kind: "solver": by the pipeline's own scheduler; "jump": by a `JumpScheduler`.
        strength: how far up it goes, as a share of the scheduler's steps, as in SDEdit.
        steps: network calls per molecule.
    """

    kind: str
    strength: float
    steps: int

    def __post_init__(self):
        if self.kind not in ("solver", "jump"):
            raise ValueError(f"a restart of kind {quoted(self.kind)}: expected 'solver' or 'jump'")
        check_number("a restart's strength", self.strength, "above 0, at most 1", lambda share: 0 < share <= 1)
        check_count("a restart's steps", self.steps)
        most = int(self.strength * NOISE_SCHEDULE["num_train_timesteps"])
        if self.steps > most:
            raise ValueError(f"a restart of strength {self.strength} has at most {most} steps, not {self.steps}")


def read_restarts(restarts):
    """A list of Restart from triples, as a config file holds them: [["solver", 0.4, 20], ["jump", 0.4, 15]].

    Raises: ValueError for what is none.
    """
    expected = "expected a list of triples (kind, strength, steps), such as [('jump', 0.4, 15)], or [] for none"
    if not isinstance(restarts, (list, tuple)):
        raise ValueError(f"restarts={quoted(restarts)}: {expected}")
    for triple in restarts:
        if not isinstance(triple, (list, tuple)) or len(triple) != 3:
            raise ValueError(f"{quoted(triple)} among the restarts: {expected}")
    return [Restart(*triple) for triple in restarts]
