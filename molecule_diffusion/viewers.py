"""Pictures of molecules, graphs, scores and trainings for the notebooks, and the figures of the README."""

import numpy as np
import torch
from rdkit import Chem, rdBase

from molecule_diffusion.checks import check_count, check_smiles_list, quoted
from molecule_diffusion.chemistry import (
    ATOM_TYPES,
    BOND_TYPES,
    MAX_ATOMS,
    NO_ATOM,
    PROPERTIES,
    matrix_from_pairs,
    properties,
    sanitised_smiles,
    to_mols,
    to_smiles,
    verdict,
)
from molecule_diffusion.drawing import (
    ATOM_COLOURS,
    BOND_COLOURS,
    COLOURS,
    as_it_stands,
    as_mol,
    draw_arrow,
    drawable,
    figure_png,
    molecule_picture,
    molecules_png,
    show_bundle,
    show_figure,
    show_image,
)
from molecule_diffusion.encodings import split_vector, vector_graph
from molecule_diffusion.evaluation import number_text, reference
from molecule_diffusion.files import CHECKPOINTS, RESULTS, ROOT, atomic, read_json
from molecule_diffusion.grammar import expression_value, parse_expression

# ---------------------------------------------------------------------------------------------------------------------
# Molecules and graphs
# ---------------------------------------------------------------------------------------------------------------------


def show_grid(molecules, legends=None, columns=6, alt=None, caption=None):
    """Draw molecules in a grid.

    Args:
        molecules: SMILES or RDKit molecules, at most 60; molecules that RDKit refuses are drawn as they stand.
        legends: a text under each, or None.
        columns: pictures in a row.
        alt: text for those who cannot see it; lists the SMILES by default.
    """
    molecules = check_smiles_list("show_grid", molecules)
    check_count("columns", columns)
    if not 1 <= len(molecules) <= 60:
        raise ValueError(f"{len(molecules)} molecules: a grid shows 1 to 60; pass a slice such as molecules[:24]")
    if legends is not None:
        legends = [str(text) for text in legends]
    if legends is not None and len(legends) != len(molecules):
        raise ValueError(f"{len(legends)} legends for {len(molecules)} molecules: give one each, or none")
    mols = [drawable(as_mol(molecule)) for molecule in molecules]
    png = molecules_png(mols, (150, 130), min(columns, len(mols)), legends, legend_size=15)
    show_image(png, alt or "2D structures of " + ", ".join(map(Chem.MolToSmiles, mols)), caption)


def show_graph(atoms, bonds, caption=None):
    """Show one graph three ways, side by side: structure with atom numbers, one-hot atoms, bond matrix.

    Shapes: atoms (9,), bonds (9, 9).
    """
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap

    atoms, bonds = np.asarray(atoms), np.asarray(bonds)
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[1, 0.75, 1.1])
    mol = as_it_stands(to_mols(atoms[None], bonds[None])[0])
    left.imshow(molecule_picture(mol, (300, 300), atom_numbers=True))
    left.axis("off")
    labels = ["–" if t == NO_ATOM else ATOM_TYPES[t] for t in atoms]
    middle.imshow(np.eye(len(ATOM_TYPES))[atoms], cmap="Greys", vmin=0, vmax=1)
    middle.set(title="atoms, one-hot", xticks=range(5), xticklabels=ATOM_TYPES, ylabel="atom number")
    right.imshow(bonds, cmap=ListedColormap(BOND_COLOURS), vmin=0, vmax=3)
    for i, j in zip(*bonds.nonzero()):
        right.text(j, i, bonds[i, j], ha="center", va="center", fontsize=9)
    right.set(title="bond matrix", xticks=range(MAX_ATOMS), xticklabels=labels)
    for axes in (middle, right):
        axes.set(yticks=range(MAX_ATOMS), yticklabels=[f"{i} {label}" for i, label in enumerate(labels)])
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in BOND_COLOURS]
    right.legend(handles, BOND_TYPES, loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False, title="bond")
    smiles = to_smiles(atoms[None], bonds[None])[0] or "a molecule that RDKit refuses"
    show_figure(fig, f"Graph of {smiles}: its structure, its one-hot atom matrix and its 9 by 9 bond matrix.", caption)


