"""Weight files of a merged model: made piece by piece in several threads, and kept across a kill.

What no adapter touches is copied; what one does is computed some rows at a time. A file gets its name when it is whole,
on the disk, and was looked at there; it is noted in `PROGRESS` then, and a merge that was killed goes on behind it.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from qwen_tune.disk import NO_ROOM, flush, sha256
from qwen_tune.errors import MergeError, NoRoomError, Problem
from qwen_tune.machine import bring_in, usable_cores
from qwen_tune.merging.base_weights import BaseWeights
from qwen_tune.merging.output_file import OutputFile
from qwen_tune.merging.steps import MergePlan, Step, blocks
from qwen_tune.model.tensor_files import TensorSpan, header, read_bytes, read_into, read_spans
from qwen_tune.runs.directory import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from qwen_tune.merging.arithmetic import Source

PROGRESS = "merging.json"
CHUNK_BYTES = 4 << 20
MOST_WORKERS = 4
LOOKED_AT_BYTES = 1 << 16  # at the start, the middle and the end of each tensor

Count = Callable[[int], None]
Change: TypeAlias = Callable[[memoryview], bool]
"""Turns a piece of the base's bytes into the merged model's, in place; says whether they differ."""


@dataclass(frozen=True)
class Shard:
    """One weight file: its name and its tensors in order, by the names that they have in it and in the base."""

    name: str
    tensors: tuple[tuple[str, TensorSpan], ...]

    @property
    def length(self) -> int:
        """Bytes of all tensors."""
        return sum(span.length for _, span in self.tensors)


@dataclass(frozen=True)
class ShardFacts:
    """What was found in a file that was written: its hash, and the tensors that differ from the base's."""

    sha256: str
    bytes: int
    changed: tuple[str, ...]


def shards(tensors: Mapping[str, TensorSpan], largest: int | None) -> list[Shard]:
    """The files that hold these tensors: the base's own, or as many as are needed at `largest` bytes each."""
    groups: list[tuple[str, list[tuple[str, TensorSpan]]]] = []
    if largest is None:
        by_file: dict[str, list[tuple[str, TensorSpan]]] = {}
        for name, span in tensors.items():
            by_file.setdefault(span.file.name, []).append((name, span))
        groups = list(by_file.items())
    else:
        parts: list[list[tuple[str, TensorSpan]]] = [[]]
        size = 0
        for name, span in tensors.items():
            if parts[-1] and size + span.length > largest:
                parts.append([])
                size = 0
            parts[-1].append((name, span))
            size += span.length
        count = len(parts)
        groups = [(f"model-{n:05}-of-{count:05}.safetensors", part) for n, part in enumerate(parts, start=1)]
    if len(groups) == 1:
        groups = [("model.safetensors", groups[0][1])]
    return [Shard(name, tuple(part)) for name, part in groups]


def index_of(written: Sequence[Shard]) -> str:
    """The index of several files."""
    where = {name: shard.name for shard in written for name, _ in shard.tensors}
    metadata = {"total_size": sum(shard.length for shard in written)}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


