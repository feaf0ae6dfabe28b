"""Two drawings for notebook 07: the retriever's towers, and what each loss does to right and wrong molecules."""

import numpy as np
import torch

from molecule_diffusion.drawing import COLOURS, draw_arrow, show_figure
from molecule_diffusion.retrieval import FEATURE_SIZES, LOSSES
from molecule_diffusion.sentences import SENTENCE_SIZE

# ---------------------------------------------------------------------------------------------------------------------
# The towers
# ---------------------------------------------------------------------------------------------------------------------


def show_towers(caption=None):
    """Draw the way of a sentence and that of a molecule into one space, and the loss between them."""
    from matplotlib import pyplot as plt

    rows = {
        "orange": [
            "“it contains a nitrile\nand a ring”",
            f"sentence model (fixed)\n{SENTENCE_SIZE} numbers",
            "text tower\nthree trained layers",
        ],
        "blue": [
            "molecule\nN#CC1CC1",
            f"fingerprint and latent\n{FEATURE_SIZES['both']:,} numbers",
            "molecule tower\nthree trained layers",
        ],
    }
    fig, ax = plt.subplots(figsize=(12, 2.7))
    for y, (colour, texts) in zip((1.3, 0), rows.items()):
        for x, text in enumerate(texts):
            _box(ax, (3 * x, y), text, colour)
            if x:
                draw_arrow(ax, (3 * x - 1.7, y), (3 * x - 1.28, y))
        draw_arrow(ax, (7.3, y), (7.72, 0.65 + np.sign(y - 0.65) * 0.2))
    _box(ax, (9, 0.65), "one space\npoints of 128 numbers\nand length 1", "green", height=0.9)
    draw_arrow(ax, (10.3, 0.65), (10.72, 0.65))
    _box(ax, (12, 0.65), "all cosines of a batch\n→ loss, which trains\nboth towers", "red", height=0.9)
    ax.set(xlim=(-1.4, 13.4), ylim=(-0.5, 1.8))
    ax.axis("off")
    alt = (
        f"A sentence goes through the fixed sentence model, {SENTENCE_SIZE} numbers, and the text tower; a molecule "
        f"through fingerprint and latent, {FEATURE_SIZES['both']:,} numbers, and the molecule tower. Both end in one "
        "space of 128 numbers, where the loss reads the cosines of all pairs of a batch; it trains both towers."
    )
    show_figure(fig, alt, caption)


def _box(ax, middle, text, colour, height=0.7):
    from matplotlib.patches import FancyBboxPatch

    (x, y), look = middle, dict(boxstyle="round,pad=0.02", fc="white", ec=COLOURS[colour], lw=2)
    ax.add_patch(FancyBboxPatch((x - 1.25, y - height / 2), 2.5, height, **look))
    ax.text(x, y, text, ha="center", va="center", fontsize=9)


# ---------------------------------------------------------------------------------------------------------------------
# Pulls and pushes
# ---------------------------------------------------------------------------------------------------------------------

# One sentence and five molecules: its own one, another right one that lies far off, and three wrong ones.
SCORES = (0.75, 0.2, 0.65, 0.0, -0.7)
NAMES = ("its own molecule", "the other right one", "the nearest wrong one", "a wrong one farther off", "the farthest")
RIGHT = 2  # the first two are right
FAINT = 0.04  # slopes below this share of the largest are not drawn


def loss_slopes(scores=SCORES, right=RIGHT):
    """How steeply each loss falls or rises with each molecule's cosine; below 0 it is pulled, above 0 pushed.

    Args: scores: cosines of one sentence with molecules, its own one first; right: how many of them fit, from the
        first on. The settings of the losses are those of LOSSES; the triplet loss takes, for each right molecule, the
        nearest wrong one that is farther than it, as the semi-hard miner does.

    Returns: dict: loss -> list of slopes, one per molecule.
    """
    slopes = {}
    for name, value in _LOSS_OF.items():
        cosines = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
        value(cosines, right).backward()
        slopes[name] = cosines.grad.tolist()
    return slopes


