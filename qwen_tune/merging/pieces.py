"""Pieces of the base on their way into a merged file: read, changed by several threads, and put down in order."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from qwen_tune.machine import bring_in, usable_cores
from qwen_tune.merging.base_weights import BaseWeights
from qwen_tune.merging.output_file import PART_BYTES, OutputFile, Part
from qwen_tune.merging.steps import Step
from qwen_tune.model.tensor_files import TensorSpan, read_into

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_tune.merging.arithmetic import Source

MOST_WORKERS = 4

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


@dataclass(frozen=True)
class _Begun:
    """A piece that was read into its place; `differs` is None where nothing is done to it."""

    piece: Piece
    data: memoryview
    differs: Future[bool] | None

    def finish(self) -> bool:
        """Waits for the change, or makes it here if no thread has come to it."""
        if self.differs is None:
            return False
        if self.piece.change is not None and self.differs.cancel():
            return self.piece.change(self.data)
        return self.differs.result()


class Workers:
    """Threads that change pieces ahead of the one that reads, hashes and passes on."""

    def __init__(self, pool: ThreadPoolExecutor, ahead: int) -> None:
        self._pool, self._ahead = pool, ahead

    def fill(self, file: OutputFile, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, bool]]:
        """Puts pieces into a file, one behind another; yields each with whether it differs from the base's."""
        waiting: deque[tuple[Part, list[_Begun]]] = deque()
        try:
            for group in _groups(pieces):
                part = file.take(sum(piece.size for piece in group))
                waiting.append((part, self._begin(group, part.data)))
                if len(waiting) > self._ahead:
                    yield from _finish(file, *waiting.popleft())
            while waiting:
                yield from _finish(file, *waiting.popleft())
        finally:
            for _, begun in waiting:
                for one in begun:
                    if one.differs:
                        one.differs.cancel()

    def _begin(self, pieces: Sequence[Piece], room: memoryview) -> list[_Begun]:
        _read(pieces, room)
        begun = []
        for piece in pieces:
            data, room = room[: piece.size], room[piece.size :]
            begun.append(_Begun(piece, data, self._pool.submit(piece.change, data) if piece.change else None))
        return begun


def _read(pieces: Sequence[Piece], room: memoryview) -> None:
    """Reads pieces one behind another: at once those that lie so in the base's file too, as mostly all do."""
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


def _finish(file: OutputFile, part: Part, begun: Sequence[_Begun]) -> list[tuple[Piece, bool]]:
    finished = [(one.piece, one.finish()) for one in begun]
    file.append(part)
    return finished


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
def workers() -> Iterator[Workers]:
    """Threads that compute, each by itself: waiting for one another costs more than blocks of rows do."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    # What reads and hashes takes a core as well, and keeps up with two or three of these.
    count = min(max(usable_cores() - 1, 1), MOST_WORKERS)
    bringing_in = threading.Thread(target=bring_in, args=("torch",))
    bringing_in.start()  # what needs none of it is copied meanwhile
    try:
        with ThreadPoolExecutor(count, "merges") as pool:
            yield Workers(pool, 1 + count)
    finally:
        bringing_in.join()
        if before is not None:
            sys.modules["torch"].set_num_threads(before)
