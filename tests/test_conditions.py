"""Files of conditions, good and bad, and the encoder."""

import errno
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

import helpers

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


def test_what_was_saved_is_loaded(files, qm9):
    loaded = helpers.load_conditions(*files, list(helpers.TYPES), list(helpers.PARTS))
    table = helpers.condition_table(qm9, qm9.test[:6])
    assert len(loaded) == 6 and loaded.table["type"].tolist() == table["type"].tolist()
    np.testing.assert_allclose(loaded.table["gap"], table["gap"], rtol=1e-6)
    assert (helpers.sequence_graph(loaded.data)[0] == qm9.atoms[qm9.test[:6]]).all()
    for row, type, part in zip(loaded.vectors, table["type"], table["part"]):
        assert (row == [*(name == type for name in helpers.TYPES), *(name == part for name in helpers.PARTS)]).all()


def test_any_length_width_and_category(tmp_path):
    """The shape of an earlier project's file: sequences of 72 grammar rules out of 53, 8 types, 20 parts."""
    rng = np.random.default_rng(0)
    data = np.eye(53)[rng.integers(53, size=(40, 72))][:, None]
    table = pd.DataFrame({"type": np.arange(40) % 8, "part": np.arange(40) % 20, "expr": "x"})
    helpers.save_conditions(tmp_path / "a.h5", tmp_path / "a.csv", data, table)
    loaded = helpers.load_conditions(tmp_path / "a.h5", tmp_path / "a.csv")
    assert loaded.data.shape == (40, 1, 72, 53) and loaded.vectors.shape == (40, 28)
    assert (loaded.vectors.sum(1) == 2).all() and list(loaded.table["expr"]) == ["x"] * 40


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
        ({"gap": 10**400}, "gap=1000.*…: expected a number"),
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


def test_dropout_asks_in_every_way(encoder):
    """12 % keep nothing, the type alone or the part alone, 18 % these two, 5 % each target alone, 26 % any mixture."""
    torch.manual_seed(0)
    full = encoder({"type": "ester", "part": "cage", "gap": 7.0, "mu": 2.0, "logP": 0.5, "QED": 0.5}, 40_000)
    dropped = encoder.drop(full)
    assert (((dropped == full) | (dropped == 0)).all()).item()
    assert (dropped[:, 22] != 0).equal(dropped[:, 23] != 0), "a value without its flag"
    of_type, of_part = dropped[:, 1] != 0, dropped[:, 21] != 0
    targets = (dropped[:, 23:30:2] != 0).sum(1)
    mixed = 0.26 / 16  # rows of the last line in which all four targets are forgotten
    ways = {
        "nothing": (~of_type & ~of_part & (targets == 0), 0.12 + mixed * 0.04),
        "the type alone": (of_type & ~of_part & (targets == 0), 0.12 + mixed * 0.16),
        "the part alone": (~of_type & of_part & (targets == 0), 0.12 + mixed * 0.16),
        "type and part": (of_type & of_part & (targets == 0), 0.18 + mixed * 0.64),
        "a target alone": (~of_type & ~of_part & (targets == 1), 0.20 + 4 * mixed * 0.04),
        "some target": (targets > 0, 0.20 + 0.26 * 15 / 16),
    }
    for name, (rows, share) in ways.items():
        assert abs(rows.float().mean() - share) < 0.01, name
    alone = ~of_type & ~of_part & (targets == 1)
    for column in range(23, 30, 2):
        share = (alone & (dropped[:, column] != 0)).float().mean()
        assert abs(share - 0.05 - mixed * 0.04) < 0.006, "each target is left alone equally often"


def test_each_molecule_forgets_on_its_own(encoder):
    torch.manual_seed(0)
    dropped = encoder.drop(encoder({"type": "ester", "part": "cage"}, 1000))
    assert abs(torch.corrcoef(torch.stack([dropped[:-1, 1], dropped[1:, 1]]))[0, 1]) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Files that do not belong together, full disks
# ---------------------------------------------------------------------------------------------------------------------


def test_a_table_of_another_pair_is_refused(files, tmp_path, qm9):
    rows = qm9.test[6:12]
    other = tmp_path / "other.h5", tmp_path / "other.csv"
    table = helpers.condition_table(qm9, rows)
    helpers.save_conditions(*other, helpers.graph_sequence(qm9.atoms[rows], qm9.bonds[rows]), table)
    helpers.load_conditions(*files)
    helpers.load_conditions(*other)
    with pytest.raises(ValueError, match="other.csv is not the table that six.h5 was saved with; .*Save both again"):
        helpers.load_conditions(files[0], other[1])


