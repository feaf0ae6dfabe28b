"""Every definition of the score on cases small enough to check by hand, and the reference it is compared with."""

import json
import types

import fcd
import numpy as np
import pandas as pd
import pytest
import torch
from rdkit import Chem

import helpers
from molecule_diffusion import evaluation


@pytest.mark.parametrize(
    "smiles, valid, fragmented, corrected",
    [
        ("CCO", 1, 0, 1),
        ("c1ccccc1", 1, 0, 1),
        ("[H]C([H])([H])[H]", 1, 0, 1),
        ("CC.O", 0, 1, 1),
        ("C[NH3+]", 0, 0, 1),
        ("C[N+](=O)[O-]", 0, 0, 1),
        ("CN(=O)=O", 0, 0, 1),  # RDKit rewrites this nitro group with charges
        ("[NH4+].[F-]", 0, 0, 1),  # in pieces, but charged: not even fragmented
        ("FC(F)(F)(F)F", 0, 0, 1),  # five bonds on carbon
        ("c1ccc1C1", 0, 0, 0),  # a ring left open: no SMILES
        ("*C", 0, 0, 0),  # a placeholder is not an atom
        ("garbage", 0, 0, 0),
        ("", 0, 0, 0),
        (None, 0, 0, 0),
    ],
)
def test_what_counts_as_valid(smiles, valid, fragmented, corrected):
    score = helpers.evaluate([smiles])
    assert (score.valid, score.fragmented, score.corrected) == (valid, fragmented, corrected)
    assert score.N == 1 and len(score.smiles) == valid


def test_shares_are_of_what_the_definition_says(qm9):
    known = [qm9.smiles[i] for i in qm9.train[100:102]]
    same = Chem.MolToSmiles(Chem.MolFromSmiles(known[0]), doRandom=True, allHsExplicit=True)
    new = "FN(F)N(F)F"
    assert new not in set(qm9.smiles)
    score = helpers.evaluate([*known, same, new, "CC.O", "C[NH3+]", "FC(F)(F)(F)F", None], "mine")
    assert (score.name, score.N) == ("mine", 8)
    assert score.valid == 4 / 8
    assert score.fragmented == 1 / 8
    assert score.corrected == 7 / 8
    assert score.unique == 3 / 4
    assert score.novel == pytest.approx(1 / 3)
    assert score.fcd > 0
    assert sorted(score.smiles) == sorted([known[0], known[0], known[1], new])


def test_novel_means_not_in_the_training_split(qm9):
    training, test = ([qm9.smiles[i] for i in part[:30]] for part in (qm9.train, qm9.test))
    assert helpers.evaluate(training).novel == 0
    assert helpers.evaluate(test).novel == 1
    assert helpers.evaluate(["C[C@H](O)C#N", "CC(O)C#N"]).unique == 0.5, "stereo must not count"


def test_nothing_at_all():
    score = helpers.evaluate([])
    assert score.N == 0 and score.framing == []
    values = score.as_dict()
    assert {values[name] for name in "valid fragmented corrected unique novel fcd".split()} == {None}
    assert set(values["distances"].values()) == {None}
    assert score._repr_html_().count("<tr>") == 2


def test_nothing_valid():
    score = helpers.evaluate(["garbage", None, "CC.O"])
    assert (score.N, score.valid, score.fragmented) == (3, 0, 1 / 3)
    assert (score.unique, score.novel, score.fcd) == (None, None, None)
    assert set(score.distances.values()) == {None}
    assert "–" in str(score)


def test_one_molecule_has_no_fcd():
    score = helpers.evaluate(["CCO", "garbage"])
    assert (score.valid, score.unique, score.fcd) == (0.5, 1, None)
    assert score.distances["weight"] > 0


@pytest.mark.parametrize(
    "molecules, message",
    [
        ("CCO", r"evaluate\('CCO'\): expected a list of SMILES; wrap a single one in \[ \]"),
        (["CCO", 3], "3 among the molecules: expected SMILES strings, or None"),
        ((np.zeros((2, 9)), np.zeros((2, 9, 9))), "integer classes"),
    ],
)
def test_wrong_input_is_explained(molecules, message):
    with pytest.raises(ValueError, match=message):
        helpers.evaluate(molecules)


@pytest.mark.parametrize("pair", [("CCO", None), (None, "CCO"), (None, None)])
def test_a_pair_of_smiles_is_not_taken_for_a_pair_of_arrays(pair):
    assert helpers.evaluate(pair).valid == pair.count("CCO") / 2


