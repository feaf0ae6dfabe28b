"""What must hold for every saved notebook and every page."""

import ast
import inspect
import json
import re
import statistics

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import helpers

FOLDER = helpers.ROOT / "notebooks"


NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


MACHINE_PATH = re.compile(r"(?<![\w.~-])/(root|home|tmp|work|Users)/|\b[A-Z]:\\+Users")


DETAILS = re.compile(r"<details>.*?</details>", re.S)


FENCE = re.compile(r"```.*?```", re.S)


# ---------------------------------------------------------------------------------------------------------------------
# The rules: each takes a parsed notebook and yields what is wrong with it
# ---------------------------------------------------------------------------------------------------------------------


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind and cell.source.strip()]


def outputs(notebook):
    return [output for cell in cells(notebook, "code") for output in cell.outputs]


def texts(notebook):
    """Everything in it that is text: sources and the textual part of outputs."""
    yield from (cell.source for cell in notebook.cells)
    for output in outputs(notebook):
        yield from (output[key] for key in ("text", "evalue") if key in output)
        for kind, value in output.get("data", {}).items():
            if not kind.startswith("image/") or kind == "image/svg+xml":
                yield value if isinstance(value, str) else json.dumps(value)


def one_clean_run(notebook):
    counts = [cell.execution_count for cell in cells(notebook, "code")]
    if counts != list(range(1, len(counts) + 1)):
        yield f"execution counts are {counts}: run it top to bottom in a fresh kernel"


def no_errors(notebook):
    for output in outputs(notebook):
        if output.output_type == "error":
            yield f"an error is saved: {output.ename}: {output.evalue}"


def no_widgets(notebook):
    if "widgets" in notebook.metadata:
        yield "widget state is saved"
    for output in outputs(notebook):
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            yield "a widget is saved, which shows as nothing without a kernel"


def no_scripts(notebook):
    for output in outputs(notebook):
        for kind, value in output.get("data", {}).items():
            if kind == "application/javascript" or "<script" in str(value):
                yield f"a script is saved in {kind}"


def small(notebook):
    size = len(nbformat.writes(notebook).encode())
    if size > 1.5e6:
        yield f"{size / 1e6:.1f} MB; at most 1.5"


def short_cells(notebook):
    lines = [
        sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in cell.source.split("\n"))
        for cell in cells(notebook, "code")
    ]
    for cell, n in zip(cells(notebook, "code"), lines):
        if n > 25:
            yield f"a code cell of {n} lines; at most 25: {cell.source[:60]!r}"
    if lines and statistics.median(lines) > 8:
        yield f"code cells have {statistics.median(lines)} lines in the middle; at most 8"


def short_prose(notebook):
    """Words between two code cells; folded text, code, the title and whole closing sections do not count."""
    words, first = 0, True
    for cell in notebook.cells[1:]:
        if cell.cell_type == "code":
            if words > 350 and not first:
                yield f"{words} words of prose before {cell.source[:60]!r}; at most 350"
            words, first = 0, False
        elif not re.match(r"#+ *(references|quiz|questions)", cell.source, re.I):
            prose = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", FENCE.sub("", DETAILS.sub("", cell.source)))
            words += len(re.findall(r"\w[\w'’-]*", re.sub(r"<[^>]+>", "", prose)))


def alt_texts(notebook):
    sources = [cell.source for cell in cells(notebook, "markdown")]
    pages = sources + [
        output.data["text/html"] for output in outputs(notebook) if "text/html" in output.get("data", {})
    ]
    for source in sources:
        for link in re.findall(r"!\[\s*\]\([^)]*\)", source):
            yield f"no alt text: {link}"
    for page in pages:
        for tag in re.findall(r"<img\b[^>]*>", page):
            alt = re.search(r"""\balt\s*=\s*(["'])(.*?)\1""", tag, re.S)
            if not alt or not alt[2].strip():
                yield f"no alt text: {tag[:80]}"
    for output in outputs(notebook):
        if "image/png" in output.get("data", {}) and not output.metadata.get("image/png", {}).get("alt", "").strip():
            yield "a picture without alt text: show it with helpers.show_figure or helpers.show_image"


