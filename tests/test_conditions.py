"""Types, parts and targets: rules, files, the encoder, the prior that obeys and the oracle that judges."""

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from rdkit import Chem

import helpers

SIZES = dict(width=32, hidden=32, depth=1, time_dim=16)


# ---------------------------------------------------------------------------------------------------------------------
# Rules
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
    assert (helpers.molecule_type(mol), helpers.molecule_part(mol)) == (type, part)


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


def test_the_halves_share_no_molecule(qm9):
    first, second = qm9.halves()
    assert abs(len(first) - len(second)) < 100 and len(first) + len(second) == len(qm9.train)
    assert not {qm9.smiles[i] for i in first} & {qm9.smiles[i] for i in second}
    assert set(first) | set(second) == set(qm9.train)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, qm9):
    """Six molecules in an HDF5 file and a CSV."""
    rows = qm9.test[:6]
    paths = tmp_path / "six.h5", tmp_path / "six.csv"
    table = helpers.condition_table(qm9, rows)
    helpers.save_conditions(*paths, helpers.graph_sequence(qm9.atoms[rows], qm9.bonds[rows]), table)
    return paths


def test_sequences_become_the_same_graphs_again(qm9):
    atoms, bonds = qm9.atoms[:500], qm9.bonds[:500]
    data = helpers.graph_sequence(atoms, bonds)
    assert data.shape == (500, 1, 45, 9) and data.dtype == np.uint8 and (data.sum(-1) == 1).all()
    again = helpers.sequence_graph(0.9 * data + 0.01)
    assert (again[0] == atoms).all() and (again[1] == bonds).all()


def test_what_was_saved_is_loaded(files, qm9):
    loaded = helpers.load_conditions(*files, list(helpers.TYPES), list(helpers.PARTS))
    table = helpers.condition_table(qm9, qm9.test[:6])
    assert len(loaded) == 6 and loaded.table["type"].tolist() == table["type"].tolist()
    np.testing.assert_allclose(loaded.table["gap"], table["gap"], rtol=1e-6)
    assert (helpers.sequence_graph(loaded.data)[0] == qm9.atoms[qm9.test[:6]]).all()
    for row, type, part in zip(loaded.one_hot, table["type"], table["part"]):
        assert (row == helpers.one_hot_condition(type, part, helpers.TYPES, helpers.PARTS)).all()


def test_any_length_width_and_category(tmp_path):
    """The shape of an earlier project's file: sequences of 72 grammar rules out of 53, 8 types, 20 parts."""
    rng = np.random.default_rng(0)
    data = np.eye(53)[rng.integers(53, size=(40, 72))][:, None]
    table = pd.DataFrame({"type": np.arange(40) % 8, "part": np.arange(40) % 20, "expr": "x"})
    helpers.save_conditions(tmp_path / "a.h5", tmp_path / "a.csv", data, table)
    loaded = helpers.load_conditions(tmp_path / "a.h5", tmp_path / "a.csv")
    assert loaded.data.shape == (40, 1, 72, 53) and loaded.one_hot.shape == (40, 28)
    assert (loaded.one_hot.sum(1) == 2).all() and list(loaded.table["expr"]) == ["x"] * 40


def rewrite(change):
    def damage(h5, csv):
        with h5py.File(h5, "r+") as file:
            data = file["data"][()]
            del file["data"]
            change(file, data)

    return damage