def test_graphs_output_and_smiles_score_alike(qm9):
    rows = qm9.test[:40]
    atoms, bonds = qm9.atoms[rows], qm9.bonds[rows].copy()
    bonds[0] = bonds[1]  # the atoms of one molecule with the bonds of another
    bonds[0] = helpers.mask_bonds(atoms[0], bonds[0])
    smiles = helpers.to_smiles(atoms, bonds)
    output = helpers.MoleculeOutput(smiles=smiles, atoms=atoms, bonds=bonds, latents=torch.zeros(40, 9, 8))
    expected = helpers.evaluate(output)
    assert 0 < expected.valid <= 1
    assert helpers.evaluate((atoms, bonds)) == expected
    assert helpers.evaluate((torch.from_numpy(atoms), torch.from_numpy(bonds))) == expected
    from_smiles = helpers.evaluate(smiles)
    for name in ("valid", "fragmented", "unique", "novel", "fcd"):
        assert getattr(from_smiles, name) == pytest.approx(getattr(expected, name)), name


def test_property_distance_by_hand(monkeypatch):
    """W1 of rings: half of ours have one ring, of the reference none, so half a ring has to be moved."""
    reference = helpers.properties(["CCO", "CO"])
    monkeypatch.setattr(evaluation, "reference", lambda: {"properties": reference})
    assert evaluation.property_distances(["CCO", "C1CC1"])["rings"] == pytest.approx(0.5)
    assert evaluation.property_distances(["CO", "CCO"]) == pytest.approx(dict.fromkeys(helpers.PROPERTIES, 0))


def test_obedience_by_hand():
    smiles = ["CCO", "CCO", "CC", None, "CNC=O", "C.C"]
    output = helpers.MoleculeOutput(smiles, np.zeros((6, 9)), np.zeros((6, 9, 9)), None)
    assert output.valid.tolist() == [True, True, True, False, True, False]
    asked = {"type": ["alcohol", "alcohol", "alcohol", "alcohol", "amide", "amide"], "part": "chain"}
    found = helpers.obedience(output, asked)
    assert found["type_by_class"] == {"alcohol": pytest.approx(2 / 3), "amide": 1.0}
    assert found["type_obeyed"] == pytest.approx((2 / 3 + 1) / 2) and found["part_obeyed"] == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# FCD, reference and framing rows
# ---------------------------------------------------------------------------------------------------------------------


def test_fcd_is_that_of_the_fcd_package(qm9, monkeypatch):
    ours, others = ([qm9.smiles[i] for i in part[:150]] for part in (qm9.train, qm9.test))
    mean, covariance = evaluation.fcd_statistics(others)
    monkeypatch.setattr(evaluation, "reference", lambda: {"mean": mean, "covariance": covariance})
    assert evaluation.fcd_to_test(ours) == pytest.approx(fcd.get_fcd(ours, others, device="cpu"), rel=1e-3)
    assert evaluation.fcd_to_test(others) == pytest.approx(0, abs=1e-3)


def test_choices_are_made_by_the_distance_to_the_validation_molecules(qm9, monkeypatch):
    ours, others = ([qm9.smiles[i] for i in part[:150]] for part in (qm9.train, qm9.validation))
    few = types.SimpleNamespace(smiles=qm9.smiles, validation=qm9.validation[:150])
    monkeypatch.setattr(evaluation, "shared_qm9", lambda: few)
    evaluation._validation_statistics.cache_clear()
    try:
        assert helpers.fcd_to_validation(ours) == pytest.approx(fcd.get_fcd(ours, others, device="cpu"), rel=1e-3)
        assert helpers.fcd_to_validation(others) == pytest.approx(0, abs=1e-3)
        assert helpers.fcd_to_validation(ours[:1]) is None
    finally:
        evaluation._validation_statistics.cache_clear()  # of all 5,000, for the other tests


@pytest.fixture(scope="module")
def thousand():
    return evaluation.compute_framing(1000)


def test_framing_rows_are_those_in_the_file(thousand):
    shipped = helpers.framing_rows(1000)
    assert [row.name for row in shipped] == ["training molecules", "random graphs"]
    for row, computed in zip(shipped, thousand):
        expected, got = row.as_dict(), computed.as_dict()
        assert got.pop("distances") == pytest.approx(expected.pop("distances"), rel=1e-3)
        assert got.pop("fcd") == pytest.approx(expected.pop("fcd"), rel=1e-2)
        assert got == expected


