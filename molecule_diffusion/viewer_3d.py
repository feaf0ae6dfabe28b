"""Molecules in 3D to turn with the mouse: py3Dmol, fed with the script in data/3Dmol so that it needs no network."""

import base64
import functools
import html
import json

import numpy as np
from rdkit import Chem

from molecule_diffusion.drawing import ATOM_COLOURS, as_mol, figure_png, show_bundle
from molecule_diffusion.files import DATA

SCRIPT = DATA / "3Dmol" / "3Dmol-2.5.5-min.js.gz"
MOST_ATOMS = 60  # heavy atoms whose geometry is guessed; RDKit takes seconds for these, hours for hundreds
STYLE = {"stick": {"radius": 0.12}, "sphere": {"scale": 0.25}}


def show_3d(molecules, names=None, caption=None):
    """Show molecules in 3D to turn with the mouse, with a menu if there are several; offline, no server, no widget.

    A static picture of the first one stands beside it, and alone in the saved notebook.

    Args:
        molecules: one molecule or a list: RDKit molecules with coordinates (`qm9.mol(i)`), or SMILES, for which a quick
            force-field geometry is made. Too strained ones are left out of a list, with a message.
        names: the menu's texts, one each; SMILES by default.
    """
    molecules = [molecules] if isinstance(molecules, (str, Chem.Mol)) else list(molecules)
    if not molecules:
        raise ValueError("show_3d got no molecule; pass at least one SMILES or RDKit molecule")
    if names is None:
        names = [Chem.MolToSmiles(Chem.RemoveHs(as_mol(m)), isomericSmiles=False) for m in molecules]
    names = [str(name) for name in names]
    if len(names) != len(molecules):
        raise ValueError(f"{len(names)} names for {len(molecules)} molecules: give one each, or none")
    mols, shown = [], []
    for molecule, name in zip(molecules, names):
        try:
            mols.append(with_geometry(molecule))
            shown.append(name)
        except ValueError as error:
            if len(molecules) == 1:
                raise
            print(f"left out: {error}")
    if not mols:
        raise ValueError("none of these molecules has a 3D geometry; pass others")
    alt = f"3D picture of {shown[0]}: {mols[0].GetNumAtoms()} atoms, hydrogens white, C grey, N blue, O red, F green."
    png = _flat_picture(mols[0])
    show_bundle({"text/html": _page(mols, shown, png, alt)}, png, alt, caption)


def with_geometry(molecule):
    """The molecule with hydrogens and 3D coordinates: its own, or a quick force-field guess (ETKDG) for a SMILES."""
    from rdkit.Chem import AllChem

    mol = as_mol(molecule)
    if mol.GetNumConformers() and mol.GetConformer().Is3D():
        return mol
    if mol.GetNumAtoms() > MOST_ATOMS:
        raise ValueError(f"a molecule of {mol.GetNumAtoms()} atoms: a geometry is guessed for at most {MOST_ATOMS}")
    mol = Chem.AddHs(mol)
    for attempt in ({}, {"useRandomCoords": True, "useExpTorsionAnglePrefs": False, "useBasicKnowledge": False}):
        if AllChem.EmbedMolecule(mol, randomSeed=0, **attempt) == 0:
            AllChem.MMFFOptimizeMolecule(mol)
            return mol
    raise ValueError(f"RDKit finds no 3D geometry for {Chem.MolToSmiles(Chem.RemoveHs(mol))}: too strained")