def show_filmstrip(x, titles, caption=None):
    """Graph vectors as pictures in a row: noisy atoms and bonds as colours, and below the graph nearest to each.

    On the 9 × 9 picture the diagonal shows the atoms, the rest the bonds; a colour is the mean of the classes' colours.

    Args:
        x: graph vectors (n, 189), clean or noisy, at most 12.
        titles: n texts.
    """
    if not 1 <= len(x) <= 12 or len(titles) != len(x):
        raise ValueError(f"{len(x)} graph vectors with {len(titles)} titles: expected 1 to 12 of each")
    _show_strip(_vector_images(x), vector_graph(x), titles, "Graphs as pictures and as structures", caption)


def show_latent_filmstrip(latents, graphs, titles, caption=None):
    """Latents as shades of grey in a row, and below each the graph that a decoder makes of it.

    Args:
        latents: (n, rows, columns), standardised, at most 12; black is -3 or less, white 3 or more.
        graphs: a pair of atoms (n, 9) and bonds (n, 9, 9).
        titles: n texts.
    """
    n = len(titles)
    if not 1 <= n <= 12 or len(latents) != n or np.ndim(latents) != 3 or len(graphs[0]) != n:
        raise ValueError(
            f"latents of shape {tuple(np.shape(latents))}, {len(graphs[0])} graphs, {n} titles: expected "
            "(n, rows, columns), n and n, with n from 1 to 12"
        )
    _show_strip(np.asarray(latents), graphs, titles, "Latents and the graphs decoded from them", caption)


def _show_strip(images, graphs, titles, what, caption):
    """Images in a row, colours (h, w, 3) or shades (h, w) from -3 to 3, each above its graph, with its verdict."""
    from matplotlib import pyplot as plt

    fig, panels = plt.subplots(2, len(titles), figsize=(1.5 * len(titles), 3.1), squeeze=False)
    told = []
    for k, mol in enumerate(to_mols(*graphs)):
        with rdBase.BlockLogs():
            smiles = sanitised_smiles(Chem.Mol(mol))
        state = {"valid": "valid", "fragmented": "in pieces"}.get(verdict(smiles), "not valid")
        told.append(f"{titles[k]} {state if state == 'not valid' else smiles}")
        panels[0, k].imshow(images[k], cmap="Greys_r", vmin=-3, vmax=3)  # which colours of their own ignore
        panels[0, k].set_title(titles[k], fontsize=9)
        panels[1, k].imshow(molecule_picture(drawable(mol), (200, 200)))
        panels[1, k].set_title(state, fontsize=8, color=COLOURS["blue" if state == "valid" else "red"], y=-0.15)
    for axes in panels.flat:
        axes.axis("off")
    show_figure(fig, f"{what}: " + ", ".join(told) + ".", caption)


def _vector_images(x):
    """Graph vectors (n, 189) as colour images (n, 9, 9, 3): atoms on the diagonal, bonds off it."""
    from matplotlib.colors import to_rgb

    atom_parts, pair_parts = (((part.float().cpu() + 1) / 2).clamp(0, 1) for part in split_vector(x))
    atom_colours = torch.tensor([to_rgb(ATOM_COLOURS.get(symbol, "white")) for symbol in ATOM_TYPES])
    bond_colours = torch.tensor([to_rgb(colour) for colour in BOND_COLOURS])
    pairs = _mixed(pair_parts, bond_colours)
    images = matrix_from_pairs(pairs.transpose(1, 2)).permute(0, 2, 3, 1)
    images[:, range(MAX_ATOMS), range(MAX_ATOMS)] = _mixed(atom_parts, atom_colours)
    return images.numpy()


def _mixed(shares, colours):
    """Mean colours. Shapes: shares (..., classes), colours (classes, 3) -> (..., 3)."""
    return shares @ colours / shares.sum(-1, keepdim=True).clamp(min=1e-6)


