"""Runs in separate processes: signals, and two processes that train as one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment
from resuming import losses, weights

from qwen_tune.runs.checkpoints import fault_of, list_checkpoints

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("qwen-tune")), *arguments]


def interrupted_after(step: int, folder: Path, number: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run in a separate process that gets a signal once a step is logged."""
    process = subprocess.Popen(
        command("train", "recipe.yaml", "run.dir=run", *overrides),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, errors = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


LONG = ("train.max_steps=400", "train.logging_steps=1", "lora.lora_dropout=0.1")


def test_a_signal_saves_and_two_processes_resume_to_the_same_result(workspace, qwen_tune):
    both = ("train.num_processes=2", "train.max_steps=60", "train.logging_steps=1", "lora.lora_dropout=0.1")
    stopped = interrupted_after(3, workspace, signal.SIGTERM, *both)
    assert stopped.returncode == 130, stopped.stderr
    assert "which is saved. Resume with: qwen-tune train recipe.yaml run.dir=run " in stopped.stderr
    assert "Traceback" not in stopped.stderr
    facts = json.loads((workspace / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit"], facts["world_size"], facts["engine"]) == ("interrupted", 130, 2, "ddp")
    [checkpoint] = facts["checkpoints"]
    done = int(checkpoint.removeprefix("step-"))
    assert 3 <= done < 60
    resumed = qwen_tune("train", "recipe.yaml", "run.dir=run", *both, cwd=workspace)
    assert resumed.returncode == 0, resumed.stderr
    whole = qwen_tune("train", "recipe.yaml", "run.dir=whole", *both, cwd=workspace)
    assert whole.returncode == 0, whole.stderr
    assert weights(workspace / "run") == weights(workspace / "whole")
    assert losses(workspace / "run") == losses(workspace / "whole")
    assert (workspace / "whole" / "logs" / "rank-1.log").exists()
    assert whole.stdout.count("step 60/60") == 1


def test_ctrl_c_in_one_process(workspace):
    stopped = interrupted_after(2, workspace, signal.SIGINT, *LONG)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopping after this step" in stopped.stderr
    [checkpoint] = list_checkpoints(workspace / "run" / "checkpoints")
    assert fault_of(checkpoint) is None


def test_two_processes_train_the_same_adapter_as_one(workspace, qwen_tune):
    # SGD, since Adam would amplify rounding. 27 packs: the last batch of an epoch is not full.
    same = (
        "train.optim=sgd",
        "train.learning_rate=0.1",
        "train.global_batch_size=4",
        "train.max_steps=8",
        "train.eval_steps=4",
    )
    one = qwen_tune("train", "recipe.yaml", "run.dir=one", *same, cwd=workspace)
    assert one.returncode == 0, one.stderr
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    two = subprocess.run(
        [*launch, str(ROOT / "qwen_tune" / "train.py"), "recipe.yaml", "run.dir=two", *same, "train.num_processes=2"],
        cwd=workspace,
        env=environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert two.returncode == 0, two.stderr
    from safetensors.torch import load_file

    first, second = (load_file(workspace / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-6
    for mine, theirs in zip(losses(workspace / "one"), losses(workspace / "two"), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-6)
    facts = json.loads((workspace / "two" / "run.json").read_text())
    assert facts["tokens"]["padding"] == 1  # one filler: 27 packs for two processes
    assert (
        facts["tokens"]["processed"] - 1
        == json.loads((workspace / "one" / "run.json").read_text())["tokens"]["processed"]
    )
