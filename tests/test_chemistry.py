"""Graph <-> RDKit <-> SMILES by hand and on all of QM9; validity; types, parts and properties."""

import re
import time

import numpy as np
import pandas as pd
import pytest
import torch
from rdkit import Chem

import helpers
from molecule_diffusion import chemistry

C, N, O, NONE = (helpers.ATOM_TYPES.index(name) for name in ("C", "N", "O", "none"))  # noqa: E741


def graph(atoms, bonds):
    """A batch of one graph from atom classes and {(i, j): bond class}."""
    types = np.full((1, 9), NONE, np.int8)
    types[0, : len(atoms)] = atoms
    matrix = np.zeros((1, 9, 9), np.int8)
    for (i, j), order in bonds.items():
        matrix[0, i, j] = matrix[0, j, i] = order
    return types, matrix


BENZENE_BONDS = {(0, 1): 2, (1, 2): 1, (2, 3): 2, (3, 4): 1, (4, 5): 2, (0, 5): 1}


@pytest.mark.parametrize(
    "smiles, canonical, atoms, bonds",
    [
        ("C=O", "C=O", [C, O], {(0, 1): 2}),
        ("O=C", "C=O", [C, O], {(0, 1): 2}),
        ("O1CC1", "C1CO1", [C, C, O], {(0, 1): 1, (1, 2): 1, (0, 2): 1}),
        ("C[C@H](N)C#N", "CC(N)C#N", [C, C, N, C, N], {(0, 1): 1, (1, 2): 1, (1, 3): 1, (3, 4): 3}),
        ("C", "C", [C], {}),
    ],
)
def test_graph_by_hand(smiles, canonical, atoms, bonds):
    expected_atoms, expected_bonds = graph(atoms, bonds)
    got_atoms, got_bonds, got_smiles = helpers.to_graph(smiles)
    assert got_smiles == canonical
    assert (got_atoms.dtype, got_bonds.dtype) == (np.int8, np.int8)
    np.testing.assert_array_equal(got_atoms, expected_atoms[0])
    np.testing.assert_array_equal(got_bonds, expected_bonds[0])
    assert helpers.to_smiles(expected_atoms, expected_bonds) == [canonical]


@pytest.mark.parametrize("smiles", ["c1ccccc1", "C1=CC=CC=C1"])
def test_benzene_is_kekulised_and_stays_aromatic_as_smiles(smiles):
    atoms, bonds, canonical = helpers.to_graph(smiles)
    assert sorted(bonds[helpers.PAIRS]) == [0] * 30 + [1] * 3 + [2] * 3
    assert (bonds.sum(-1)[:6] == 3).all() and (atoms[:6] == C).all()
    assert canonical == "c1ccccc1"
    assert helpers.to_smiles(*graph([C] * 6, BENZENE_BONDS)) == ["c1ccccc1"]


def test_an_rdkit_molecule_is_taken_and_not_changed():
    mol = Chem.MolFromSmiles("Oc1ccccc1")
    atoms, bonds, smiles = helpers.to_graph(mol)
    assert smiles == "Oc1ccccc1"
    assert mol.GetAtomWithIdx(1).GetIsAromatic()
    np.testing.assert_array_equal(bonds, helpers.to_graph("c1ccccc1O")[1])


