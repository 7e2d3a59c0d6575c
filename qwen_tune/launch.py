"""Starting one process a GPU, passing signals on to them, and ending with their exit code.

The processes are the ones that `accelerate launch` starts: the same environment, the same rendezvous. They are started
here because the launcher turns every end of a process into exit code 1 with a traceback of its own, and kills processes
that need more than 30 seconds to save.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qwen_tune.errors import Problem, RunError
from qwen_tune.machine import usable_cores

SET_BY_LAUNCHERS = ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")  # accelerate sets the latter even for one process
SECONDS_AFTER_A_FAILURE = 30.0  # for the other processes to end by themselves


def processes_to_start(num_processes: int | None) -> int:
    """How many processes a `qwen-tune train` starts: what the recipe asks for, else one a visible GPU.

    Returns:
        1 where nothing has to be started, as in a process that a launcher has started.

    Raises:
        RunError: More are asked for than there are GPUs.
    """
    if any(name in os.environ for name in SET_BY_LAUNCHERS):
        return 1
    gpus = visible_gpus()
    if num_processes is None:
        return max(gpus, 1)
    if gpus and num_processes > gpus:
        what = f"the recipe asks for {num_processes} processes, and {gpus} GPUs are visible"
        raise RunError(Problem("train.num_processes", what, f"set train.num_processes={gpus}"))
    return num_processes


def visible_gpus() -> int:
    """NVIDIA GPUs that a process may use, without importing torch: what the driver lists, or what the user chose."""
    driver = Path("/proc/driver/nvidia/gpus")
    present = len(list(driver.iterdir())) if driver.is_dir() else 0
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not present or chosen is None:
        return present
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    return 0 if "-1" in names[:1] else len(names)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs `qwen-tune` with some arguments in several processes and waits for them.

    SIGINT and SIGTERM go on to all of them.

    Returns:
        The exit code of the first process, or of the one that failed.
    """
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
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
    with _passing_signals_on(workers):
        return _wait(workers)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    failed: int | None = None
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers):
        codes = [worker.returncode for worker in workers if worker.returncode]
        if codes and failed is None:
            failed, deadline = codes[0], time.monotonic() + SECONDS_AFTER_A_FAILURE
        if time.monotonic() > deadline:
            for worker in workers:
                worker.kill()
        time.sleep(0.05)
    codes = [worker.returncode for worker in workers]
    if failed is None:
        failed = next((code for code in codes if code), 0)
    # The first process's own word counts, unless it went down because of another.
    code = codes[0] if codes[0] > 0 else failed
    return code if code >= 0 else 128 - code


@contextmanager
def _passing_signals_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
