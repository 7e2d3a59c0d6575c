"""The checkpoints of a run that trains: written while it waits, proven behind its back, and rotated.

A step waits for a checkpoint to be on the disk, and for no more: whether it can be read back as it was written is found
out on another thread, and older ones are deleted only then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from qwen_tune.disk import is_full
from qwen_tune.errors import Problem, TrainingError, first_line
from qwen_tune.runs.checkpoints import fault_of, list_checkpoints, rotate, save_checkpoint
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.drift import same_facts


@dataclass
class Saves:
    """What checkpoints cost in this process: how many, the seconds that training waited, bytes of the last."""

    count: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, seconds: float, size: int) -> None:
        """Counts one more."""
        self.count, self.seconds, self.bytes = self.count + 1, round(self.seconds + seconds, 3), size


class SavedCheckpoints:
    """Saves into a run's folder of checkpoints; for the first process.

    Args:
        run: Where they go, and where their names and costs are recorded.
        keep: How many stay, beside the best.
        note: Says a line to the user.
    """

    def __init__(self, run: RunDir, keep: int, note: Callable[[str], None]) -> None:
        self.saves = Saves()
        self._run = run
        self._keep = keep
        self._note = note
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._reading: Future[str | None] | None = None
        self._newest: Path | None = None
        self._best_step: int | None = None

    def save(self, step: int, best_step: int | None, write: Callable[[Path], None]) -> None:
        """Makes the checkpoint of a step.

        Args:
            step: Optimizer steps done.
            best_step: The step whose checkpoint is never deleted.
            write: Writes the checkpoint's files into the directory that it is given.

        Raises:
            TrainingError: The disk is full. The older checkpoints are as they were.
        """
        began = time.perf_counter()
        self.settle()
        written_under = {
            "recipe": self._run.recipe.read_text(encoding="utf-8"),
            "facts": same_facts(self._run.facts),
        }
        try:
            path = save_checkpoint(self._run.checkpoints, step, written_under, write)
        except Exception as error:  # a full disk has another type in every library
            if not is_full(error):
                raise
            raise TrainingError(self._no_room(step, error)) from error
        self.saves.add(time.perf_counter() - began, sum(file.stat().st_size for file in path.iterdir()))
        self._newest, self._best_step = path, best_step
        self._reading = self._reader.submit(fault_of, path)
        self._note(f"saved {path}")

    def settle(self, *, wait: bool = True) -> None:
        """Deletes what the newest checkpoint replaces, once it has been read back."""
        if self._reading is None or not (wait or self._reading.done()):
            return
        fault, self._reading = self._reading.result(), None
        folder = self._run.checkpoints
        if fault:
            self._note(f"warning: {self._newest} is not whole ({fault}); the older checkpoints are kept")
        else:
            rotate(folder, keep=self._keep, best_step=self._best_step)
        checkpoints = [checkpoint.name for checkpoint in list_checkpoints(folder)]
        self._run.record({"checkpoints": checkpoints, "saves": vars(self.saves)})

    def _no_room(self, step: int, error: Exception) -> Problem:
        there = list_checkpoints(self._run.checkpoints)
        last = f"the last whole checkpoint is {there[-1].name}" if there else "there is no earlier checkpoint"
        what = f"the checkpoint of step {step} does not fit on the disk ({first_line(error)}); {last}"
        fix = "free some room and run the same command again, or keep fewer with train.save_total_limit"
        return Problem(str(self._run.checkpoints), what, fix)
