"""The arithmetic of a merge, on some rows of a tensor at a time: the same operations as PEFT's, so the same bits."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from qwen_tune.errors import MergeError, Problem
from qwen_tune.machine import usable_cores
from qwen_tune.merging.steps import LEAST_ROWS, BiasShift, ExpertLowRank, LowRank, Replacement, Step, TokenRows
from qwen_tune.model.tensor_files import TensorSpan, read_into

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The types of weights that an adapter can be merged into, by safetensors' names."""

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

Rows: TypeAlias = "tuple[int, int]"


def read_tensor(span: TensorSpan, rows: Rows | None = None) -> Tensor:
    """A tensor, or its matrix rows [first, last)."""
    first, last = rows or (0, 0)
    size = (last - first) * span.row_bytes if rows else span.length
    buffer = torch.empty(size, dtype=torch.uint8)
    read_into(span, first * span.row_bytes, memoryview(buffer.numpy().data))
    shape = (last - first, *span.shape[1:]) if rows else span.shape
    return buffer.view(DTYPES[span.dtype]).reshape(shape)


class Source:
    """A tensor that changes, with the matrices of its adapters; several threads may ask for rows at once.

    Args:
        name: Its name, for messages.
        span: Where it begins as the base's.
        steps: What is done to it.
        unpacked: What is taken in place of the base's own, see `BaseWeights`.
        read_experts: Reads a matrix of all experts of a layer.
    """

    def __init__(
        self,
        name: str,
        span: TensorSpan,
        steps: Sequence[Step],
        unpacked: Tensor | None,
        read_experts: Callable[[TensorSpan], Tensor],
    ) -> None:
        self._name, self._span, self._unpacked = name, span, unpacked
        self._steps = [_in_memory(step, read_experts) for step in steps]
        self._has_changed = False
        # A thread of ours has a core to itself. But products of few rows differ in their last bits with the number of
        # torch's threads, and PEFT's are those of a whole process.
        self._threads = 1 if span.shape and span.shape[0] >= LEAST_ROWS else usable_cores()

    @torch.inference_mode()
    def merge(self, rows: Rows, data: memoryview) -> bool:
        """Merges rows [first, last), whose bytes are the base's, in place.

        Returns:
            Whether they differ now. After the first rows that do, all are said to.

        Raises:
            MergeError: There are values in them that are not finite.
        """
        torch.set_num_threads(self._threads)
        if not data:
            return False
        shape = (rows[1] - rows[0], *self._span.shape[1:]) if self._span.shape else ()
        weight = torch.frombuffer(data, dtype=DTYPES[self._span.dtype]).view(shape)
        # What 4 or 8 bits left of the base is not the adapter's doing.
        seen = weight.clone() if not self._steps else None
        if self._unpacked is not None:
            weight.copy_(self._unpacked[rows[0] : rows[1]])
        original = seen if seen is not None else None if self._has_changed else weight.clone()
        result = apply(self._steps, weight, rows)
        if result.data_ptr() != weight.data_ptr():
            weight.copy_(result)
        # A finite sum has finite terms only, and takes half the time of a look at each; but it may overflow by itself.
        if not math.isfinite(weight.sum()) and not math.isfinite(weight.abs().max()):
            fix = "the adapter diverged: take an earlier checkpoint"
            raise MergeError(Problem(self._name, "the merged tensor holds values that are not finite", fix))
        if original is not None:
            self._has_changed = not torch.equal(_bits(weight), _bits(original))
        return self._has_changed


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


class Applied(Protocol):
    """A step with its matrices in memory."""

    needs_base: bool

    def merge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        """The rows with the step done; `weight` may be changed in place, `base` may not."""

    def unmerge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        """The rows with the step taken back, as exactly as their type allows."""


def apply(steps: Sequence[Applied], weight: Tensor, rows: Rows) -> Tensor:
    """Some rows of a tensor with all steps done in turn, each rounded to the tensor's type once."""
    done: list[tuple[Applied, Tensor]] = []  # with the base that each saw
    for step in steps:
        base = weight
        if step.needs_base and done:
            # PEFT takes the adapters before off and puts them on again, and rounds each time.
            for earlier, seen in reversed(done):
                weight = earlier.unmerge(weight, rows, seen)
            base = weight.clone()
            done = [(earlier, base) for earlier, _ in done]
            for earlier, _ in done:
                weight = earlier.merge(weight, rows, base)
        weight = step.merge(weight, rows, base)
        done.append((step, base))
    return weight


def _scratch(rows: int, columns: int) -> Tensor:
    """Room for a block of float32, one for each thread: memory that is new each time costs more than the arithmetic."""
    room: Tensor | None = getattr(_of_thread, "room", None)
    if room is None or room.numel() < rows * columns:
        room = _of_thread.room = torch.empty(rows * columns)
    return room[: rows * columns].view(rows, columns)


_of_thread = threading.local()


@lru_cache
def _adds_as_it_multiplies(rows: int, rank: int, columns: int) -> bool:
    """Whether W + B·A in one call has the bits of B·A, and then the sum, for matrices of these shapes.

    It takes two thirds of the time. Whether it begins at W or ends with it is for the routine to choose, by shapes and
    processor, so it is tried out: an order of its own shows in a quarter of all numbers.
    """
    a = torch.linspace(-9, 9, rank * columns).view(rank, columns).sin_()
    b = torch.linspace(-7, 7, rows * rank).view(rows, rank).cos_()
    weight = torch.linspace(-1, 1, rows * columns).view(rows, columns)
    return torch.equal(torch.addmm(weight, b, a), torch.mm(b, a).add_(weight))


