"""Starts one process per GPU, forwards signals to them, and returns their exit code.

Environment and rendezvous are those of `accelerate launch`. It is not used because it turns every failure of a process
into exit code 1 with a traceback of its own, and kills processes that need more than 30 seconds to save.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from qwen_tune.console import report
from qwen_tune.distributed.world import check_world
from qwen_tune.errors import Problem, RunError
from qwen_tune.machine import on_stop_signals, usable_cores
from qwen_tune.recipe.schema import Recipe, TrainSpec

SET_BY_LAUNCHERS = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")  # accelerate sets the latter even for one process
SECONDS_AFTER_A_FAILURE = 30.0  # before the other processes are killed


def start_processes(recipe: Recipe, recipe_path: str | Path, overrides: Sequence[str], *, overwrite: bool) -> None:
    """Starts the processes of a run, and ends with them; returns in a process that is one of them, or the only one.

    Raises:
        SystemExit: They have ended; the code is theirs.
        RunError: There are other processes than the recipe asks for, or fewer GPUs.
    """
    if (processes := processes_to_start(recipe.train)) > 1:
        again = ["train", str(recipe_path), *overrides, *(["--overwrite"] if overwrite else [])]
        sys.exit(launch(again, processes, recipe.run_dir / "logs"))
    check_world(recipe.train.num_processes)


def processes_to_start(train: TrainSpec) -> int:
    """How many processes `qwen-tune train` starts: the recipe's number, else one per visible GPU.

    Without a number in the recipe, it uses only as many GPUs as divide the global batch. It is 1 in a process that a
    launcher has started.

    Raises:
        RunError: The recipe asks for more processes than there are GPUs.
    """
    if any(name in os.environ for name in SET_BY_LAUNCHERS):
        return 1
    gpus = visible_gpus()
    if train.num_processes is None:
        return next(count for count in range(max(gpus, 1), 0, -1) if train.global_batch_size % count == 0)
    if gpus and train.num_processes > gpus:
        what = f"the recipe asks for {train.num_processes} processes, but only {gpus} GPUs are visible"
        raise RunError(Problem("train.num_processes", what, f"set train.num_processes={gpus}"))
    return train.num_processes


def visible_gpus() -> int:
    """The number of NVIDIA GPUs that a process may use, without importing torch."""
    driver = Path("/proc/driver/nvidia/gpus")
    present = len(list(driver.iterdir())) if driver.is_dir() else 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present or chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return 0 if "-1" in names[:1] else len(names)


def launch(arguments: Sequence[str], processes: int, logs: Path) -> int:
    """Runs `qwen-tune` with these arguments in several processes, forwards SIGINT and SIGTERM, and waits.

    All but the first write their output to `logs`. Returns 0, or the exit code of the process that failed.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free_port = listener.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
    }
    if not visible_gpus():
        shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(max(1, usable_cores() // processes))}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "qwen_tune", *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # a terminal's Ctrl-C reaches them through us, once
        )
        for rank in range(processes)
    ]

    def forward(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    with on_stop_signals(forward):
        failed = _wait(workers)
    if failed is None:
        return 0
    log = logs / f"rank-{failed}.log"
    if failed and log.exists():
        report(f"process {failed} failed; its output is in {log}")
    # A process that reports an error to the user (2), or that it has saved (130), takes the others down.
    codes = [worker.returncode for worker in workers]
    code = next((known for known in (2, 130) if known in codes), codes[failed])
    return code if code >= 0 else 128 - code


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits for all; returns the rank of the first that failed, if any."""
    failed: int | None = None
    deadline = float("inf")
    running = True
    while running:
        running = any(worker.poll() is None for worker in workers)
        if failed is None:
            failed = next((rank for rank, worker in enumerate(workers) if worker.returncode), None)
            deadline = float("inf") if failed is None else time.monotonic() + SECONDS_AFTER_A_FAILURE
        if running and time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(0.05 if running else 0)
    return failed


def resume_command(recipe_path: str | Path, overrides: Sequence[str], recipe: Recipe) -> str:
    """The command that resumes an interrupted run from its newest checkpoint, without replacing it."""
    kept = [override for override in overrides if override.split("=")[0].strip() != "train.resume"]
    again = ["train.resume=auto"] if recipe.train.resume != "auto" else []
    return shlex.join(["qwen-tune", "train", str(recipe_path), *kept, *again])
