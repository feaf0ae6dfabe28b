"""Published image pipelines: what is known of them, what is missing and how it is said; a tiny one, end to end."""

import fnmatch
import json
import os
import re
import shlex
import socket
import sys
from types import SimpleNamespace

import pytest
import torch

import helpers

NAMES = sorted(helpers.OPEN_MODELS)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hugging Face cache, and no way to a network."""

    def refuse(*arguments, **options):
        raise AssertionError("a network was asked")

    for action in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, action, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put_into(cache, name, left_out=None):
    """Empty files of an open model where the Hugging Face libraries look for them."""
    model = helpers.OPEN_MODELS[name]
    folder = cache / f"models--{model.repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0123")
    for file in ("model_index.json", *model.weights):
        if file != left_out:
            path = folder / "snapshots" / "0123" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def command_in(error):
    """The command in an error's message, a list of its words."""
    return shlex.split(re.search(r"^  (hf download .*)$", str(error.value), re.M)[1])


# ---------------------------------------------------------------------------------------------------------------------
# What is known
# ---------------------------------------------------------------------------------------------------------------------


def test_the_four_open_models():
    assert NAMES == ["sd-turbo", "sdxl", "sdxl-turbo", "stable-diffusion-2-1"]
    for name, model in helpers.OPEN_MODELS.items():
        assert isinstance(model, helpers.OpenModel)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.repository)
        assert model.pixels in (512, 768, 1024) and model.download_gb > 2
        assert model.licence and model.source
        assert all(file.endswith(".fp16.safetensors") for file in model.weights)
        assert (model.steps, model.guidance) == (1, 0) if "turbo" in name else model.steps > 1 < model.guidance
    assert len({model.repository for model in helpers.OPEN_MODELS.values()}) == 4


@pytest.mark.parametrize("function", [helpers.weights_in_cache, helpers.load_open_model])
@pytest.mark.parametrize("name", ["stable-diffusion", "", None, ["sdxl"], "x" * 500])
def test_an_unknown_name_is_explained(cache, function, name):
    with pytest.raises(ValueError, match="unknown open model .*; known ones: stable-diffusion-2-1, sd-turbo,") as error:
        function(name)
    assert len(str(error.value)) < 250


# ---------------------------------------------------------------------------------------------------------------------
# What is missing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_are_explained_without_a_network(cache, name):
    model = helpers.OPEN_MODELS[name]
    assert not helpers.weights_in_cache(name)
    with pytest.raises(FileNotFoundError, match="nothing was downloaded") as error:
        helpers.load_open_model(name)
    assert f"{model.download_gb} GB" in str(error.value) and model.licence in str(error.value)
    assert command_in(error)[:3] == ["hf", "download", model.repository]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("left_out", ["model_index.json", *helpers.OPEN_MODELS["sdxl"].weights])
def test_a_part_of_the_weights_is_not_enough(cache, left_out):
    put_into(cache, "sdxl", left_out)
    assert not helpers.weights_in_cache("sdxl")
    with pytest.raises(FileNotFoundError, match="nothing was downloaded"):
        helpers.load_open_model("sdxl")


def test_the_command_fetches_what_is_needed_and_no_more(cache):
    with pytest.raises(FileNotFoundError) as error:
        helpers.load_open_model("sdxl")
    words = command_in(error)
    patterns = [word for before, word in zip(words, words[1:]) if before == "--include"]
    needed = {"model_index.json", "unet/config.json", "tokenizer/merges.txt", *helpers.OPEN_MODELS["sdxl"].weights}
    others = {"sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/model.onnx_data"}
    others |= {"vae_1_0/diffusion_pytorch_model.fp16.safetensors", "text_encoder/flax_model.msgpack"}
    fetched = {file for file in needed | others if any(fnmatch.fnmatch(file, pattern) for pattern in patterns)}
    assert fetched == needed


def test_the_command_is_one_that_the_installed_hf_understands(cache, run_python):
    with pytest.raises(FileNotFoundError) as error:
        helpers.load_open_model("sd-turbo")
    command = command_in(error)[1:]
    environment = os.environ | {"HF_HUB_CACHE": str(cache)}
    result = run_python("-m", "huggingface_hub.cli.hf", *command, "--dry-run", env=environment)
    assert "repository cannot be accessed" in result.stderr, result.stderr  # what it says without a network
    wrong = run_python("-m", "huggingface_hub.cli.hf", *command, "--dry-running", env=environment)
    assert "No such option" in wrong.stderr


def test_a_missing_package_is_explained(cache, monkeypatch):
    put_into(cache, "sd-turbo")
    assert helpers.weights_in_cache("sd-turbo")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(ImportError, match="(?s)needs the package transformers.*pip install transformers.*restart"):
        helpers.load_open_model("sd-turbo")


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def test_every_picture_has_a_generator_of_its_own():
    def pipe(prompt, generator, shift=0):
        return SimpleNamespace(images=[(prompt, shift + torch.randn(3, generator=generator))])

    images, seconds = helpers.draw_images(pipe, "a ring", [0, 1, 0])
    shifted, _ = helpers.draw_images(pipe, "a ring", [1], shift=1)
    assert [prompt for prompt, _ in images] == ["a ring"] * 3
    noises = [noise for _, noise in images]
    assert torch.equal(noises[0], noises[2]) and not torch.equal(noises[0], noises[1])
    assert torch.equal(shifted[0][1], 1 + noises[1])
    assert len(seconds) == 3 and min(seconds) >= 0
    with pytest.raises(ValueError, match="seed=-1"):
        helpers.draw_images(pipe, "a ring", [-1])


