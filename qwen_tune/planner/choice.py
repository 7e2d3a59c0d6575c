"""Which microbatch and which checkpointing suit a device's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qwen_tune.planner.activations import LEVELS, Checkpointing
from qwen_tune.planner.memory import Memory, memory
from qwen_tune.planner.workload import Workload
from qwen_tune.recipe.schema import TrainSpec

MARGIN = 0.05  # of a device's memory that is left free: sums over shapes know nothing of fragments
LARGEST_TOKENS = 16_384  # of a microbatch; more make the products no faster
LARGEST_MASKED_TOKENS = 4_096  # where a mask makes every token look at every other: attention grows with the square
LARGEST_ON_CPU = 4  # samples, without packing; on a CPU more gain nothing


@dataclass(frozen=True)
class Choice:
    """A microbatch that was chosen.

    Attributes:
        work: What it was chosen for.
        sequences: Sequences of it.
        checkpointing: Which activations are computed again.
        memory: What it is counted to take.
        available_bytes: The memory that it was chosen for; None where nothing limits it.
    """

    work: Workload
    sequences: int
    checkpointing: Checkpointing
    memory: Memory
    available_bytes: int | None

    @property
    def fits(self) -> bool:
        """Whether the plan fits into the memory with the margin."""
        return self.available_bytes is None or self.memory.peak <= usable_bytes(self.available_bytes)

    def facts(self) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": self.sequences,
            "gradient_checkpointing": self.checkpointing,
            "predicted_peak_bytes": self.memory.peak,
            "predicted_bytes": self.memory.parts(),
            "available_bytes": self.available_bytes,
            "fits": self.fits,
        }


def usable_bytes(available: int) -> int:
    """The memory that a plan may use, in bytes."""
    return int(available * (1 - MARGIN))


def levels(work: Workload, asked: str) -> tuple[Checkpointing, ...]:
    """The kinds of checkpointing that `train.gradient_checkpointing` leaves, the fastest first.

    `auto` takes half a layer only where layers are fused.
    """
    if asked != "auto":
        return tuple(level for level in LEVELS if level == asked)
    return tuple(level for level in LEVELS if level != "selective" or work.fuses_every_mlp)


def batch_sizes(work: Workload, asked: int | str, per_process: int) -> list[int]:
    """The sequences of a microbatch that `train.per_device_train_batch_size` leaves, the most first.

    Several share a forward only while their tokens are few, and only as many as divide a process' share of a step.
    """
    if isinstance(asked, int):
        return [asked]
    if not work.on_gpu:
        most = 1 if work.packing else LARGEST_ON_CPU
        return [next((size for size in range(most, 0, -1) if per_process % size == 0), 1)]
    sizes = [1]
    for size in range(2, min(per_process, LARGEST_TOKENS // work.sequence_tokens) + 1):
        most_tokens = LARGEST_MASKED_TOKENS if work.is_masked(size) else LARGEST_TOKENS
        if per_process % size == 0 and size * work.sequence_tokens <= most_tokens:
            sizes.append(size)
    return sizes[::-1]


def choose(work: Workload, train: TrainSpec, available_bytes: int | None) -> Choice:
    """The fastest plan that is counted to fit: no recomputation before some, and then the largest microbatch.

    Args:
        work: The run.
        train: The recipe's train section.
        available_bytes: The device's memory; None to take the fastest plan.

    Returns:
        The smallest plan where none fits; see `Choice.fits`.
    """
    per_process = max(train.global_batch_size // work.processes, 1)
    if not work.on_gpu and train.gradient_checkpointing == "auto":
        candidates: tuple[Checkpointing, ...] = ("none",)  # time is what runs out on a CPU
    else:
        candidates = levels(work, train.gradient_checkpointing)
    sizes = batch_sizes(work, train.per_device_train_batch_size, per_process)
    plans = [
        Choice(work, size, level, memory(work, size, level), available_bytes) for level in candidates for size in sizes
    ]
    smallest = min(plans, key=lambda plan: plan.memory.peak)
    return next((plan for plan in plans if plan.fits), smallest)