def _flat_picture(mol):
    """PNG of a 3D molecule, seen 25° off its thinnest axis so that few atoms hide behind others."""
    from matplotlib import pyplot as plt

    positions = mol.GetConformer().GetPositions()
    positions = positions - positions.mean(0)
    if len(positions) > 2:
        positions = positions @ np.linalg.svd(positions)[2].T
    x, y, depth = positions.T
    tilt = np.radians(25)
    y, depth = np.cos(tilt) * y - np.sin(tilt) * depth, np.sin(tilt) * y + np.cos(tilt) * depth
    fig, axes = plt.subplots(figsize=(3.6, 3))
    for bond in mol.GetBonds():
        pair = [bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()]
        axes.plot(x[pair], y[pair], color="#999999", linewidth=1 + 2 * bond.GetBondTypeAsDouble(), zorder=1)
    ball = dict(edgecolors="black", linewidths=0.6, zorder=2)
    letter = dict(ha="center", va="center", fontsize=8, zorder=3)
    for atom in np.argsort(depth):
        symbol = mol.GetAtomWithIdx(int(atom)).GetSymbol()
        size = 130 if symbol == "H" else 380
        axes.scatter(x[atom], y[atom], size, ATOM_COLOURS.get(symbol, "#AAAAAA"), **ball)
        axes.text(x[atom], y[atom], symbol, color="black" if symbol == "H" else "white", **letter)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.margins(0.15)
    return figure_png(fig)


# ---------------------------------------------------------------------------------------------------------------------
# The live page
# ---------------------------------------------------------------------------------------------------------------------

# py3Dmol loads its script from the network unless $3Dmolpromise is there already: this is that promise, made once a
# page from the packed script. The script must not see a module loader, or it hands itself to that instead of the page.
_LOADER = """<script>
if (typeof $3Dmolpromise === "undefined") {
  var $3Dmolpromise = (async () => {
    const packed = Uint8Array.from(atob("%s"), c => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    new Function("exports", "module", "define", await new Response(stream).text()).call(window);
  })();
}
</script>"""

# The frame is drawn around py3Dmol's box, whose canvas would cover a border of its own.
_PAGE = """<div style="display:flex;flex-wrap:wrap;align-items:center;gap:12px">
 <img alt="%(alt)s" src="data:image/png;base64,%(png)s">
 <div>%(menu)s
  <div style="width:380px;height:300px;padding:2px;border:1px solid #ccc;border-radius:6px">%(viewer)s</div>
  <small>drag to turn · wheel to zoom</small></div></div>
<script>$3Dmolpromise.then(() => {
  const menu = document.getElementById("menu_%(id)s"), viewer = viewer_%(id)s;
  if (!viewer) throw "no WebGL";
  if (menu) menu.onchange = () => {
    viewer.setStyle({}, {});
    viewer.setStyle({model: Number(menu.value)}, %(style)s);
    viewer.zoomTo({model: Number(menu.value)});
    viewer.render();
  };
}).catch(error => {
  const box = document.getElementById("3dmolviewer_%(id)s");
  box.textContent = "No 3D viewer here (" + error + "); the picture beside it stands in.";
});</script>"""


def _page(mols, names, png, alt):
    """The HTML of a viewer with a menu of its molecules, the static picture beside it."""
    import py3Dmol

    view = py3Dmol.view(width=380, height=300, js="")  # nothing to load: the promise of _LOADER is there
    for mol in mols:
        view.addModel(_mol_block(mol), "sdf")
    view.setStyle({}, {})
    view.setStyle({"model": 0}, STYLE)
    view.zoomTo({"model": 0})
    viewer = view.write_html()  # gives the view its uniqueid
    parts = {
        "viewer": viewer,
        "id": view.uniqueid,
        "menu": _menu(names, view.uniqueid) if len(mols) > 1 else "",
        "style": json.dumps(STYLE),
        "png": base64.b64encode(png).decode(),
        "alt": html.escape(alt, quote=True),
    }
    return _LOADER % _packed_script() + _PAGE % parts


def _menu(names, uniqueid):
    options = "".join(f'<option value="{k}">{html.escape(name)}</option>' for k, name in enumerate(names))
    return f'<select id="menu_{uniqueid}" aria-label="molecule" style="max-width:380px">{options}</select>'


def _mol_block(mol):
    """The molecule as an SDF text without its name and comments, which could hold anything, the end of a script too."""
    mol = Chem.Mol(mol)
    for name in ("_Name", "_MolFileInfo", "_MolFileComments"):
        mol.ClearProp(name)
    return Chem.MolToMolBlock(mol)


@functools.cache
def _packed_script():
    return base64.b64encode(SCRIPT.read_bytes()).decode()
