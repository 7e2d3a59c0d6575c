"""What can be done to a tensor of the base, and the rows in which it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qwen_tune.families import family
from qwen_tune.model.tensor_files import TensorSpan

HEAD, EMBEDDING = f"{family.HEAD}.weight", f"{family.EMBEDDING}.weight"

BLOCK_BYTES = 2 << 20
"""Of float32 in a block: what is worked on stays in the processor's caches."""

LEAST_ROWS = 64
"""Rows in a block at least: products of a few rows are made by other routines, which sum in another order."""


@dataclass(frozen=True)
class LowRank:
    """W + scaling · B·A (Hu et al. 2021), with a magnitude for each row as DoRA has it (Liu et al. 2024).

    Of an embedding, W + scaling · (B·A)ᵀ.
    """

    a: TensorSpan
    b: TensorSpan
    scaling: float
    magnitude: TensorSpan | None = None
    is_embedding: bool = False
    rounds_first: bool = False
    """Whether the product is rounded to the tensor's type before it is added, as PEFT does for target_parameters."""


@dataclass(frozen=True)
class ExpertLowRank:
    """W[e] + scaling · B[:, :, e]·A[e] of a parameter that holds all experts of a layer.

    `expert` and `first` say which part of it a tensor is, in checkpoints that keep a file of each: the rows from
    `first` on of one expert; None for the parameter as a whole.
    """

    a: TensorSpan
    b: TensorSpan
    scaling: float
    experts: int
    expert: int | None = None
    first: int = 0


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that were trained themselves."""

    indices: tuple[int, ...]
    values: TensorSpan


@dataclass(frozen=True)
class Replacement:
    """A tensor that was trained itself (`modules_to_save`)."""

    values: TensorSpan


@dataclass(frozen=True)
class BiasShift:
    """b + scaling · the bias of B."""

    shift: TensorSpan
    scaling: float


Step: TypeAlias = LowRank | ExpertLowRank | TokenRows | Replacement | BiasShift


@dataclass
class MergePlan:
    """The steps of each tensor that changes, in the order of the adapters.

    `untied` is whether the output matrix gets a tensor of its own, copied from the embedding's; `consumed` counts the
    adapters' tensors.
    """

    steps: dict[str, tuple[Step, ...]]
    untied: bool = False
    consumed: int = 0


def blocks(shape: tuple[int, ...], steps: Sequence[Step] = ()) -> list[tuple[int, int]]:
    """A tensor's rows in blocks: each of `LEAST_ROWS` at least, if the tensor has as many.

    All rows in one where a step needs them (DoRA on an embedding).
    """
    if not shape:
        return [(0, 1)]
    if any(isinstance(step, LowRank) and step.is_embedding and step.magnitude for step in steps):
        return [(0, shape[0])]
    row = 4
    for size in shape[1:]:
        row *= size
    rows = max(LEAST_ROWS if len(shape) < 3 else 1, BLOCK_BYTES // max(row, 1))
    starts = list(range(0, shape[0], rows)) or [0]
    if len(starts) > 1 and shape[0] - starts[-1] < LEAST_ROWS and len(shape) < 3:
        starts.pop()
    return list(zip(starts, [*starts[1:], shape[0]], strict=True))


def embedding_of(tensors: Mapping[str, TensorSpan]) -> str | None:
    """The name of the token embedding."""
    return next((name for name in tensors if name.endswith(EMBEDDING)), None)