def test_files_of_other_programs_need_no_fingerprint(files):
    rewrite(lambda file, data: file.update(data=data))(*files)
    with h5py.File(files[0], "r+") as file:
        file.attrs.clear()
    edit_csv(lambda table: table.assign(note="mine"))(*files)
    assert helpers.load_conditions(*files).table["note"].tolist() == ["mine"] * 6


@pytest.mark.parametrize("failing", ["six.h5", "six.csv"])
def test_a_full_disk_leaves_a_pair_that_belongs_together(files, qm9, monkeypatch, failing):
    before = [path.read_bytes() for path in files]
    write_bytes = Path.write_bytes

    def full(path, content):
        if path.name.startswith(failing):
            write_bytes(path, content[:100])
            raise OSError(errno.ENOSPC, "no space left")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    rows = qm9.test[6:12]
    data = helpers.graph_sequence(qm9.atoms[rows], qm9.bonds[rows])
    with pytest.raises(OSError, match="no space left"):
        helpers.save_conditions(*files, data, helpers.condition_table(qm9, rows))
    assert [path.read_bytes() for path in files] == before
    assert sorted(path.name for path in files[0].parent.iterdir()) == ["six.csv", "six.h5"]


# ---------------------------------------------------------------------------------------------------------------------
# Wishes as plausible users write them
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [6, 6.0, np.float32(6), np.float64(6), np.array(6.0), torch.tensor(6.0), np.int64(6)])
def test_any_kind_of_number_is_a_wish(encoder, gap):
    assert torch.equal(encoder({"gap": gap}, 2), encoder({"gap": [6.0, 6.0]}, 2))


@pytest.mark.parametrize("condition", ["ester", ["ester"], 5])
def test_a_wish_is_a_dict(encoder, condition):
    with pytest.raises(ValueError, match="expected a dict with any of type, part, gap, mu, logP, QED"):
        encoder(condition, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h5, csv, data, table: (h5, h5, data, table), "expected the paths of two different files"),
        (lambda h5, csv, data, table: (h5, h5.parent, data, table), "none of them a folder"),
        (lambda h5, csv, data, table: (h5, csv, data * 0, table), "the data to save is not one-hot"),
        (lambda h5, csv, data, table: (h5, csv, data[:, 0], table), "the data to save has shape"),
        (lambda h5, csv, data, table: (h5, csv, data, table.drop(columns="part")), "it lacks part"),
        (lambda h5, csv, data, table: (h5, csv, data, table.assign(type=None)), "a row without a type"),
        (lambda h5, csv, data, table: (h5, csv, data, table.assign(part="")), "a row without a part"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(files, qm9, change, message):
    before = [path.read_bytes() for path in files]
    rows = qm9.test[6:12]
    data = helpers.graph_sequence(qm9.atoms[rows], qm9.bonds[rows])
    with pytest.raises(ValueError, match=message):
        helpers.save_conditions(*change(*files, data, helpers.condition_table(qm9, rows)))
    assert [path.read_bytes() for path in files] == before


def test_categories_stay_as_they_are_written(tmp_path):
    data = np.eye(5)[np.zeros((3, 4), int)][:, None]
    table = pd.DataFrame({"type": ["007", "1e3", "1.0"], "part": ["true", "08", "1"]})
    helpers.save_conditions(tmp_path / "a.h5", tmp_path / "a.csv", data, table)
    loaded = helpers.load_conditions(tmp_path / "a.h5", tmp_path / "a.csv")
    assert loaded.table["type"].tolist() == ["007", "1e3", "1.0"] and loaded.parts == ["08", "1", "true"]


def test_targets_must_differ():
    table = pd.DataFrame({name: [1.0, 1.0] for name in helpers.CONDITION_TARGETS})
    with pytest.raises(ValueError, match="a target that is the same in all 2 rows"):
        helpers.ConditionEncoder().set_targets(table)


def test_columns_are_separated_by_commas(files):
    h5, csv = files
    csv.write_text(csv.read_text().replace(",", ";"))
    with pytest.raises(ValueError, match="it lacks part, type. Columns are separated by commas"):
        helpers.load_conditions(h5, csv)


def test_known_categories_are_texts(files):
    with pytest.raises(ValueError, match=r"types=\[1, 2\]: expected texts, as the CSV file holds them, not 1"):
        helpers.load_conditions(*files, types=[1, 2])