TINY = """
import inspect, json, os, socket, sys, tempfile
from pathlib import Path
import numpy as np, torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
import helpers

try:
    socket.create_connection(("192.0.2.1", 80), 1)
except OSError as error:
    assert str(error) == "network is blocked in tests"
else:
    raise AssertionError("the network is not blocked")

defaults = {"stable-diffusion-2-1": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
for name, kind in defaults.items():
    arguments = inspect.signature(kind.__call__).parameters
    model = helpers.OPEN_MODELS[name]
    assert arguments["num_inference_steps"].default == model.steps
    assert arguments["guidance_scale"].default == model.guidance

# a Stable Diffusion of some hundred thousand weights, all random, in the cache's folders
torch.manual_seed(0)
letters = "abcdefghijklmnopqrstuvwxyz"
words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
source = Path(tempfile.mkdtemp(dir=sys.argv[1]))
(source / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
(source / "merges.txt").write_text("#version: 0.2\\n")
tokenizer = CLIPTokenizer.from_pretrained(source, model_max_length=16)
blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
unet = UNet2DConditionModel(
    sample_size=8, cross_attention_dim=16, attention_head_dim=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    **blocks,
)
vae = AutoencoderKL(
    latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, **blocks
)
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
text = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=16, bos_token_id=0, eos_token_id=1, **sizes)
scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
parts = {"vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
pipe = StableDiffusionPipeline(**parts, **nothing)
repository = Path(os.environ["HF_HUB_CACHE"]) / "models--stabilityai--sd-turbo"
assert not helpers.weights_in_cache("sd-turbo")
pipe.to(torch.float16).save_pretrained(repository / "snapshots" / "0123", variant="fp16")
(repository / "refs").mkdir()
(repository / "refs" / "main").write_text("0123")

assert helpers.weights_in_cache("sd-turbo") and not helpers.weights_in_cache("sdxl")
pipe = helpers.load_open_model("sd-turbo")
assert type(pipe) is StableDiffusionPipeline
on_gpu = torch.cuda.is_available()
assert pipe.unet.dtype == pipe.text_encoder.dtype == (torch.float16 if on_gpu else torch.float32)
(picture,), (seconds,) = helpers.draw_images(pipe, "a cat", [0], num_inference_steps=2)
assert picture.size == (16, 16) and seconds > 0

def draw(seeds=(0,), prompt="a cat", **knobs):
    knobs = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "np"} | knobs
    return np.stack(helpers.draw_images(pipe, prompt, seeds, **knobs)[0])

def same(one, other):
    return bool(np.abs(one - other).max() < 1e-6)

facts = {}
for kind in (DDIMScheduler, DPMSolverMultistepScheduler):
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    first, unguided = draw(), draw(guidance_scale=1)
    facts[kind.__name__] = {
        "the seed again": same(first, draw()),
        "another seed": same(first, draw(seeds=[1])),
        "whatever stands beside it": same(first[0], draw(seeds=[1, 0])[1]),
        "more steps": same(first, draw(num_inference_steps=4)),
        "another prompt": same(first, draw(prompt="a dog")),
        "no guidance": same(first, unguided),
        "guidance 0 for 1": same(unguided, draw(guidance_scale=0)),
        "a negative prompt": same(first, draw(negative_prompt="dog")),
        "a negative prompt without guidance": same(unguided, draw(guidance_scale=1, negative_prompt="dog")),
    }
    facts[kind.__name__]["picture"] = first.tolist()
print(json.dumps(facts))
"""

# What leaves the picture as it is, and what changes it. diffusers takes every guidance_scale up to 1 for "off".
KEPT = {"the seed again", "whatever stands beside it", "guidance 0 for 1", "a negative prompt without guidance"}
CHANGED = {"another seed", "more steps", "another prompt", "no guidance", "a negative prompt"}


def test_a_tiny_pipeline_is_found_loaded_and_drawn_from(run_python, tmp_path):
    folder = os.environ.get("MOLECULE_DIFFUSION_TRANSFORMERS")
    if not folder:
        pytest.skip("needs the package transformers: MOLECULE_DIFFUSION_TRANSFORMERS names no folder that holds it")
    paths = os.pathsep.join([os.environ["PYTHONPATH"], folder])
    environment = {"PYTHONPATH": paths, "HF_HUB_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    result = run_python("-c", TINY, tmp_path, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout.splitlines()[-1])
    pictures = [facts[kind].pop("picture") for kind in ("DDIMScheduler", "DPMSolverMultistepScheduler")]
    assert pictures[0] != pictures[1]
    for found in facts.values():
        assert {name for name, same in found.items() if same} == KEPT
        assert found.keys() == KEPT | CHANGED