@pytest.mark.parametrize(
    "molecule, message",
    [
        ("C1CC", "'C1CC' is not a valid SMILES"),
        ("C(C)(C)(C)(C)C", "is not a valid SMILES"),
        ("", "'' has 0 heavy atoms; this course works with 1 to 9"),
        ("C" * 10, "has 10 heavy atoms; this course works with 1 to 9"),
        ("CCl", "'CCl' contains Cl; known elements: C, N, O, F"),
        (Chem.AddHs(Chem.MolFromSmiles("C")), "contains H"),
        ("*C", "contains *"),
        ("C[NH3+]", "carries formal charges"),
        ("CN(=O)=O", "carries formal charges"),
        ("C$C", "'C$C'"),  # bonds that the four classes do not know must not become other bonds
        ("C~C", "'C~C'"),
        ("N->C", "'N->C'"),
        ("[CH3]", "'[CH3]'"),  # a radical would come back as methane
        (None, "None"),
        (5, "5"),
    ],
)
def test_a_molecule_that_does_not_fit_is_named(molecule, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        helpers.to_graph(molecule)


def test_charges_have_their_own_error():
    with pytest.raises(helpers.ChargedMoleculeError):
        helpers.to_graph("[NH4+]")


def test_lists_of_smiles():
    atoms, bonds = helpers.to_graphs(["C=O", "c1ccccc1"])
    assert atoms.shape == (2, 9) and bonds.shape == (2, 9, 9)
    assert helpers.to_smiles(atoms, bonds) == ["C=O", "c1ccccc1"]
    atoms, bonds = helpers.to_graphs([])
    assert atoms.shape == (0, 9) and bonds.shape == (0, 9, 9)
    assert helpers.to_smiles(atoms, bonds) == []
    with pytest.raises(ValueError, match="CCl"):
        helpers.to_graphs(["C", "CCl"])


def test_graphs_that_rdkit_refuses_are_none_and_pieces_keep_their_dot():
    five_valent = graph([C] * 6, {(0, k): 1 for k in range(1, 6)})
    pieces = graph([C, C, O], {(0, 1): 1})
    nothing = graph([], {})
    atoms, bonds = (np.concatenate(parts) for parts in zip(five_valent, pieces, nothing))
    assert helpers.to_smiles(atoms, bonds) == [None, "CC.O", None]


def test_unsanitised_molecules_keep_padding_out():
    atoms, bonds = graph([C, NONE, O], {(0, 2): 2})
    (mol,) = helpers.to_mols(atoms, bonds)
    assert [atom.GetSymbol() for atom in mol.GetAtoms()] == ["C", "O"]
    assert mol.GetBondBetweenAtoms(0, 1).GetBondTypeAsDouble() == 2


def with_entry(place, value, array="bonds"):
    def change(atoms, bonds):
        {"atoms": atoms, "bonds": bonds}[array][place] = value
        return atoms, bonds

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, b: (a[0], b), r"expected \(N, 9\) and \(N, 9, 9\)"),
        (lambda a, b: (a, b[:, :8]), r"expected \(N, 9\) and \(N, 9, 9\)"),
        (lambda a, b: (np.repeat(a, 2, 0), b), "with the same N"),
        (lambda a, b: (a, 3), r"expected \(N, 9\) and \(N, 9, 9\)"),
        (lambda a, b: (a.astype(float), b), "atoms has dtype float64: expected integer classes; use .argmax"),
        (lambda a, b: (a, torch.from_numpy(b).float()), "bonds has dtype float32"),
        (with_entry((0, 0), 5, "atoms"), r"atoms holds 2\.\.5: expected 0\.\.4"),
        (with_entry((0, 0), -1, "atoms"), "atoms holds -1"),
        (with_entry((0, 0, 1), 4), r"bonds holds 0\.\.4: expected 0\.\.3"),
        (with_entry((0, 0, 1), 1), "bonds is not symmetric"),
        (with_entry((0, 1, 1), 1), "entries on its diagonal"),
        (with_entry((0, [1, 5], [5, 1]), 1), "padded atom .*helpers.mask_bonds"),
    ],
)
def test_wrong_graphs_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        helpers.check_graphs(*change(*graph([C, O], {(0, 1): 2})))


def test_checked_graphs_may_be_torch_and_of_any_integer_type():
    atoms, bonds = graph([C, O], {(0, 1): 2})
    got = helpers.check_graphs(torch.from_numpy(atoms).long(), bonds.astype(np.int64))
    assert [x.dtype for x in got] == [np.int8, np.int8]
    np.testing.assert_array_equal(got[1], bonds)


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_mask_bonds_removes_rows_and_columns_of_padding(convert):
    atoms, _ = graph([C, O], {})
    full = np.ones((1, 9, 9), np.int8)
    expected = np.zeros((9, 9), np.int8)
    expected[:2, :2] = 1
    masked = helpers.mask_bonds(convert(atoms), convert(full))
    np.testing.assert_array_equal(masked[0], expected)
    assert masked.dtype == convert(full).dtype
    np.testing.assert_array_equal(helpers.mask_bonds(convert(atoms[0]), convert(full[0])), expected)


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor])
def test_matrices_from_pairs(convert):
    pairs = convert(np.arange(1, 73, dtype=np.int16).reshape(2, 36))
    matrix = helpers.matrix_from_pairs(pairs)
    assert tuple(matrix.shape) == (2, 9, 9) and matrix.dtype == pairs.dtype
    assert (matrix[0, 0, 1], matrix[0, 0, 8], matrix[0, 7, 8], matrix[0, 8, 7]) == (1, 8, 36, 36)
    matrix = np.asarray(matrix)
    np.testing.assert_array_equal(matrix, matrix.transpose(0, 2, 1))
    assert not matrix[:, range(9), range(9)].any()
    np.testing.assert_array_equal(helpers.pairs_from_matrix(matrix[1]), pairs[1])


def test_every_neutral_molecule_of_qm9_comes_back(qm9):
    assert len(qm9) == 130_251
    assert helpers.to_smiles(qm9.atoms, qm9.bonds) == qm9.smiles


