"""Fixtures that several test files share. Nothing here needs more than the clone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fork_server import MODULES, fork_server

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the commands set it, before torch is imported

os.environ.pop("COLUMNS", None)  # the width of a terminal that tests may be started in

# Folders of this run alone: a cache for what runs in the tests' own process and for the processes that they start, and
# for these a place for what they leave when they are killed.
_OWN = tempfile.TemporaryDirectory(prefix="qwen-tune-tests-")
os.environ["QWEN_TUNE_CACHE"] = f"{_OWN.name}/cache"
_LEFT = Path(_OWN.name, "tmp")
_LEFT.mkdir()

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny-qwen"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests that take more than a minute")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
        if "gpu" in item.keywords:
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: offline, without a network's time-outs, and without a terminal's width."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160", "TMPDIR": str(_LEFT), **changes}


READ_AT_IMPORT = ("HF_", "OMP_", "CUDA_", "WANDB_", "ACCELERATE_", "PYTHON")


@pytest.fixture(scope="session")
def qwen_tune() -> Iterator[Run]:
    """Runs `qwen-tune …` in a process of its own.

    It is forked from one that has imported everything, which takes 12 seconds a process; but where the environment
    changes what libraries read when they are imported, it is started as a user does.
    """
    with fork_server(MODULES, environment()) as server:

        def run(*arguments: str, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess[str]:
            if not any(name.startswith(READ_AT_IMPORT) for name in changes):
                return server(*arguments, cwd=cwd, **changes)
            command = [str(Path(sys.executable).with_name("qwen-tune")), *arguments]
            return subprocess.run(
                command, cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=600
            )

        yield run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, qwen_tune):
    """One run of the bundled recipe, shortened, with its merged model: (run directory, what the command printed)."""
    folder = tmp_path_factory.mktemp("trained")
    result = qwen_tune(
        "train", "recipes/quickstart.yaml", f"run.dir={folder}/run", "train.max_steps=6", "export.merge=true"
    )
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stdout


@pytest.fixture(scope="session")
def tiny_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def official_template() -> Callable[[str], str]:
    """The original chat templates of Qwen checkpoints, as TRL's package carries them."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return lambda name: (folder / f"{name}.jinja").read_text(encoding="utf-8")


def make_workspace(folder: Path) -> Path:
    """Puts a small recipe, its examples, and the tiny model into a directory."""
    (folder / "tiny-qwen").symlink_to(TINY)
    shutil.copy(ROOT / "data" / "quickstart.jsonl", folder / "rows.jsonl")
    (folder / "recipe.yaml").write_text(
        "name: small\n"
        "model: {base: ./tiny-qwen}\n"
        "data:\n"
        "  train: [{path: rows.jsonl}]\n"
        "  eval: {fraction: 0.1}\n"
        "  max_length_tokens: 256\n"
        "train: {max_steps: 3, global_batch_size: 2, learning_rate: 1e-3}\n"
    )
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A directory of its own with a small recipe, its examples, and the tiny model beside it."""
    return make_workspace(tmp_path)


@pytest.fixture(scope="session")
def tiny_bfloat16(tmp_path_factory) -> Path:
    """The tiny model as real checkpoints are stored: in bfloat16."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("base") / "tiny-bfloat16"
    shutil.copytree(TINY, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory of its own, so that a test can write and name files as a user does."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a model that was read may still map its files