@pytest.mark.parametrize("n", [1000, 10_000])
def test_framing_rows_frame(n):
    assert str(n) in json.loads(evaluation.FRAMING.read_text(encoding="utf-8")), "framing.json lacks this N"
    training, noise = helpers.framing_rows(n)
    assert training.N == noise.N == n
    distinct = 115_251 * (1 - (1 - 1 / 115_251) ** n)  # expected of n draws with replacement
    assert training.valid == 1 and training.novel == 0
    assert training.unique == pytest.approx(distinct / n, abs=0.005)
    assert training.fcd == pytest.approx({1000: 0.40, 10_000: 0.067}[n], abs=0.05 if n == 1000 else 0.01)
    assert noise.valid < 0.5 and noise.fcd > 5 * training.fcd


def test_framing_rows_need_a_number():
    with pytest.raises(ValueError, match="n=0: expected a whole number of at least 1"):
        helpers.framing_rows(0)


def test_random_graphs_keep_atoms_and_bonds_and_leave_padding_alone(qm9):
    atoms, bonds = helpers.random_graphs(200, seed=3)
    helpers.check_graphs(atoms, bonds)
    counts = {}
    for i in qm9.train:
        counts.setdefault((qm9.atoms[i].tobytes(), *np.bincount(qm9.bonds[i].ravel(), minlength=4).tolist()), i)
    for a, b in zip(atoms, bonds):
        assert (a.tobytes(), *np.bincount(b.ravel(), minlength=4).tolist()) in counts
    again, other = helpers.random_graphs(200, seed=3), helpers.random_graphs(200, seed=4)
    assert (bonds == again[1]).all() and (bonds != other[1]).any()


def test_a_score_can_be_saved_and_shown():
    score = helpers.Evaluation(**helpers.framing_rows(1000)[0].as_dict())
    values = json.loads(json.dumps(score.as_dict()))
    assert helpers.Evaluation(**values) == score and "smiles" not in values
    score.name = "mine <b>"
    page = score._repr_html_()
    rows = [row.split("</td>")[0] for row in page.split("<tr><td>")[1:]]
    assert rows == ["mine &lt;b&gt;", "training molecules", "random graphs"]
    assert f"{100 * score.valid:.1f}" in page and "1,000" in page
    assert str(score).startswith("mine <b> (N = 1,000): valid 1.00, fragmented")


@pytest.fixture
def own_reference(tmp_path, monkeypatch):
    """The path of a copy of data/reference.npz that is read instead of it."""
    path = tmp_path / "reference.npz"
    path.write_bytes(evaluation.REFERENCE.read_bytes())
    monkeypatch.setattr(evaluation, "REFERENCE", path)
    evaluation.reference.cache_clear()
    yield path
    evaluation.reference.cache_clear()


def of_another_split(path):
    with np.load(path) as file:
        np.savez_compressed(path, **dict(file) | {"test": np.array("another")})


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda path: path.unlink(), FileNotFoundError, "reference.npz is missing"),
        (of_another_split, ValueError, "reference.npz belongs to another test split"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000]), ValueError, "reference.npz is damaged"),
        (lambda path: path.write_bytes(b"garbage"), ValueError, "reference.npz is damaged"),
    ],
    ids=["missing", "another split", "truncated", "garbage"],
)
def test_a_reference_that_does_not_fit(own_reference, damage, error, message):
    damage(own_reference)
    with pytest.raises(error, match=message + ".*python helpers.py reference"):
        helpers.evaluate(["CCO", "CO"])


def test_the_reference_is_of_the_test_molecules(qm9):
    reference = evaluation.reference()
    rows = [0, 5000, 9999]
    expected = helpers.properties([qm9.smiles[qm9.test[i]] for i in rows])
    np.testing.assert_allclose(reference["properties"][rows], expected, rtol=1e-5)
    np.testing.assert_array_equal(reference["covariance"], reference["covariance"].T)


