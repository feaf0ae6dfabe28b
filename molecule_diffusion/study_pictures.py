"""Pictures of studies: rows with their seeds between the rows that frame them; and the model of two stages."""

import numpy as np

from molecule_diffusion.drawing import COLOURS, draw_arrow, show_figure

FRAME_STYLES = ("--", ":", "-.")


def show_seeds(table, group, values, frames=None, caption=None):
    """One line per group, one dot per seed, a bar at the mean; dashed lines mark the rows that frame the table.

    Args:
        table: a DataFrame with a row for each group and seed.
        group: the column that names the groups; they stand in the order in which they first occur.
        values: {column: label of its axis}; one panel each. An axis whose values span a factor of 5 is logarithmic.
        frames: DataFrame with the same columns of values, indexed by the names of the framing rows; None for none.
        caption: one sentence that states the conclusion.

    Raises: ValueError for a column that the table does not have.
    """
    from matplotlib import pyplot as plt

    if missing := [name for name in (group, *values) if name not in table]:
        raise ValueError(f"show_seeds: the table has no column {missing[0]!r}; it has {', '.join(map(str, table))}")
    names = list(dict.fromkeys(table[group]))
    size = (4.2 * len(values) + 2, 0.32 * len(names) + 1.3)
    fig, panels = plt.subplots(1, len(values), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, (column, label) in zip(panels[0], values.items()):
        for place, name in enumerate(names):
            found = table.loc[table[group] == name, column].astype(float).dropna()
            axes.plot(found, np.full(len(found), place), "o", color=COLOURS["blue"], alpha=0.6, ms=5)
            axes.plot(found.mean(), place, "|", color=COLOURS["orange"], ms=16, mew=2.5)
        _mark_frames(axes, frames, column)
        spread = table[column].astype(float)
        if spread.min() > 0 and spread.max() > 5 * spread.min():
            axes.set_xscale("log")
        axes.set(xlabel=label, yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="x", alpha=0.3)
    if frames is not None:
        panels[0][0].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5 * len(values), -0.25), ncols=3)
    show_figure(fig, _told(table, group, values), caption)


def _mark_frames(axes, frames, column):
    if frames is None:
        return
    for style, (name, value) in zip(FRAME_STYLES, frames[column].items(), strict=False):
        axes.axvline(value, color="#666666", ls=style, lw=1.2, label=name)


def _told(table, group, values):
    """The means of every group, in words, for those who cannot see the picture."""
    means = table.groupby(group, sort=False)[list(values)].mean(numeric_only=True)
    lines = [
        f"{name}: " + ", ".join(f"{column} {row[column]:.3g}" for column in means) for name, row in means.iterrows()
    ]
    return "; ".join(lines)


def show_two_stages():
    """Latent diffusion as a picture: what is trained in which stage, and what runs when molecules are drawn."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(figsize=(9.5, 3.2))
    axes.set(xlim=(0, 9.5), ylim=(0, 3.2))
    axes.axis("off")
    for y, title in ((2.75, "stage 1: the VAE"), (1.6, "stage 2: diffusion"), (0.45, "drawing")):
        axes.text(0.05, y, title, va="center", fontsize=10, weight="bold")
    graph, latent, network = "#DDDDDD", COLOURS["sky"], COLOURS["yellow"]
    top = [("graph", graph), ("encoder", network), ("latent z", latent), ("decoder", network), ("graph", graph)]
    middle = [("graph", graph), ("encoder,\nfrozen", "white"), ("latent z", latent), ("noise added", latent)]
    middle.append(("denoiser", network))
    bottom = [("noise", latent), ("denoiser,\nevery step", "white"), ("latent z", latent), ("decoder,\nonce", "white")]
    bottom.append(("graph", graph))
    for y, row in ((2.75, top), (1.6, middle), (0.45, bottom)):
        for k, (text, colour) in enumerate(row):
            x = 2.6 + 1.6 * k
            box = dict(boxstyle="round,pad=0.35", fc=colour, ec="#444444")
            axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=box)
            if k > 0:
                look = dict(arrowstyle="->", color="#444444", shrinkA=2, shrinkB=2, lw=1)
                draw_arrow(axes, (x - 1.02, y), (x - 0.58, y), **look)
    alt = (
        "Three rows of boxes. Stage 1: graph, encoder, latent z, decoder, graph; encoder and decoder are trained. "
        "Stage 2: graph, frozen encoder, latent z, noise added, denoiser, which is trained. Drawing: noise, denoiser "
        "at every step, latent z, decoder once, graph."
    )
    show_figure(fig, alt, "A model of two stages; yellow is trained. The encoder is needed for training only.")