def test_ten_thousand_graphs_to_smiles_in_five_seconds_and_back(qm9):
    atoms, bonds = qm9.atoms[qm9.test], qm9.bonds[qm9.test]
    started = time.process_time()
    smiles = helpers.to_smiles(atoms, bonds)
    assert time.process_time() - started <= 5
    assert helpers.to_smiles(*helpers.to_graphs(smiles)) == smiles


@pytest.mark.parametrize(
    "smiles, corrected",
    [
        ("CCO", "CCO"),
        ("FC(F)(F)(F)F", "FC(F)(F)F"),  # five bonds on carbon: one goes, the larger piece stays
        ("CC(=C)(C)=C", "CC(C)(C)C"),  # six: both double bonds fall to single ones
        ("CC.O", "CC"),
        ("C#F", "CF"),  # a triple bond falls by one order until fluorine is content
    ],
)
def test_valency_correction(smiles, corrected):
    mol = Chem.MolFromSmiles(smiles, sanitize=False)
    before = Chem.MolToSmiles(mol)
    assert helpers.corrected_smiles(mol) == corrected
    assert Chem.MolToSmiles(mol) == before, "the caller's molecule was changed"


def test_valency_correction_of_nothing():
    assert helpers.corrected_smiles(Chem.Mol()) is None


# ---------------------------------------------------------------------------------------------------------------------
# Rules and properties
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "smiles, type, part",
    [
        ("Oc1ccccc1", "aromatic", "ring 6+"),
        ("COC(C)=O", "ester", "chain"),
        ("O=C1CCO1", "ester", "ring 4"),
        ("CNC=O", "amide", "chain"),
        ("O=C1CC1", "carbonyl", "ring 3"),
        ("N#CC1CC1", "nitrile", "ring 3"),
        ("CC(N)=N", "imine", "chain"),
        ("C#CC", "alkyne", "chain"),
        ("C1=CCC2CC12", "alkene", "fused"),
        ("OC1CC2(CC2)C1", "alcohol", "spiro"),
        ("CN1CCCC1", "amine", "ring 5"),
        ("C1CC2CCC1O2", "ether", "bridged"),
        ("C1CC1C1CC1", "other", "separate"),
        ("C12C3C4C1C5C4C3C25", "other", "cage"),
        ("C1CC2CCC1C2", "other", "bridged"),
        ("C1C2CC1C2", "other", "bridged"),
        ("C", "other", "chain"),
        ("CF", "other", "chain"),
        ("C1CCCCCC1", "other", "ring 6+"),
    ],
)
def test_type_and_part_by_hand(smiles, type, part):
    mol = Chem.MolFromSmiles(smiles)
    assert (chemistry.molecule_type(mol), chemistry.molecule_part(mol)) == (type, part)


def test_the_classes_are_enough_to_teach_with(qm9):
    table = helpers.describe([qm9.smiles[i] for i in qm9.test[:2000]])
    for key, known, least in (("type", helpers.TYPES, 8), ("part", helpers.PARTS, 6)):
        shares = table[key].value_counts(normalize=True)
        assert set(shares.index) == set(known) and len(known) >= least
        assert shares.max() < 0.3


def test_describe_measures():
    table = helpers.describe(["CCO", "c1ccccc1"])
    assert list(table.columns) == ["smiles", "type", "part", "logP", "QED"]
    assert table["logP"].round(3).tolist() == [-0.001, 1.687]  # RDKit's Crippen values of ethanol and benzene
    assert helpers.describe([]).empty


@pytest.mark.parametrize("smiles", [None, "", "C.C", "C(", 3])
def test_describe_refuses_what_is_no_molecule(smiles):
    with pytest.raises(ValueError, match="is not the SMILES of one connected molecule"):
        helpers.describe(["CC", smiles])


def test_properties_by_hand():
    weight = [46.07, 78.11]  # ethanol, benzene
    values = helpers.properties(["CCO", "c1ccccc1"])
    assert values.shape == (2, len(helpers.PROPERTIES)) and helpers.properties([]).shape == (0, 4)
    np.testing.assert_allclose(values[:, helpers.PROPERTIES.index("weight")], weight, atol=0.01)
    assert values[:, helpers.PROPERTIES.index("rings")].tolist() == [0, 1]
    assert (0 < values[:, 0]).all() and (values[:, 0] < 1).all() and values[0, 1] < values[1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# What plausible users give
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labelled, plain",
    [
        ("[CH3:1]O", "CO"),
        ("[2H]O[2H]", "O"),
        ("[13CH3][OH:7]", "CO"),
        ("[2H]C([2H])([2H])C", "CC"),
        ("[cH:1]1ccoc1", "c1ccoc1"),
    ],
)
def test_atom_maps_and_isotopes_make_no_other_molecule(labelled, plain):
    for molecule in (labelled, Chem.MolFromSmiles(labelled)):
        got, expected = helpers.to_graph(molecule), helpers.to_graph(plain)
        assert got[2] == expected[2]
        np.testing.assert_array_equal(got[0], expected[0])
        np.testing.assert_array_equal(got[1], expected[1])
    assert helpers.describe([labelled])["type"].tolist() == helpers.describe([plain])["type"].tolist()
    np.testing.assert_allclose(helpers.properties([labelled]), helpers.properties([plain]))