def show_expressions(texts, caption=None, low=-4.0, high=4.0, columns=4):
    """Expressions in x as curves, each under its own text; where one has no real value, its curve has a gap.

    Args: texts: a list of at most 24; None stands for a sequence that breaks the grammar. low, high: the range of x.
    """
    from matplotlib import pyplot as plt

    if len(texts) > 24:
        raise ValueError(f"{len(texts)} expressions: expected at most 24 in one picture")
    x = np.linspace(low, high, 801)
    rows = (len(texts) + columns - 1) // columns
    fig, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 1.9 * rows), layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, text in zip(axes.flat, texts):
        ax.set_title("breaks the grammar" if text is None else text, fontsize=8)
        if text is not None:
            ax.set_axis_on()
            y = expression_value(parse_expression(text), x)
            ax.plot(x, y, color=COLOURS["blue"])
            ax.set_ylim(_calm_range(y))
            ax.tick_params(labelsize=7)
    fig.supxlabel("x", fontsize=9)
    readable = ", ".join(str(text) for text in texts)
    show_figure(fig, f"Curves of {readable}", caption)


def _calm_range(y):
    """Limits for a curve that may run away near a pole: its middle nine tenths, and a little room."""
    real = y[np.isfinite(y)]
    if not len(real):
        return -1, 1
    low, high = np.percentile(real, [5, 95])
    flat = high - low < 1e-6 * max(1, abs(low))  # a constant, but for rounding
    room = max(1, abs(low) / 2) if flat else 0.2 * (high - low)
    return low - room, high + room


def show_map(points, values, smiles, label, caption=None):
    """A map of molecules, coloured by a property; live, the molecule at the pointer is drawn beside it.

    Args:
        points: (n, 2); values: (n,), the colours; smiles: n texts; label: what the values are, with their unit.
    """
    points, values, smiles = np.asarray(points), np.asarray(values), check_smiles_list("show_map", smiles)
    if not len(smiles) or points.shape != (len(smiles), 2) or values.shape != (len(smiles),):
        raise ValueError(
            f"points {points.shape}, values {values.shape}, {len(smiles)} SMILES: expected (n, 2), (n,), n"
        )
    for name, numbers in (("points", points), ("values", values)):
        if numbers.dtype.kind not in "biuf" or not np.isfinite(numbers).all():
            raise ValueError(f"{name} of show_map: expected finite numbers, got {quoted(numbers.ravel()[:5].tolist())}")
    for text in smiles:
        as_mol(text)  # refuses what cannot be drawn, before the pointer gets there
    live = _live_map(points, values, smiles, label)._repr_mimebundle_()
    alt = f"Map of {len(smiles):,} molecules, coloured by {label} from {values.min():.3g} to {values.max():.3g}."
    show_bundle(live, _flat_map(points, values, label), alt, caption)


def _flat_map(points, values, label):
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(6, 4.4))
    dots = axes.scatter(*points.T, c=values, s=8, cmap="viridis")
    axes.set(xlabel="first direction", ylabel="second direction")
    fig.colorbar(dots, label=label)
    return figure_png(fig)


def _live_map(points, values, smiles, label):
    """A widget: the map, and beside it the molecule at the pointer."""
    import plotly.graph_objects as go
    from ipywidgets import HBox, Image, Layout

    def drawn(k):
        legend = f"{smiles[k]}  {values[k]:.2f}"
        return molecules_png([drawable(as_mol(smiles[k]))], (260, 260), legends=[legend], legend_size=18)

    def point_at(trace, hovered, state):
        if hovered.point_inds:
            picture.value = drawn(hovered.point_inds[0])

    marker = dict(color=values, colorscale="Viridis", size=6, colorbar=dict(title=label))
    figure = go.FigureWidget([go.Scattergl(x=points[:, 0], y=points[:, 1], mode="markers", marker=marker, text=smiles)])
    figure.update_layout(width=600, height=420, margin=dict(l=10, r=10, t=10, b=10), template="plotly_white")
    figure.data[0].on_hover(point_at)
    picture = Image(value=drawn(0), width=240, height=240)
    return HBox([figure, picture], layout=Layout(align_items="center"))  # else the picture is stretched


# ---------------------------------------------------------------------------------------------------------------------
# Scores and trainings
# ---------------------------------------------------------------------------------------------------------------------


