"""Conditions of molecules: tables of type, part and targets, their files, and the encoder that makes numbers of it."""

import hashlib
import io
import numbers
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from molecule_diffusion.checks import quoted
from molecule_diffusion.chemistry import PARTS, TYPES, describe
from molecule_diffusion.encodings import graph_sequence
from molecule_diffusion.files import MADE, atomic, sha256
from molecule_diffusion.qm9 import shared_qm9

CONDITION_TARGETS = ("gap", "mu", "logP", "QED")  # eV, Debye, and two numbers without a unit


def condition_table(qm9, rows):
    """Conditions of QM9's molecules `rows`: the columns of `describe` and gap (eV) and mu (the dipole, Debye)."""
    table = describe([qm9.smiles[i] for i in rows])
    return table.assign(gap=qm9.target("gap")[rows], mu=qm9.target("mu")[rows])


# ---------------------------------------------------------------------------------------------------------------------
# Files: one-hot sequences in HDF5, their conditions in CSV
# ---------------------------------------------------------------------------------------------------------------------


_TABLE_SHA256 = "sha256 of the CSV file"


@dataclass
class Conditions:
    """One-hot sequences with conditions, as `load_conditions` read them.

    Attributes:
        data: uint8 (N, 1, length, width), one 1 in each row of width.
        table: pandas DataFrame, N rows in the same order, with the columns type and part and what else the CSV held.
        types, parts: the known categories, in the order of the one-hots.
    """

    data: np.ndarray = field(repr=False)
    table: object = field(repr=False)
    types: list
    parts: list

    def __len__(self):
        return len(self.data)

    @property
    def vectors(self):
        """float32 (N, types + parts): one-hot type and one-hot part, side by side."""
        types = [self.types.index(name) for name in self.table["type"]]
        parts = [self.parts.index(name) for name in self.table["part"]]
        one_hot_types = np.eye(len(self.types), dtype=np.float32)[types]
        one_hot_parts = np.eye(len(self.parts), dtype=np.float32)[parts]
        return np.concatenate([one_hot_types, one_hot_parts], 1)


def save_conditions(h5, csv, data, table):
    """Write one-hot sequences to an HDF5 file (key `data`) and their table to a CSV file, in the same row order.

    Two files cannot be replaced in one step, so the HDF5 file carries the fingerprint of its CSV file: a pair that does
    not belong together, because only one of them could be written, is refused when it is read.
    """
    import h5py

    h5, csv = Path(h5), Path(csv)
    if len(data) != len(table):
        raise ValueError(f"{len(data)} sequences and {len(table)} rows: expected as many of each, in one order")
    if h5.resolve() == csv.resolve() or h5.is_dir() or csv.is_dir():
        raise ValueError(f"{h5.name} and {csv.name}: expected the paths of two different files, none of them a folder")
    data = _checked_sequences("the data to save", np.asarray(data))
    _check_columns("the table to save", table)
    for column in ("type", "part"):
        if table[column].isna().any() or (table[column] == "").any():
            raise ValueError(f"the table to save holds a row without a {column}")
    text = table.to_csv(index=False).encode()
    buffer = io.BytesIO()  # in memory first: h5py ends the whole process where a disk is full
    with h5py.File(buffer, "w") as file:
        file.create_dataset("data", data=data, compression="gzip", chunks=(min(1000, len(data)), *data.shape[1:]))
        file.attrs[_TABLE_SHA256] = hashlib.sha256(text).hexdigest()
    with atomic(csv) as csv_part, atomic(h5) as h5_part:  # both are complete before the first is replaced
        csv_part.write_bytes(text)
        h5_part.write_bytes(buffer.getvalue())


def load_conditions(h5, csv, types=None, parts=None):
    """Read one-hot sequences and their conditions, of any length and width.

    Args:
        h5: path of an HDF5 file with the key `data`: (N, 1, length, width), one-hot along width.
        csv: path of a CSV file with the columns `type` and `part`, N rows in the same order. If `save_conditions` wrote
            the two, it must be the very file that was written with the HDF5 file.
        types, parts: known categories, in the order of the one-hots; None takes those in the CSV, sorted.

    Returns: Conditions.
    Raises: FileNotFoundError; ValueError for a file that is not HDF5, a missing key or column, another shape, rows that
        do not match, values that are not one-hot, an empty or unknown category.
    """
    h5, csv = Path(h5), Path(csv)
    for path in (h5, csv):
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}; save_conditions writes both")
    data, fingerprint = _read_sequences(h5)
    table = _read_table(csv)
    if len(table) != len(data):
        raise ValueError(
            f"{h5.name} holds {len(data):,} sequences, {csv.name} {len(table):,} rows; expected as many of each, in "
            "the same order"
        )
    types = _categories(csv, table, "type", types)
    parts = _categories(csv, table, "part", parts)
    if fingerprint not in (None, sha256(csv)):
        raise ValueError(
            f"{csv.name} is not the table that {h5.name} was saved with; molecules would get others' conditions. Save "
            "both again with save_conditions, with the table that belongs to the sequences"
        )
    return Conditions(data, table, types, parts)