def _in_memory(step: Step, read_experts: Callable[[TensorSpan], Tensor]) -> Applied:
    if isinstance(step, LowRank):
        a, b = read_tensor(step.a).float(), read_tensor(step.b).float()
        magnitude = read_tensor(step.magnitude).float() if step.magnitude else None
        kind = _EmbeddingProduct if step.is_embedding else _RoundedProduct if step.rounds_first else _Product
        return kind(a, b, step.scaling, magnitude)
    if isinstance(step, ExpertLowRank):
        return _ExpertProduct(read_experts(step.a), read_experts(step.b), step)
    if isinstance(step, TokenRows):
        return _Tokens(step)
    if isinstance(step, BiasShift):
        return _Shift(read_tensor(step.shift).float() * step.scaling)
    return _Replaced(step)


@dataclass
class _Product:
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None
    needs_base = False
    can_add = False
    """Whether W + B·A is all that is to be done."""

    def __post_init__(self) -> None:
        self.needs_base = self.magnitude is not None
        if math.frexp(self.scaling)[0] == 0.5:
            # A power of two, as mostly: B takes it without rounding, in place of every product.
            self.b, self.scaling = self.b * self.scaling, 1.0
        self.can_add = type(self) is _Product and self.magnitude is None and self.scaling == 1

    def delta(self, rows: Rows, _dtype: torch.dtype) -> Tensor:
        b = self.b[rows[0] : rows[1]]
        product = torch.mm(b, self.a, out=_scratch(b.shape[0], self.a.shape[1]))
        return product if self.scaling == 1 else product.mul_(self.scaling)

    def factor(self, weight: Tensor, rows: Rows) -> Tensor:
        """DoRA's magnitudes over the norms of the rows."""
        assert self.magnitude is not None
        norms: Tensor = torch.linalg.norm(weight, dim=1)
        return (self.magnitude[rows[0] : rows[1]] / norms).view(-1, 1)

    def merge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        if self.can_add and weight.element_size() <= 4:
            b = self.b[rows[0] : rows[1]]
            if _adds_as_it_multiplies(b.shape[0], *self.a.shape):
                return weight.copy_(_scratch(*weight.shape).copy_(weight).addmm_(b, self.a))
        delta = self.delta(rows, weight.dtype)
        if self.magnitude is None:
            if weight.element_size() > 2:
                return weight.add_(delta)
            return weight.copy_(delta.add_(weight))  # `weight += delta` in half the time, with the same rounding
        merged: Tensor = self.factor(base + delta, rows) * (weight + delta)
        return merged.to(weight.dtype)

    def unmerge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        delta = self.delta(rows, weight.dtype)
        if self.magnitude is None:
            weight -= delta.to(weight.dtype)
            return weight
        return (weight / self.factor(base + delta, rows) - delta).to(weight.dtype)


@dataclass
class _RoundedProduct(_Product):
    """A product that PEFT rounds to the weight's type before it adds it."""

    def merge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        return weight.add_(self.delta(rows, weight.dtype).to(weight.dtype))


@dataclass
class _EmbeddingProduct(_Product):
    def delta(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        delta = (self.b @ self.a[:, rows[0] : rows[1]]).T * self.scaling
        return delta if self.magnitude is not None else delta.to(dtype)

    def factor(self, weight: Tensor, rows: Rows) -> Tensor:
        """The same for columns: an embedding's magnitudes belong to its dimensions, so all rows have to be there."""
        assert self.magnitude is not None
        norms: Tensor = torch.linalg.norm(weight.T, dim=1)
        return (self.magnitude / norms).view(1, -1)


@dataclass
class _ExpertProduct:
    a: Tensor
    b: Tensor
    step: ExpertLowRank
    needs_base = False

    @cached_property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """A as (experts, rank, in) and B as (out, rank, experts)."""
        experts = self.step.experts
        return self.a.reshape(experts, -1, self.a.shape[-1]), self.b.reshape(self.b.shape[0], -1, experts)

    def delta(self, weight: Tensor, rows: Rows) -> Tensor:
        a, b = self.matrices
        if self.step.expert is None:
            first, last = rows
            delta = torch.einsum("o r e, e r i -> e o i", b[:, :, first:last], a[first:last]) * self.step.scaling
        else:
            first, last = self.step.first + rows[0], self.step.first + rows[1]
            expert = slice(self.step.expert, self.step.expert + 1)
            delta = torch.einsum("o r e, e r i -> e o i", b[first:last, :, expert], a[expert])[0] * self.step.scaling
        rounded: Tensor = delta.to(weight.dtype)
        return rounded

    def merge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        weight += self.delta(weight, rows)
        return weight

    def unmerge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        weight -= self.delta(weight, rows)
        return weight


@dataclass
class _Tokens:
    step: TokenRows
    needs_base = False

    @cached_property
    def values(self) -> Tensor:
        return read_tensor(self.step.values)

    def merge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        for number, token in enumerate(self.step.indices):
            if rows[0] <= token < rows[1]:
                weight[token - rows[0]] = self.values[number].to(weight.dtype)
        return weight

    def unmerge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        return weight  # the rows of other tokens are what they were, and no adapter adds to these


@dataclass
class _Replaced:
    step: Replacement
    needs_base = False

    def merge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        values = read_tensor(self.step.values, rows if self.step.values.shape else None)
        return values.reshape(weight.shape).to(weight.dtype)

    def unmerge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        return weight


@dataclass
class _Shift:
    shift: Tensor
    needs_base = False

    def merge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        weight += self.shift[rows[0] : rows[1]]
        return weight

    def unmerge(self, weight: Tensor, rows: Rows, base: Tensor) -> Tensor:
        weight -= self.shift[rows[0] : rows[1]]
        return weight
