"""The notebooks as files: the set-up check, running and saving one clean, repeating a study."""

import base64
import importlib.metadata
import io
import math
import platform
import queue
import re
import time
from pathlib import Path

from molecule_diffusion.checkpoints import machine
from molecule_diffusion.checks import quoted
from molecule_diffusion.files import RESULTS, ROOT, TRAINING, atomic, read_json, write_json
from molecule_diffusion.sentences import SENTENCE_INSTALL


def check_setup():
    """A table of the pinned packages against those installed here; says what to do where they differ."""
    from IPython.display import HTML
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("molecule-diffusion-course") or []]
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError("the course is not installed: run `python -m pip install -e .` in its folder") from None
    sentence_model = Requirement(SENTENCE_INSTALL.split()[-1])  # installed by a command of its own
    rows, wrong = [], []
    for wanted in [*requirements, sentence_model]:
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = _installed_version(wanted.name)
        fits = found != "missing" and wanted.specifier.contains(found, prereleases=True)
        if not fits:
            wrong.append(f"{wanted.name}{wanted.specifier}")
        cells = (wanted.name, wanted.specifier, found, "✓" if fits else "✗")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    verdict = "All packages are the ones the course was tested with."
    if wrong:
        commands = ["python -m pip install -e ."] if wrong != [str(sentence_model)] else []
        if str(sentence_model) in wrong:
            commands.append(SENTENCE_INSTALL)
        verdict = (
            f"Expected {', '.join(wrong)}. Run <code>{' && '.join(commands)}</code> in the course's folder, "
            "then restart the kernel."
        )
    head = "<tr><th>package</th><th>pinned</th><th>here</th><th></th></tr>"
    return HTML(f"<p>Python {platform.python_version()}. {verdict}</p><table>{head}{''.join(rows)}</table>")


def _installed_version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def run_notebook(path):
    """Run a notebook top to bottom in a fresh kernel and save it clean: no widget state, no scripts, no timings.

    The notebook on disk changes only if every cell ran. Raises nbclient.exceptions.CellExecutionError otherwise.
    """
    import nbformat
    from nbclient import NotebookClient

    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    settings = dict(timeout=300, kernel_name="python3", coalesce_streams=True)
    client = NotebookClient(notebook, **settings, resources={"metadata": {"path": path.parent}})

    def ask_often(notebook):
        client.kc.shell_channel.get_msg = asked_often(client.kc.shell_channel.get_msg)

    client.on_notebook_start = ask_often
    started = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - started
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            shown = [part for output in cell.outputs for part in _with_first_picture(output, client.widget_state)]
            cell.outputs = [output for output in map(_static_output, shown) if output is not None]
    with atomic(path) as part:
        nbformat.write(notebook, part)
    print(f"{path.name}: ran in {seconds:.0f} s, {path.stat().st_size / 1e6:.2f} MB")
    return seconds


def _with_first_picture(output, states):
    """An output, or, in place of a slider made by ipywidgets' `interact`, what stands below it at its first position.

    Args: states: of all widgets, by model id, as nbclient keeps them. Returns: list of outputs.
    """
    view = output.get("data", {}).get("application/vnd.jupyter.widget-view+json", {})
    state = states.get(view.get("model_id"), {})
    if "widget-interact" not in state.get("_dom_classes", ()):
        return [output]
    children = [states[name.removeprefix("IPY_MODEL_")] for name in state["children"]]
    return [shown for child in children for shown in child.get("outputs", ())]


def asked_often(get_msg, seconds=1):
    """A channel's `get_msg` that looks for a message again every few seconds until its timeout.

    While nbclient waits for the end of a cell it also answers widgets through the same channel, and may then not notice
    the message that it waits for before the timeout of the cell (nbclient's issue 312).
    """

    async def get_msg_often(timeout=None):
        left = math.inf if timeout is None else timeout
        while True:
            try:
                return await get_msg(timeout=min(seconds, left))
            except queue.Empty:
                left -= seconds
                if left <= 0:
                    raise

    return get_msg_often


def _static_output(output):
    """The part of a cell's output that a page without a kernel can show; None if there is none."""
    if output.output_type == "stream" and output.name == "stderr":
        bar = re.compile(r"\|\s*[\d.]+/[\d.]+ \[")  # as in 100%|███| 25/25 [00:03<00:00, 8.2it/s]
        output.text = "".join(line for line in output.text.splitlines(True) if line.strip() and not bar.search(line))
        return output if output.text else None
    data = output.get("data")
    if data is None:
        return output
    if data.pop("application/vnd.jupyter.widget-view+json", None) and "image/png" not in data:
        return None
    data.pop("application/javascript", None)
    if "image/png" in data:
        data["image/png"] = packed_png(data["image/png"])
    if "<script" in "".join(data.get("text/html", "")):
        del data["text/html"]
    return output if data else None


def packed_png(text):
    """A PNG in base64 with the same pixels in fewer bytes; the text itself if it cannot be made smaller."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    if picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (255, 255):
        picture = picture.convert("RGB")  # opaque all over
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    packed = base64.b64encode(buffer.getvalue()).decode()
    return packed if len(packed) < len(text) else text


def run_study(number, parts=()):
    """Run the cells of a notebook that are tagged "study", then the functions in its dict STUDY; keep what they return.

    The recipe of a study is thus the code that the student reads. data/results/NUMBER_study.json is written after each
    part, with the machine that ran it, so a study that was stopped goes on with `parts`, the names of those to run; all
    by default.
    """
    names = {}
    for source in _study_cells(number):
        exec(compile(source, f"notebook {number}", "exec"), names)
    study = names["STUDY"]
    unknown = set(parts) - study.keys()
    if unknown:
        raise ValueError(f"unknown parts {sorted(unknown)}; notebook {number} has {', '.join(study)}")
    path = RESULTS / f"{number}_study.json"
    for part in parts or study:
        results = read_json(path) if path.exists() else {}
        results[part] = study[part]()
        results["machine"] = results.get("machine", {}) | {part: machine()}
        write_json(path, results)


def study_rows(name, settings, make):
    """The rows of a part of a study, one per setting, each kept as soon as it is made: a part that was stopped goes on.

    Args:
        name: of the file in data/training that keeps them, such as "03_targets"; delete it to begin anew.
        settings: list of dicts, as JSON can hold them, such as {"steps": 1000, "seed": 0}.
        make: function (**setting) -> dict of what was found.

    Returns: list of dicts, each a setting and what was found with it.
    """
    path = TRAINING / f"{name}.json"
    kept = read_json(path) if path.exists() else []
    rows = []
    for setting in settings:
        row = next((row for row in kept if setting.items() <= row.items()), None)
        if row is None:
            row = setting | make(**setting)
            kept.append(row)
            write_json(path, kept)
        rows.append(row)
    return rows


def _study_cells(number):
    """The sources of a notebook's cells that carry the tag "study"."""
    import nbformat

    if not re.fullmatch(r"\d\d", number):
        raise ValueError(f"study {quoted(number)}: expected the two digits of a notebook, such as 02")
    sources = []
    for path in sorted((ROOT / "notebooks").glob(f"{number}_*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if "study" in cell.metadata.get("tags", ()):
                sources.append(cell.source)
    if not sources:
        raise ValueError(f"no study in notebook {number!r}; those with one have cells tagged study")
    return sources
