"""Fixtures for tests of a push: a server with a base, a finished run, and the command."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY
from fakes.hub_write_server import serve_hub
from fork_server import fork_server
from pushing import TOKEN, client

LICENSED = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Tiny\n"

Push = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(TINY, folder)
    (folder / "README.md").write_text(LICENSED)
    return folder


@pytest.fixture(scope="module")
def served(base):
    with serve_hub(token=TOKEN) as hub:
        yield hub


@pytest.fixture
def hub(served, base):
    """The server with only the base."""
    served.clear()
    served.add_folder("qwen/tiny", base)
    yield served
    assert TOKEN.encode() not in served.bodies


@pytest.fixture(scope="module")
def commands(served, tmp_path_factory):
    """The client reads its environment when it is imported, and the import takes most of a push's time here."""
    folder = tmp_path_factory.mktemp("client")
    modules = ("huggingface_hub.hf_api", "matplotlib.figure", "qwen_tune.publishing.push")
    with fork_server(modules, client(served, folder)) as server:
        yield server


@pytest.fixture
def push(hub, commands, tmp_path) -> Push:
    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        result = commands("push", *arguments, cwd=tmp_path, **changes)
        assert TOKEN not in result.stdout + result.stderr
        assert "Traceback" not in result.stderr, result.stderr
        return result

    return run


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    """The run of the bundled recipe, in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    shutil.copytree(trained[0], folder)
    return folder


@pytest.fixture
def own_run(run, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(run, tmp_path / "own"))
