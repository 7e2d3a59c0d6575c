"""Memory or disk that ran out: how that shows, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qwen_tune.disk import is_full
from qwen_tune.errors import Problem, QwenTuneError, TrainingError, first_line
from qwen_tune.recipe.schema import Recipe


@contextmanager
def advising(recipe: Recipe) -> Iterator[None]:
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
        raise TrainingError(_advice(error, recipe)) from error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of the GPU or of this machine."""
    text = str(error)
    return (
        isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: can't allocate memory" in text
    )


def _advice(error: BaseException, recipe: Recipe) -> Problem:
    """What to change first, in the order in which it costs the least."""
    advice = []
    if recipe.train.per_device_train_batch_size not in ("auto", 1):
        advice.append("train.per_device_train_batch_size=1 (the result stays the same)")
    if recipe.train.gradient_checkpointing == "none":
        advice.append("train.gradient_checkpointing=full (slower, the result stays the same)")
    if recipe.model.quantization == "none":
        advice.append("model.quantization=nf4 (the base in a quarter of the memory)")
    advice.append(f"data.max_length_tokens below {recipe.data.max_length_tokens}")
    advice.append("a smaller base")
    what = f"memory ran out ({first_line(error)})"
    return Problem("training", what, "; or ".join(advice))