def test_the_callers_labels_stay():
    mol = Chem.MolFromSmiles("[CH3:1]O")
    helpers.to_graph(mol)
    assert mol.GetAtomWithIdx(0).GetAtomMapNum() == 1


def test_an_aromatic_bond_outside_a_ring_is_refused():
    with pytest.raises(ValueError, match="'C:C' has a bond that is not single, double, triple or, in a ring, aromatic"):
        helpers.to_graph("C:C")
    assert helpers.to_graph("C1:C:C:C:C:C:1")[2] == "c1ccccc1"


LONG = "C" * 20_000


@pytest.mark.parametrize(
    "read",
    [
        helpers.to_graph,
        lambda text: helpers.to_graphs(["C", text]),
        lambda text: helpers.describe([text]),
        lambda text: helpers.properties([text]),
        chemistry.read_smiles,
    ],
)
def test_a_smiles_that_is_too_long_is_never_given_to_rdkit(read):
    with pytest.raises(ValueError, match="a SMILES of 20,000 letters, 'CCC.*…: this course reads at most 500") as error:
        read(LONG)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    "read, name",
    [(helpers.to_graphs, "to_graphs"), (helpers.describe, "describe"), (helpers.properties, "properties")],
)
def test_one_text_is_not_read_letter_by_letter(read, name):
    with pytest.raises(ValueError, match=rf"{name}\('CCO'\): expected a list of SMILES; wrap a single one in \[ \]"):
        read("CCO")
    with pytest.raises(ValueError, match=f"{name} got a table: .*table\\['smiles'\\]"):
        read(pd.DataFrame({"smiles": ["CCO"]}))
    with pytest.raises(ValueError, match=rf"{name}\(3\): expected a list of SMILES"):
        read(3)
    assert len(read(pd.Series(["CCO", "C"]))) == 2


@pytest.mark.parametrize("wrong", ["xx", "C1CC", None, 3])
def test_properties_need_molecules(wrong):
    with pytest.raises(ValueError, match="is not a valid SMILES|expected a SMILES"):
        helpers.properties(["CCO", wrong])


@pytest.mark.parametrize(
    "smiles, word",
    [
        ("CCO", "valid"),
        ("C.C", "fragmented"),
        ("C[NH3+]", "charged"),
        ("[NH4+].[F-]", "charged"),
        (None, "refused"),
        ("", "refused"),
        ("C[nH]", "valid"),
    ],
)
def test_the_verdict(smiles, word):
    assert chemistry.verdict(smiles) == word


@pytest.mark.parametrize("pairs", [np.zeros((2, 35)), np.zeros((36, 2)), torch.zeros(()), torch.zeros(2, 9, 9)])
def test_a_matrix_is_made_of_36_pairs(pairs):
    with pytest.raises(ValueError, match=r"pairs of shape .*: expected \(\.\.\., 36\)"):
        helpers.matrix_from_pairs(pairs)


@pytest.mark.parametrize("bonds", [np.zeros((2, 9)), torch.zeros(9, 9, 2)])
def test_pairs_are_of_a_matrix(bonds):
    with pytest.raises(ValueError, match=r"bonds of shape .*: expected \(\.\.\., 9, 9\)"):
        helpers.pairs_from_matrix(bonds)


def test_hydrogens_are_counted_on_one_molecule():
    atoms, bonds = helpers.to_graphs(["C=O", "CC"])
    assert helpers.count_hydrogens(atoms[0], bonds[0])[:2].tolist() == [2, 0]
    for wrong in ((bonds[0], atoms[0]), (atoms, bonds)):
        with pytest.raises(ValueError, match=r"expected \(9,\) and \(9, 9\), one molecule"):
            helpers.count_hydrogens(*wrong)


@pytest.mark.parametrize("mol", [None, "CCO", [Chem.MolFromSmiles("C")]])
def test_only_an_rdkit_molecule_is_corrected(mol):
    with pytest.raises(ValueError, match=r"corrected_smiles\(.*\): expected an RDKit molecule"):
        helpers.corrected_smiles(mol)