def no_remote_files(notebook):
    for text in texts(notebook):
        for address in re.findall(r"https?://[^\s\"'<>)]+\.(?:js|css|png|jpe?g|svg)\b", text):
            yield f"needs a network: {address}"


def no_machine_paths(notebook):
    for text in texts(notebook):
        for found in MACHINE_PATH.finditer(text):
            yield f"a path of one machine: {text[found.start() : found.start() + 60]!r}"


def no_placeholders(notebook):
    for text in texts(notebook):
        for found in re.finditer("[⟦⟧]", text):
            yield f"a placeholder is left: {text[max(0, found.start() - 40) : found.start() + 40]!r}"


def no_installs(notebook):
    for cell in cells(notebook, "code"):
        if re.search(r"\b(pip|conda|mamba)3?\b.*\binstall\b", cell.source):
            yield f"installs something: {cell.source[:60]!r}"


def one_setup_cell(notebook):
    importing = [bool(re.search(r"^\s*(import|from) helpers\b", c.source, re.M)) for c in cells(notebook, "code")]
    if importing != [True] + [False] * (len(importing) - 1):
        yield f"helpers must be imported in the first code cell and only there; it is in {importing.count(True)}"


def known_names(notebook):
    """Every `helpers.x`, in code and in prose, is public, and takes the arguments that it is called with."""
    code = [cell.source for cell in cells(notebook, "code")]
    prose = [cell.source for cell in cells(notebook, "markdown")]
    code += [block for text in prose for block in re.findall(r"```python\n(.*?)```", text, re.S)]
    used = {name for text in prose for name in re.findall(r"\bhelpers\.([A-Za-z]\w*)", text)} - {"py"}
    for source in code:
        try:
            tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.M))
        except SyntaxError as error:
            yield f"{error}: {source[:60]!r}"
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "helpers":
                used |= {alias.name for alias in node.names}
            elif name := helpers_name(node):
                used.add(name)
            if isinstance(node, ast.Call) and (name := helpers_name(node.func)) and hasattr(helpers, name):
                yield from wrong_arguments(name, node)
    for name in sorted(used - set(helpers.__all__)):
        yield (
            f"helpers.{name} is not in helpers.__all__" if hasattr(helpers, name) else f"helpers.{name} does not exist"
        )


def helpers_name(node):
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "helpers":
        return node.attr


def wrong_arguments(name, call):
    signature = inspect.signature(getattr(helpers, name))
    if any(isinstance(argument, ast.Starred) for argument in call.args):
        positional = []  # how many there are shows only when it runs
    else:
        positional = call.args
    try:
        signature.bind_partial(*positional, **{k.arg: k.value for k in call.keywords if k.arg})
    except TypeError as error:
        yield f"helpers.{name}{signature}: {error}"


def links_lead_somewhere(notebook):
    for cell in cells(notebook, "markdown"):
        yield from missing_links(cell.source, FOLDER)


def missing_links(text, folder):
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r"<img\b[^>]*\bsrc=[\"']([^\"']+)", text)
    for target in targets:
        path = target.split("#")[0]
        if path and not re.match(r"[a-z]+:", path) and not (folder / path).exists():
            yield f"nothing at {target}"


def minutes_of_exercises(notebook):
    """The title says how long all exercises take together; the open task is not counted."""
    headings = [line for cell in notebook.cells for line in cell.source.split("\n") if line.startswith("> **Exercise ")]
    minutes = sum(int(re.search(r"· (\d+) min\b", line)[1]) for line in headings)
    said = re.search(r"exercises (\d+) min\b", notebook.cells[0].source)
    if minutes != (int(said[1]) if said else 0):
        yield f"the exercises take {minutes} min, the title says {said[1] if said else 'nothing of them'}"


