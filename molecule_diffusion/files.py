"""Paths of the course, writes that never leave half a file, and checksums."""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
CHECKPOINTS = DATA / "checkpoints"
RESULTS = DATA / "results"
TRAINING = DATA / "training"  # unfinished trainings and runs of one's own; git-ignored


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path` that replaces it only when the block ends well.

    A full disk, a crash or Ctrl-C inside the block leaves whatever stood at `path` untouched. Works for a file and for
    a folder (create it at the yielded path).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _remove(part)
    try:
        yield part
        if part.is_dir() and path.exists():
            _replace_folder(path, part)
        else:
            os.replace(part, path)
    finally:
        _remove(part)


def _replace_folder(path, part):
    """Put folder `part` in the place of folder `path`, which cannot be done in one step, or leave `path` as it was."""
    old = path.with_name(path.name + ".old")
    _remove(old)
    os.replace(path, old)
    try:
        os.replace(part, path)
    except BaseException:
        os.replace(old, path)
        raise
    _remove(old)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path):
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path, content):
    """Write a JSON file, atomically."""
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def sha256(path):
    """The SHA-256 of a file, as hexadecimal text."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_count(name, value):
    """Raises: ValueError unless `value`, the argument called `name`, is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
