"""The place of a process among those of a run, as the launcher's environment has it. Light: torch is not imported."""

from __future__ import annotations

import os

from qwen_tune.errors import Problem, RunError


def world_size() -> int:
    """How many processes the launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def local_rank() -> int:
    """The number of this process among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    """The number of this process among all of the run."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def check_world(num_processes: int | None) -> None:
    """Compares the processes that run with those that the recipe asks for.

    Raises:
        RunError: They differ.
    """
    running = world_size()
    if num_processes is not None and running != num_processes:
        hint = (
            "; on a CPU, `accelerate launch --cpu --num_processes N` starts one process whatever N says"
            if running == 1
            else ""
        )
        raise RunError(
            Problem(
                "train.num_processes",
                f"the recipe asks for {num_processes} processes and {running} run{hint}",
                f"start {num_processes} processes or set train.num_processes={running}",
            )
        )