def edit_csv(change):
    return lambda h5, csv: change(pd.read_csv(csv)).to_csv(csv, index=False)


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (lambda h5, csv: h5.unlink(), FileNotFoundError, "no file at .*six.h5"),
        (lambda h5, csv: csv.unlink(), FileNotFoundError, "no file at .*six.csv"),
        (lambda h5, csv: h5.write_text("text"), ValueError, "six.h5 is not a complete HDF5 file"),
        (lambda h5, csv: h5.write_bytes(h5.read_bytes()[:900]), ValueError, "six.h5 is not a complete HDF5 file"),
        (rewrite(lambda file, data: file.update(x=data)), ValueError, "has the keys x; expected a dataset `data`"),
        (rewrite(lambda file, data: None), ValueError, r"has the keys \(none\); expected a dataset `data`"),
        (rewrite(lambda file, data: file.create_group("data")), ValueError, "expected a dataset `data`"),
        (rewrite(lambda file, data: file.update(data=data[:, 0])), ValueError, r"shape \(6, 45, 9\); expected \(N, 1,"),
        (rewrite(lambda file, data: file.update(data=data[:0])), ValueError, r"shape \(0, 1, 45, 9\)"),
        (rewrite(lambda file, data: file.update(data=data * 2)), ValueError, "is not one-hot"),
        (rewrite(lambda file, data: file.update(data=data * np.nan)), ValueError, "is not one-hot"),
        (rewrite(lambda file, data: file.update(data=data[:5])), ValueError, "holds 5 sequences, six.csv 6 rows"),
        (edit_csv(lambda table: table[:-1]), ValueError, "holds 6 sequences, six.csv 5 rows"),
        (edit_csv(lambda table: table.drop(columns="part")), ValueError, "it lacks part"),
        (edit_csv(lambda table: table.assign(type=["alcohol"] * 5 + [None])), ValueError, "no type in line 7"),
        (
            edit_csv(lambda table: table.assign(part="knot")),
            ValueError,
            "unknown part 'knot'; known ones: chain, ring 3",
        ),
        (edit_csv(lambda table: table.assign(type="alkohol")), ValueError, "unknown type 'alkohol'; known ones: arom"),
        (lambda h5, csv: csv.write_text(""), ValueError, "six.csv cannot be read as CSV"),
    ],
    ids="no-h5 no-csv text half-a-file other-key no-key group three-axes empty twos nan fewer-sequences fewer-rows "
    "no-part no-type unknown-part unknown-type empty-csv".split(),
)
def test_files_that_do_not_fit_are_explained(files, damage, error, message):
    damage(*files)
    with pytest.raises(error, match=message):
        helpers.load_conditions(*files, list(helpers.TYPES), list(helpers.PARTS))


def test_what_does_not_match_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="3 sequences and 2 rows"):
        helpers.save_conditions(
            tmp_path / "a.h5", tmp_path / "a.csv", np.zeros((3, 1, 2, 2)), pd.DataFrame({"a": [1, 2]})
        )
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder():
    table = pd.DataFrame(
        {"gap": [4.0, 6.0, 8.0], "mu": [0.0, 1.0, 5.0], "logP": [-1.0, 0.0, 1.0], "QED": [0.2, 0.4, 0.6]}
    )
    return helpers.ConditionEncoder().set_targets(table)


def test_an_encoded_condition_by_hand(encoder):
    encoded = encoder({"type": ["ester", None], "part": "cage", "gap": [8.0, 6.0], "QED": 0.2}, 2)
    assert encoded.shape == (2, encoder.size) == (2, 12 + 10 + 2 * 4)
    assert encoded[0, :12].tolist() == [0, 1] + [0] * 10 and not encoded[1, :12].any()
    assert encoded[:, 12:22].tolist() == [[0] * 9 + [1]] * 2
    torch.testing.assert_close(encoded[0, 22:], torch.tensor([1.0, 1, 0, 0, 0, 0, -1, 1]))
    torch.testing.assert_close(encoded[1, 22:], torch.tensor([0.0, 1, 0, 0, 0, 0, -1, 1]))


@pytest.mark.parametrize("nothing", [None, {}, {"type": None, "gap": None}])
def test_nothing_asked_for_is_zeros(encoder, nothing):
    assert not encoder(nothing, 3).any()


@pytest.mark.parametrize(
    "condition, message",
    [
        ({"typ": "ester"}, "unknown condition 'typ'; known ones: type, part, gap, mu, logP, QED"),
        ({"type": "alkohol"}, "unknown type 'alkohol'; known ones: aromatic, ester"),
        ({"part": ["cage", "knot"]}, "unknown part 'knot'; known ones: chain, ring 3"),
        ({"gap": float("nan")}, "gap holds NaN"),
        ({"gap": [6.0, float("inf")]}, "gap holds NaN or infinite"),
        ({"gap": "wide"}, "gap='wide': expected a number"),
        ({"gap": [1.0, 2.0, 3.0]}, "gap has 3 values for 2 molecules"),
        ({"type": ["ester"]}, "type has 1 values for 2 molecules"),
    ],
)
def test_a_wish_that_cannot_be_read_is_explained(encoder, condition, message):
    with pytest.raises(ValueError, match=message):
        encoder(condition, 2)


def test_a_target_outside_the_training_range_warns(encoder, recwarn):
    encoder({"gap": [4.0, 8.0]}, 2)
    assert not recwarn
    with pytest.warns(UserWarning, match="gap=9 lies outside the training range, 4 to 8"):
        encoder({"gap": [5.0, 9.0]}, 2)


