"""Drawing molecules, also those that RDKit refuses."""

from rdkit import Chem
from shared import refused_molecules

from molecule_diffusion import drawing


def test_a_refused_molecule_is_drawn_as_it_stands():
    carbon, *_ = refused_molecules()
    drawn = drawing.drawable(carbon)
    assert drawn.GetNumConformers() == 1
    assert [bond.GetBondType() for bond in drawn.GetBonds()] == [bond.GetBondType() for bond in carbon.GetBonds()]
    assert drawing.drawable(Chem.AddHs(Chem.MolFromSmiles("CCO"))).GetNumAtoms() == 3  # a sound one loses hydrogens
    benzene = drawing.drawable(Chem.MolFromSmiles("c1ccccc1"))
    assert {str(bond.GetBondType()) for bond in benzene.GetBonds()} == {"SINGLE", "DOUBLE"}
