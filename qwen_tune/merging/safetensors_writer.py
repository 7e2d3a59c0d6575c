"""Weight files of a merged model: made piece by piece in several threads, and kept across a kill.

What no adapter touches is copied; what one does is computed some rows at a time. A file gets its name when it is whole,
on the disk, and was looked at there; it is noted in `PROGRESS` then, and a merge that was killed resumes after it.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from qwen_tune.artifacts.directory import PROGRESS
from qwen_tune.disk import NO_ROOM, flush, parse_json, sha256, write_atomically
from qwen_tune.errors import MergeError, NoRoomError, Problem
from qwen_tune.merging.output_file import PART_BYTES, OutputFile
from qwen_tune.merging.steps import MergePlan, blocks
from qwen_tune.merging.stream import BaseWeights, ChangingTensor, Piece, computing, fill, read_float
from qwen_tune.model.tensor_files import TensorSpan, header, read_bytes, read_spans

CORES_A_SHARD = 2
"""One hashes what another computes meanwhile; a third would wait for the hash, which goes in order."""

MOST_SHARDS = 4
"""Files that are written at the same time, where there are cores for them: each takes about 40 MB of memory."""

LOOKED_AT_BYTES = 1 << 16  # at the start, the middle and the end of each tensor

Count = Callable[[int], None]


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
    cores: int
    count: Count = lambda _: None
    done: dict[str, ShardFacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Where each expert has a tensor of its own, the matrices of all of a layer are wanted hundreds of times.
        self._read_experts = lru_cache(maxsize=4)(read_float)
        self._noting = threading.Lock()
        self._stop = threading.Event()

    def find_done(self, wanted: Sequence[Shard]) -> int:
        """Finds files of the same merge that are whole, and removes all others; returns their tensors' bytes."""
        try:
            record = parse_json((self.directory / PROGRESS).read_text(encoding="utf-8"))
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
        missing = [shard for shard in wanted if shard.name not in self.done]
        at_once = max(1, min(self.cores // CORES_A_SHARD, MOST_SHARDS, len(missing)))
        with computing():
            if at_once == 1:
                for shard in missing:
                    self._write_shard(shard)
            else:
                self._write_together(missing, at_once)
        return {shard.name: self.done[shard.name] for shard in wanted}

    def _write_together(self, missing: Sequence[Shard], at_once: int) -> None:
        with ThreadPoolExecutor(at_once, "writes a file") as pool:
            begun = [pool.submit(self._write_shard, shard) for shard in missing]
            try:
                wait(begun, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._stop.set()  # the user does not wait for files of gigabytes
                raise
            finally:
                for future in begun:
                    future.cancel()  # those that have begun are finished, and kept
        for future in begun:
            if not future.cancelled():
                future.result()

    def _write_shard(self, shard: Shard) -> None:
        part = self.directory / f"{shard.name}.part"
        head = header(((name, span.dtype, span.shape) for name, span in shard.tensors), {"format": "pt"})
        changed: dict[str, None] = {}
        try:
            with OutputFile(part, len(head) + shard.length) as file:
                start = file.take(len(head))
                start.data[:] = head
                file.append(start)
                threads = min(self.cores, CORES_A_SHARD)
                fill(file, self._pieces(shard), partial(self._count, changed), threads=threads, stop=self._stop)
                if self._stop.is_set():
                    return
                digest = file.finish()
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            what = f"there is no room for {shard.name} ({shard.length / 1e9:.1f} GB)"
            fix = "free some space and run the command again: it resumes after the last whole file"
            raise NoRoomError(Problem(str(self.directory.parent), what, fix)) from error
        self._look_at(part, shard, changed)
        part.replace(self.directory / shard.name)
        flush(self.directory)
        with self._noting:
            self.done[shard.name] = ShardFacts(digest, len(head) + shard.length, tuple(changed))
            self._note()

    def _count(self, changed: dict[str, None], piece: Piece, differs: bool) -> None:
        if differs:
            changed[piece.name] = None
        self.count(piece.size)

    def _pieces(self, shard: Shard) -> Iterator[Piece]:
        for name, span in shard.tensors:
            steps = self.plan.steps.get(name, ())
            if steps or name in self.base.rewritten:
                tensor = ChangingTensor(name, span, steps, self.base, self._read_experts)
                for first, last in blocks(span.shape, steps):
                    size = (last - first) * span.row_bytes
                    yield Piece(name, span, first * span.row_bytes, size, partial(tensor.change, (first, last)))
            else:
                for start in range(0, span.length, PART_BYTES):
                    yield Piece(name, span, start, min(PART_BYTES, span.length - start))

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


def _not_as_planned(name: str, what: str) -> MergeError:
    return MergeError(Problem(name, f"in the file that was written, it {what}", "check the disk, and merge again"))
