"""Pictures, viewers, the set-up check, saving notebooks, and the command line."""

import base64
import gzip
import importlib.metadata
import io
import json
import re
import tomllib

import nbformat
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from rdkit import Chem

import helpers


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: a list of (data, metadata)."""
    seen = []

    def display(thing, raw=False, metadata=None):
        seen.append((thing if raw else {"text/markdown": thing.data}, metadata))

    monkeypatch.setattr("IPython.display.display", display)
    return seen


def check_picture(data, metadata, alt):
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG\r\n")
    assert alt in metadata["image/png"]["alt"]
    assert data["text/plain"] == metadata["image/png"]["alt"]


# ---------------------------------------------------------------------------------------------------------------------
# 3D
# ---------------------------------------------------------------------------------------------------------------------


def test_show_3d_is_a_picture_and_an_offline_viewer(qm9, shown):
    helpers.show_3d(qm9.mol(100), caption="Turn it.")
    (data, metadata), caption = shown
    check_picture(data, metadata, alt=qm9.smiles[100])
    page = data["text/html"]
    assert page.count("<script>") == page.count("</script>") == 1
    assert not re.search(r"https?:|//cdn|\bsrc=(?!\"data:)", page), "the page asks for something outside"
    library = re.search(r'atob\("([^"]+)"\)', page)[1]
    assert b"3Dmol" in gzip.decompress(base64.b64decode(library))
    assert f'alt="{metadata["image/png"]["alt"]}"' in page
    assert "display:none" in page, "a menu for one molecule"
    assert caption[0] == {"text/markdown": "*Turn it.*"}


def test_show_3d_has_a_menu_for_several(shown):
    helpers.show_3d(["CCO", "C#N"], names=["ethanol", "</script> & co"])
    page = shown[0][0]["text/html"]
    assert "display:block" in page and "display:none" not in page
    assert page.count("</script>") == 1, "a name ends the script"
    models = json.loads(re.search(r"const models = (\[.*\]);\n", page)[1])
    assert [name for name, _ in models] == ["ethanol", "</script> & co"]
    mols = [Chem.MolFromMolBlock(block, removeHs=False) for _, block in models]
    assert [mol.GetNumAtoms() for mol in mols] == [9, 3]
    assert all(np.ptp(mol.GetConformer().GetPositions()) > 1 for mol in mols)


def test_show_3d_names_its_molecules_by_smiles(shown):
    helpers.show_3d(["OCC"])
    assert '[["CCO", ' in shown[0][0]["text/html"] and len(shown) == 1


def test_two_viewers_do_not_share_their_boxes(shown):
    helpers.show_3d("C")
    helpers.show_3d("C")
    boxes = [set(re.findall(r'id="(\w+)"', data["text/html"])) for data, _ in shown]
    assert len(boxes[0]) == 2 and not boxes[0] & boxes[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([],), "show_3d got no molecule"),
        ((["C"], ["a", "b"]), "2 names for 1 molecules: give one each, or none"),
        (("C1CC",), "'C1CC' cannot be drawn: expected a valid SMILES or an RDKit molecule"),
        (([None],), "None cannot be drawn"),
        ((["C", 5],), "5 cannot be drawn"),
    ],
)
def test_show_3d_explains_wrong_input(shown, arguments, message):
    with pytest.raises(ValueError, match=message):
        helpers.show_3d(*arguments)
    assert shown == []


# ---------------------------------------------------------------------------------------------------------------------
# 2D
# ---------------------------------------------------------------------------------------------------------------------


def test_show_grid(shown):
    helpers.show_grid(["OCC", Chem.MolFromSmiles("c1ccccc1")], legends=[1, "b"], caption="Two.")
    check_picture(*shown[0], alt="2D structures of CCO, c1ccccc1")
    assert shown[1][0] == {"text/markdown": "*Two.*"}
    helpers.show_grid(["C"] * 60, alt="sixty times methane")
    check_picture(*shown[2], alt="sixty times methane")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(molecules=[]), "0 molecules: a grid shows 1 to 60"),
        (dict(molecules=["C"] * 61), r"61 molecules: a grid shows 1 to 60; pass a slice such as molecules\[:24\]"),
        (dict(molecules=["C"], legends=["a", "b"]), "2 legends for 1 molecules: give one each, or none"),
        (dict(molecules=["C", None]), "None cannot be drawn"),
        (dict(molecules=["C1CC"]), "'C1CC' cannot be drawn"),
        (dict(molecules="CCO"), "'CCO'"),  # not three molecules C, C and O
        (dict(molecules=["C"], columns=0), "columns=0: expected a whole number of at least 1"),
    ],
)
def test_show_grid_explains_wrong_input(shown, arguments, message):
    with pytest.raises(ValueError, match=message):
        helpers.show_grid(**arguments)
    assert shown == []


def refused_molecules():
    """Graphs that RDKit refuses: a carbon with five bonds, a fluorine with two, no atom at all."""
    atoms, bonds = helpers.to_graphs(["FC(F)(F)F", "CF", "C"])
    bonds[0, 0, 1:4] = bonds[0, 1:4, 0] = 2
    bonds[1, [0, 1], [1, 0]] = 2
    atoms[2] = helpers.NO_ATOM
    assert helpers.to_smiles(atoms, bonds) == [None] * 3
    return helpers.to_mols(atoms, bonds)


def pixels(data):
    return plt.imread(io.BytesIO(base64.b64decode(data["image/png"])))


def test_show_grid_draws_what_rdkit_refuses(shown):
    mols = [*refused_molecules(), Chem.MolFromSmiles("c1cccc1", sanitize=False), Chem.MolFromSmiles("CCO")]
    before = [mol.ToBinary() for mol in mols]
    helpers.show_grid(mols, legends="abcde", columns=5)
    check_picture(*shown[0], alt="2D structures of ")
    assert shown[0][1]["image/png"]["alt"].endswith("CCO")
    panels = np.split(pixels(shown[0][0])[:100, :, :3], 5, axis=1)  # above the legends
    assert [panel.min() < 0.9 for panel in panels] == [True, True, False, True, True]
    assert [mol.ToBinary() for mol in mols] == before, "the caller's molecules were changed"


def test_a_refused_molecule_is_drawn_as_it_stands():
    carbon, *_ = refused_molecules()
    drawn = helpers._drawable(carbon)
    assert drawn.GetNumConformers() == 1
    assert [bond.GetBondType() for bond in drawn.GetBonds()] == [bond.GetBondType() for bond in carbon.GetBonds()]
    assert helpers._drawable(Chem.AddHs(Chem.MolFromSmiles("CCO"))).GetNumAtoms() == 3  # a sound one loses hydrogens
    benzene = helpers._drawable(Chem.MolFromSmiles("c1ccccc1"))
    assert {str(bond.GetBondType()) for bond in benzene.GetBonds()} == {"SINGLE", "DOUBLE"}


@pytest.fixture
def no_figure_left():
    plt.close("all")
    yield
    assert not plt.get_fignums(), "a figure stays open"


def vectors(*smiles):
    return helpers.graph_vector(*helpers.to_graphs(smiles))


def test_show_filmstrip(shown, no_figure_left):
    noise = torch.randn(1, 189, generator=torch.Generator().manual_seed(0))
    x = torch.cat([noise, vectors("CCO", "C.C", "c1ccccc1")])
    before = x.clone()
    helpers.show_filmstrip(x, ["t = 999", "t = 500", "t = 20", "t = 0"], caption="Noise becomes benzene.")
    alt = "Graphs as pictures and as structures: t = 999 not valid, t = 500 CCO, t = 20 C.C, t = 0 c1ccccc1."
    check_picture(*shown[0], alt=alt)
    assert shown[1][0] == {"text/markdown": "*Noise becomes benzene.*"}
    assert torch.equal(x, before), "the caller's vectors were changed"


def noise_graphs():
    """Pure noise; the last three are graphs for which RDKit lays bonded atoms on one point."""
    x = torch.randn(3000, 189, generator=torch.Generator().manual_seed(0))
    return x[[0, 1, 2, 16, 333, 466]]


def test_noise_can_be_drawn(shown, no_figure_left):
    x = noise_graphs()
    helpers.show_grid(helpers.to_mols(*helpers.vector_graph(x)))
    helpers.show_filmstrip(x, list("abcdef"))
    check_picture(*shown[0], alt="2D structures of")
    check_picture(*shown[1], alt="a not valid, b not valid")


def test_show_filmstrip_of_any_numbers(shown, no_figure_left):
    given = [100 * vectors(*["CCO"] * 12), torch.zeros(1, 189), -torch.ones(1, 189), vectors("C").half()]
    given += [helpers.graph_vector(np.full((1, 9), helpers.NO_ATOM), np.zeros((1, 9, 9), int))]  # no atom at all
    for x in given:
        helpers.show_filmstrip(x, list("abcdefghijkl")[: len(x)])
    assert len(shown) == len(given)
    for picture in shown:
        check_picture(*picture, alt="Graphs as pictures and as structures: a ")


@pytest.mark.parametrize(
    "x, titles, message",
    [
        (torch.zeros(0, 189), [], "0 graph vectors with 0 titles: expected 1 to 12 of each"),
        (torch.zeros(13, 189), ["t"] * 13, "13 graph vectors with 13 titles: expected 1 to 12 of each"),
        (torch.zeros(2, 189), ["t"], "2 graph vectors with 1 titles"),
        (torch.zeros(2, 189), ["t"] * 3, "2 graph vectors with 3 titles"),
        (torch.zeros(189), ["t"], "189 graph vectors with 1 titles"),
        (torch.zeros(2, 188), ["t"] * 2, r"a graph vector of shape \(2, 188\): expected \(\.\.\., 189\)"),
        (torch.zeros(2, 9, 9), ["t"] * 2, r"a graph vector of shape \(2, 9, 9\)"),
    ],
)
def test_show_filmstrip_explains_wrong_input(shown, no_figure_left, x, titles, message):
    with pytest.raises(ValueError, match=message):
        helpers.show_filmstrip(x, titles)
    assert shown == []


def test_show_map(shown, no_figure_left):
    points = np.random.default_rng(0).normal(size=(3, 2))
    helpers.show_map(points, [0.25, 7, -1], ["C", "CCO", "c1ccccc1"], "dipole moment, D", caption="Neighbours agree.")
    data, metadata = shown[0]
    check_picture(data, metadata, alt="Map of 3 molecules, coloured by dipole moment, D from -1 to 7.")
    assert "application/vnd.jupyter.widget-view+json" in data
    assert shown[1][0] == {"text/markdown": "*Neighbours agree.*"}


def test_show_map_of_one_and_of_many(shown, qm9):
    for n in (1, 2000):
        helpers.show_map(torch.zeros(n, 2), torch.ones(n), qm9.smiles[:n], "x")
    check_picture(*shown[0], alt="Map of 1 molecules")
    check_picture(*shown[1], alt="Map of 2,000 molecules, coloured by x from 1 to 1.")


@pytest.mark.parametrize(
    "points, values, smiles, message",
    [
        ((3, 2), (2,), 3, r"points \(3, 2\), values \(2,\), 3 SMILES: expected \(n, 2\), \(n,\), n"),
        ((3, 2), (3,), 2, r"points \(3, 2\), values \(3,\), 2 SMILES"),
        ((2, 2), (3,), 3, r"points \(2, 2\)"),
        ((3, 3), (3,), 3, r"points \(3, 3\)"),
        ((3,), (3,), 3, r"points \(3,\)"),
        ((3, 2), (3, 1), 3, r"values \(3, 1\)"),
    ],
)
def test_show_map_explains_wrong_input(shown, no_figure_left, points, values, smiles, message):
    with pytest.raises(ValueError, match=message):
        helpers.show_map(np.zeros(points), np.zeros(values), ["C"] * smiles, "x")
    assert shown == []


@pytest.mark.parametrize("smiles", ["C=O", "c1ccccc1"])
def test_show_graph(shown, smiles):
    atoms, bonds, _ = helpers.to_graph(smiles)
    helpers.show_graph(atoms, bonds, caption="A graph.")
    check_picture(*shown[0], alt=f"Graph of {smiles}")


def test_show_graph_of_an_impossible_molecule(shown):
    atoms, bonds, _ = helpers.to_graph("CCO")
    helpers.show_graph(atoms, bonds * 3)
    check_picture(*shown[0], alt="Graph of")
    assert "None" not in shown[0][1]["image/png"]["alt"]


def test_show_properties_and_loss(shown, qm9):
    score = helpers.Evaluation(**helpers.framing_rows(1000)[0].as_dict())
    with pytest.raises(ValueError, match="training molecules: no valid molecule to draw"):
        helpers.show_properties(score)
    score.smiles = qm9.smiles[1000:1100]
    helpers.show_properties(score)
    check_picture(*shown[0], alt="Four histograms. training molecules against the test molecules")
    helpers.show_loss([{"step": 1, "loss": 3.0}, {"step": 9, "loss": 1.25}], "my loss")
    check_picture(*shown[2], alt="my loss: 3 at step 1, 1.25 at step 9.")


def test_figures_made_by_code():
    figure = helpers.course_map()
    assert isinstance(figure, Figure)
    text = " ".join(text.get_text() for text in figure.axes[0].texts)
    assert all(f"{k:02}" in text for k in range(1, 8))
    for name in ("graph_ddpm", "latent_diffusion"):
        figure = helpers.training_curve(name)
        assert isinstance(figure, Figure) and name in figure.get_suptitle()
        assert [axes.get_ylabel() for axes in figure.axes] == ["strictly valid, %", "FCD"]
    for name in ("course_map", "graph_ddpm_curve", "latent_diffusion_curve"):
        assert (helpers.ROOT / "figs" / f"{name}.png").is_file(), "make it: python helpers.py figures"


# ---------------------------------------------------------------------------------------------------------------------
# Set-up check
# ---------------------------------------------------------------------------------------------------------------------


def test_check_setup_of_the_right_packages():
    page = helpers.check_setup().data
    assert "All packages are the ones the course was tested with." in page and "✗" not in page
    project = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert page.count("✓") == len(project["dependencies"])


@pytest.mark.parametrize("found", ["0.1", None])
def test_check_setup_of_a_wrong_or_missing_package(monkeypatch, found):
    real = importlib.metadata.version

    def version(name):
        if name != "rdkit":
            return real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    page = helpers.check_setup().data
    assert re.search(r"Expected rdkit==[\d.]+\. Run <code>python -m pip install -e \.</code>", page)
    assert page.count("✗") == 1 and f"<td>{found or 'missing'}</td>" in page


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
    helpers.run_notebook(path)
    saved = nbformat.read(path, as_version=4)
    assert [p.name for p in tmp_path.iterdir()] == ["small.ipynb"]
    assert "widgets" not in saved.metadata
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(CELLS) + 1))
    setup, slider, script, javascript, auto, bar, molecules, viewer, live_map, text, network, crash = (
        c.outputs for c in code
    )
    for removed in (setup, slider, auto, bar, molecules):
        assert removed == []
    assert not [o for o in [*script, *javascript] if {"text/html", "application/javascript"} & o.data.keys()]
    for pictures in (viewer, live_map):
        (picture,) = pictures
        assert set(picture.data) == {"image/png", "text/plain"} and picture.metadata["image/png"]["alt"]
    assert {o.get("text", o.get("data", {}).get("text/plain")) for o in text} == {"a warning\n", "and text\n", "2"}
    assert network[0].text == "network is blocked in tests\n"
    assert "your code stopped at line 2, `return atoms.nothing`, with AttributeError" in crash[0].text


def test_a_failing_notebook_is_left_alone(tmp_path):
    path = tmp_path / "small.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell("1 / 0")]), path)
    before = path.read_bytes()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        helpers.run_notebook(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["small.ipynb"]


# ---------------------------------------------------------------------------------------------------------------------
# Studies
# ---------------------------------------------------------------------------------------------------------------------


def study_cell(source):
    return new_code_cell(source, metadata={"tags": ["study"]})


@pytest.fixture
def write_study(tmp_path, monkeypatch):
    """A function that writes notebooks/77_small.ipynb of a course in an empty folder; returns that folder."""
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    monkeypatch.setattr(helpers, "RESULTS", tmp_path / "results")
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
    helpers.run_study("77")
    assert [path.name for path in (folder / "results").iterdir()] == ["77_study.json"]
    results = json.loads((folder / "results" / "77_study.json").read_text(encoding="utf-8"))
    assert results.keys() == {"rows", "name", "machine"}
    assert results["rows"] == [1] and results["name"] == "é" and "torch" in results["machine"]


def test_a_failing_study_keeps_what_there_was_and_the_parts_before(write_study):
    folder = write_study(study_cell("STUDY = {'a': lambda: 1, 'b': lambda: 2, 'c': lambda: 3}"))
    helpers.run_study("77")
    write_study(study_cell("STUDY = {'a': lambda: 10, 'b': lambda: 1 / 0, 'c': lambda: 30}"))
    with pytest.raises(ZeroDivisionError):
        helpers.run_study("77")
    results = json.loads((folder / "results" / "77_study.json").read_text(encoding="utf-8"))
    assert (results["a"], results["b"], results["c"]) == (10, 2, 3)
    helpers.run_study("77", ["c"])
    results = json.loads((folder / "results" / "77_study.json").read_text(encoding="utf-8"))
    assert (results["a"], results["b"], results["c"]) == (10, 2, 30)
    with pytest.raises(ValueError, match=r"unknown parts \['d'\]; notebook 77 has a, b, c"):
        helpers.run_study("77", ["d"])


@pytest.mark.parametrize("number", ["99", "", "0", "nonsense"])
def test_an_unknown_study_is_explained(number):
    with pytest.raises(ValueError, match=f"no study in notebook '{number}'; those with one have cells tagged study"):
        helpers.run_study(number)


def test_a_notebook_without_a_study_is_explained(write_study):
    write_study(new_code_cell("1 + 1"), new_markdown_cell("study"))
    with pytest.raises(ValueError, match="no study in notebook '77'"):
        helpers.run_study("77")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_line_as_a_program(run_python):
    result = run_python("helpers.py", "train", "nonsense")
    assert result.returncode != 0
    assert "nonsense" in result.stderr and all(name in result.stderr for name in helpers.RECIPES)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        helpers.main(arguments)
    assert end.value.code == 0
    assert "python helpers.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: command"),
        (["dance"], "invalid choice: 'dance'"),
        (["score", "nonsense"], "token_vae"),
        (["train", "token_vae", "--steps", "0"], "ValueError: steps=0: expected a whole number of at least 1"),
        (["train", "token_vae", "--steps", "many"], "invalid int value: 'many'"),
        (["notebook", "none.ipynb"], "none.ipynb"),
        (["study"], "required: number"),
        (["study", "99"], "ValueError: no study in notebook '99'"),
    ],
)
def test_wrong_commands_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        helpers.main(arguments)
    assert end.value.code not in (0, None)
    assert message in capsys.readouterr().err


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown recipe 'nonsense'; known ones: " + ", ".join(helpers.RECIPES)):
        helpers.train("nonsense")