def test_targets_must_be_numbers():
    table = pd.DataFrame({"gap": [4.0, np.nan], "mu": [0.0, 1.0], "logP": [0.0, 1.0], "QED": [0.0, 1.0]})
    with pytest.raises(ValueError, match="NaN or infinite values among the targets gap, mu"):
        helpers.ConditionEncoder().set_targets(table)


def test_dropout_forgets_whole_conditions(encoder):
    torch.manual_seed(0)
    full = encoder({"type": "ester", "part": "cage", "gap": 7.0, "mu": 2.0, "logP": 0.5, "QED": 0.5}, 20_000)
    dropped = encoder.drop(full)
    assert (((dropped == full) | (dropped == 0)).all()).item()
    kept = torch.stack([dropped[:, 1], dropped[:, 21], dropped[:, 23], dropped[:, 25]], 1)
    torch.testing.assert_close(kept.mean(0), torch.tensor([0.72, 0.72, 0.45, 0.45]), atol=0.015, rtol=0)
    assert (dropped[:, 22] != 0).equal(dropped[:, 23] != 0), "a value without its flag"
    assert 0.1 < (dropped == 0).all(1).float().mean() < 0.115


def test_each_molecule_forgets_on_its_own(encoder):
    torch.manual_seed(0)
    dropped = encoder.drop(encoder({"type": "ester", "part": "cage"}, 1000))
    assert abs(torch.corrcoef(torch.stack([dropped[:-1, 1], dropped[1:, 1]]))[0, 1]) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The prior
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(encoder):
    torch.manual_seed(0)
    vae = helpers.TokenVAE(width=16, layers=1, latent_dim=8)
    denoiser = helpers.LatentDenoiser(**SIZES, condition_dim=encoder.size)
    denoiser.set_latents(vae, torch.randn(50, 9, 8))
    torch.nn.init.normal_(denoiser.out.weight)
    scheduler = helpers.PowerSpacedDPMSolver(**helpers.NOISE_SCHEDULE, **helpers.SAMPLER)
    pipe = helpers.DiffusionPriorPipeline(vae, denoiser, scheduler, encoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, condition=None, scale=2.0, n=7, **options):
    options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0), "batch_size": 3} | options
    return pipe(n, condition, scale, **options).latents


def test_guidance_is_a_mixture_of_two_predictions(pipe, encoder):
    seen = []
    draw(pipe, {"type": "ester"}, 3.0, n=2, callback=lambda pipe, step, t, state: seen.append((t, state)))
    asked, nothing = encoder({"type": "ester"}, 2), encoder({}, 2)
    for t, state in seen:
        with torch.no_grad():
            with_, without = (pipe.denoiser(state["latents"], torch.tensor(t), c) for c in (asked, nothing))
        torch.testing.assert_close(state["prediction"], without + 3 * (with_ - without))
        assert not torch.allclose(with_, without)


def test_guidance_0_ignores_the_condition_and_1_is_the_condition_alone(pipe, encoder):
    wish = {"type": "ester", "gap": 7.0}
    torch.testing.assert_close(draw(pipe, wish, 0.0), draw(pipe, None))
    assert not torch.allclose(draw(pipe, wish, 1.0), draw(pipe, None))
    pipe.encoder.forward = lambda condition, n: encoder.__class__.forward(encoder, wish, n)  # also in place of nothing
    torch.testing.assert_close(draw(pipe, wish, 5.0), draw(pipe, wish, 1.0))


def test_a_negative_condition_takes_the_place_of_nothing(pipe):
    wish, away = {"type": "ester"}, {"type": "amide"}
    torch.testing.assert_close(draw(pipe, wish, 0.0, negative_condition=away), draw(pipe, away, 1.0))
    assert not torch.allclose(draw(pipe, wish, negative_condition=away), draw(pipe, wish))


def test_every_molecule_gets_its_own_condition_across_batches(pipe):
    """One of seven, in the last of three batches, differs; the others do not."""
    same, other = ["ester"] * 7, ["ester"] * 6 + ["cage"]
    with pytest.raises(ValueError, match="unknown type 'cage'"):
        draw(pipe, {"type": other})
    first, second = draw(pipe, {"type": same}), draw(pipe, {"type": ["ester"] * 6 + ["amide"]})
    torch.testing.assert_close(first[:6], second[:6])
    assert not torch.allclose(first[6], second[6])


@pytest.mark.parametrize("scale", [-1, -0.1, float("nan"), float("inf")])
def test_guidance_that_makes_no_sense(pipe, scale):
    with pytest.raises(ValueError, match=f"guidance_scale={scale}: expected 0 or more"):
        draw(pipe, {"type": "ester"}, scale)


