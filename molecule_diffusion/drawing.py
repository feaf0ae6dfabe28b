"""What every picture of the course is made with: colours, drawn molecules, and showing with alt text and caption."""

import base64
import io

import numpy as np
from rdkit import Chem, rdBase

from molecule_diffusion.checks import quoted
from molecule_diffusion.chemistry import MAX_SMILES_LENGTH, read_smiles, sanitises

# Okabe & Ito's palette, distinguishable with every common colour blindness.
COLOURS = dict(
    blue="#0072B2", orange="#E69F00", green="#009E73", red="#D55E00", purple="#CC79A7", sky="#56B4E9", yellow="#F0E442"
)
ATOM_COLOURS = {"H": "#E6E6E6", "C": "#555555", "N": COLOURS["blue"], "O": COLOURS["red"], "F": COLOURS["green"]}
BOND_COLOURS = ("#F2F2F2", COLOURS["sky"], COLOURS["orange"], COLOURS["purple"])  # none, single, double, triple

# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


def show_image(png, alt, caption=None):
    """Display PNG bytes with a text for those who cannot see it, and a caption that states the conclusion."""
    show_bundle({}, png, alt, caption)


def show_figure(fig, alt, caption=None):
    """Display a matplotlib figure as PNG (see `show_image`) and close it."""
    show_image(figure_png(fig), alt, caption)


def show_bundle(live, png, alt, caption=None):
    """Display what a live notebook can show, a dict of MIME types; a saved one shows the PNG and the caption alone."""
    from IPython.display import Markdown, display

    bundle = live | {"image/png": base64.b64encode(png).decode(), "text/plain": alt}
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}})
    if caption:
        display(Markdown(f"*{caption}*"))


def draw_arrow(axes, start, end, zorder=3, **look):
    """An arrow between two points (x, y) of a matplotlib drawing; `look` changes its style.

    With zorder=0 it lies under all boxes.
    """
    style = dict(arrowstyle="-|>", color="#777777", shrinkA=0, shrinkB=0, lw=1.5) | look
    axes.annotate("", end, start, arrowprops=style, zorder=zorder)


def figure_png(fig):
    """A matplotlib figure as PNG bytes; it is closed."""
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    plt.close(fig)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Molecules in 2D
# ---------------------------------------------------------------------------------------------------------------------


def as_mol(molecule):
    """An RDKit molecule from itself or from a valid SMILES."""
    mol = molecule
    if isinstance(molecule, str):
        mol = read_smiles(molecule)
    if not isinstance(mol, Chem.Mol):
        raise ValueError(f"{quoted(molecule)} cannot be drawn: expected a valid SMILES or an RDKit molecule")
    if mol.GetNumAtoms() > MAX_SMILES_LENGTH:
        raise ValueError(f"a molecule of {mol.GetNumAtoms():,} atoms: this course draws at most {MAX_SMILES_LENGTH}")
    return mol


def drawable(mol):
    """A copy to draw: without hydrogens, kekulised, with coordinates; one that RDKit refuses stays as it is."""
    from rdkit.Chem.Draw import rdMolDraw2D

    mol = Chem.Mol(mol)
    with rdBase.BlockLogs():
        sound = sanitises(mol)
    if sound:
        return rdMolDraw2D.PrepareMolForDrawing(Chem.RemoveHs(mol), kekulize=True, forceCoords=True)
    mol = as_it_stands(mol)
    # RDKit may put atoms of a tangle on one spot, which its drawing then refuses
    shift = np.random.default_rng(0).normal(0, 0.05, (mol.GetNumAtoms(), 2))
    positions = mol.GetConformer().GetPositions()
    positions[:, :2] += shift
    mol.GetConformer().SetPositions(positions)
    return mol


def as_it_stands(mol):
    """A copy to draw with its own bonds, whatever RDKit thinks of them."""
    from rdkit.Chem.Draw import rdMolDraw2D

    mol = Chem.Mol(mol)
    mol.UpdatePropertyCache(strict=False)
    return rdMolDraw2D.PrepareMolForDrawing(mol, kekulize=False, forceCoords=True)


def molecules_png(mols, size, columns=1, legends=None, legend_size=16, atom_numbers=False):
    """Molecules side by side as PNG bytes.

    Args:
        mols: made with `drawable` or `as_it_stands`.
        size: (width, height) of one picture, in pixels.
        columns: pictures in a row.
        legends: a text under each, or None.
        legend_size: of their letters.
        atom_numbers: whether each atom carries its number.
    """
    from rdkit.Chem import Draw

    width, height = size
    rows = (len(mols) + columns - 1) // columns
    drawer = Draw.MolDraw2DCairo(width * columns, height * rows, width, height)
    options = drawer.drawOptions()
    options.legendFontSize = legend_size
    options.addAtomIndices = atom_numbers
    options.prepareMolsBeforeDrawing = False
    drawer.DrawMolecules(mols, legends=legends or [""] * len(mols))
    drawer.FinishDrawing()
    return drawer.GetDrawingText()


def molecule_picture(mol, size, **options):
    """One molecule as an image array for matplotlib's imshow; arguments as in `molecules_png`."""
    from matplotlib import pyplot as plt

    return plt.imread(io.BytesIO(molecules_png([mol], size, **options)))
