"""What the tests share: QM9, a way to run Python apart, and no network for every process that is started from here."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
import pytest
import torch
from shared import SIZES

import helpers

matplotlib.use("Agg")  # not through MPLBACKEND, which notebook kernels would inherit

# Python runs a module of this name at its start, so kernels and their children cannot reach a network either.
SITECUSTOMIZE = """
import ipaddress
import socket


def _is_local(host):
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _guard(function, host_of):
    def guarded(*args, **options):
        if not _is_local(host_of(*args)):
            raise OSError("network is blocked in tests")
        return function(*args, **options)

    return guarded


def _peer(sock, address, *rest):
    return address[0] if isinstance(address, tuple) else None  # AF_UNIX addresses are text


socket.socket.connect = _guard(socket.socket.connect, _peer)
socket.socket.connect_ex = _guard(socket.socket.connect_ex, _peer)
socket.getaddrinfo = _guard(socket.getaddrinfo, lambda host, *rest: host)
"""


def pytest_configure(config):
    folder = Path(tempfile.mkdtemp(prefix="no_network_"))
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def qm9():
    return helpers.load_qm9()


@pytest.fixture(scope="session")
def graphs(qm9):
    """Atoms (32, 9) and bonds (32, 9, 9) of 32 molecules, as tensors."""
    return torch.from_numpy(qm9.atoms[1000:1032]), torch.from_numpy(qm9.bonds[1000:1032])


@pytest.fixture(scope="session")
def x_0(graphs):
    return helpers.graph_vector(*graphs)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return helpers.TokenVAE(width=16, layers=1, latent_dim=2)


@pytest.fixture
def graph_denoiser():
    torch.manual_seed(0)
    return helpers.GraphDenoiser(**SIZES)


@pytest.fixture(scope="session")
def run_python():
    """A function that runs Python with these arguments in the repository's folder and returns the finished process."""

    def run(*arguments, **options):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, **{"cwd": helpers.ROOT, "capture_output": True, "text": True} | options)

    return run


@pytest.fixture
def shown(monkeypatch):
    """What was displayed: a list of (data, metadata)."""
    seen = []

    def display(thing, raw=False, metadata=None):
        seen.append((thing if raw else {"text/markdown": thing.data}, metadata))

    monkeypatch.setattr("IPython.display.display", display)
    return seen