@dataclass
class ShardWriter:
    """Writes the files of one merge into a directory; `key` names what they are made from."""

    directory: Path
    key: str
    plan: MergePlan
    base: BaseWeights
    count: Count = lambda _: None
    done: dict[str, ShardFacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Where each expert has a tensor of its own, the matrices of all of a layer are wanted hundreds of times.
        self._read_experts = lru_cache(maxsize=4)(_read_float)

    def find_done(self, wanted: Sequence[Shard]) -> int:
        """Finds files of the same merge that are whole, and removes all others; returns their tensors' bytes."""
        try:
            record = json.loads((self.directory / PROGRESS).read_text(encoding="utf-8"))
            noted = record["shards"] if record["key"] == self.key else {}
            facts = {
                name: ShardFacts(entry["sha256"], entry["bytes"], tuple(entry["changed"]))
                for name, entry in noted.items()
            }
        except (OSError, ValueError, KeyError, TypeError):
            facts = {}
        for path in self.directory.iterdir():
            known = facts.get(path.name)
            if known and path.stat().st_size == known.bytes and sha256(path) == known.sha256:
                self.done[path.name] = known
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._note()
        return sum(shard.length for shard in wanted if shard.name in self.done)

    def write(self, wanted: Sequence[Shard]) -> dict[str, ShardFacts]:
        """Writes the files that are not there yet; returns what was found in each.

        Raises:
            MergeError: What was written is not what it should be, or there is no room for it.
        """
        with _workers() as workers:
            for shard in wanted:
                if shard.name not in self.done:
                    self._write_shard(shard, workers)
        return {shard.name: self.done[shard.name] for shard in wanted}

    def _write_shard(self, shard: Shard, workers: _Workers) -> None:
        part = self.directory / f"{shard.name}.part"
        head = header(((name, span.dtype, span.shape) for name, span in shard.tensors), {"format": "pt"})
        changed: dict[str, None] = {}
        try:
            with OutputFile(part, len(head) + shard.length) as file:
                file.append(head)
                for name, data, differs in workers.in_order(self._pieces(shard)):
                    file.append(data)
                    if differs:
                        changed[name] = None
                    self.count(len(data))
                digest = file.finish()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            what = f"there is no room for {shard.name} ({shard.length / 1e9:.1f} GB)"
            fix = "free some space and run the command again: it goes on behind the last whole file"
            raise NoRoomError(Problem(str(self.directory.parent), what, fix)) from error
        self._look_at(part, shard, changed)
        part.replace(self.directory / shard.name)
        flush(self.directory)
        self.done[shard.name] = ShardFacts(digest, len(head) + shard.length, tuple(changed))
        self._note()

    def _pieces(self, shard: Shard) -> Iterator[_Piece]:
        for name, span in shard.tensors:
            steps = self.plan.steps.get(name, ())
            if steps or name in self.base.rewritten:
                tensor = _Tensor(name, span, steps, self.base, self._read_experts)
                for first, last in blocks(span.shape, steps):
                    size = (last - first) * span.row_bytes
                    yield _Piece(name, span, first * span.row_bytes, size, partial(tensor.change, (first, last)))
            else:
                for start in range(0, span.length, CHUNK_BYTES):
                    yield _Piece(name, span, start, min(CHUNK_BYTES, span.length - start))

    def _look_at(self, path: Path, shard: Shard, changed: Mapping[str, None]) -> None:
        """Reads parts of every tensor from the file, by the file's own header, and compares them with the base's.

        Raises:
            MergeError: A tensor is missing or misplaced, or differs without an adapter.
        """
        written = read_spans(path)
        for name, span in shard.tensors:
            found = written.get(name)
            if found is None or (found.dtype, found.shape) != (span.dtype, span.shape):
                raise _not_as_planned(name, "is missing, or of another shape")
            if name in changed or name in self.base.rewritten:
                continue
            size = min(span.length, LOOKED_AT_BYTES)
            for start in {0, (span.length - size) // 2, span.length - size}:
                if read_bytes(found, start, size) != read_bytes(span, start, size):
                    raise _not_as_planned(name, "is not the base's, and no adapter changes it")

    def _note(self) -> None:
        noted = {name: asdict(facts) for name, facts in self.done.items()}
        write_atomically(self.directory / PROGRESS, json.dumps({"key": self.key, "shards": noted}, indent=2) + "\n")


@dataclass(frozen=True)
class _Piece:
    """Some bytes of a file: a tensor's from `start` on, and what is done to them."""

    name: str
    span: TensorSpan
    start: int
    size: int
    change: Change | None = None


class _Tensor:
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


def _read_float(span: TensorSpan) -> Tensor:
    from qwen_tune.merging.arithmetic import read_tensor

    return read_tensor(span).float()


class _Workers:
    """Threads that change pieces ahead of whoever takes them in order, in buffers that are used again and again."""

    def __init__(self, pool: ThreadPoolExecutor, ahead: int) -> None:
        self._pool, self._ahead = pool, ahead
        self._waiting: deque[tuple[_Piece, bytearray, Future[bool] | None]] = deque()
        self._free: list[bytearray] = []

    def in_order(self, pieces: Iterator[_Piece]) -> Iterator[tuple[str, memoryview, bool]]:
        """Tensor, bytes, and whether they differ from the base's; each to be used before the next is asked for."""
        try:
            for piece in pieces:
                buffer = self._free.pop() if self._free else bytearray()
                if len(buffer) < piece.size:
                    buffer = bytearray(piece.size)
                data = memoryview(buffer)[: piece.size]
                read_into(piece.span, piece.start, data)
                change = self._pool.submit(piece.change, data) if piece.change else None
                self._waiting.append((piece, buffer, change))
                if len(self._waiting) > self._ahead:
                    yield from self._next()
            while self._waiting:
                yield from self._next()
        finally:
            for *_, change in self._waiting:
                if change:
                    change.cancel()

    def _next(self) -> Iterator[tuple[str, memoryview, bool]]:
        piece, buffer, change = self._waiting.popleft()
        yield piece.name, memoryview(buffer)[: piece.size], change.result() if change else False
        self._free.append(buffer)


@contextmanager
def _workers() -> Iterator[_Workers]:
    """Threads that compute, each by itself: waiting for one another costs more than blocks of rows do."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else None
    # What reads and hashes takes a core as well, and keeps up with two or three of these.
    count = min(max(usable_cores() - 1, 1), MOST_WORKERS)
    bringing_in = threading.Thread(target=bring_in, args=("torch",))
    bringing_in.start()  # what needs none of it is copied meanwhile
    try:
        with ThreadPoolExecutor(count, "merges") as pool:
            yield _Workers(pool, 2 * count)
    finally:
        bringing_in.join()
        if before is not None:
            sys.modules["torch"].set_num_threads(before)


def _not_as_planned(name: str, what: str) -> MergeError:
    return MergeError(Problem(name, f"in the file that was written, it {what}", "check the disk, and merge again"))
