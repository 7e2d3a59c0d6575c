"""Memory or disk that ran out: how that shows, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from qwen_tune.disk import is_full
from qwen_tune.errors import Problem, QwenTuneError, TrainingError, first_line
from qwen_tune.planner.activations import Checkpointing
from qwen_tune.planner.choice import Choice
from qwen_tune.planner.gpus import GIB
from qwen_tune.planner.job import Job
from qwen_tune.planner.memory import memory
from qwen_tune.recipe.schema import Recipe


@contextmanager
def advising(recipe: Recipe, choice: Choice) -> Iterator[None]:
    """Turns memory or room on a disk that runs out into advice.

    Raises:
        TrainingError: It ran out.
    """
    try:
        yield
    except QwenTuneError:
        raise
    except Exception as error:  # libraries have types of their own for both
        if is_full(error):
            what = f"a disk is full ({first_line(error)})"
            fix = "free some room and run the same command again: it goes on from the last checkpoint, if there is one"
            raise TrainingError(Problem(str(recipe.run_dir), what, fix)) from error
        if not ran_out_of_memory(error):
            raise
        raise TrainingError(_advice(error, recipe, choice)) from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the GPU or of this machine."""
    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: can't allocate memory" in text
    )


def _advice(error: BaseException, recipe: Recipe, choice: Choice) -> Problem:
    """What to change first, in the order in which it costs the least, with the peak that is then counted."""
    job, rows, level = choice.job, choice.rows, choice.checkpointing
    changes: list[tuple[str, Job, int, Checkpointing]] = []
    if rows > 1:
        changes.append(("train.per_device_train_batch_size=1", job, 1, level))
    if level != "full":
        changes.append(("train.gradient_checkpointing=full", job, rows, "full"))
    if job.quantization == "none":
        changes.append(("model.quantization=nf4", replace(job, quantization="nf4"), rows, level))
    half = recipe.data.max_length_tokens // 2
    changes.append((f"data.max_length_tokens={half}", replace(job, row_tokens=half), rows, level))
    advice = [f"{key} ({_gib(memory(other, size, kind).peak)})" for key, other, size, kind in changes]
    what = f"memory ran out ({first_line(error)}); {_gib(choice.memory.peak)} were counted"
    return Problem("training", what, "; or ".join([*advice, "a smaller base"]))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