RULES = [
    one_clean_run,
    no_errors,
    no_widgets,
    no_scripts,
    small,
    short_cells,
    short_prose,
    alt_texts,
    no_remote_files,
    no_machine_paths,
    no_placeholders,
    no_installs,
    one_setup_cell,
    known_names,
    links_lead_somewhere,
    minutes_of_exercises,
]


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def test_the_notebooks_are_there():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{k:02}_" for k in range(len(NOTEBOOKS))]
    assert len(NOTEBOOKS) >= 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_notebooks_keep(rule, notebook):
    assert list(rule(notebook)) == []


# ---------------------------------------------------------------------------------------------------------------------
# The rules themselves, on notebooks that break them
# ---------------------------------------------------------------------------------------------------------------------


SETUP = "import helpers"


PICTURE = {"image/png": "AAAA", "text/plain": "a picture"}


TMP, ROOT_PATH, WINDOWS = "/" + "tmp/x", "/" + "root/x", "C:" + "\\Users\\me"


def make(*parts, **metadata):
    """A notebook from markdown texts (starting with #) and code cells: a source or (source, outputs)."""
    made, count = [], 0
    for part in ("# Title", SETUP, *parts):
        if isinstance(part, str) and part.startswith("#"):
            made.append(new_markdown_cell(part))
        else:
            count += 1
            source, found = part if isinstance(part, tuple) else (part, [])
            made.append(new_code_cell(source, outputs=found, execution_count=count))
    return new_notebook(cells=made, metadata=metadata)


def shown(data, **metadata):
    return new_output("display_data", data, metadata=metadata)


def uncounted(notebook):
    notebook.cells[-1].execution_count = 7
    return notebook


GOOD = make(
    "# Text\n![a ring](../figs/course_map.png) [glossary](../GLOSSARY.md) <img alt='a' src='../figs/course_map.png'>",
    ("x = 1\nx", [new_output("execute_result", {"text/plain": "1"}, execution_count=2)]),
    ("helpers.show_grid(['C'], columns=2)", [shown(PICTURE, **{"image/png": {"alt": "methane"}})]),
    "# More\n`helpers.load_qm9()` in helpers.py, https://example.org/page\n```python\nhelpers.to_graph('C')\n```",
    ("%timeit helpers.to_graph('C')", [new_output("stream", text="1 ms\n")]),
    "# Quiz\n" + "word " * 400,
    "helpers.mask_bonds(*helpers.to_graph('C')[:2])",
    "# Next\n<details><summary>Solution</summary>" + "word " * 400 + "</details>",
    "helpers.results_table([])",
)


