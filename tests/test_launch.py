"""One command, several processes: how many, one stream of messages, and their exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from qwen_tune.distributed.launch import SET_BY_LAUNCHERS, launch, processes_to_start, visible_gpus
from qwen_tune.errors import RunError
from qwen_tune.recipe.schema import TrainSpec


@pytest.fixture
def no_launcher(monkeypatch):
    for name in (*SET_BY_LAUNCHERS, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_that_a_launcher_started_starts_no_others(no_launcher, monkeypatch):
    for name in SET_BY_LAUNCHERS:
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert processes_to_start(TrainSpec(num_processes=2)) == 1


@pytest.mark.skipif(visible_gpus() > 0, reason="this machine has GPUs")
def test_without_gpus_there_is_one_process_unless_the_recipe_asks_for_more(no_launcher, monkeypatch):
    assert [processes_to_start(TrainSpec(num_processes=count)) for count in (None, 1, 3)] == [1, 1, 3]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_gpus() == 0  # this machine has none, whatever the variable says


@pytest.mark.gpu
def test_no_more_processes_than_gpus(no_launcher):
    with pytest.raises(RunError, match=r"99 processes, but only \d+ GPUs are visible"):
        processes_to_start(TrainSpec(num_processes=99))


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((2, 2), 2), ((0, 5), 5), ((130, 130), 130)])
def test_the_exit_code_is_that_of_the_first_process_or_of_the_one_that_failed(tmp_path, monkeypatch, codes, expected):
    # A package of that name in the working directory replaces ours: `python -m qwen_tune` finds it first.
    package = tmp_path / "qwen_tune"
    package.mkdir()
    (package / "__main__.py").write_text(f"import os, sys; sys.exit({codes}[int(os.environ['RANK'])])")
    monkeypatch.chdir(tmp_path)
    assert launch([], 2, tmp_path) == expected


def test_the_log_of_a_failed_process_is_named(tmp_path, monkeypatch, capfd):
    package = tmp_path / "qwen_tune"
    package.mkdir()
    (package / "__main__.py").write_text("import os, sys; sys.exit(int(os.environ['RANK']))")
    (tmp_path / "rank-1.log").write_text("why")
    monkeypatch.chdir(tmp_path)
    assert launch([], 2, tmp_path) == 1
    assert "process 1 failed; its output is in" in capfd.readouterr().err


def test_a_fault_is_reported_once_with_exit_code_2(workspace, qwen_tune):
    (workspace / "rows.jsonl").write_text("{\n")
    result = qwen_tune("train", "recipe.yaml", "run.dir=run", "train.num_processes=2", cwd=workspace)
    assert result.returncode == 2
    assert result.stderr.count("rows.jsonl:1: the line is not JSON") == 1
    assert "Traceback" not in result.stderr
    assert not (workspace / "run").exists()


def test_a_launcher_that_starts_a_different_number_is_an_error(workspace):
    """`accelerate launch --cpu --num_processes 2` starts one process and does not tell it about the two."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2"]
    result = subprocess.run(
        [*command, str(ROOT / "qwen_tune" / "train.py"), "recipe.yaml", "train.num_processes=2", "run.dir=run"],
        cwd=workspace,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode != 0
    assert "train.num_processes: the recipe asks for 2 processes, but 1 is running" in result.stderr
    assert not (workspace / "run").exists()


MEMORY = """
import resource, sys
import torch, trl, bitsandbytes  # loaded first, so that the limit is on what training needs
from qwen_tune.training import trainer
from qwen_tune.cli import run_command
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
sys.exit(run_command(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_memory_that_runs_out_ends_with_advice(workspace):
    long = {"messages": [{"role": "user", "content": "harbour " * 600}, {"role": "assistant", "content": "yes " * 600}]}
    (workspace / "rows.jsonl").write_text((json.dumps(long) + "\n") * 8)
    arguments = ("train", "recipe.yaml", "run.dir=run", "data.max_length_tokens=2048", "data.eval=null")
    batch = ("data.packing=false", "train.global_batch_size=8", "train.per_device_train_batch_size=8")
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments, "model.attention=eager", *batch],
        cwd=workspace,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 2, result.stderr[-2000:]
    assert "training: memory ran out" in result.stderr
    advice = r"Fix: train\.per_device_train_batch_size=1 \(\d+\.\d GiB\); or train\.gradient_checkpointing=.* GiB\)"
    assert re.search(advice, result.stderr), result.stderr
    assert re.search(r"or data\.max_length_tokens=1024 \(\d+\.\d GiB\)", result.stderr)
    assert "Traceback" not in result.stderr
    facts = json.loads((workspace / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit"]) == ("failed", 2)
