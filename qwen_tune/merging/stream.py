"""A merge as a stream: the merged model's tensors in order, each computed some rows at a time.

Whoever writes a format reads this: a `MergedTensor` says its name, type and shape, and gives its bytes in pieces, which
several threads may read at once. `safetensors_writer` is one reader.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

from qwen_tune.families.family import QUANTIZED
from qwen_tune.machine import import_without_gc
from qwen_tune.merging.steps import HEAD, MergePlan, Step, blocks, embedding_of
from qwen_tune.model.tensor_files import TensorSpan, read_into

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_tune.merging.arithmetic import Source

PIECE_BYTES = 8 << 20
"""Of a piece that is copied, at most; pieces that are computed have the rows of `steps.blocks`."""

Change: TypeAlias = Callable[[memoryview], bool]
"""Turns a piece of the base's bytes into the merged model's, in place; says whether they differ."""


class BaseWeights:
    """The base's tensors as training saw them: its own, or what 4 or 8 bits left of them.

    `rewritten` names those that are not the base's own: quantized and unpacked again.
    """

    def __init__(self, tensors: Mapping[str, TensorSpan], quantization: Mapping[str, Any] | None) -> None:
        self._settings = dict(quantization or {})
        self.rewritten = frozenset(name for name in tensors if quantization and QUANTIZED.fullmatch(name))

    def unpacked(self, name: str, span: TensorSpan) -> Tensor | None:
        """What is left of a tensor in 4 or 8 bits, in its own type: all at once, as its scales belong together.

        None for a tensor that stays as the base has it.
        """
        if name not in self.rewritten:
            return None
        import bitsandbytes as bnb
        import torch

        from qwen_tune.merging.arithmetic import read_tensor

        weight = read_tensor(span)
        unpacked: Tensor
        if self._settings.get("load_in_8bit"):
            packed = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
            unpacked = bnb.functional.int8_vectorwise_dequant(packed.data, packed.SCB)
        else:
            packed = bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                quant_type=self._settings.get("bnb_4bit_quant_type", "fp4"),
                compress_statistics=bool(self._settings.get("bnb_4bit_use_double_quant")),
                quant_storage=getattr(torch, self._settings.get("bnb_4bit_quant_storage", "uint8")),
            ).to("cpu")
            unpacked = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        return unpacked.to(weight.dtype)


@dataclass(frozen=True)
class Piece:
    """Some bytes of a tensor, from `start` on, and what is done to the base's."""

    name: str
    span: TensorSpan
    start: int
    size: int
    change: Change | None = None

    @property
    def place(self) -> int:
        return self.span.start + self.start


def read_pieces(pieces: Sequence[Piece], room: memoryview) -> list[bool]:
    """Fills a buffer with the merged bytes of some pieces, one after another; says of each whether it differs.

    Pieces that lie one after another in the base's file, as most do, are read at once.
    """
    left, at = room, 0
    while at < len(pieces):
        first = pieces[at]
        end = first.place
        while at < len(pieces) and (pieces[at].span.file, pieces[at].place) == (first.span.file, end):
            end += pieces[at].size
            at += 1
        read_into(first.span, first.start, left[: end - first.place])
        left = left[end - first.place :]
    differing = []
    for piece in pieces:
        differing.append(piece.change(room[: piece.size]) if piece.change else False)
        room = room[piece.size :]
    return differing


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the merged model: its name there, where the base has what it begins as, and what is done to it."""

    name: str
    span: TensorSpan
    steps: Sequence[Step]
    stream: MergeStream

    @property
    def dtype(self) -> str:
        """Safetensors' name of the type."""
        return self.span.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.span.shape

    @property
    def may_differ(self) -> bool:
        """Whether its bytes may differ from the base's."""
        return bool(self.steps) or self.name in self.stream.base.rewritten

    def pieces(self) -> Iterator[Piece]:
        span = self.span
        if not self.may_differ:
            for start in range(0, span.length, PIECE_BYTES):
                yield Piece(self.name, span, start, min(PIECE_BYTES, span.length - start))
            return
        change = _Change(self)
        for first, last in blocks(span.shape, self.steps):
            size = (last - first) * span.row_bytes
            yield Piece(self.name, span, first * span.row_bytes, size, partial(change, (first, last)))


class _Change:
    """What is done to a tensor. Its matrices are read when its first rows are, and live as long as its pieces."""

    def __init__(self, tensor: MergedTensor) -> None:
        self._tensor = tensor
        self._source: Source | None = None
        self._lock = threading.Lock()

    def __call__(self, rows: tuple[int, int], data: memoryview) -> bool:
        from qwen_tune.merging.arithmetic import Source

        tensor = self._tensor
        with self._lock:
            if self._source is None:
                unpacked = tensor.stream.base.unpacked(tensor.name, tensor.span)
                self._source = Source(tensor.name, tensor.span, tensor.steps, unpacked, tensor.stream.read_experts)
        return self._source.merge(rows, data)


class MergeStream:
    """The tensors of a merged model, in the base's order.

    Args:
        tensors: The base's.
        plan: What adapters do to them; an untied output matrix follows the embedding that it is copied from.
        base: What of them training saw.
    """

    def __init__(self, tensors: Mapping[str, TensorSpan], plan: MergePlan, base: BaseWeights) -> None:
        self.plan = plan
        self.base = base
        # Where each expert has a tensor of its own, the matrices of all of a layer are wanted hundreds of times.
        self.read_experts = lru_cache(maxsize=4)(_read_float)
        spans: dict[str, TensorSpan] = {}
        embedding = embedding_of(tensors)
        for name, span in tensors.items():
            spans[name] = span
            if plan.untied and name == embedding:
                spans[HEAD] = span
        self.tensors = [MergedTensor(name, span, plan.steps.get(name, ()), self) for name, span in spans.items()]


def _read_float(span: TensorSpan) -> Tensor:
    from qwen_tune.merging.arithmetic import read_tensor

    return read_tensor(span).float()


@contextmanager
def computing() -> Iterator[None]:
    """Imports torch on a thread of its own, while what needs none of it is copied; keeps its number of threads."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    importing = threading.Thread(target=import_without_gc, args=("torch",))
    importing.start()
    try:
        yield
    finally:
        importing.join()
        if before is not None:
            sys.modules["torch"].set_num_threads(before)
