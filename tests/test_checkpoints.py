"""Checkpoints: files that are missing, damaged or of another shape; saving; cards."""

import errno
import inspect
import json
import pickle
import platform
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import SCHEDULES, draw, untrained

import helpers
from molecule_diffusion import checkpoints, recipes, scoring
from molecule_diffusion.files import sha256

NAMES = sorted(helpers.RECIPES)


# networks of which no older checkpoint can be
SINCE_THE_ROOMS = {"gnn_ddpm", "graphvae", "pixel_ddpm", "property_oracle", "retriever"}


WEIGHTS = "vae/diffusion_pytorch_model.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """The folder of a copied token_vae checkpoint, to damage."""
    return shutil.copytree(helpers.CHECKPOINTS / "token_vae", tmp_path / "token_vae")


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def flip_byte(folder):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (folder / WEIGHTS).write_bytes(content)


def truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def with_config(**values):
    """A checkpoint whose config fits its card but not its weights, as after an edit that somebody meant well."""

    def damage(folder):
        edit_json(folder / "vae" / "config.json", lambda config: config.update(values))
        hash_again(folder)

    return damage


def hash_again(folder):
    def update(card):
        for file in card["sha256"]:
            card["sha256"][file] = sha256(folder / file)

    edit_json(folder / "card.json", update)


def with_index(text):
    def damage(folder):
        (folder / "model_index.json").write_text(text)
        hash_again(folder)

    return damage


def other_pipeline(folder):
    edit_json(folder / "model_index.json", lambda index: index.update(_class_name="DiffusionPipeline"))
    hash_again(folder)


def only_pickle(folder):
    (folder / WEIGHTS).unlink()
    pickled = (folder / WEIGHTS).with_suffix(".bin")
    pickled.write_bytes(pickle.dumps(Trap(folder.parent / "pickle_was_loaded")))

    def name_the_pickle(card):
        del card["sha256"][WEIGHTS]
        card["sha256"][pickled.relative_to(folder).as_posix()] = sha256(pickled)

    edit_json(folder / "card.json", name_the_pickle)


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (shutil.rmtree, FileNotFoundError, "no checkpoint 'token_vae'; here are: none. If it was here"),
        (lambda f: (f / "card.json").unlink(), FileNotFoundError, "card.json is missing"),
        (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, "diffusion_pytorch_model.safetensors is missing"),
        (flip_byte, ValueError, "token_vae/vae/diffusion_pytorch_model.safetensors is damaged: its SHA-256"),
        (truncate, ValueError, "token_vae/vae/diffusion_pytorch_model.safetensors is damaged: its SHA-256"),
        (lambda f: (f / "card.json").write_text('{"name": "tok'), ValueError, "card.json is damaged"),
        (lambda f: (f / "card.json").write_bytes(b"\xff\xfe\x00"), ValueError, "card.json is damaged"),
        (lambda f: (f / "card.json").write_text("{}"), ValueError, "card.json is damaged"),
        (lambda f: (f / "card.json").write_text("[]"), ValueError, "card.json is damaged"),
        (lambda f: (f / "card.json").write_text('{"sha256": null}'), ValueError, "card.json is damaged"),
        (lambda f: (f / "model_index.json").unlink(), (ValueError, FileNotFoundError), ""),
        (lambda f: (f / "model_index.json").write_text("{"), ValueError, "model_index.json is damaged: its SHA-256"),
        (with_index("{"), ValueError, "does not fit this code"),
        (with_index("{}"), ValueError, "names no pipeline of this course: None"),
        (with_index("[]"), ValueError, "names no pipeline of this course: None"),
        (with_index("null"), ValueError, "names no pipeline of this course: None"),
        (lambda f: edit_json(f / "card.json", lambda card: card.update(sha256={})), ValueError, "has no SHA-256 of it"),
        (lambda f: (f / "vae" / "more.json").write_text("{}"), ValueError, "more.json is not of this checkpoint"),
        (other_pipeline, ValueError, "names no pipeline of this course: 'DiffusionPipeline'"),
        (lambda f: (f / "vae/config.json").unlink(), (ValueError, FileNotFoundError), ""),
        (lambda f: (f / "vae/config.json").write_text("{"), ValueError, ""),
        (with_config(width=64), ValueError, "does not fit this code"),
        (with_config(latent_dim=4), ValueError, "does not fit this code"),
        # too few or too many layers would load, the rest at random
        (with_config(layers=4), ValueError, "does not fit this code"),
        (with_config(layers=2), ValueError, "does not fit this code"),
        (only_pickle, ValueError, "does not fit this code"),
    ],
    ids="no-folder no-card no-weights flipped-byte truncated half-a-card binary-card empty-card list-card "
    "null-card no-index half-an-index no-json-index empty-index list-index null-index no-hashes "
    "another-file other-pipeline no-config half-a-config width latent-dim more-layers fewer-layers "
    "only-pickle".split(),
)
def test_a_damaged_checkpoint_is_refused_with_a_remedy(copy, damage, error, message):
    damage(copy)
    remedy = r".*git checkout -- data/checkpoints/token_vae.* or train it: python helpers.py train token_vae"
    with pytest.raises(error, match="(?s)" + message + remedy):
        helpers.load_pipeline("token_vae", copy.parent)
    assert not (copy.parent / "pickle_was_loaded").exists()


def test_the_copied_checkpoint_loads_undamaged(copy):
    helpers.load_pipeline("token_vae", copy.parent)


def make_old(folder):
    """Give a copied checkpoint the files that the course wrote when it was one module, helpers."""

    def name_helpers(index):
        index.pop("restarts", None)  # they came later
        for key, entry in index.items():
            if isinstance(entry, list) and entry[0].startswith("molecule_diffusion."):
                index[key] = ["helpers", entry[1]]

    edit_json(folder / "model_index.json", name_helpers)
    weights = {file.relative_to(folder).as_posix(): sha256(file) for file in folder.rglob("*.safetensors")}
    edit_json(folder / "card.json", lambda card: card.update(sha256=weights))
    assert "molecule_diffusion" not in (folder / "model_index.json").read_text()
    if (folder / "scheduler").exists():
        edit_json(folder / "scheduler" / "scheduler_config.json", lambda config: config.pop("power", None))


@pytest.mark.parametrize("name", sorted({*NAMES} - SINCE_THE_ROOMS))
def test_a_checkpoint_from_before_the_rooms_loads(name, tmp_path):
    folder = shutil.copytree(helpers.CHECKPOINTS / name, tmp_path / name)
    make_old(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    old, new = helpers.load_pipeline(name, tmp_path), helpers.load_pipeline(name)
    assert type(old) is type(new) and old.components.keys() == new.components.keys()
    for key, network in checkpoints.networks(new).items():
        for tensor, same in zip(network.state_dict().values(), old.components[key].state_dict().values()):
            assert torch.equal(tensor, same)
    if name in SCHEDULES:
        if "power" in new.scheduler.config:
            assert old.scheduler.config.power == 1.5, "what all had that came without a number"
            old.scheduler.register_to_config(power=new.scheduler.config.power)
        drawn = [draw(pipe, 4, num_inference_steps=3, restarts=[]).latents for pipe in (old, new)]
        assert torch.equal(*drawn)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_checkpoint_from_before_the_rooms_loads_without_the_front_door(tmp_path, run_python):
    make_old(shutil.copytree(helpers.CHECKPOINTS / "latent_diffusion", tmp_path / "latent_diffusion"))
    code = (
        "import sys; from molecule_diffusion.checkpoints import load_pipeline;"
        "print(type(load_pipeline('latent_diffusion', sys.argv[1])).__module__, 'helpers' in sys.modules)"
    )
    result = run_python("-c", code, tmp_path)
    assert result.stdout.split() == ["molecule_diffusion.pipelines", "False"], result.stderr


def test_the_pickle_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["stable_diffusion", "", ".", "..", "../checkpoints/token_vae"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint {re.escape(repr(name))}; here are: {', '.join(NAMES)}"):
        helpers.load_pipeline(name)


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


def test_a_saved_checkpoint_loads_and_its_card_holds_its_score(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "reconstruction_accuracy", lambda *_: 0.5)  # that of 10,000 molecules takes a while
    pipe = helpers.load_pipeline("token_vae")
    weights = {name: tensor.clone() for name, tensor in pipe.vae.state_dict().items()}
    checkpoints.save_checkpoint("token_vae", pipe, {"steps": 7}, 3, 61.4, tmp_path)
    recipes.score_checkpoint("token_vae", tmp_path, num_molecules=20)
    again = helpers.load_pipeline("token_vae", tmp_path)
    assert all(torch.equal(tensor, again.vae.state_dict()[name]) for name, tensor in weights.items())
    card = again.card
    assert (card["recipe"], card["seed"], card["training_seconds"]) == ({"steps": 7}, 3, 61)
    assert card["metrics"]["N"] == 20 and card["metrics"]["exact_reconstruction_test"] == 0.5
    assert "| N | 20 |" in (tmp_path / "token_vae" / "README.md").read_text(encoding="utf-8")
    # where the networks were loaded from is nobody's business
    for path in ("model_index.json", "vae/config.json"):
        assert "_name_or_path" not in (tmp_path / "token_vae" / path).read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["token_vae"]


def test_a_saved_graph_ddpm_loads_and_draws_the_same(tmp_path):
    pipe = untrained("graph_ddpm")
    checkpoints.save_checkpoint("graph_ddpm", pipe, {"steps": 7}, 3, 61.4, tmp_path)
    recipes.score_checkpoint("graph_ddpm", tmp_path, num_molecules=20)
    again = helpers.load_pipeline("graph_ddpm", tmp_path)
    assert again.denoiser.config.width == 32 and again.scheduler.config.prediction_type == "sample"
    pipe.to(torch.float32)  # the weights were rounded to half precision when they were saved
    assert torch.equal(draw(again, 5, num_inference_steps=4).latents, draw(pipe, 5, num_inference_steps=4).latents)
    assert again.card["metrics"]["N"] == again.card["metrics_fast"]["N"] == 20
    assert (
        again.card["metrics_fast"]["num_inference_steps"] == helpers.RECIPES["graph_ddpm"].fast["num_inference_steps"]
    )


INTERRUPTS = [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left")]


@pytest.mark.parametrize("error", INTERRUPTS)
def test_an_interrupted_checkpoint_leaves_the_old_one(vae, tmp_path, monkeypatch, error):
    folder = tmp_path / "token_vae"
    folder.mkdir()
    (folder / "old").write_text("old")

    def interrupted(part, card):
        assert (part / "vae" / "diffusion_pytorch_model.safetensors").exists()
        raise error

    monkeypatch.setattr(checkpoints, "write_card", interrupted)
    with pytest.raises(type(error)):
        checkpoints.save_checkpoint("token_vae", helpers.TokenVAEPipeline(vae), {}, 0, 1.0, tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == ["token_vae", "token_vae/old"]


# ---------------------------------------------------------------------------------------------------------------------
# The shipped ones
# ---------------------------------------------------------------------------------------------------------------------


def read_card(name):
    return json.loads((helpers.CHECKPOINTS / name / "card.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_cards(name):
    folder, card = helpers.CHECKPOINTS / name, read_card(name)
    assert card["name"] == name
    assert card["recipe"] == json.loads(json.dumps(helpers.RECIPES[name].settings)), "the card is of another recipe"
    assert card["seed"] == 0
    assert "130,251 molecules" in card["data"]
    assert "torch" in card["machine"] and card["training_seconds"] > 60
    assert card["metrics"]["N"] == 10_000
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - {"card.json", "README.md"} == set(card["sha256"])
    page = (folder / "README.md").read_text(encoding="utf-8")
    first = {"property_oracle": "mae_gap", "retriever": "known P@1"}.get(name, "valid")
    assert f"# {name}" in page and f"| {first} | {card['metrics'][first]} |" in page
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_checkpoints_are_small():
    sizes = {
        name: sum(path.stat().st_size for path in (helpers.CHECKPOINTS / name).rglob("*") if path.is_file())
        for name in NAMES
    }
    assert all(0 < size <= 16e6 for size in sizes.values()), sizes
    assert sum(sizes.values()) <= 60e6


def test_the_card_of_graph_ddpm_meets_the_goals():
    card = read_card("graph_ddpm")
    metrics = card["metrics"]
    assert metrics["N"] == 10_000
    assert metrics["valid"] >= 0.994 and 0.955 <= metrics["unique"] <= 0.975
    assert metrics["fcd"] <= 0.11
    assert metrics["network_calls"] <= 60  # what a molecule costs, whatever the machine
    weights = helpers.CHECKPOINTS / "graph_ddpm" / "denoiser" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 16e6


def test_the_card_of_graph_ddpm_is_of_the_settings_in_the_code():
    card = read_card("graph_ddpm")
    default = inspect.signature(helpers.GraphDDPMPipeline.__call__).parameters["num_inference_steps"].default
    assert card["metrics"]["num_inference_steps"] == default
    assert card["metrics_fast"]["num_inference_steps"] == helpers.RECIPES["graph_ddpm"].fast["num_inference_steps"]
    assert card["metrics_fast"]["num_inference_steps"] < default
    assert card["metrics_fast"]["N"] == 10_000
    assert card["metrics_fast"]["network_calls"] <= 35
    assert card["metrics_fast"]["valid"] >= 0.99 and card["metrics_fast"]["fcd"] <= 0.14


@pytest.mark.parametrize("name, valid", [("pixel_ddpm", 0.97), ("gnn_ddpm", 0.985)])
def test_the_cards_of_the_other_graph_networks_meet_the_goals(name, valid):
    metrics = read_card(name)["metrics"]
    assert metrics["N"] == 10_000 and metrics["num_inference_steps"] == 50 == metrics["network_calls"]
    assert metrics["valid"] >= valid and metrics["unique"] >= 0.955 and metrics["fcd"] <= 0.30


def test_the_card_meets_the_goals():
    metrics = read_card("latent_diffusion")["metrics"]
    assert metrics["N"] == 10_000
    assert metrics["valid"] >= 0.99 and 0.95 <= metrics["unique"] <= 0.98
    assert metrics["fcd"] <= 0.20
    assert metrics["network_calls"] <= 30


def test_the_card_of_the_prior_meets_the_goals():
    metrics = helpers.load_pipeline("diffusion_prior").card["metrics"]
    assert metrics["N"] == 10_000 and metrics["valid"] >= 0.95 and metrics["unique"] >= 0.90
    assert metrics["type_obeyed"] >= 0.90 and metrics["part_obeyed"] >= 0.85
    assert set(metrics["type_by_class"]) == set(helpers.TYPES) and set(metrics["part_by_class"]) == set(helpers.PARTS)


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_name_the_rooms_and_every_setting(name):
    index = json.loads((helpers.CHECKPOINTS / name / "model_index.json").read_text())
    assert index.pop("restarts", []) == [list(restart) for restart in helpers.RECIPES[name].restarts]
    libraries = {entry[0] for entry in index.values() if isinstance(entry, list)}
    rooms = ("models", "graph_denoisers", "graphvae", "oracle", "schedules", "conditions", "retrieval")
    assert libraries <= {f"molecule_diffusion.{room}" for room in rooms} | {"diffusers"}
    if "molecule_diffusion.schedules" in libraries:
        config = json.loads((helpers.CHECKPOINTS / name / "scheduler" / "scheduler_config.json").read_text())
        assert config["power"] == helpers.RECIPES[name].sampler().config.power


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes there")
def test_weights_can_be_read_by_others(tmp_path):
    checkpoints.save_checkpoint("token_vae", untrained("token_vae"), {}, 0, 1.0, tmp_path)
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


@pytest.mark.parametrize("name", NAMES)
def test_loading_leaves_torchs_random_numbers_alone(name):
    before = torch.random.get_rng_state()
    helpers.load_pipeline(name)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_checkpoint_whose_replacement_was_killed_comes_back(copy):
    old = copy.with_name(f"{copy.name}.{platform.node()}.999999999.abcd.old")
    copy.rename(old)
    (copy.parent / f"{copy.name}.{platform.node()}.999999999.abcd.part").mkdir()
    assert helpers.load_pipeline("token_vae", copy.parent).card["name"] == "token_vae"
    assert copy.is_dir() and not old.exists()


@pytest.mark.parametrize(
    "name, file, change",
    [
        ("diffusion_prior", "encoder/config.json", lambda config: config["types"].reverse()),
        ("property_oracle", "oracle/config.json", lambda config: config["targets"].reverse()),
        (
            "latent_diffusion",
            "scheduler/scheduler_config.json",
            lambda config: config.update(trained_betas=[float("nan")]),
        ),
    ],
)
def test_settings_that_would_change_the_meaning_of_weights_are_refused(tmp_path, name, file, change):
    folder = shutil.copytree(helpers.CHECKPOINTS / name, tmp_path / name)
    edit_json(folder / file, change)
    with pytest.raises(ValueError, match=f"{name}/{file} is damaged: its SHA-256 is not the one in card.json"):
        helpers.load_pipeline(name, tmp_path)


@pytest.mark.parametrize("name", [None, 3, True])
def test_a_name_is_a_text(name):
    with pytest.raises(ValueError, match="expected a text, such as 'latent_diffusion'"):
        helpers.load_pipeline(name)


def nan_weights(folder):
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    hash_again(folder)


@pytest.mark.parametrize(
    "damage, message",
    [
        (nan_weights, "token_vae holds NaN or infinite weights in vae"),
        (with_index('{"_class_name": "TokenVAEPipeline", "vae": []}'), "does not fit this code"),
        (with_config(width="a"), "does not fit this code"),
    ],
)
def test_more_damage_is_refused_with_a_remedy(copy, damage, message):
    damage(copy)
    with pytest.raises(ValueError, match=message + ".*train it: python helpers.py train token_vae"):
        helpers.load_pipeline("token_vae", copy.parent)


def test_a_very_long_name_is_quoted_in_part():
    with pytest.raises(FileNotFoundError, match="no checkpoint 'xxx") as error:
        helpers.load_pipeline("x" * 5000)
    assert len(str(error.value)) < 400
