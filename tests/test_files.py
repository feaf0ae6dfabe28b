"""Atomic writes with everything that can interrupt them."""

import errno
import itertools

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
        (path.parent / "target.part").mkdir(parents=True, exist_ok=True)  # left over from a killed process
        with files.atomic(path) as part:
            write(part, kind, text)
        assert read(path, kind) == text
    assert [p.name for p in path.parent.iterdir()] == ["target"]