BAD = [
    (one_clean_run, uncounted(make("1"))),
    (no_errors, make(("1 / 0", [new_output("error", ename="ZeroDivisionError", evalue="x", traceback=[])]))),
    (no_widgets, make("1", widgets={"state": {}})),
    (no_widgets, make(("w", [shown({"application/vnd.jupyter.widget-view+json": {"model_id": "1"}})]))),
    (no_scripts, make(("h", [shown({"text/html": "<b>x</b><script>1</script>"})]))),
    (no_scripts, make(("h", [shown({"application/javascript": "1"})]))),
    (small, make(("p", [shown({"image/png": "A" * 1_600_000})]))),
    (short_cells, make("\n".join(f"x = {k}" for k in range(26)), *["1"] * 5)),
    (short_cells, make("\n".join(f"x = {k}" for k in range(9)), "\n".join(f"x = {k}" for k in range(9)))),
    (short_prose, make("# Text\n" + "word " * 351, "1")),
    (short_prose, make("# Text\n" + "word " * 180, "# More\n" + "word " * 180, "1")),
    (alt_texts, make("# Text\n![](../figs/course_map.png)")),
    (alt_texts, make("# Text\n<img src='../figs/course_map.png'>")),
    (alt_texts, make("# Text\n<img alt='' src='../figs/course_map.png'>")),
    (alt_texts, make(("p", [shown(PICTURE)]))),
    (alt_texts, make(("p", [shown({"text/html": "<img src='data:image/png;base64,AAAA'>"})]))),
    (no_remote_files, make("# Text\n![x](https://example.org/x.png)")),
    (no_remote_files, make(("h", [shown({"text/html": "<link href='https://cdn.example.org/a.css'>"})]))),
    (no_remote_files, make("url = 'http://cdn.example.org/a.min.js?v=1'")),
    (no_machine_paths, make(f"open('{TMP}')")),
    (no_machine_paths, make(("1", [new_output("stream", text=f"saved to {ROOT_PATH}")]))),
    (no_machine_paths, make(("1", [shown({"text/html": f"<p>{WINDOWS}</p>"})]))),
    (no_placeholders, make("# Text\nIt draws ⟦share: of the study⟧ of them.")),
    (no_placeholders, make(("1", [new_output("stream", text="⟦all⟧")]))),
    (no_installs, make("%pip install x")),
    (no_installs, make("!python -m pip install x")),
    (one_setup_cell, make("import helpers")),
    (one_setup_cell, make("from helpers import one_hot")),
    (known_names, make("helpers.load_qm8()")),
    (known_names, make("helpers._qm9()")),
    (known_names, make("helpers.show_grid(['C'], colums=2)")),
    (known_names, make("helpers.load_qm9(3)")),
    (known_names, make("f = [helpers.LatentDenoiser(widht=3)]")),
    (known_names, make("# Text\n`helpers.load_qm8()`")),
    (known_names, make("# Text\n```python\nhelpers.show_grid(['C'], colums=2)\n```")),
    (known_names, make("def broken(:")),
    (links_lead_somewhere, make("# Text\n[next](99_missing.ipynb)")),
    (links_lead_somewhere, make("# Text\n<img alt='x' src='missing.png'>")),
    (minutes_of_exercises, make("# Text\n> **Exercise 01.1 · Try** · difficulty ●○○ · 5 min · solo")),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_passes(rule):
    assert list(rule(GOOD)) == []


@pytest.mark.parametrize("rule, bad", BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_a_bad_notebook_is_caught(rule, bad):
    assert list(rule(bad)) != []


def test_every_rule_is_tested():
    assert {rule for rule, _ in BAD} == set(RULES)


# ---------------------------------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------------------------------


TEXT_SUFFIXES = {".md", ".py", ".toml", ".yml", ".json", ".ipynb", ""}


def text_files():
    """The repository's text files, found without git, which a downloaded archive does not have."""
    shipped = ["*", "notebooks/*", "tests/*", ".ci/*", "data/results/*", "data/checkpoints/**/*"]
    found = {path for pattern in shipped for path in helpers.ROOT.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix in TEXT_SUFFIXES and path.name != ".DS_Store")


PAGES = [path for path in text_files() if path.suffix == ".md"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(helpers.ROOT).as_posix())
def test_pages_name_only_files_that_exist(path):
    text = path.read_text(encoding="utf-8")
    assert list(missing_links(text, path.parent)) == []
    named = set(re.findall(r"(?<![\w/.])(?:data|figs|notebooks|tests)/[\w./-]*\w", text))
    placeholders = {name for name in named if "NAME" in name}
    assert [name for name in sorted(named - placeholders) if not (helpers.ROOT / name).exists()] == []


def test_every_promise_is_kept_by_a_test():
    page = (helpers.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (`test_.+?) \|$", page, re.M)
    assert len(rows) >= 10
    tests = "".join(path.read_text(encoding="utf-8") for path in (helpers.ROOT / "tests").glob("test_*.py"))
    promised = [name for _, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert [name for name in promised if f"def {name}(" not in tests] == []


def test_pages_hold_no_placeholder():
    leftovers = re.compile(r"\b(TODO|FIXME|TBD|XXX|RESULTS_TABLE)\b")
    assert [path.name for path in PAGES if leftovers.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("path", text_files(), ids=lambda path: path.relative_to(helpers.ROOT).as_posix())
def test_files_hold_no_path_of_one_machine(path):
    found = MACHINE_PATH.search(path.read_text(encoding="utf-8"))
    assert not found, found
