"""The training loop `fit`, what it works with (progress, saved states, the learning rate), and the losses."""

import contextlib
import copy
import functools
import json
import math
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from molecule_diffusion.checks import check_count, check_seed, this_process
from molecule_diffusion.encodings import expected_graph, split_vector
from molecule_diffusion.files import atomic
from molecule_diffusion.models import summed_cross_entropy
from molecule_diffusion.schedules import NOISE_SCHEDULE, sampler, x_0_from_v

SAVE_EVERY = 30  # seconds between two saved states


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


def fit(model, loss, data, settings, seed=0, state=None, monitor=None, monitor_steps=()):
    """Train a model and return its exponential moving average: AdamW, warm-up, cosine decay, gradient norm at most 1.

    Runs on a CPU, on a GPU, and on several processes through `accelerate launch`, as one process with a batch as large
    as all of theirs. On one GPU the step is recorded and replayed, see `_RecordedStep`. Every step seeds its own random
    numbers, so a run that was stopped and resumed ends with the same weights as one that was not.

    Args:
        model: nn.Module, trained in place.
        loss: function (model, *batch) -> scalar tensor. It calls the model itself, `model(…)`, not a method of it:
            with several processes only that call adds up their gradients.
        data: tensors of equal length; a batch is drawn from them with replacement.
        settings: dict, such as a Recipe's `settings`, with steps, batch_size (per process), learning_rate, warmup,
            ema_decay, and perhaps hold and again, see `learning_rate`, and recorded (False: a GPU does each step as
            usual); what else it holds is only kept with the state.
        seed: whole number.
        state: path of the file to resume from and to save to, every 30 s and after Ctrl-C; None keeps nothing.
        monitor: function (model) -> dict, called with the moving average.
        monitor_steps: after which steps; its dict becomes part of the history.

    Returns: (ema, history): the averaged model in evaluation mode, and a list of dicts with step, loss, seconds, ….
    Raises: ValueError for data or settings that do not fit; TrainingError when the loss is not finite.
    """
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    _check_training(data, settings, seed)
    steps = settings["steps"]
    _, processes = this_process()
    several_on_cpu = processes > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision="bf16" if bf16_is_fast() else "no", cpu=several_on_cpu)
    optimizer = _optimizer(model.to(accelerator.device), settings, accelerator)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    plain = accelerator.unwrap_model(model)
    ema = EMAModel(plain.parameters(), decay=settings["ema_decay"], foreach=True)
    progress = Progress()
    if state is not None and Path(state).exists():
        progress = load_state(state, plain, ema, optimizer, settings, seed)
    data = [column.to(accelerator.device) for column in data]
    train_on = _training_step(model, loss, data, optimizer, accelerator, settings)
    saved = time.monotonic()
    bar = tqdm(total=steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step")
    with bar, torch.random.fork_rng(), _noted_interrupts() as interrupts:
        for step in range(progress.step, steps):
            started = time.perf_counter()
            rows = _draw_rows(len(data[0]), settings["batch_size"], seed, step, accelerator)
            rate = learning_rate(settings, step)
            _set_rate(optimizer, rate)
            value = train_on(rows).item()
            _check_finite(value, step, rate, state)
            ema.step(plain.parameters())
            progress.add_step(value, time.perf_counter() - started)
            bar.set_postfix_str(f"loss {progress.loss:.4f}, lr {rate:.1e}", refresh=False)
            bar.update()
            if progress.step in monitor_steps or _entry_is_due(progress.step, steps):
                progress.history.append(progress.entry())
            if progress.step in monitor_steps and monitor is not None and accelerator.is_main_process:
                progress.history[-1] |= monitor(_averaged(averaged, ema, plain))
                bar.write(json.dumps(progress.history[-1]))
            save_is_due = progress.step == steps or interrupts or time.monotonic() - saved > SAVE_EVERY
            if state is not None and save_is_due and accelerator.is_main_process:
                save_state(state, plain, ema, optimizer, settings, seed, progress)
                saved = time.monotonic()
            if interrupts:
                raise KeyboardInterrupt(f"stopped after step {progress.step} of {steps}")
    return _averaged(averaged, ema, plain), progress.history


def _averaged(averaged, ema, model):
    """The averaged model, brought up to date: its parameters are the averages, its buffers the model's own.

    (Batch norm's running means are such buffers.)
    """
    for own, current in zip(averaged.buffers(), model.buffers()):
        own.copy_(current)
    ema.copy_to(averaged.parameters())
    return averaged


def _may_record(accelerator, settings):
    """Whether the step can be recorded: on one GPU, unless its settings say that its tensors change their sizes."""
    on_one_gpu = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    return on_one_gpu and settings.get("recorded", True)


def _optimizer(model, settings, accelerator):
    """AdamW; if its steps are recorded, with a rate that lies on the GPU, for a recording reads numbers only there."""
    if not _may_record(accelerator, settings):
        return torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"])
    rate = torch.tensor(settings["learning_rate"], device=accelerator.device)
    return torch.optim.AdamW(model.parameters(), lr=rate, fused=True, capturable=True)


def _training_step(model, loss, data, optimizer, accelerator, settings):
    """A function (rows) -> loss, a tensor, that takes one step on these rows of the data."""

    def train_on(rows):
        optimizer.zero_grad()
        with accelerator.autocast():
            value = loss(model, *(column[rows] for column in data))
        accelerator.backward(value)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.detach()

    return _RecordedStep(train_on) if _may_record(accelerator, settings) else train_on


def _set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


class _RecordedStep:
    """A training step that is recorded as a CUDA graph once and replayed from then on.

    Of our small networks' steps a GPU does each operation in microseconds and then waits for Python to send the next; a
    replay sends them all at once. What is recorded must not depend on numbers that Python knows, so the losses draw
    theirs on the GPU. The first steps are done as usual: in them libraries choose their algorithms.
    """

    def __init__(self, step):
        self.step = step
        self.usual = 3
        self.graph = None
        self.stream = torch.cuda.Stream()

    def __call__(self, rows):
        if self.usual > 0:
            self.usual -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                loss = self.step(rows)
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if self.graph is None:
            self.rows = rows.clone()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.loss = self.step(self.rows)
        self.rows.copy_(rows)
        self.graph.replay()
        return self.loss


def _check_training(data, settings, seed):
    needed = ("steps", "batch_size", "learning_rate", "warmup", "ema_decay")
    if not isinstance(settings, dict) or not settings.keys() >= set(needed):
        raise ValueError(f"settings={settings!r}: expected a dict with {', '.join(needed)}, a Recipe's .settings")
    check_count("steps", settings["steps"])
    check_count("batch_size", settings["batch_size"])
    check_seed(seed)
    if not (np.isfinite(settings["learning_rate"]) and settings["learning_rate"] > 0):
        raise ValueError(f"learning_rate={settings['learning_rate']!r}: expected a number above 0")
    if not 0 <= settings["ema_decay"] < 1:
        raise ValueError(f"ema_decay={settings['ema_decay']!r}: expected at least 0 and less than 1")
    lengths = [len(column) for column in data]
    if len(set(lengths)) != 1 or lengths[0] < settings["batch_size"]:
        raise ValueError(
            f"training data of lengths {lengths} with batch_size={settings['batch_size']}: "
            "expected equal lengths of at least one batch"
        )


def _draw_rows(number, batch_size, seed, step, accelerator):
    """Which of the data a process learns from in a step; torch's random numbers are then its own for the rest of it.

    All processes draw the rows of all of them and take their share, so that together they learn from what one process
    with as large a batch would have drawn.
    """
    process = accelerator.process_index
    _seed_step(seed, step, 0)
    rows = torch.randint(number, (batch_size * accelerator.num_processes,))
    if process > 0:
        _seed_step(seed, step, process)
    return rows[process * batch_size : (process + 1) * batch_size].to(accelerator.device)


def _seed_step(seed, step, process):
    """Give each step of each run and process random numbers of its own, the same again when a run is resumed.

    seed, step and process become one number as digits do: below 1,000,003 steps and 64 processes none occurs twice.
    """
    torch.manual_seed((seed * 1_000_003 + step) * 64 + process)


def _check_finite(loss, step, rate, state):
    if np.isfinite(loss):
        return
    kept = ""
    if state is not None and Path(state).exists():
        kept = f"; the last good state is kept in {Path(state).name}"
    raise TrainingError(f"the loss is {loss} at step {step} with learning rate {rate:.2g}{kept}. Lower learning_rate")


@contextlib.contextmanager
def _noted_interrupts():
    """Note the first Ctrl-C in the yielded list, so that the loop can end its step and save; raise the second."""
    noted = []

    def note(number, frame):
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():  # only there may Python handle signals
        yield noted
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _entry_is_due(step, steps):
    """The history gets an entry every 100 steps, in short trainings twenty in all, and one at the end."""
    return step % min(100, math.ceil(steps / 20)) == 0 or step == steps


def learning_rate(settings, step):
    """Linear warm-up, the full rate for the share `hold` of the steps, then a cosine to 2 %.

    With `again`, a dict of after and learning_rate, a training of more than `after` steps does all this twice: in so
    many steps, and in the rest with a rate of its own.

    (A cosine, and beginning again: Loshchilov & Hutter, arXiv:1608.03983; held before it: Hu et al., arXiv:2404.06395.)
    """
    steps, rate = settings["steps"], settings["learning_rate"]
    if again := settings.get("again"):
        first = min(again["after"], steps)
        if step < first:
            steps = first
        else:
            step, steps, rate = step - first, steps - first, again["learning_rate"]
    held = settings.get("hold", 0) * steps
    warm = min(1, (step + 1) / max(1, settings["warmup"]))
    cosine = 0.5 * (1 + np.cos(np.pi * max(0, step - held) / (steps - held)))
    return rate * warm * (0.02 + 0.98 * cosine)


def bf16_is_fast():
    """Whether this machine calculates in bfloat16 natively; training does so where it can."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# ---------------------------------------------------------------------------------------------------------------------
# Progress, and states to resume from
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """How far a training is: steps done, seconds spent in them, running mean of the loss, and entries on the way."""

    step: int = 0
    seconds: float = 0.0
    loss: float | None = None
    history: list = field(default_factory=list)

    def add_step(self, loss, seconds):
        self.step += 1
        self.seconds += seconds
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss

    def entry(self):
        return {"step": self.step, "loss": round(self.loss, 5), "seconds": round(self.seconds, 1)}


def save_state(path, model, ema, optimizer, settings, seed, progress):
    """Write all that a training needs to go on to one safetensors file, atomically."""
    from safetensors.torch import save

    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for (name, _), average in zip(model.named_parameters(), ema.shadow_params):
        tensors[f"ema.{name}"] = average
    for index, moments in optimizer.state_dict()["state"].items():
        for name, tensor in moments.items():
            tensors[f"optimizer.{index}.{name}"] = tensor
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    content = json.dumps({"settings": settings, "seed": seed, "progress": asdict(progress)})
    with atomic(path) as part:  # not by save_file, whose files only their owner can read
        part.write_bytes(save(tensors, metadata={"training": content}))


def load_state(path, model, ema, optimizer, settings, seed):
    """Load what `save_state` wrote into model, average and optimizer. Returns: Progress.

    Raises: ValueError where the file is damaged, or of another recipe, seed or model; it is never changed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["training"])
            # clones, because a file that tensors still lie in cannot be replaced on Windows
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        progress = Progress(**content["progress"])
    except KeyError as error:
        raise ValueError(
            f"the training state {path} is of another version of the course (no {error}); delete it to start afresh"
        ) from None
    except (SafetensorError, OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"the training state {path} is damaged ({error}); delete it to start afresh") from None
    if (content["settings"], content["seed"]) != (json.loads(json.dumps(settings)), seed):
        raise ValueError(f"the training state {path} belongs to another recipe or seed; delete it to start afresh")
    try:
        model.load_state_dict(_below("model.", tensors))
    except RuntimeError as error:
        raise ValueError(
            f"the training state {path} is of another shape ({error}); delete it to start afresh"
        ) from None
    averages = _below("ema.", tensors)
    ema.shadow_params = [averages[name].to(parameter) for name, parameter in model.named_parameters()]
    ema.optimization_step = progress.step
    moments = {}
    for name, tensor in _below("optimizer.", tensors).items():
        index, key = name.split(".")
        moments.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return progress


