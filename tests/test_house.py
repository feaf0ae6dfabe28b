"""The house: the order of the rooms, their size, plain code; the front door; lint; and the network block."""

import ast
import json
import os
import re

import pytest

import helpers

PACKAGE = helpers.ROOT / "molecule_diffusion"
FRONT_DOOR = helpers.ROOT / "helpers.py"

# ---------------------------------------------------------------------------------------------------------------------
# Rooms: each imports only from those above it
# ---------------------------------------------------------------------------------------------------------------------


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path):
    """The name of a file as a room: exercises/checking.py is exercises.checking, an __init__.py is its package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


ROOMS = {room_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_rooms(tree, rooms):
    """The rooms that code imports, in functions too, each time it does."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("molecule_diffusion.") in rooms else node.module for name in inside]
        elif isinstance(node, ast.ImportFrom):
            names = [f"molecule_diffusion.(relative import in line {node.lineno})"]
        for name in dict.fromkeys(names):
            if name.split(".")[0] in ("molecule_diffusion", "helpers"):
                yield name.removeprefix("molecule_diffusion.")


def order_of_the_rooms():
    """As the front door's docstring lists them; the exercises stand in one line."""
    listed = re.findall(r"^    (\w+)/? {2,}\S", helpers.__doc__, re.M)
    order = []
    for name in listed:
        inside = [room for room in ROOMS if room.startswith(f"{name}.")]
        order += sorted(inside, key=lambda room: ("notebook_" in room, room)) or [name]
    return order


def upward_imports(sources, order):
    """What is wrong in a dict of {room: syntax tree}: imports that do not lead to a room further up."""
    for room, tree in sources.items():
        for target in imported_rooms(tree, order):
            if target not in order:
                yield f"{room} imports {target}, which is no room"
            elif order.index(target) >= order.index(room):
                yield f"{room} imports {target}, which is not above it"
            elif room.startswith("exercises.") and target.startswith("exercises.notebook"):
                yield f"{room} imports {target}: a notebook's exercises stand alone"


def test_every_room_is_on_the_map():
    packages = {"", "exercises"}  # their __init__.py
    assert sorted(order_of_the_rooms()) == sorted(ROOMS.keys() - packages)


def test_rooms_import_only_from_rooms_above():
    order = order_of_the_rooms()
    sources = {room: parsed(path) for room, path in ROOMS.items() if room in order}
    assert list(upward_imports(sources, order)) == []


def test_the_front_door_imports_in_the_order_of_the_map():
    order = order_of_the_rooms()
    places = [order.index(room) for room in imported_rooms(parsed(FRONT_DOOR), order)]
    assert places == sorted(places) and len(places) == len(set(places))


@pytest.mark.parametrize(
    "source",
    [
        "from molecule_diffusion.qm9 import load_qm9",
        "from molecule_diffusion import qm9",
        "import molecule_diffusion.qm9",
        "import molecule_diffusion.qm9 as q",
        "def f():\n    from molecule_diffusion.qm9 import load_qm9",
        "from molecule_diffusion.chemistry import to_graph",  # itself
        "from .files import atomic",
        "import helpers",
        "from helpers import to_graph",
        "from molecule_diffusion.attic import trunk",
    ],
)
def test_an_upward_import_is_caught(source):
    order = ["files", "chemistry", "qm9"]
    assert list(upward_imports({"chemistry": ast.parse(source)}, order))
    fine = ast.parse("import json\nfrom molecule_diffusion.files import atomic\nfrom molecule_diffusion import files")
    assert not list(upward_imports({"chemistry": fine}, order))


def test_exercises_of_two_notebooks_do_not_lean_on_each_other():
    order = ["exercises.checking", "exercises.notebook_00", "exercises.notebook_01"]
    leaning = ast.parse("from molecule_diffusion.exercises.notebook_00 import new_molecules")
    assert list(upward_imports({"exercises.notebook_01": leaning}, order))


# ---------------------------------------------------------------------------------------------------------------------
# Size, and plain code
# ---------------------------------------------------------------------------------------------------------------------


def length(node):
    """Lines of a function, its docstring left out."""
    docstring = ast.get_docstring(node, clean=False)
    return node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)