# ---------------------------------------------------------------------------------------------------------------------
# What plausible users give
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "molecules, options, message",
    [
        (pd.DataFrame({"smiles": ["CCO"]}), {}, "evaluate got a table: .*table\\['smiles'\\]"),
        (["CCO"], {"name": 5}, "name=5: expected a text, the row's name in tables"),
        (["C" * 20_000], {}, "a SMILES of 20,000 letters"),
        (3, {}, r"evaluate\(3\): expected a list of SMILES"),
    ],
)
def test_more_wrong_input_is_explained(molecules, options, message):
    with pytest.raises(ValueError, match=message):
        helpers.evaluate(molecules, **options)


def test_labels_do_not_make_a_molecule_novel(qm9):
    smiles = qm9.smiles[qm9.train[50]]
    mol = Chem.MolFromSmiles(smiles)
    mol.GetAtomWithIdx(0).SetAtomMapNum(1)
    mol.GetAtomWithIdx(1).SetIsotope(13)
    score = helpers.evaluate([Chem.MolToSmiles(mol)])
    assert score.smiles == [smiles] and score.novel == 0
    assert helpers.evaluate(["[2H]O[2H]"]).smiles == ["O"]


def test_scoring_leaves_torchs_random_numbers_alone():
    before = torch.random.get_rng_state()
    helpers.evaluate(["CCO", "CO", "CN"])._repr_html_()
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("condition", [{"type": "nope"}, {"part": ["chain", "knot"]}])
def test_obedience_to_what_there_is_not(condition):
    output = helpers.MoleculeOutput(["CCO", "CC"], None, None, None)
    with pytest.raises(ValueError, match="unknown (type 'nope'|part 'knot'); known ones: "):
        helpers.obedience(output, condition)


def test_framing_rows_at_another_n_are_kept(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(evaluation, "OWN_FRAMING", tmp_path / "framing.json")
    first = helpers.framing_rows(37)
    assert "rows that frame a table at N = 37" in capfd.readouterr().err
    monkeypatch.setattr(evaluation, "compute_framing", lambda n: pytest.fail("computed again"))
    assert [row.as_dict() for row in helpers.framing_rows(37)] == [row.as_dict() for row in first]


@pytest.mark.parametrize("content", ["{", "[]", '{"1000": 3}', '{"1000": [{"name": "x"}]}'])
def test_framing_rows_that_are_damaged(monkeypatch, tmp_path, content):
    path = tmp_path / "framing.json"
    path.write_text(content)
    monkeypatch.setattr(evaluation, "FRAMING", path)
    with pytest.raises(ValueError, match="framing.json is damaged .*python helpers.py reference"):
        helpers.framing_rows(1000)


def test_a_reference_without_a_key(own_reference):
    with np.load(own_reference) as file:
        content = dict(file)
    del content["mean"]
    np.savez_compressed(own_reference, **content)
    with pytest.raises(ValueError, match="reference.npz is of another version: .*mean.*python helpers.py reference"):
        helpers.evaluate(["CCO", "CO"])


def test_the_table_as_text():
    rows = helpers.framing_rows(1000)
    lines = evaluation.text_table(rows).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert lines[1].startswith("training molecules  1,000    100.0")


def test_obedience_knows_its_keys():
    with pytest.raises(ValueError, match="unknown condition 'Type'; obedience is counted for type and part"):
        helpers.obedience(helpers.MoleculeOutput(["CCO"], None, None, None), {"Type": "ester"})


@pytest.mark.parametrize("n", [None, 0, 2.5])
def test_random_graphs_are_a_number_of_graphs(n):
    with pytest.raises(ValueError, match="n=.*: expected a whole number of at least 1"):
        helpers.random_graphs(n)


def test_sequences_that_are_compared_have_one_shape():
    data = np.zeros((3, 1, 45, 9))
    for other in (data[:1], data[:, 0], data[:, :, :44]):
        with pytest.raises(ValueError, match="expected two of one shape"):
            helpers.exact_match(data, other)


def test_a_table_of_one():
    score = helpers.evaluate(["CO"])
    assert helpers.results_table(score) == helpers.results_table([score])


@pytest.mark.parametrize("number", [1, 4])
def test_obedience_needs_a_wish_for_each_molecule(qm9, number):
    output = helpers.load_pipeline("token_vae")(3)
    with pytest.raises(ValueError, match=f"{number} values of type for 3 molecules: expected one for each"):
        helpers.obedience(output, {"type": ["ester"] * number})


def test_sequences_may_be_tensors():
    data = torch.eye(9)[torch.randint(9, (3, 1, 45))]
    assert helpers.exact_match(data, data.numpy()) == 1
