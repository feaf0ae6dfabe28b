"""Any number of molecules to a file, in batches: bounded memory, resumed after a kill, shared among processes."""

import csv
import inspect
import io
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from molecule_diffusion.checkpoints import load_pipeline
from molecule_diffusion.checks import check_count, check_seed, quoted, this_process
from molecule_diffusion.chemistry import describe
from molecule_diffusion.files import read_json, write_json
from molecule_diffusion.viewer_3d import with_geometry

BATCH = 1000  # molecules drawn, written and, after a kill, drawn again at once
COLUMNS = ("smiles", "valid", "type", "part", "logP", "QED")


@dataclass
class Sampled:
    """What `sample_to_file` did: the file, how many molecules were drawn, how many stand in the file."""

    path: Path
    drawn: int
    written: int

    def __str__(self):
        left_out = self.drawn - self.written
        note = f"; {left_out:,} that cannot be written so are left out" if left_out else ""
        return f"{self.path.name}: {self.written:,} of {self.drawn:,} molecules{note}"


def sample_to_file(name, num_molecules, path, seed=0, **arguments):
    """Draw molecules from a shipped pipeline to a file. The same seed and arguments give the same file.

    Every batch of 1,000 has its own random numbers, made of the seed and its own number, and is written at once. A call
    that was stopped goes on after the last whole batch when it is repeated; no molecule is lost or written twice. Of
    several processes (`accelerate launch`) each writes a file of its own, NAME-1-of-4.csv: together the same molecules.

    Args:
        name: of the checkpoint. num_molecules: how many are drawn.
        path: .csv: every draw, with the columns smiles (empty where RDKit refuses it), valid, type, part, logP and QED,
            the last four for valid ones; .smi: the valid ones, one SMILES a line; .sdf: the valid ones with a quick
            force-field geometry, without those that are too strained for one.
        seed: whole number.
        arguments: of the pipeline: num_inference_steps, and for the prior condition and guidance_scale.

    Returns: Sampled.
    Raises: ValueError for another ending, a file that is there already, an unfinished one of another call, and
        arguments that the pipeline does not take.
    """
    check_count("num_molecules", num_molecules)
    check_seed(seed)
    path = Path(path)
    if path.suffix not in WRITERS:
        raise ValueError(f"{path.name}: expected a file that ends in {', '.join(WRITERS)}")
    rank, world = this_process()
    if world > 1:
        path = path.with_stem(f"{path.stem}-{rank + 1}-of-{world}")
    if path.is_dir():
        raise ValueError(f"{path.name} is a folder; expected the name of a file")
    if path.exists():
        raise ValueError(f"{path.name} is there already; delete it, or choose another name")
    pipe = load_pipeline(name)
    _check_arguments(pipe, name, arguments)
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    call = {"name": name, "num_molecules": num_molecules, "seed": seed, "world": world, "arguments": arguments}
    unfinished = Unfinished(path, call)
    batches = range(rank, (num_molecules + BATCH - 1) // BATCH, world)
    try:
        _draw_batches(pipe, unfinished, num_molecules, batches, seed, arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped after {unfinished.drawn:,} molecules; the same call goes on there") from None
    unfinished.finish()
    return Sampled(path, unfinished.drawn, unfinished.written)


def _check_arguments(pipe, name, arguments):
    taken = inspect.signature(pipe.__call__).parameters
    if "num_molecules" not in taken:
        raise ValueError(f"{name} draws no molecules; take a generator")
    if strange := sorted(arguments.keys() - taken.keys()):
        raise ValueError(f"{name} takes no {strange[0]}; diffusion_prior takes wishes (a condition) and guidance_scale")


def _draw_batches(pipe, unfinished, num_molecules, batches, seed, arguments):
    from tqdm.auto import tqdm

    write = WRITERS[unfinished.path.suffix]
    total = sum(min(BATCH, num_molecules - batch * BATCH) for batch in batches)
    with tqdm(total=total, initial=unfinished.drawn, desc=unfinished.path.name, unit=" molecules") as bar:
        for batch in batches[unfinished.batches :]:
            size = min(BATCH, num_molecules - batch * BATCH)
            # seed and batch become one number as digits do: below a billion batches none occurs twice
            generator = torch.Generator(pipe.device).manual_seed(seed * 1_000_000_007 + batch)
            output = pipe(size, generator=generator, batch_size=BATCH, **arguments)
            text, written = write(output, with_head=unfinished.batches == 0)
            unfinished.add(text, size, written)
            bar.update(size)


class Unfinished:
    """A file in the making, FILE.unfinished, and FILE.progress.json, which says how much of it counts."""

    def __init__(self, path, call):
        self.path = path
        self.call = call
        self.content = path.with_name(path.name + ".unfinished")
        self.record = path.with_name(path.name + ".progress.json")
        self.batches = self.drawn = self.written = self.bytes = 0
        if self.record.exists():
            self._resume()

    def _resume(self):
        remedy = f"delete {self.record.name} and {self.content.name}, or choose another name"
        try:
            progress = read_json(self.record)
            call = progress["call"]
            counts = [progress[key] for key in ("batches", "drawn", "written", "bytes")]
            for count in counts:
                if type(count) is not int or count < 0:
                    raise TypeError(f"{count!r} is no count")
            length = self.content.stat().st_size
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{self.path.name} cannot be continued ({error!r}); {remedy}") from None
        if call != self.call:
            raise ValueError(f"{self.path.name} was begun by another call, {quoted(call)}; {remedy}")
        self.batches, self.drawn, self.written, self.bytes = counts
        if length < self.bytes or not self.content.is_file():
            raise ValueError(f"{self.content.name} is shorter than {self.record.name} says; {remedy}")
        os.truncate(self.content, self.bytes)  # a batch that was not recorded as whole

    def add(self, text, drawn, written):
        """Append a batch. It counts from the moment at which the record names it."""
        with open(self.content, "ab" if self.batches else "wb") as file:
            self.bytes += file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.batches += 1
        self.drawn += drawn
        self.written += written
        progress = {key: getattr(self, key) for key in ("call", "batches", "drawn", "written", "bytes")}
        write_json(self.record, progress)

    def finish(self):
        """Give the file its name. Of more processes than batches, some have an empty one."""
        if not self.batches:
            self.content.write_bytes(b"")
        os.replace(self.content, self.path)
        self.record.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Formats: each takes an output, returns its text and the number of molecules in it
# ---------------------------------------------------------------------------------------------------------------------


def _as_csv(output, with_head):
    described = describe(output.valid_smiles).itertuples(index=False)
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    if with_head:
        rows.writerow(COLUMNS)
    for smiles, valid in zip(output.smiles, output.valid):
        if valid:
            row = next(described)
            rows.writerow([smiles, True, row.type, row.part, f"{row.logP:.4f}", f"{row.QED:.4f}"])
        else:
            rows.writerow([smiles or "", False, "", "", "", ""])
    return text.getvalue(), len(output)


def _as_smi(output, with_head):
    return "".join(f"{smiles}\n" for smiles in output.valid_smiles), len(output.valid_smiles)


def _as_sdf(output, with_head):
    from rdkit import Chem

    text = io.StringIO()
    written = 0
    with Chem.SDWriter(text) as writer:
        for smiles in output.valid_smiles:
            try:
                mol = with_geometry(smiles)
            except ValueError:  # too strained, counted by the caller
                continue
            mol.SetProp("_Name", smiles)
            writer.write(mol)
            written += 1
    return text.getvalue(), written


WRITERS = {".csv": _as_csv, ".smi": _as_smi, ".sdf": _as_sdf}
