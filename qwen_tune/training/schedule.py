"""Batch arithmetic: users ask for the batch that decides the result, and the rest follows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from qwen_tune.errors import Problem, RecipeError
from qwen_tune.machine import world_size
from qwen_tune.planner.activations import Checkpointing
from qwen_tune.planner.choice import Choice
from qwen_tune.recipe.schema import TrainSpec


@dataclass(frozen=True)
class Schedule:
    """How a run's rows become optimizer steps. A row is a pack when packing, else a sample."""

    rows: int
    num_processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_epoch: int
    max_steps: int
    warmup_steps: int
    gradient_checkpointing: Checkpointing

    def facts(self) -> dict[str, int | str]:
        """For run.json."""
        return asdict(self)


def plan_schedule(train: TrainSpec, choice: Choice, *, rows: int) -> Schedule:
    """Derives batch and accumulation from the global batch.

    Args:
        train: The recipe's train section.
        choice: The microbatch that suits the device.
        rows: Rows of one epoch.

    Raises:
        RecipeError: The global batch does not divide, or the warm-up is as long as the run.
    """
    num_processes = world_size()
    per_process, remainder = divmod(train.global_batch_size, num_processes)
    per_device = choice.rows
    if remainder or per_process % per_device:
        share = per_device * num_processes
        below = train.global_batch_size // share * share
        nearest = " or ".join(str(size) for size in (below, below + share) if size)
        raise RecipeError(
            Problem(
                "train.global_batch_size",
                f"{train.global_batch_size} does not divide by {num_processes} process(es) x {per_device} row(s) each",
                f"set it to {nearest}",
            )
        )
    accumulation = per_process // per_device
    micro_batches = math.ceil(rows / (num_processes * per_device))
    steps_per_epoch = math.ceil(micro_batches / accumulation)
    max_steps = train.max_steps or math.ceil(train.num_train_epochs * steps_per_epoch)
    # A share is rounded down: rounded up, the first of a few steps would have a learning rate of zero.
    warmup_steps = int(train.warmup_steps * max_steps if train.warmup_steps < 1 else train.warmup_steps)
    if warmup_steps >= max_steps:
        raise RecipeError(
            Problem(
                "train.warmup_steps",
                f"{warmup_steps} steps of warm-up in a run of {max_steps}",
                "write a share, such as 0.03, or fewer steps",
            )
        )
    return Schedule(
        rows=rows,
        num_processes=num_processes,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        steps_per_epoch=steps_per_epoch,
        max_steps=max_steps,
        warmup_steps=warmup_steps,
        gradient_checkpointing=choice.checkpointing,
    )