def show_properties(evaluation):
    """Histograms of QED, logP, weight and rings: an `evaluate` result's valid molecules over the test molecules."""
    from matplotlib import pyplot as plt

    if not evaluation.smiles:
        raise ValueError(f"{evaluation.name}: no valid molecule to draw; pass what helpers.evaluate returned for some")
    ours, test = properties(evaluation.smiles), reference()["properties"]
    fig, panels = plt.subplots(1, len(PROPERTIES), figsize=(12, 2.6))
    for k, (axes, name) in enumerate(zip(panels, PROPERTIES, strict=True)):
        low, high = np.quantile(np.concatenate([ours[:, k], test[:, k]]), [0.001, 0.999])
        bins = np.arange(low, high + 2) - 0.5 if name == "rings" else np.linspace(low, high, 40)
        axes.hist(test[:, k], bins, density=True, color="#C8C8C8", label="test molecules")
        axes.hist(ours[:, k], bins, density=True, histtype="step", color=COLOURS["blue"], lw=1.6, label=evaluation.name)
        axes.set(xlabel=f"{name} (Da)" if name == "weight" else name, yticks=[])
        axes.locator_params("x", integer=name == "rings", nbins=5)
        axes.set_title(f"W = {number_text(evaluation.distances[name])}", fontsize=10)
    panels[0].set_ylabel("density")
    fig.legend(
        *panels[0].get_legend_handles_labels(), loc="lower center", ncols=2, bbox_to_anchor=(0.5, -0.22), frameon=False
    )
    distances = ", ".join(f"{name} {number_text(value)}" for name, value in evaluation.distances.items())
    text = f"{evaluation.name} against the test molecules, Wasserstein distances: {distances}."
    show_figure(fig, f"Four histograms. {text}", f"{text} The closer the blue outline to the grey area, the better.")


def show_loss(history, title="training loss"):
    """The loss curve of `fit`'s history."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(6, 2.6))
    axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history], color=COLOURS["blue"])
    axes.set(xlabel="training step", ylabel="loss (running mean)", title=title)
    axes.grid(alpha=0.3)
    first, last = history[0], history[-1]
    show_figure(
        fig, f"{title}: {first['loss']:.3g} at step {first['step']}, {last['loss']:.3g} at step {last['step']}."
    )


def _names_of_curves():
    """The checkpoints that data/results has a curve of validity and FCD for."""
    names = [path.stem.removesuffix("_curve") for path in sorted(RESULTS.glob("*_curve.json"))]
    return [name for name in names if len(_scored_entries(name)) > 1]


def _scored_entries(name):
    """The entries of a training's curve at which molecules were drawn and scored; others hold the loss only."""
    path = RESULTS / f"{name}_curve.json"
    return [entry for entry in read_json(path) if "fcd" in entry] if path.exists() else []


def training_curve(name):
    """Validity and FCD against training time, from data/results/NAME_curve.json, as a matplotlib figure.

    Raises: ValueError if the molecules were not scored on the way, at two points or more.
    """
    from matplotlib import pyplot as plt

    entries = _scored_entries(name)
    if len(entries) < 2:
        drawn = ", ".join(_names_of_curves())
        raise ValueError(f"no curve of validity and FCD for {quoted(name)}; there are some of {drawn}")
    minutes = [entry["seconds"] / 60 for entry in entries]
    fig, panels = plt.subplots(1, 2, figsize=(9, 2.8))
    for axes, key, label, colour in zip(panels, ("valid", "fcd"), ("strictly valid, %", "FCD"), ("green", "red")):
        factor = 100 if key == "valid" else 1
        values = [entry[key] * factor for entry in entries]
        axes.plot(minutes, values, "o-", color=COLOURS[colour])
        axes.annotate(
            f"{values[-1]:.3g}",
            (minutes[-1], values[-1]),
            textcoords="offset points",
            xytext=(-6, -16 if key == "valid" else 9),
            ha="right",
        )
        axes.margins(y=0.15)
        axes.set(xlabel="training minutes", ylabel=label, title=f"{entries[-1]['N']:,} samples")
        axes.grid(alpha=0.3)
    samplers = ", later ".join(dict.fromkeys(entry["sampler"] for entry in entries))
    machine = read_json(CHECKPOINTS / name / "card.json")["machine"]
    fig.suptitle(f"{name}, sampler {samplers}\ntrained on: {machine}", fontsize=9)
    fig.tight_layout()
    return fig


# ---------------------------------------------------------------------------------------------------------------------
# The map of the course, and the files in figs/
# ---------------------------------------------------------------------------------------------------------------------