def _distances(cosines, right):
    apart = (2 - 2 * cosines).sqrt()
    return apart[:right], apart[right:]


def _contrastive(cosines, right):
    near, far = _distances(cosines, right)
    return near.sum() + (LOSSES["contrastive"]["neg_margin"] - far).relu().sum()


def _triplet(cosines, right):
    near, far = _distances(cosines, right)
    total = cosines.sum() * 0
    for distance in near:
        farther = far[far > distance]
        if len(farther):
            total = total + (distance - farther.min() + LOSSES["triplet"]["margin"]).relu()
    return total


def _margin(cosines, right):
    (near, far), (margin, beta) = _distances(cosines, right), LOSSES["margin"].values()
    return (near - beta + margin).relu().sum() + (beta + margin - far).relu().sum()


def _infonce(cosines, right):
    logits = torch.cat([cosines[:1], cosines[right:]]) / LOSSES["infonce"]["temperature"]
    return logits.logsumexp(0) - logits[0]


def _supcon(cosines, right):
    logits = cosines / LOSSES["supcon"]["temperature"]
    return logits.logsumexp(0) - logits[:right].mean()


_LOSS_OF = {
    "contrastive": _contrastive,
    "triplet": _triplet,
    "margin": _margin,
    "InfoNCE": _infonce,
    "SupCon": _supcon,
}


def show_pulls(caption=None):
    """Draw one sentence's molecules on a line, by their cosine, and which way each loss moves them."""
    from matplotlib import pyplot as plt

    slopes = loss_slopes()
    fig, ax = plt.subplots(figsize=(9, 4.2))
    for row, values in enumerate(slopes.values()):
        _line_of(ax, -row, values)
    ax.set(xlim=(-1.05, 1.08), ylim=(-len(slopes) + 0.45, 0.55), xlabel="cosine with the sentence, which stands at 1")
    ax.axvline(1, color="grey", lw=0.8)
    ax.set_xticks([-1, -0.5, 0, 0.5, 1])
    ax.set_yticks(range(0, -len(slopes), -1), [*slopes])
    ax.plot([], [], "o", color=COLOURS["blue"], ms=9, label="right molecules (the filled one: the sentence's own)")
    ax.plot([], [], "s", color=COLOURS["orange"], ms=8, label="wrong molecules")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
    for side in ("left", "right", "top"):
        ax.spines[side].set_visible(False)
    told = "; ".join(f"{name}: {_in_words(values)}" for name, values in slopes.items())
    alt = "A sentence and five molecules at cosines " + ", ".join(f"{score:g}" for score in SCORES) + ". "
    show_figure(fig, alt + told + ".", caption)


def _line_of(ax, y, slopes):
    """One loss: the molecules as marks, and an arrow at each that it moves, as long as the slope is steep."""
    ax.axhline(y, color="lightgrey", lw=1, zorder=0)
    largest = max(abs(slope) for slope in slopes)
    for k, (score, slope) in enumerate(zip(SCORES, slopes)):
        colour = COLOURS["blue" if k < RIGHT else "orange"]
        face = "white" if k == 1 else colour
        ax.plot(score, y, "o" if k < RIGHT else "s", color=colour, mfc=face, mew=2, ms=8)
        if abs(slope) > FAINT * largest:
            height = y + (0.24 if k < RIGHT else -0.24)  # right ones above the line, wrong ones below it
            draw_arrow(ax, (score, height), (score - 0.24 * slope / largest, height), color=colour, lw=2.5)


def _in_words(slopes):
    """What a loss does to each of the five molecules: a text."""
    parts, largest = [], max(abs(slope) for slope in slopes)
    for name, slope in zip(NAMES, slopes):
        if abs(slope) > FAINT * largest:
            parts.append(f"{'pulls' if slope < 0 else 'pushes'} {name} ({slope:+.1f})")
    return ", ".join(parts)
