"""The stream of a merge as safetensors files: written in several threads, and kept across a kill.

A file gets its name when it is whole, on the disk, and was looked at there; it is noted in `PROGRESS` then, and a merge
that was killed resumes after it.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from qwen_tune.artifacts.directory import FREE_SPACE
from qwen_tune.disk import NO_ROOM, flush, parse_json, sha256, write_atomically
from qwen_tune.errors import MergeError, NoRoomError, Problem
from qwen_tune.merging.output_file import PART_BYTES, OutputFile, Part
from qwen_tune.merging.stream import MergedTensor, Piece, computing, read_pieces
from qwen_tune.model.tensor_files import header, read_bytes, read_spans

PROGRESS = "merging.json"
CORES_A_SHARD = 2
"""One hashes what another computes meanwhile; a third would wait for the hash, which goes in order."""

MOST_SHARDS = 4
"""Files that are written at the same time, where there are cores for them: each takes about 40 MB of memory."""

LOOKED_AT_BYTES = 1 << 16  # at the start, the middle and the end of each tensor

Count: TypeAlias = Callable[[int], None]
Finished: TypeAlias = Callable[[Piece, bool], None]
"""Hears of each piece, in their order, and whether it differs from the base's."""


@dataclass(frozen=True)
class Shard:
    """One weight file: its name and its tensors in order."""

    name: str
    tensors: tuple[MergedTensor, ...]

    @property
    def length(self) -> int:
        return sum(tensor.span.length for tensor in self.tensors)


@dataclass(frozen=True)
class ShardFacts:
    """What was found in a file that was written: its hash, and the tensors that differ from the base's."""

    sha256: str
    bytes: int
    changed: tuple[str, ...]


def divide(tensors: Iterable[MergedTensor], largest: int | None) -> list[Shard]:
    """The files that hold these tensors: the base's own, or as many as are needed at `largest` bytes each."""
    by_name: dict[str, list[MergedTensor]] = {}
    if largest is None:
        for tensor in tensors:
            by_name.setdefault(tensor.span.file.name, []).append(tensor)
    else:
        parts: list[list[MergedTensor]] = [[]]
        size = 0
        for tensor in tensors:
            if parts[-1] and size + tensor.span.length > largest:
                parts.append([])
                size = 0
            parts[-1].append(tensor)
            size += tensor.span.length
        by_name = {f"model-{n:05}-of-{len(parts):05}.safetensors": part for n, part in enumerate(parts, start=1)}
    if len(by_name) == 1:
        by_name = {"model.safetensors": next(iter(by_name.values()))}
    return [Shard(name, tuple(part)) for name, part in by_name.items()]


def index_of(written: Sequence[Shard]) -> str:
    """model.safetensors.index.json of several files."""
    where = {tensor.name: shard.name for shard in written for tensor in shard.tensors}
    metadata = {"total_size": sum(shard.length for shard in written)}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"


