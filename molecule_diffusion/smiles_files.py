"""A user's own molecules: SMILES from a .csv or a text file, with a reason for every line that cannot be used."""

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from molecule_diffusion.chemistry import stack_graphs, to_graph


@dataclass
class SmilesFile:
    """What `load_smiles` read: smiles, atoms (N, 9), bonds (N, 9, 9), and `rejected`: (line number, text, reason)."""

    smiles: list
    atoms: np.ndarray = field(repr=False)
    bonds: np.ndarray = field(repr=False)
    rejected: list

    def __len__(self):
        return len(self.smiles)

    def __str__(self):
        lines = [f"{len(self)} molecules read, {len(self.rejected)} lines not used"]
        return "\n".join(lines + [f"  line {number}: {reason}" for number, _, reason in self.rejected])


def load_smiles(path):
    """Read a user's own molecules: a .csv with a column named smiles, or any text file with one SMILES a line.

    Lines that cannot be used are never dropped silently: print the result, or read its `.rejected`.

    Returns: SmilesFile.
    Raises: FileNotFoundError; ValueError where the file is empty, is not text, or has no smiles column.
    """
    path = Path(path)
    lines = _read_lines(path)
    is_csv = path.suffix.lower() == ".csv"
    column = 0
    if is_csv:
        column = _smiles_column(path, lines.pop(0)[1])
        if not lines:
            raise ValueError(f"{path.name} holds a header and no molecule")
    graphs, rejected = [], []
    for number, line in lines:
        try:
            cells = next(csv.reader([line], strict=True)) if is_csv else line.split()
            if column >= len(cells) or not cells[column].strip():
                raise ValueError(f"no value in the smiles column: {line!r}")
            graphs.append(to_graph(cells[column].strip()))
        except csv.Error as error:
            rejected.append((number, line, f"a quoting error ({error}): {line!r}"))
        except ValueError as error:
            rejected.append((number, line, str(error)))
    return SmilesFile([graph[2] for graph in graphs], *stack_graphs(graphs), rejected)


def _read_lines(path):
    """The lines of a text file that are not blank: a list of (line number, text)."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; give the path of a .csv or .smi file")
    content = path.read_bytes()
    try:
        if b"\0" in content:
            place = content.index(b"\0")
            raise UnicodeDecodeError("utf-8", content, place, place + 1, "a zero byte")
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not a text file (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"{path.name} is empty; expected one SMILES a line, or a CSV with a column named smiles")
    return numbered


def _smiles_column(path, header):
    """Which column of a CSV file is called smiles, by its first line."""
    names = [name.strip().lower() for name in next(csv.reader([header]))]
    if "smiles" not in names:
        raise ValueError(f"{path.name} has the columns {', '.join(names)}; expected one of them to be named smiles")
    return names.index("smiles")
