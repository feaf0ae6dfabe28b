"""Where the course keeps its files, writes that never leave half a file, and checksums."""

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import zipfile
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"  # what the course ships
CHECKPOINTS = DATA / "checkpoints"
RESULTS = DATA / "results"
# What is made on this machine. MOLECULE_DIFFUSION_DATA names another folder for it, where that of the course is shared
# and cannot be written, or is to stay as it is.
MADE = Path(os.environ.get("MOLECULE_DIFFUSION_DATA") or DATA).expanduser().resolve()
TRAINING = MADE / "training"  # unfinished trainings and runs of one's own

# ---------------------------------------------------------------------------------------------------------------------
# Atomic writes
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path beside `path` that replaces it only when the block ends well.

    A full disk, a crash or Ctrl-C inside the block leaves whatever stood at `path` untouched. Works for a file and for
    a folder (create it at the yielded path). Several processes may write one path at once: the last one's stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover(path)
    part = _beside(path, "part")
    try:
        yield part
        if part.is_dir():
            _put_folder(part, path)
        else:
            os.replace(part, path)
    finally:
        _remove(part)


def recover(path):
    """Put right what a killed process left of a write to `path`: restore a folder that was moved aside, remove parts.

    A folder cannot replace a folder in one step; a process that dies between the two leaves the old one as NAME.….old.
    """
    path = Path(path)
    for left in path.parent.glob(f"{_escaped(path.name)}.*.old"):
        if not path.exists():
            with contextlib.suppress(OSError):  # another process was quicker
                os.replace(left, path)
        elif not _is_being_written(left):
            _remove(left)
    for left in path.parent.glob(f"{_escaped(path.name)}.*.part"):
        if not _is_being_written(left):
            _remove(left)


def _beside(path, ending):
    """A path of this process's own: NAME.MACHINE.PROCESS.RANDOM.ENDING."""
    machine = "".join(letter for letter in platform.node() if letter.isalnum())
    return path.with_name(f"{path.name}.{machine}.{os.getpid()}.{secrets.token_hex(4)}.{ending}")


def _is_being_written(path):
    """Whether the process that a temporary path is named after may still be at work; on another machine, who knows."""
    import psutil

    machine, process = path.name.split(".")[-4:-2]
    own_machine = _beside(path, "part").name.split(".")[-4]
    return machine != own_machine or not process.isdigit() or psutil.pid_exists(int(process))


def _escaped(name):
    """A name in which no letter has a meaning for glob."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _put_folder(part, path):
    """Put folder `part` in the place of folder `path`, or leave `path` as it was."""
    old = _beside(path, "old")
    try:
        for _ in range(100):  # another process may put its own folder there between the two steps
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, old)
            try:
                os.replace(part, path)
                return
            except OSError:
                if not (path.exists() and part.exists()):
                    raise
                _remove(old)
        raise OSError(f"{path} is replaced by other processes all the time; try again")
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        if path.exists():
            _remove(old)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # what is open on Windows stays, until `recover` comes by again
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# JSON, arrays and checksums
# ---------------------------------------------------------------------------------------------------------------------


def read_json(path):
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_json(path, content):
    """Write a JSON file, atomically."""
    with atomic(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_npz(path, names):
    """The arrays `names` of an .npz file, a dict. Raises: FileNotFoundError; ValueError where they cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise ValueError(f"{path.name} is of another version: {error.args[0]}") from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None
    except ValueError:  # numpy then advises to read it as a pickle, which no file of the course is
        raise ValueError(f"{path.name} is damaged: it is not an npz file") from None


def sha256(path):
    """The SHA-256 of a file, as hexadecimal text."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