def _read_sequences(path):
    """The one-hot sequences, and the fingerprint of their table, None where another program wrote the file."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            if not isinstance(file.get("data"), h5py.Dataset):
                raise ValueError(f"{path.name} has the keys {', '.join(file) or '(none)'}; expected a dataset `data`")
            data = file["data"][()]
            fingerprint = file.attrs.get(_TABLE_SHA256)
    except OSError as error:
        raise ValueError(f"{path.name} is not a complete HDF5 file ({error})") from None
    return _checked_sequences(f"`data` of {path.name}", data), fingerprint


def _checked_sequences(name, data):
    """One-hot sequences as uint8 (N, 1, length, width). Raises: ValueError for what is none."""
    if data.ndim != 4 or data.shape[1] != 1 or 0 in data.shape:
        raise ValueError(f"{name} has shape {data.shape}; expected (N, 1, length, width)")
    if data.dtype.kind not in "biuf" or not (((data == 0) | (data == 1)).all() and (data.sum(-1) == 1).all()):
        raise ValueError(f"{name} is not one-hot: expected 0 and 1, one 1 in each row of width")
    return data.astype(np.uint8)


def _read_table(path):
    import pandas as pd

    try:
        categories = {"type": str, "part": str}  # as they are written: 007 is not 7
        table = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=categories)
    except (ValueError, pd.errors.ParserError) as error:
        raise ValueError(f"{path.name} cannot be read as CSV ({error})") from None
    _check_columns(path.name, table)
    return table


def _check_columns(name, table):
    if missing := {"type", "part"} - set(table):
        columns = quoted(", ".join(map(str, table)))
        raise ValueError(
            f"{name} has the columns {columns}; it lacks {', '.join(sorted(missing))}. Columns are separated by commas"
        )


def _categories(path, table, column, known):
    """Turn a column of categories into text, in place; returns those that are known, a list."""
    if table[column].isna().any():
        raise ValueError(f"{path.name}: no {column} in line {int(table[column].isna().argmax()) + 2}")
    table[column] = table[column].astype(str)
    found = set(table[column])
    known = sorted(found) if known is None else list(known)
    if strange := [name for name in known if not isinstance(name, str)]:
        raise ValueError(f"{column}s={quoted(known)}: expected texts, as the CSV file holds them, not {strange[0]!r}")
    if unknown := sorted(found - set(known)):
        raise ValueError(f"{path.name}: unknown {column} {unknown[0]!r}; known ones: {', '.join(known)}")
    return known


def make_conditions():
    """Write QM9 as sequences with conditions: data/qm9_conditions.h5 and .csv, all molecules, about three minutes."""
    qm9 = shared_qm9()
    table = condition_table(qm9, range(len(qm9)))
    sequences = graph_sequence(qm9.atoms, qm9.bonds)
    save_conditions(MADE / "qm9_conditions.h5", MADE / "qm9_conditions.csv", sequences, table)


# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------


ONE_TARGET = 0.20  # share of the rows that keep one target, each of them equally often, and nothing else
DROPOUT = (  # share of the rows, and how likely such a row keeps its type, its part, each of its targets
    (0.12, (0.0, 0.0, 0.0)),
    (0.12, (1.0, 0.0, 0.0)),
    (0.12, (0.0, 1.0, 0.0)),
    (0.18, (1.0, 1.0, 0.0)),
    (0.26, (0.8, 0.8, 0.5)),  # last: without targets it takes the share of ONE_TARGET too
)


class ConditionEncoder(ModelMixin, ConfigMixin):
    """Conditions as numbers: one-hot type, one-hot part, and for each target its standardised value and a 1.

    What is not known is all zeros, so that any subset of conditions can be asked for, none included. It has no weights
    to train; it remembers the categories and each target's mean, spread and range.

    Args: types, parts, targets: names, in the order of the numbers.
    """

    @register_to_config
    def __init__(self, types: list = tuple(TYPES), parts: list = tuple(PARTS), targets: list = CONDITION_TARGETS):
        super().__init__()
        for name, value in (("mean", 0.0), ("std", 1.0), ("low", -torch.inf), ("high", torch.inf)):
            self.register_buffer(name, torch.full((len(targets),), value))
        groups = [0] * len(types) + [1] * len(parts)  # which condition each number belongs to
        for k in range(len(targets)):
            groups += [2 + k, 2 + k]  # its value and its 1
        self.register_buffer("groups", torch.tensor(groups), persistent=False)
        alone = [(ONE_TARGET / len(targets), (0.0, 0.0, *row)) for row in torch.eye(len(targets)).tolist()]
        mixed = [(share, (*kept[:2], *[kept[2]] * len(targets))) for share, kept in DROPOUT]
        shares, kept = zip(*alone, *mixed)
        self.register_buffer("line_ends", torch.tensor(shares).cumsum(0)[:-1], persistent=False)
        self.register_buffer("keep_shares", torch.tensor(kept), persistent=False)

    @property
    def size(self):
        """How many numbers a condition is."""
        return len(self.groups)

    def set_targets(self, table):
        """Remember mean, standard deviation and range of the targets in a training table. Returns self."""
        values = torch.tensor(table[list(self.config.targets)].to_numpy(np.float32))
        if not values.isfinite().all():
            raise ValueError(f"NaN or infinite values among the targets {', '.join(self.config.targets)}")
        if len(values) < 2 or (values.std(0) == 0).any():
            raise ValueError(f"a target that is the same in all {len(values)} rows; expected targets that differ")
        self.mean.copy_(values.mean(0))
        self.std.copy_(values.std(0))
        self.low.copy_(values.amin(0))
        self.high.copy_(values.amax(0))
        return self

    def forward(self, condition, n):
        """Encode a condition for n molecules.

        Args:
            condition: dict with any of the keys type, part and the targets; each value stands for all molecules, or is
                a sequence of n. None or {} asks for nothing.
            n: number of molecules.

        Returns: float tensor (n, size).
        Raises: ValueError for an unknown key or category, another length, NaN. Warns where a target lies outside the
            range that training saw.
        """
        known = ["type", "part", *self.config.targets]
        if condition is not None and not isinstance(condition, Mapping):
            raise ValueError(f"condition={quoted(condition)}: expected a dict with any of {', '.join(known)}")
        condition = dict(condition or {})
        if unknown := condition.keys() - set(known):
            raise ValueError(f"unknown condition {sorted(unknown)[0]!r}; known ones: {', '.join(known)}")
        columns = self._category_columns("type", self.config.types, condition.get("type"), n)
        columns += self._category_columns("part", self.config.parts, condition.get("part"), n)
        for k, key in enumerate(self.config.targets):
            columns += self._target_columns(k, key, condition.get(key), n)
        encoded = np.array(columns, np.float32).reshape(self.size, n).T
        return torch.tensor(encoded, device=self.mean.device).to(self.dtype)

    def _category_columns(self, key, known, asked, n):
        """One-hot columns of a category: a list of len(known) columns of n numbers."""
        values = self._one_for_each(key, asked, n)
        if wrong := [value for value in values if value is not None and value not in known]:
            raise ValueError(f"unknown {key} {quoted(wrong[0])}; known ones: {', '.join(known)}")
        return [[float(value == name) for value in values] for name in known]

    def _target_columns(self, k, key, asked, n):
        """Two columns of a target: its standardised values, and 1 where it is asked for."""
        values = self._one_for_each(key, asked, n)
        try:
            asked_for = np.array([np.inf if value is None else value for value in values], float)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{key}={quoted(asked)}: expected a number, or one for each molecule") from None
        given = np.array([value is not None for value in values])
        if not np.isfinite(asked_for[given]).all():
            raise ValueError(f"{key} holds NaN or infinite values; leave the key out to ask for nothing")
        low, high = self.low[k].item(), self.high[k].item()
        margin = 0.001 * (high - low)  # the range was rounded to half precision
        outside = asked_for[given & ((asked_for < low - margin) | (asked_for > high + margin))]
        if outside.size:
            warnings.warn(
                f"{key}={outside[0]:.3g} lies outside the training range, {low:.3g} to {high:.3g}; expect nonsense",
                stacklevel=6,  # the line that called the pipeline
            )
        return [np.where(given, (asked_for - self.mean[k].item()) / self.std[k].item(), 0), given]

    @staticmethod
    def _one_for_each(key, values, n):
        if values is None or isinstance(values, (str, numbers.Number)) or np.ndim(values) == 0:
            return [values] * n
        values = list(values)
        if len(values) != n:
            raise ValueError(f"{key} has {len(values)} values for {n} molecules; expected one, or one for each")
        return values

    def drop(self, encoded):
        """Condition dropout, for training: what each row keeps is drawn by the shares of DROPOUT and ONE_TARGET.

        So every way of asking is frequent: for nothing, for one condition alone, for type and part, for any mixture.
        Shapes: (B, size) -> (B, size).
        """
        line = torch.bucketize(torch.rand(len(encoded), device=encoded.device), self.line_ends)
        kept = self.keep_shares[line]
        return encoded * (torch.rand_like(kept) < kept)[:, self.groups]