def test_an_encoder_of_another_size_is_refused(pipe):
    other = helpers.ConditionEncoder(["a"], ["b"], [])
    with pytest.raises(ValueError, match="conditions of 30 numbers, the encoder makes 2"):
        helpers.DiffusionPriorPipeline(pipe.vae, pipe.denoiser, pipe.scheduler, other)


def test_obedience_by_hand():
    smiles = ["CCO", "CCO", "CC", None, "CNC=O", "C.C"]
    output = helpers.MoleculeOutput(smiles, np.zeros((6, 9)), np.zeros((6, 9, 9)), None)
    assert output.valid.tolist() == [True, True, True, False, True, False]
    asked = {"type": ["alcohol", "alcohol", "alcohol", "alcohol", "amide", "amide"], "part": "chain"}
    found = helpers.obedience(output, asked)
    assert found["type_by_class"] == {"alcohol": pytest.approx(2 / 3), "amide": 1.0}
    assert found["type_obeyed"] == pytest.approx((2 / 3 + 1) / 2) and found["part_obeyed"] == 1.0


def test_charged_molecules_are_not_valid():
    output = helpers.MoleculeOutput(["C[N+](=O)[O-]", "C[nH]", "CN"], None, None, None)
    assert output.valid.tolist() == [False, True, True] and output.valid_smiles == ["C[nH]", "CN"]


def test_the_prior_learns_from_one_half_only(qm9, monkeypatch):
    first, _ = qm9.halves()
    monkeypatch.setattr(helpers.QM9, "halves", lambda self: (first[:300], first[300:600]))
    model, loss, (z, condition), *_ = helpers._diffusion_prior_setup({"model": SIZES})
    assert z.shape == (300, 9, 8) and condition.shape == (300, model.config.condition_dim)
    vae = helpers.load_pipeline("token_vae").vae
    expected = helpers.encode_graphs(vae, qm9.atoms[first[:300]], qm9.bonds[first[:300]])
    torch.testing.assert_close(z * model.latent_scale + model.latent_mean, expected, atol=1e-4, rtol=1e-4)
    assert torch.isfinite(loss(model, z[:8], condition[:8]))
    model, loss, (atoms, _, values), *_ = helpers._property_oracle_setup({"model": dict(width=16, layers=1)})
    assert (atoms.numpy() == qm9.atoms[first[300:600]]).all()
    torch.testing.assert_close(values.mean(0), torch.zeros(2), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Quality
# ---------------------------------------------------------------------------------------------------------------------


def test_the_shipped_prior_obeys():
    prior = helpers.load_pipeline("diffusion_prior")
    asked = {"type": np.repeat(list(helpers.TYPES), 25)}
    output = prior(300, asked, generator=torch.Generator().manual_seed(0))
    assert output.valid.mean() >= 0.9 and helpers.obedience(output, asked)["type_obeyed"] >= 0.8
    nothing = prior(300, asked, 0.0, generator=torch.Generator().manual_seed(0))
    assert helpers.obedience(nothing, asked)["type_obeyed"] < 0.3


def test_the_gap_follows_the_wish_and_the_oracle_sees_it():
    prior, oracle = helpers.load_pipeline("diffusion_prior"), helpers.load_pipeline("property_oracle")
    low, high = (
        oracle(prior(100, {"gap": gap}, generator=torch.Generator().manual_seed(0)).valid_smiles)["gap"].mean()
        for gap in (5.0, 9.0)
    )
    assert abs(low - 5) < 0.6 and abs(high - 9) < 0.6


def test_the_oracle_is_right_about_test_molecules(qm9):
    oracle = helpers.load_pipeline("property_oracle")
    rows = qm9.test[:500]
    found = oracle([qm9.smiles[i] for i in rows])
    for name, spread in (("gap", 0.35), ("mu", 0.7)):
        assert np.abs(found[name] - qm9.target(name)[rows]).mean() < spread
    assert oracle([]).shape == (0, 2)


def test_the_card_of_the_prior_meets_the_goals():
    metrics = helpers.load_pipeline("diffusion_prior").card["metrics"]
    assert metrics["N"] == 10_000 and metrics["valid"] >= 0.95 and metrics["unique"] >= 0.90
    assert metrics["type_obeyed"] >= 0.90 and metrics["part_obeyed"] >= 0.85
    assert set(metrics["type_by_class"]) == set(helpers.TYPES) and set(metrics["part_by_class"]) == set(helpers.PARTS)