def not_plain(tree):
    """Code that a student would have to decode."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and length(node) > 60:
            yield f"line {node.lineno}: {node.name} has {length(node)} lines; at most 60"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Tuple):
            yield f"line {node.lineno}: a tuple used as a statement"
        if isinstance(node, ast.IfExp) and sum(isinstance(inside, ast.IfExp) for inside in ast.walk(node)) > 1:
            yield f"line {node.lineno}: a conditional expression in another"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.BinOp):
            if isinstance(node.operand.op, ast.FloorDiv):
                yield f"line {node.lineno}: rounding up by two minus signs"
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield f"line {node.lineno}: an except without a class"


@pytest.mark.parametrize("path", [FRONT_DOOR, *ROOMS.values()], ids=lambda path: path.stem)
def test_code_is_plain(path):
    assert list(not_plain(parsed(path))) == []


@pytest.mark.parametrize(
    "source",
    [
        "a.append(1), b.append(2)",
        "x = 1 if a else 2 if b else 3",
        "x = 1 if (2 if b else 3) else 4",
        "rows = -(-n // 6)",
        "def f():\n" + "    x = 1\n" * 60,
        "try:\n    f()\nexcept:\n    pass",
    ],
)
def test_code_that_is_not_plain_is_caught(source):
    assert list(not_plain(ast.parse(source)))
    assert not list(not_plain(ast.parse("def f(n):\n    x = 1 if n else 2\n    return -n // 6, -(n + 1)")))


def test_rooms_are_of_a_size():
    sizes = {room: len(path.read_text(encoding="utf-8").splitlines()) for room, path in ROOMS.items()}
    assert max(sizes.values()) <= 500, sizes
    assert len(FRONT_DOOR.read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("path", ROOMS.values(), ids=lambda path: path.stem)
def test_every_room_says_what_it_is_for(path):
    assert ast.get_docstring(parsed(path))


# ---------------------------------------------------------------------------------------------------------------------
# The front door
# ---------------------------------------------------------------------------------------------------------------------


def test_all_public_names_exist_and_nothing_else_is_imported():
    assert len(helpers.__all__) == len(set(helpers.__all__))
    imported = [
        alias.name for node in parsed(FRONT_DOOR).body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert sorted(imported) == sorted(helpers.__all__)


def test_the_front_door_holds_no_logic():
    kinds = (ast.Expr, ast.ImportFrom, ast.Assign, ast.If)  # docstring, imports, __all__, main
    body = parsed(FRONT_DOOR).body
    assert all(isinstance(node, kinds) for node in body)
    assert [ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)] == ["__all__"]
    assert [ast.unparse(node) for node in body if isinstance(node, ast.If)] == [
        "if __name__ == '__main__':\n    main()"
    ]


def test_every_public_name_is_used_where_a_reader_can_see_it():
    """In a notebook, on a page, or as the class or the constant behind such a name."""
    pages = [*helpers.ROOT.glob("*.md"), *helpers.ROOT.glob("notebooks/*.ipynb")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    behind = {
        *("main", "train"),  # python helpers.py
        "ROOT",
        *("QM9", "Evaluation", "Recipe", "PropertyOracle", "TrainingError"),  # what is returned, held or raised
        *(
            "TokenVAEPipeline",
            "GraphVAEPipeline",
            "GraphDDPMPipeline",
            "PropertyOraclePipeline",
        ),  # what load_pipeline returns
        "RetrieverPipeline",
        *("MAX_ATOMS", "PROPERTIES", "SAMPLER"),
        *("check_graphs", "one_hot_graphs", "corrected_smiles", "random_graphs"),  # named in messages and docstrings
        *("show_image", "course_map"),
    }
    unused = {name for name in helpers.__all__ if not re.search(rf"\bhelpers\.{name}\b", text)}
    assert unused <= behind, unused - behind
    assert behind <= set(helpers.__all__)


IMPORT = """
import ast, json, random, sys, time, warnings
from pathlib import Path
import numpy, torch
# what the rooms import from elsewhere is imported first, so that only what the course itself does is seen
for path in Path(sys.argv[1]).rglob("*.py"):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        ours = isinstance(node, ast.ImportFrom) and node.module.startswith("molecule_diffusion")
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not ours:
            exec(ast.unparse(node), {})
def state():
    return [torch.initial_seed(), str(torch.random.get_rng_state().sum()), random.getstate(),
            str(numpy.random.get_state()), warnings.filters[:], torch.get_num_threads(), torch.get_default_dtype()]
before, modules = state(), set(sys.modules)
import helpers
unchanged = before == state()
assert "molecule_diffusion.files" not in modules and "molecule_diffusion.files" in sys.modules
heavy = "matplotlib pandas fcd IPython torch_geometric scipy.stats plotly h5py py3Dmol nbformat accelerate".split()
heavy += "faiss umap pytorch_metric_learning sklearn tokenizers".split()
print(json.dumps([unchanged, [name for name in heavy if name in set(sys.modules) - modules]]))
"""


def test_importing_helpers_changes_nothing(run_python, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in helpers.ROOT.glob("data/**/*")}
    options = {
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(helpers.ROOT), os.environ["PYTHONPATH"]]),
    }
    result = run_python("-c", IMPORT, PACKAGE, cwd=tmp_path, env=os.environ | options)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [True, []]
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in helpers.ROOT.glob("data/**/*")} == before


def test_importing_helpers_is_quick(run_python):
    result = run_python("-c", "import helpers, time; print(time.process_time())")
    assert float(result.stdout) < 15


# ---------------------------------------------------------------------------------------------------------------------
# Lint
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(run_python, arguments):
    result = run_python("-m", "ruff", *arguments, "--no-cache", ".")
    assert result.returncode == 0, result.stdout + result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The network block that conftest.py puts on every process started by a test, notebook kernels included
# ---------------------------------------------------------------------------------------------------------------------


BLOCKED = """
import asyncio, socket, threading
def refused(action, *arguments):
    try:
        action(*arguments)
    except OSError as error:
        return str(error) == "network is blocked in tests"
assert refused(socket.create_connection, ("192.0.2.1", 80), 1)
assert refused(socket.socket().connect, ("192.0.2.1", 80))
assert refused(socket.socket().connect_ex, ("192.0.2.1", 80))
assert refused(socket.socket(socket.AF_INET6).connect, ("2001:db8::1", 80))
assert refused(socket.getaddrinfo, "example.org", 80)
import urllib.request, urllib.error
try:
    urllib.request.urlopen("http://example.org")
except urllib.error.URLError as error:
    assert "network is blocked in tests" in str(error)
server = socket.create_server(("127.0.0.1", 0))
port = server.getsockname()[1]
for host in ("127.0.0.1", "localhost"):
    socket.create_connection((host, port), 5).close()
assert socket.socket().connect_ex(("127.0.0.1", port)) == 0
asyncio.run(asyncio.sleep(0))
print("blocked")
"""


def test_processes_of_the_tests_reach_no_network(run_python):
    result = run_python("-c", BLOCKED)
    assert result.stdout.strip() == "blocked", result.stderr
