"""Atomic writes with everything that can interrupt them."""

import errno
import itertools
import os
import subprocess
import sys

import pytest

from molecule_diffusion import files

INTERRUPTS = [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left")]


def write(path, kind, text):
    if kind == "folder":
        path.mkdir()
        path = path / "content"
    path.write_text(text)


def read(path, kind):
    return (path / "content" if kind == "folder" else path).read_text()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("error", INTERRUPTS)
@pytest.mark.parametrize("moment", ["while writing", "at the first rename", "at the last rename"])
def test_an_interrupt_leaves_what_stood_there(tmp_path, monkeypatch, kind, error, moment):
    path = tmp_path / "target"
    write(path, kind, "old")
    replace = files.os.replace
    renames = itertools.count(1)
    last = {"at the first rename": 1, "at the last rename": {"file": 1, "folder": 2}[kind]}.get(moment)

    def interrupted_replace(source, target):
        if next(renames) == last:
            raise error
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", interrupted_replace)
    with pytest.raises(type(error)):
        with files.atomic(path) as part:
            write(part, kind, "new")
            if moment == "while writing":
                raise error
    assert read(path, kind) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_finished_write_replaces_what_stood_there(tmp_path, kind):
    path = tmp_path / "new folder" / "target"
    for text in ("old", "new"):
        with files.atomic(path) as part:
            write(part, kind, text)
        assert read(path, kind) == text
    assert [p.name for p in path.parent.iterdir()] == ["target"]


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and processes that die
# ---------------------------------------------------------------------------------------------------------------------

DYING = """
import os, sys
from molecule_diffusion import files
moment, path = int(sys.argv[1]), sys.argv[2]
replace, calls = os.replace, []
def dying(source, target):
    if len(calls) == moment:
        os._exit(9)
    calls.append(target)
    replace(source, target)
os.replace = dying
with files.atomic(path) as part:
    part.mkdir()
    (part / "content").write_text("new")
    if moment == -1:
        os._exit(9)
"""


@pytest.mark.parametrize("moment, left", [(-1, "old"), (0, "old"), (1, "old"), (2, "new")])
def test_a_process_that_dies_leaves_nothing_that_is_not_put_right(tmp_path, run_python, moment, left):
    path = tmp_path / "target"
    write(path, "folder", "old")
    result = run_python("-c", DYING, moment, path)
    assert result.returncode == (9 if moment < 2 else 0), result.stderr
    files.recover(path)
    assert read(path, "folder") == left
    assert [p.name for p in tmp_path.iterdir()] == ["target"]
    with files.atomic(path) as part:
        write(part, "folder", "newer")
    assert read(path, "folder") == "newer" and [p.name for p in tmp_path.iterdir()] == ["target"]


def test_parts_of_living_processes_and_of_other_machines_are_left_alone(tmp_path):
    path = tmp_path / "target"
    with files.atomic(path) as part:
        write(part, "file", "half")
        files.recover(path)
        assert part.exists()
        write(part, "file", "whole")
    assert read(path, "file") == "whole"
    elsewhere = tmp_path / "target.anothermachine.1.abcd.part"
    elsewhere.write_text("half")
    files.recover(path)
    assert elsewhere.exists()


WRITERS = """
import sys
from molecule_diffusion import files
path, text = sys.argv[1:]
for k in range(60):
    with files.atomic(path) as part:
        if text.startswith("folder"):
            part.mkdir()
            (part / "content").write_text(text)
        else:
            part.write_text(text)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_writers_of_one_path(tmp_path, kind):
    path = tmp_path / "target"
    command = [sys.executable, "-c", WRITERS, str(path)]
    writers = [subprocess.Popen([*command, f"{kind} {k}"], stderr=subprocess.PIPE, cwd=files.ROOT) for k in range(3)]
    errors = [writer.communicate()[1].decode() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0], errors
    assert read(path, kind) in [f"{kind} {k}" for k in range(3)]
    files.recover(path)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_names_with_letters_that_mean_something_to_glob(tmp_path):
    for name in ("a[1]", "a*", "a?"):
        with files.atomic(tmp_path / name) as part:
            write(part, "file", name)
        files.recover(tmp_path / name)
        assert read(tmp_path / name, "file") == name


def test_the_folder_of_what_is_made_can_be_set(tmp_path, run_python):
    code = "import helpers; from molecule_diffusion import files, qm9; print(files.MADE, qm9.QM9_CACHE.parent)"
    result = run_python("-c", code, env=os.environ | {"MOLECULE_DIFFUSION_DATA": str(tmp_path)})
    assert result.stdout.split() == [str(tmp_path.resolve())] * 2, result.stderr
    result = run_python("-c", code, env=os.environ | {"MOLECULE_DIFFUSION_DATA": ""})
    assert result.stdout.split() == [str(files.DATA)] * 2, result.stderr