def _below(prefix, tensors):
    """The tensors whose names begin with the prefix, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


KL_WEIGHT = 0.1  # of the shipped TokenVAE


def vae_loss(model, *data, kl_weight=KL_WEIGHT):
    """A VAE's own loss on what it reads (see `TokenVAE.loss`), by default with the shipped TokenVAE's KL weight."""
    return model(*data, kl_weight)


def diffusion_loss(model, z, *condition, self_conditioned=False):
    """Mean squared error of the predicted v = sqrt(ᾱ_t)·ε - sqrt(1 - ᾱ_t)·z_0 (Salimans & Ho, arXiv:2202.00512).

    t is drawn from a logit-normal, which favours the middle of the schedule (Esser et al., arXiv:2403.03206).
    With self_conditioned the network also sees, for half of the batch, its own first guess (arXiv:2208.04202).
    Shapes: z (B, 9, latent_dim), standardised; condition (B, condition_dim), for a network that takes one.
    """
    scheduler = _training_scheduler()
    eps = torch.randn_like(z)
    t = _logit_normal_timesteps(z, 0.0)
    z_t = scheduler.add_noise(z, eps, t)
    seen = {}
    if self_conditioned:
        half = len(z) // 2
        guess = torch.zeros_like(z)
        with torch.no_grad():
            v = model(z_t[:half], t[:half], *(part[:half] for part in condition))
            guess[:half] = x_0_from_v(z_t[:half], t[:half], v.float(), scheduler.alphas_cumprod)
        seen["z_0"] = guess
    v = model(z_t, t, *condition, **seen)
    return F.mse_loss(v.float(), scheduler.get_velocity(z, eps, t))


def prior_loss(encoder, model, z, condition, self_conditioned=False):
    """`diffusion_loss` with condition dropout, so that one network learns with and without each condition.

    `fit` wants a function of model and batch: give it `functools.partial(prior_loss, encoder)`.
    Shapes: z (B, 9, latent_dim), standardised; condition (B, encoder.size), as the encoder makes it.
    """
    encoder = encoder.to(z.device)
    return diffusion_loss(model, z, encoder.drop(condition), self_conditioned=self_conditioned)


def graph_diffusion_loss(model, x_0):
    """Cross-entropy of the clean graph's 9 atoms and 36 pairs given a noisy one, in nats per molecule.

    For half of the batch the network also sees its own first guess, as it will when it samples (arXiv:2208.04202).
    t is drawn from a logit-normal that leans to the noisy end, where the classes are decided.
    Shapes: x_0 (B, 189), as `graph_vector` makes it.
    """
    x_0 = x_0.float()
    t = _logit_normal_timesteps(x_0, 0.5)
    x_t = _training_scheduler().add_noise(x_0, torch.randn_like(x_0), t)
    half = len(x_0) // 2
    guess = torch.zeros_like(x_0)  # which says: no guess
    with torch.no_grad():
        guess[:half] = expected_graph(model(x_t[:half], t[:half]))
    atom_logits, pair_logits = split_vector(model(x_t, t, guess))
    atoms, pairs = (part.argmax(-1) for part in split_vector(x_0))
    nats = summed_cross_entropy(atom_logits, atoms) + summed_cross_entropy(pair_logits, pairs)
    return nats / len(x_0)


def oracle_loss(model, of_atoms, of_pairs, values, asked, beside_weight):
    """Mean absolute error of standardised properties: the first `asked` of them, and, with less weight, the others.

    Shapes: of_atoms, of_pairs as `graph_features` makes them, values (B, properties) -> ().
    """
    errors = (model(of_atoms, of_pairs).float() - values).abs().mean(0)
    weighted = errors[:asked].sum() + beside_weight * errors[asked:].sum()
    return weighted / (asked + beside_weight * (len(errors) - asked))


def _logit_normal_timesteps(x_0, mean):
    """A timestep for each row of x_0, on its device. Shapes: (B, …) -> (B,)."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    settings = {"logit_mean": mean, "logit_std": 1.0, "device": x_0.device}
    shares = compute_density_for_timestep_sampling("logit_normal", len(x_0), **settings)
    return (shares * NOISE_SCHEDULE["num_train_timesteps"]).long()


@functools.cache
def _training_scheduler():
    """The noise schedule, to add noise and to compute v; it takes no steps, so its prediction_type does not matter."""
    return sampler("DDPM")