def course_map():
    """The map of the course as a matplotlib figure: what each notebook makes and what the next one takes from it."""
    stations = {
        "01": ("QM9", "molecules as tensors", 0, 0.5, "blue"),
        "02": ("GraphVAE", "graph → latent → graph", 1, 1, "green"),
        "03": ("graph DDPM", "noise on the graph", 1, 0, "orange"),
        "04": ("latent diffusion", "noise on the latent", 2, 1, "red"),
        "05": ("diffusion prior", "condition → latent", 3, 1, "purple"),
        "06": ("inference", "what each knob costs", 2, 0, "sky"),
        "07": ("retrieval", "molecules put to work", 3, 0, "yellow"),
    }
    boxes = {
        number: (f"{number}  {title}\n{text}", x, -y, colour)
        for number, (title, text, x, y, colour) in stations.items()
    }
    return _boxes_and_arrows(boxes, ("01 02", "01 03", "02 04", "04 05", "03 06", "04 06", "05 06", "06 07"))


def show_diagram(boxes, arrows, alt, caption=None):
    """A drawing of boxes and arrows, such as the layers of a network, in the style of the course's map.

    Args:
        boxes: dict name -> (text, column, row, colour): the text's first line is its title, rows are counted downwards
            and need not be whole numbers, colour is a key of COLOURS.
        arrows: texts of two names, such as "input layer".
        alt: what it shows, for those who cannot see it.

    Raises: ValueError for an arrow from or to a box that there is not, or a colour that there is not.
    """
    for text in arrows:
        if unknown := sorted(set(text.split()) - boxes.keys()):
            raise ValueError(f"the arrow {quoted(text)} names {quoted(unknown[0])}: expected {', '.join(boxes)}")
    for name, (_, _, _, colour) in boxes.items():
        if colour not in COLOURS:
            raise ValueError(f"the box {quoted(name)} is {quoted(colour)}: expected one of {', '.join(COLOURS)}")
    show_figure(_boxes_and_arrows(boxes, arrows), alt, caption)


def _boxes_and_arrows(boxes, arrows):
    """What `show_diagram` shows, as a matplotlib figure."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    columns = [column for _, column, _, _ in boxes.values()]
    rows = [row for _, _, row, _ in boxes.values()]
    wide, high = max(columns) - min(columns) + 0.9, max(rows) - min(rows) + 0.6
    fig, axes = plt.subplots(figsize=(3.1 * wide, 1.9 * high))
    for start, end in map(str.split, arrows):
        middle, target = ((column, -row) for _, column, row, _ in (boxes[start], boxes[end]))
        draw_arrow(axes, middle, _edge_of_box(middle, target))
    for text, column, row, colour in boxes.values():
        title, _, below = text.partition("\n")
        look = dict(boxstyle="round,pad=0.02", fc="white", ec=COLOURS[colour], lw=2.5, zorder=3)
        axes.add_patch(FancyBboxPatch((column - 0.36, -row - 0.2), 0.72, 0.4, **look))
        place = dict(ha="center", va="center", zorder=4)
        axes.text(column, -row + (0.09 if below else 0), title, fontsize=10, weight="bold", **place)
        axes.text(column, -row - 0.07, below, fontsize=8.5, **place)
    axes.set(xlim=(min(columns) - 0.45, max(columns) + 0.45), ylim=(-max(rows) - 0.3, -min(rows) + 0.3))
    axes.axis("off")
    return fig


def _edge_of_box(start, target):
    """Where the line between the middles of two boxes, 0.76 wide and 0.44 high, enters the second one: (x, y)."""
    (x0, y0), (x1, y1) = start, target
    hidden = []  # share of the line that lies within the box, by its width and by its height
    if x1 != x0:
        hidden.append(0.38 / abs(x1 - x0))
    if y1 != y0:
        hidden.append(0.22 / abs(y1 - y0))
    reach = 1 - min(hidden)
    return x0 + reach * (x1 - x0), y0 + reach * (y1 - y0)


def make_figures():
    """Write figs/course_map.png and the curve of every generator that data/results has one of."""
    figures = {"course_map": course_map()}
    for name in _names_of_curves():
        figures[f"{name}_curve"] = training_curve(name)
    for name, fig in figures.items():
        with atomic(ROOT / "figs" / f"{name}.png") as part:
            part.write_bytes(figure_png(fig))
