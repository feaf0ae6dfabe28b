"""The 3D viewer: its picture, its page made by py3Dmol, its menu, and no network."""

import base64
import gzip
import json
import re

import numpy as np
import py3Dmol
import pytest
from rdkit import Chem
from shared import check_picture

import helpers
from molecule_diffusion import viewer_3d


def models_in(page):
    """The molecules that py3Dmol's script adds to its viewer."""
    blocks = [json.loads(text) for text in re.findall(r'addModel\(("(?:[^"\\]|\\.)*"),"sdf"\)', page)]
    return [Chem.MolFromMolBlock(block, removeHs=False) for block in blocks]


def test_show_3d_is_a_picture_and_an_offline_viewer(qm9, shown):
    helpers.show_3d(qm9.mol(100), caption="Turn it.")
    (data, metadata), caption = shown
    check_picture(data, metadata, alt=qm9.smiles[100])
    page = data["text/html"]
    assert not re.search(r"https?:|//cdn|\bsrc=(?!\"data:)", page), "the page asks for something outside"
    assert f'alt="{metadata["image/png"]["alt"]}"' in page
    assert "<select" not in page, "a menu for one molecule"
    assert caption[0] == {"text/markdown": "*Turn it.*"}


def test_the_viewer_is_py3dmol_s_fed_with_the_shipped_script(shown):
    helpers.show_3d("CCO")
    page = shown[0][0]["text/html"]
    library = gzip.decompress(base64.b64decode(re.search(r'atob\("([^"]+)"\)', page)[1]))
    assert b"3Dmol" in library and library == gzip.decompress(viewer_3d.SCRIPT.read_bytes())
    assert py3Dmol.__version__ in viewer_3d.SCRIPT.name, "the shipped script is of another release than py3Dmol"
    # py3Dmol loads a script only where this promise is not there yet
    assert page.index("var $3Dmolpromise = (async") < page.index("if(typeof $3Dmolpromise === 'undefined')")
    (mol,) = models_in(page)
    assert mol.GetNumAtoms() == 9 and np.ptp(mol.GetConformer().GetPositions()) > 1


def test_show_3d_has_a_menu_for_several(shown):
    helpers.show_3d(["CCO", "C#N"], names=["ethanol", "</script> & co"])
    page = shown[0][0]["text/html"]
    assert page.count("<script>") == page.count("</script>") == 3, "a name ends a script"
    options = re.findall(r'<option value="(\d)">(.*?)</option>', page)
    assert options == [("0", "ethanol"), ("1", "&lt;/script&gt; &amp; co")]
    assert [mol.GetNumAtoms() for mol in models_in(page)] == [9, 3]


def test_texts_of_a_molecule_s_own_cannot_end_the_script(qm9, shown):
    mol = qm9.mol(100)
    for name in ("_Name", "_MolFileInfo", "_MolFileComments"):
        mol.SetProp(name, "</script><script>alert(1)")
    helpers.show_3d(mol)
    page = shown[0][0]["text/html"]
    assert page.count("<script>") == page.count("</script>") == 3 and "alert(1)" not in page
    assert mol.GetProp("_Name") == "</script><script>alert(1)", "the caller's molecule was changed"


def test_show_3d_names_its_molecules_by_smiles(shown):
    helpers.show_3d(["OCC", "OC"])
    assert '<option value="0">CCO</option>' in shown[0][0]["text/html"] and len(shown) == 1


def test_two_viewers_do_not_share_their_boxes(shown):
    helpers.show_3d(["C", "CC"])
    helpers.show_3d(["C", "CC"])
    boxes = [set(re.findall(r'id="(\w+)"', data["text/html"])) for data, _ in shown]
    assert len(boxes[0]) >= 2 and not boxes[0] & boxes[1]


def test_the_frame_is_drawn_around_the_viewer(shown):
    """A border of the box itself would lie under the canvas; the frame is an element around it, with room inside."""
    helpers.show_3d("C")
    page = shown[0][0]["text/html"]
    frame = re.search(r'<div style="([^"]*border:[^"]*)"><div id="3dmolviewer_\w+"\s+style="([^"]*)"', page)
    assert "padding:2px" in frame[1] and "width:380px;height:300px" in frame[1]
    assert "width: 380px; height: 300px" in frame[2] and "border" not in frame[2]


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


def test_names_may_be_an_array_and_anything(shown):
    helpers.show_3d(["C", "CC"], names=np.array(["<!--<script>", '"&'], dtype=object))
    page = shown[0][0]["text/html"]
    assert '<option value="0">&lt;!--&lt;script&gt;</option>' in page and "<!--" not in page
    assert "&lt;!--&lt;script&gt;" in re.search(r'<img alt="([^"]*)"', page)[1]


def test_a_molecule_that_is_too_large(shown):
    with pytest.raises(ValueError, match="a SMILES of 5,000 letters"):
        helpers.show_3d("C" * 5000)


def test_no_geometry_is_guessed_for_a_giant(shown):
    with pytest.raises(ValueError, match="a molecule of 400 atoms: a geometry is guessed for at most 60"):
        helpers.show_3d("C" * 400)
