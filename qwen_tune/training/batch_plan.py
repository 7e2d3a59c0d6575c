"""The batch plan of a run: chosen for the device's memory, turned into steps, and explained when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch

from qwen_tune.disk import is_full
from qwen_tune.distributed.world import available_memory_bytes, world_size
from qwen_tune.errors import Problem, QwenTuneError, RecipeError, TrainingError, first_line
from qwen_tune.hardware import GIB, Dtype
from qwen_tune.machine import uses_gpu
from qwen_tune.model.base import BaseCheckpoint
from qwen_tune.planner.activations import Checkpointing
from qwen_tune.planner.choice import Choice, choose
from qwen_tune.planner.memory import memory
from qwen_tune.planner.workload import Workload, read_workload
from qwen_tune.recipe.schema import Recipe, TrainSpec

if TYPE_CHECKING:
    import torch


def choose_batch_plan(recipe: Recipe, base: BaseCheckpoint, dtype: torch.dtype) -> Choice:
    """The fastest plan that the GPU's memory allows; on a CPU nothing is computed again.

    Raises:
        ModelError: A name in the recipe means no module of the model, or it asks for an attention that is not here.
    """
    from qwen_tune.model.attention import choose_attention

    names: dict[str, Dtype] = {
        "torch.bfloat16": "bfloat16",
        "torch.float16": "float16",
        "torch.float32": "float32",
    }
    chosen = choose_attention(recipe.model, dtype, base.shape)
    work = read_workload(
        recipe, base.shape, dtype=names[str(dtype)], attention=chosen, processes=world_size(), on_gpu=uses_gpu()
    )
    return choose(work, recipe.train, available_memory_bytes() if uses_gpu() else None)


@dataclass(frozen=True)
class Schedule:
    """How a run's packs become optimizer steps; without packing a pack is one sample."""

    packs: int
    num_processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    steps_per_epoch: int
    max_steps: int
    warmup_steps: int
    gradient_checkpointing: Checkpointing

    def facts(self) -> dict[str, int | str]:
        """For run.json, where the packs of an epoch are called rows."""
        return {"rows" if name == "packs" else name: value for name, value in asdict(self).items()}


def plan_schedule(train: TrainSpec, choice: Choice, *, packs: int) -> Schedule:
    """Derives batch and accumulation from the global batch.

    Args:
        train: The recipe's train section.
        choice: The microbatch that suits the device.
        packs: Packs of one epoch; without packing samples.

    Raises:
        RecipeError: The global batch does not divide, or the warm-up is as long as the run.
    """
    num_processes = world_size()
    per_process, remainder = divmod(train.global_batch_size, num_processes)
    per_device = choice.sequences
    if remainder or per_process % per_device:
        share = per_device * num_processes
        below = train.global_batch_size // share * share
        nearest = " or ".join(str(size) for size in (below, below + share) if size)
        raise RecipeError(
            Problem(
                "train.global_batch_size",
                f"{train.global_batch_size} does not divide by {num_processes} process(es) x {per_device} each",
                f"set it to {nearest}",
            )
        )
    accumulation = per_process // per_device
    micro_batches = math.ceil(packs / (num_processes * per_device))
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
        packs=packs,
        num_processes=num_processes,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        steps_per_epoch=steps_per_epoch,
        max_steps=max_steps,
        warmup_steps=warmup_steps,
        gradient_checkpointing=choice.checkpointing,
    )


@contextmanager
def explain_out_of_memory(recipe: Recipe, choice: Choice) -> Iterator[None]:
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
            fix = "free some room and run the same command again: it resumes from the last checkpoint, if there is one"
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
    work, sequences, level = choice.work, choice.sequences, choice.checkpointing
    changes: list[tuple[str, Workload, int, Checkpointing]] = []
    if sequences > 1:
        changes.append(("train.per_device_train_batch_size=1", work, 1, level))
    if level != "full":
        changes.append(("train.gradient_checkpointing=full", work, sequences, "full"))
    if work.quantization == "none":
        changes.append(("model.quantization=nf4", replace(work, quantization="nf4"), sequences, level))
    half = recipe.data.max_length_tokens // 2
    changes.append((f"data.max_length_tokens={half}", replace(work, sequence_tokens=half), sequences, level))
    advice = [f"{key} ({_gib(memory(other, size, kind).peak)})" for key, other, size, kind in changes]
    what = f"memory ran out ({first_line(error)}); {_gib(choice.memory.peak)} were counted"
    return Problem("training", what, "; or ".join([*advice, "a smaller base"]))


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