class ShardWriter:
    """Writes the files of one merge into a directory.

    Args:
        directory: Where to.
        key: What identifies the files: those of another key are not taken up.
        cores: Threads that compute and hash.
        count: Hears of bytes that are done.
    """

    def __init__(self, directory: Path, key: str, cores: int, count: Count) -> None:
        self.done: dict[str, ShardFacts] = {}
        self._directory = directory
        self._key = key
        self._cores = cores
        self._count = count
        self._noting = threading.Lock()
        self._stop = threading.Event()

    def find_done(self, wanted: Sequence[Shard]) -> int:
        """Finds files of the same merge that are whole, and removes all others; returns their tensors' bytes."""
        try:
            record = parse_json((self._directory / PROGRESS).read_text(encoding="utf-8"))
            noted = record["shards"] if record["key"] == self._key else {}
            facts = {
                name: ShardFacts(entry["sha256"], entry["bytes"], tuple(entry["changed"]))
                for name, entry in noted.items()
            }
        except (OSError, ValueError, KeyError, TypeError):
            facts = {}
        for path in self._directory.iterdir():
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
        missing = [shard for shard in wanted if shard.name not in self.done]
        at_once = max(1, min(self._cores // CORES_A_SHARD, MOST_SHARDS, len(missing)))
        with computing():
            if at_once == 1:
                for shard in missing:
                    self._write_shard(shard)
            else:
                self._write_together(missing, at_once)
        return {shard.name: self.done[shard.name] for shard in wanted}

    def _write_together(self, missing: Sequence[Shard], at_once: int) -> None:
        with ThreadPoolExecutor(at_once, "writes a file") as pool:
            started = [pool.submit(self._write_shard, shard) for shard in missing]
            try:
                wait(started, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._stop.set()  # the user does not wait for files of gigabytes
                raise
            finally:
                for future in started:
                    future.cancel()  # those that have started are finished, and kept
        for future in started:
            if not future.cancelled():
                future.result()

    def _write_shard(self, shard: Shard) -> None:
        part = self._directory / f"{shard.name}.part"
        head = header(((tensor.name, tensor.dtype, tensor.shape) for tensor in shard.tensors), {"format": "pt"})
        pieces = (piece for tensor in shard.tensors for piece in tensor.pieces())
        changed: dict[str, None] = {}
        try:
            with OutputFile(part, len(head) + shard.length) as file:
                start = file.take(len(head))
                start.data[:] = head
                file.append(start)
                threads = min(self._cores, CORES_A_SHARD)
                _fill(file, pieces, partial(self._finished, changed), threads=threads, stop=self._stop)
                if self._stop.is_set():
                    return
                digest = file.finish()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            what = f"there is no room for {shard.name} ({shard.length / 1e9:.1f} GB)"
            raise NoRoomError(Problem(str(self._directory.parent), what, FREE_SPACE)) from error
        _look_at(part, shard, changed)
        part.replace(self._directory / shard.name)
        flush(self._directory)
        with self._noting:
            self.done[shard.name] = ShardFacts(digest, len(head) + shard.length, tuple(changed))
            self._note()

    def _finished(self, changed: dict[str, None], piece: Piece, differs: bool) -> None:
        if differs:
            changed[piece.name] = None
        self._count(piece.size)

    def _note(self) -> None:
        noted = {name: asdict(facts) for name, facts in self.done.items()}
        write_atomically(self._directory / PROGRESS, json.dumps({"key": self._key, "shards": noted}, indent=2) + "\n")


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
        """Takes parts until none is left or a thread has failed."""
        try:
            while (taken := self._take()) is not None:
                turn, (part, pieces) = taken
                differing = read_pieces(pieces, part.data)
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
        """Waits for a turn; False if a thread has failed."""
        with self._turns:
            self._turns.wait_for(lambda: self._turn == turn or self.problem is not None)
            return self.problem is None


def _fill(
    file: OutputFile, pieces: Iterable[Piece], finished: Finished, *, threads: int, stop: threading.Event
) -> None:
    """Puts pieces into a file, one after another, on some threads, this one included; `stop` makes them leave off."""
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


def _look_at(path: Path, shard: Shard, changed: Mapping[str, None]) -> None:
    """Reads parts of every tensor from the file, by the file's own header, and compares them with the base's.

    Raises:
        MergeError: A tensor is missing or misplaced, or differs without an adapter.
    """
    written = read_spans(path)
    for tensor in shard.tensors:
        found, span = written.get(tensor.name), tensor.span
        if found is None or (found.dtype, found.shape) != (tensor.dtype, tensor.shape):
            raise _not_as_planned(tensor.name, "is missing, or of another shape")
        if tensor.name in changed or tensor.name in tensor.stream.base.rewritten:
            continue
        size = min(span.length, LOOKED_AT_BYTES)
        for start in {0, (span.length - size) // 2, span.length - size}:
            if read_bytes(found, start, size) != read_bytes(span, start, size):
                raise _not_as_planned(tensor.name, "is not the base's, and no adapter changes it")


def _not_as_planned(name: str, what: str) -> MergeError:
    return MergeError(Problem(name, f"in the file that was written, it {what}", "check the disk, and merge again"))
