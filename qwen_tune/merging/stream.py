"""A merge as a stream: the merged model's tensors in order, each computed some rows at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from qwen_tune.families.family import QUANTIZED
from qwen_tune.machine import import_without_gc
from qwen_tune.merging.output_file import PART_BYTES, OutputFile, Part
from qwen_tune.merging.steps import Step
from qwen_tune.model.tensor_files import TensorSpan, read_into

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_tune.merging.arithmetic import Source


class BaseWeights:
    """The base's tensors as training saw them.

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


Finished: TypeAlias = "Callable[[Piece, bool], None]"
"""Hears of each piece, in their order, and whether it differs from the base's."""

Change: TypeAlias = Callable[[memoryview], bool]
"""Turns a piece of the base's bytes into the merged model's, in place; says whether they differ."""


@dataclass(frozen=True)
class Piece:
    """Some bytes of a file: a tensor's from `start` on, and what is done to them."""

    name: str
    span: TensorSpan
    start: int
    size: int
    change: Change | None = None

    @property
    def place(self) -> int:
        """Where it begins in the base's file."""
        return self.span.start + self.start


class ChangingTensor:
    """A tensor that changes. Its matrices are read when its first rows are wanted, and live as long as its pieces."""

    def __init__(
        self,
        name: str,
        span: TensorSpan,
        steps: Sequence[Step],
        base: BaseWeights,
        read_experts: Callable[[TensorSpan], Tensor],
    ) -> None:
        self._name, self._span, self._steps, self._base, self._read_experts = name, span, steps, base, read_experts
        self._source: Source | None = None
        self._lock = threading.Lock()

    def change(self, rows: tuple[int, int], data: memoryview) -> bool:
        from qwen_tune.merging.arithmetic import Source

        with self._lock:
            if self._source is None:
                unpacked = self._base.unpacked(self._name, self._span)
                self._source = Source(self._name, self._span, self._steps, unpacked, self._read_experts)
        return self._source.merge(rows, data)


def read_float(span: TensorSpan) -> Tensor:
    """A tensor in float32."""
    from qwen_tune.merging.arithmetic import read_tensor

    return read_tensor(span).float()


class _Line:
    """Parts of a file that threads take one by one. Each is read, changed, and in its turn hashed by whoever took it.

    Hashing is half of the work and has to go in the file's order: while one thread hashes, another computes ahead.
    """

    def __init__(self, file: OutputFile, pieces: Iterable[Piece], finished: Finished, stop: threading.Event) -> None:
        self._file, self._finished, self._stop = file, finished, stop
        self._parts = enumerate((file.take(sum(piece.size for piece in group)), group) for group in _groups(pieces))
        self._taking = threading.Lock()
        self._turns = threading.Condition()
        self._turn = 0
        self.problem: BaseException | None = None

    def work(self) -> None:
        """Takes parts until none is left, or a thread has met a problem."""
        try:
            while (taken := self._take()) is not None:
                turn, (part, pieces) = taken
                differing = _change(pieces, part.data)
                if not self._comes(turn):
                    return
                self._file.append(part)
                for piece, differs in zip(pieces, differing, strict=True):
                    self._finished(piece, differs)
                with self._turns:
                    self._turn += 1
                    self._turns.notify_all()
        except BaseException as error:  # whoever waits for the next turn would wait for ever
            with self._turns:
                self.problem = self.problem or error
                self._turns.notify_all()

    def _take(self) -> tuple[int, tuple[Part, list[Piece]]] | None:
        with self._taking:
            return None if self.problem or self._stop.is_set() else next(self._parts, None)

    def _comes(self, turn: int) -> bool:
        """Waits for a turn; False where it will not come."""
        with self._turns:
            self._turns.wait_for(lambda: self._turn == turn or self.problem is not None)
            return self.problem is None


def _change(pieces: Sequence[Piece], room: memoryview) -> list[bool]:
    """Reads pieces into their room and changes them; says of each whether it differs."""
    _read(pieces, room)
    differing = []
    for piece in pieces:
        differing.append(piece.change(room[: piece.size]) if piece.change else False)
        room = room[piece.size :]
    return differing


def _read(pieces: Sequence[Piece], room: memoryview) -> None:
    """Reads pieces one after another: at once those that lie so in the base's file too, as mostly all do."""
    at = 0
    while at < len(pieces):
        first = pieces[at]
        end = first.place
        while at < len(pieces) and (pieces[at].span.file, pieces[at].place) == (first.span.file, end):
            end += pieces[at].size
            at += 1
        size = end - first.place
        read_into(first.span, first.start, room[:size])
        room = room[size:]


def fill(file: OutputFile, pieces: Iterable[Piece], finished: Finished, *, threads: int, stop: threading.Event) -> None:
    """Puts pieces into a file, one after another.

    Args:
        file: The file.
        pieces: The pieces.
        finished: See `Finished`; called by one thread at a time.
        threads: Threads that work on it, this one included.
        stop: Makes them leave off; the file is not whole then.
    """
    line = _Line(file, pieces, finished, stop)
    others = [threading.Thread(target=line.work, name="merges") for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    line.work()
    for thread in others:
        thread.join()
    if line.problem:
        raise line.problem


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """As many pieces at a time as a part of a file has room for, one at least."""
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.size > PART_BYTES:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.size
    if group:
        yield group


@contextmanager
def computing() -> Iterator[None]:
    """Imports torch on a thread of its own, while what needs none of it is copied; keeps its number of threads."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    bringing_in = threading.Thread(target=import_without_gc, args=("torch",))
    bringing_in.start()
    try:
        yield
    finally:
        bringing_in.join()
        if before is not None:
            sys.modules["torch"].set_num_threads(before)
