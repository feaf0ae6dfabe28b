"""A user's own molecules: SMILES from a .csv or a text file, with a reason for every line that cannot be used."""

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from molecule_diffusion.checks import quoted
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
        lines += [f"  line {number}: {reason}" for number, _, reason in self.rejected[:20]]
        if len(self.rejected) > 20:
            lines.append(f"  … and {len(self.rejected) - 20} more: see .rejected")
        return "\n".join(lines)


def load_smiles(path):
    """Read a user's own molecules: a .csv with a column named smiles, or any text file with one SMILES a line.

    In a text file the first word of every line is the SMILES; a line of notes is read as one too, so leave such lines
    out or write a .csv. What cannot be used is never dropped silently: print the result, or read its `.rejected`.

    Returns: SmilesFile.
    Raises: FileNotFoundError; ValueError where the file is empty, is not text, or has no smiles column.
    """
    path = Path(path)
    text = _read_text(path)
    entries = _csv_entries(path, text) if path.suffix.lower() == ".csv" else _text_entries(text)
    graphs, rejected = [], []
    for number, line, smiles, problem in entries:
        try:
            if problem:
                raise ValueError(problem)
            graphs.append(to_graph(smiles))
        except ValueError as error:
            rejected.append((number, line, str(error)))
    return SmilesFile([graph[2] for graph in graphs], *stack_graphs(graphs), rejected)


def smiles_in_file(path):
    """The SMILES of a .csv with a column named smiles, or of any text file with one a line, as they stand there.

    Returns: list of texts, None where a row of a CSV has no SMILES or cannot be read: an invalid molecule.
    Raises: as `load_smiles`.
    """
    path = Path(path)
    text = _read_text(path)
    entries = _csv_entries(path, text) if path.suffix.lower() == ".csv" else _text_entries(text)
    return [smiles or None for _, _, smiles, _ in entries]


def _read_text(path):
    """The content of a text file. Raises: FileNotFoundError; ValueError where it is empty or not text."""
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}; give the path of a .csv or .smi file")
    content = path.read_bytes()
    try:
        if b"\0" in content:
            place = content.index(b"\0")
            raise UnicodeDecodeError("utf-8", content, place, place + 1, "a zero byte")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path.name} is not a text file (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from None
    if not text.strip():
        raise ValueError(f"{path.name} is empty; expected one SMILES a line, or a CSV with a column named smiles")
    return text


def _text_entries(text):
    """(line number, line, SMILES, None) of every line that is not blank."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line, line.split()[0], None


def _csv_entries(path, text):
    """(line number, row as it stands there, SMILES, problem) of every row of a CSV that is not blank.

    A row may go over several lines, where a line break stands in quotes; it has the number of its first line.
    """
    lines = list(io.StringIO(text, newline=""))
    header = next(number for number, line in enumerate(lines) if line.strip())
    names = [name.strip().lower() for name in next(csv.reader([lines[header]]))]
    if "smiles" not in names:
        raise ValueError(f"{path.name} has the columns {', '.join(names)}; expected one of them to be named smiles")
    column = names.index("smiles")
    if not "".join(lines[header + 1 :]).strip():
        raise ValueError(f"{path.name} holds a header and no molecule")
    first = header + 1
    while first < len(lines):
        reader = csv.reader(lines[first:], strict=True)
        done = 0  # lines of whole rows
        try:
            for row in reader:
                line = "".join(lines[first + done : first + reader.line_num]).strip("\r\n")
                number = first + done + 1
                done = reader.line_num
                if not line.strip():
                    continue
                smiles = row[column].strip() if column < len(row) else ""
                problem = None if smiles else f"no value in the smiles column: {quoted(line)}"
                yield number, line, smiles, problem
            return
        except csv.Error as error:  # perhaps a quote that is never closed: leave its line out and go on with the next
            line = lines[first + done].strip("\r\n")
            yield first + done + 1, line, "", f"a quoting error ({error}): {quoted(line)}"
            first += done + 1
