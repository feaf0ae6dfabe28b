"""Pictures for notebook 02: the networks of the VAEs, and what a matching believes."""

import numpy as np

from molecule_diffusion.checks import quoted
from molecule_diffusion.drawing import COLOURS, draw_arrow, show_figure

_LEARNED, _GIVEN, _LATENT = COLOURS["yellow"], "#DDDDDD", COLOURS["sky"]
_UNDER = dict(shrinkA=2, shrinkB=2, zorder=0)  # an arrow ends two points before its boxes, or runs under them

# Each network as rows of boxes, read from left to right: (text, colour).
NETWORKS = {
    "VAE": (
        [
            [
                ("molecule x", _GIVEN),
                ("encoder", _LEARNED),
                ("mean μ,\nspread σ", _LATENT),
                ("z = μ + σ·ε", _LATENT),
                ("decoder", _LEARNED),
                ("p(x | z)", _GIVEN),
            ],
            [
                ("", None),
                ("", None),
                ("price: KL to\nN(0, I)", "white"),
                ("ε drawn from\nN(0, I)", "white"),
                ("", None),
                ("price:\n−log p(x | z)", "white"),
            ],
        ],
        "A VAE has two networks (yellow) and two prices: for a bad reconstruction, and for a cloud unlike the prior.",
    ),
    "GraphVAE": (
        [
            [
                ("graph: atoms\nand bonds", _GIVEN),
                ("2 edge-\nconditioned\nconvolutions", _LEARNED),
                ("gated sum\nover atoms", _LEARNED),
                ("z, c numbers", _LATENT),
                ("3 layers", _LEARNED),
                ("9 places,\n36 pairs:\nprobabilities", _GIVEN),
            ],
            [
                ("", None),
                ("", None),
                ("", None),
                ("", None),
                ("", None),
                ("matching,\nthen the loss", "white"),
            ],
        ],
        "GraphVAE: convolutions read the bonds, the graph becomes one vector, and a matching stands before the loss.",
    ),
    "TokenVAE": (
        [
            [
                ("9 tokens: atom\n+ row of bonds", _GIVEN),
                ("transformer,\n3 layers", _LEARNED),
                ("9 × 8 numbers", _LATENT),
                ("transformer,\n3 layers", _LEARNED),
                ("9 atom heads,\n36 pair heads", _LEARNED),
                ("classes:\nprobabilities", _GIVEN),
            ],
        ],
        "TokenVAE: one token per atom from beginning to end; canonical order, so that no matching is needed.",
    ),
}


def show_network(name):
    """One of the networks of notebook 02 as a row of boxes; yellow is learned. Args: name: a key of NETWORKS."""
    from matplotlib import pyplot as plt

    if name not in NETWORKS:
        raise ValueError(f"unknown network {quoted(name)}; known ones: {', '.join(NETWORKS)}")
    rows, caption = NETWORKS[name]
    fig, axes = plt.subplots(figsize=(11, 0.5 + 1.1 * len(rows)))
    for row, boxes in enumerate(rows):
        for column, (text, colour) in enumerate(boxes):
            if colour is None:
                continue
            box = dict(boxstyle="round,pad=0.4", fc=colour, ec="#444444")
            axes.text(2.1 * column, -1.1 * row, text, ha="center", va="center", fontsize=9, bbox=box)
            if row == 0 and column > 0:
                draw_arrow(axes, (2.1 * column - 1.3, 0), (2.1 * column - 0.8, 0), **_UNDER)
            if row > 0:
                draw_arrow(axes, (2.1 * column, -0.75), (2.1 * column, -0.3), arrowstyle="-", lw=1.2, ls=":", **_UNDER)
    axes.set(xlim=(-1.1, 11.6), ylim=(0.4 - 1.1 * len(rows), 0.6))
    axes.axis("off")
    told = "; ".join(" → ".join(text.replace("\n", " ") for text, _ in boxes if text) for boxes in rows)
    show_figure(fig, f"Diagram of {name}: {told}.", caption)


def show_beliefs(beliefs, atoms, places, chosen=None, caption=None):
    """A table of beliefs as a picture: the darker, the larger; boxes mark the assignment.

    Args:
        beliefs: (n, n), of true atom i and place a.
        atoms, places: n texts each, what stands at the rows and at the columns.
        chosen: order (n,), the atom that is assigned to each place; None marks nothing.
    """
    from matplotlib import pyplot as plt

    beliefs = np.asarray(beliefs, float)
    if beliefs.shape != (len(atoms), len(places)):
        raise ValueError(f"beliefs of shape {beliefs.shape} for {len(atoms)} atoms and {len(places)} places")
    fig, axes = plt.subplots(figsize=(1 + 0.75 * len(places), 0.8 + 0.62 * len(atoms)))
    axes.imshow(beliefs, cmap="Blues", vmin=0, vmax=max(beliefs.max(), 1e-9) * 1.3)
    for (i, a), value in np.ndenumerate(beliefs):
        axes.text(a, i, f"{value:.2g}", ha="center", va="center", fontsize=11)
    pairs = []
    if chosen is not None:
        for a, i in enumerate(np.asarray(chosen).tolist()):
            axes.add_patch(plt.Rectangle((a - 0.46, i - 0.46), 0.92, 0.92, fill=False, ec=COLOURS["red"], lw=2.5))
            pairs.append(f"{places[a]} is {atoms[i]}")
    axes.set(xticks=range(len(places)), xticklabels=places, yticks=range(len(atoms)), yticklabels=atoms)
    axes.set(xlabel="predicted place", ylabel="true atom")
    rows = "; ".join(f"{atom}: " + ", ".join(f"{value:.2g}" for value in row) for atom, row in zip(atoms, beliefs))
    show_figure(fig, f"Beliefs, one row per true atom: {rows}. {', '.join(pairs)}".strip(), caption)
