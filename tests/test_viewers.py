"""Pictures of molecules, graphs, scores and trainings."""

import base64
import io

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rdkit import Chem
from shared import check_picture, refused_molecules

import helpers


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


def test_show_latent_filmstrip(shown, no_figure_left):
    latents = torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(0))
    graphs = tuple(map(torch.from_numpy, helpers.to_graphs(["CCO", "C.C", "c1ccccc1"])))
    graphs[1][0, 0, 1] = graphs[1][0, 1, 0] = 3  # five bonds at the first carbon
    graphs[1][0, 0, 2] = graphs[1][0, 2, 0] = 2
    helpers.show_latent_filmstrip(latents, graphs, ["a", "b", "c"], caption="Three.")
    check_picture(*shown[0], alt="Latents and the graphs decoded from them: a not valid, b C.C, c c1ccccc1.")
    assert shown[1][0] == {"text/markdown": "*Three.*"}


@pytest.mark.parametrize(
    "latents, number, titles",
    [
        (torch.zeros(0, 9, 8), 0, []),
        (torch.zeros(13, 9, 8), 13, ["t"] * 13),
        (torch.zeros(2, 9, 8), 1, ["t"] * 2),
        (torch.zeros(2, 9, 8), 2, ["t"]),
        (torch.zeros(1, 9, 8), 2, ["t"] * 2),
        (torch.zeros(2, 72), 2, ["t"] * 2),
    ],
)
def test_show_latent_filmstrip_explains_wrong_input(shown, latents, number, titles):
    graphs = helpers.to_graphs(["C"] * number)
    with pytest.raises(ValueError, match=f"{number} graphs, {len(titles)} titles: expected"):
        helpers.show_latent_filmstrip(latents, graphs, titles)
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
        card = helpers.load_pipeline(name).card
        assert isinstance(figure, Figure) and name in figure.get_suptitle() and card["machine"] in figure.get_suptitle()
        assert [axes.get_ylabel() for axes in figure.axes] == ["strictly valid, %", "FCD"]
    for name in ("course_map", "graph_ddpm_curve", "latent_diffusion_curve"):
        assert (helpers.ROOT / "figs" / f"{name}.png").is_file(), "make it: python helpers.py figures"


@pytest.mark.parametrize("name", ["token_vae", "diffusion_prior", "nonsense", "property_oracle", 3])
def test_a_curve_that_there_is_not(name):
    with pytest.raises(ValueError, match=f"no curve of validity and FCD for {name!r}; there are some of gnn_ddpm"):
        helpers.training_curve(name)


def test_tables_of_pandas_are_taken(shown):
    helpers.show_grid(pd.Series(["C", "CC"]), legends=pd.Series([1.5, 2.5]))
    check_picture(*shown[0], alt="2D structures of C, CC")
    helpers.show_map(np.zeros((2, 2)), pd.Series([1, 2]), pd.Series(["C", "CC"], index=[7, 8]), "x")
    check_picture(*shown[1], alt="Map of 2 molecules")


@pytest.mark.parametrize(
    "show, message",
    [
        (lambda: helpers.show_map([[0, 0]], [1], ["C1CC"], "x"), "'C1CC' cannot be drawn"),
        (lambda: helpers.show_map([[0, 0]], [1], "C", "x"), r"show_map\('C'\): expected a list of SMILES"),
        (lambda: helpers.show_grid(["C" * 5000]), "a SMILES of 5,000 letters"),
        (
            lambda: helpers.show_grid([Chem.MolFromSmiles("C" * 499 + "." + "C" * 499)]),
            "998 atoms: this course draws at",
        ),
    ],
)
def test_more_wrong_pictures_are_explained(shown, show, message):
    with pytest.raises(ValueError, match=message):
        show()
    assert shown == []


@pytest.mark.parametrize("points, values", [(np.nan, 1), (np.inf, 1), (0, np.nan), (0, "red"), (0, None)])
def test_a_map_needs_numbers(points, values):
    with pytest.raises(ValueError, match="(points|values) of show_map: expected finite numbers, got"):
        helpers.show_map(np.full((2, 2), points), np.array([values] * 2), ["C", "CC"], "value")


BOXES = {"a": ("input\n189 numbers", 0, 0, "blue"), "b": ("layer", 1, 0, "orange"), "c": ("time", 0, 1, "green")}


def test_a_diagram(shown):
    helpers.show_diagram(BOXES, ["a b", "c b"], "Input and time go into a layer.", "One layer.")
    check_picture(*shown[0], alt="Input and time go into a layer.")


@pytest.mark.parametrize(
    "boxes, arrows, message",
    [
        (BOXES, ["a d"], "the arrow 'a d' names 'd': expected a, b, c"),
        ({"a": ("x", 0, 0, "pink")}, [], "the box 'a' is 'pink': expected one of blue, orange"),
    ],
)
def test_a_diagram_of_what_there_is_not(boxes, arrows, message):
    with pytest.raises(ValueError, match=message):
        helpers.show_diagram(boxes, arrows, "nothing")
