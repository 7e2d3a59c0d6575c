"""A large source in parts, each made into batches by one of several processes, and taken together in order."""

from __future__ import annotations

import itertools
import pickle
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from qwen_tune.chatml.encoder import Encoder
from qwen_tune.chatml.fast_encoder import FastEncoderError
from qwen_tune.chatml.rendering import Renderer
from qwen_tune.errors import DataError, Problem
from qwen_tune.prepared.row_batches import Batcher, Problems, collecting_by_batch
from qwen_tune.prepared.token_store import StoredBatch
from qwen_tune.prepared.workers import WorkerError, in_processes, processes_that_fit
from qwen_tune.recipe.schema import SourceSpec
from qwen_tune.rows.files import in_ranges
from qwen_tune.rows.source_file import SourceFile
from qwen_tune.rows.sources import SourceReader, missed_columns

WORTH_PROCESSES = 8 << 20
"""Bytes of data from which several processes take less time than one: about a second's work."""

PARTS_EACH = 16
"""Parts a process, so that none waits long for the last."""

SMALLEST_PART, LARGEST_PART = 1 << 20, 32 << 20  # bytes

FIXES: dict[int | None, str] = {
    signal.SIGKILL: "free memory, which the system may have lacked, or use fewer cores: taskset -c 0,1 qwen-tune …",
    signal.SIGTERM: "run the command again",
}
"""What helps where a process was killed from outside; other signals are faults."""


@dataclass(frozen=True)
class Division:
    """How a source is shared out: among how many processes, in ranges of lines of about how many bytes."""

    processes: int
    part_bytes: int

    @classmethod
    def of(cls, data_bytes: int) -> Division:
        """What suits so much data and this machine."""
        processes = processes_that_fit() if data_bytes >= WORTH_PROCESSES else 1
        part = data_bytes // (processes * PARTS_EACH)
        return cls(processes, min(max(part, SMALLEST_PART), LARGEST_PART))


@dataclass(frozen=True)
class _Done:
    """What a process says of a part; its batches are in the part's file."""

    rows: int
    problems: Problems
    columns_missed: set[str] | None
    encoded_rightly: bool


class ParallelBatcher:
    """The rows of a source as batches, made by several processes; has what a `Batcher` has.

    They are the same batches' worth of bytes, and the same problems, however many processes there are.
    """

    def __init__(
        self,
        parts: Sequence[SourceReader],
        source: SourceSpec,
        renderer: Renderer,
        encoder: Encoder,
        *,
        folder: Path,
        processes: int,
    ) -> None:
        """Takes the parts; nothing is read yet.

        Args:
            parts: A reader for each, in order.
            source: What they are the parts of.
            renderer: What renders rows in every process.
            encoder: What encodes them.
            folder: Where processes write their batches.
            processes: How many at once.
        """
        self.rows = 0
        self.problems = Problems()
        self._parts = parts
        self._source = source
        self._tools = renderer, encoder
        self._folder = folder
        self._processes = processes

    def batches(self) -> Iterator[StoredBatch | None]:
        """The batches of all parts, in order; None for rows with which something is wrong.

        Raises:
            DataError: A process was killed, or met something that ends it.
            FastEncoderError: See `Encoder.encode`.
            WorkerError: A process failed otherwise: a fault of ours, or of a library.
            OSError: A process cannot write.
        """
        with TemporaryDirectory(dir=self._folder) as folder:
            yield from self._batches(Path(folder))

    def _batches(self, folder: Path) -> Iterator[StoredBatch | None]:
        make = partial(self._make, folder)
        missed: list[set[str]] = []
        try:
            for number, done in enumerate(in_processes(make, range(len(self._parts)), self._processes)):
                if not done.encoded_rightly:
                    raise FastEncoderError
                self.rows += done.rows
                self.problems.add(done.problems)
                if done.columns_missed is not None:
                    missed.append(done.columns_missed)
                if self.problems.are_enough:
                    return
                if self.problems:
                    yield None
                else:
                    yield from _read(_file(folder, number))
                _file(folder, number).unlink()
        except WorkerError as error:
            if error.killed_by not in FIXES:
                raise
            fix = FIXES[error.killed_by]
            raise DataError(Problem(self._source.path, str(error), fix)) from None
        if missed:
            self.problems.add(Problems(missed_columns(self._source, set.intersection(*missed))))

    def _make(self, folder: Path, number: int) -> _Done:
        reader = self._parts[number]
        batcher = Batcher(reader, *self._tools)
        encoded_rightly = True
        with _file(folder, number).open("wb") as file, collecting_by_batch() as collect:
            try:
                for batch in batcher.batches():
                    if batch is not None:
                        pickle.dump(batch, file, pickle.HIGHEST_PROTOCOL)
                    collect()
            except FastEncoderError:
                encoded_rightly = False
        return _Done(batcher.rows, batcher.problems, reader.columns_missed, encoded_rightly)


def part_readers(
    source: SourceSpec, files: Iterable[SourceFile], division: Division, *, system: str | None
) -> list[SourceReader]:
    """A reader for each part that processes take one by one; none where a single process reads the source.

    Args:
        source: The recipe's source.
        files: Its files.
        division: How it is shared out.
        system: A system text for conversations that have none.

    Raises:
        OSError: A file cannot be read.
        DataError: The first row cannot be.
    """
    if division.processes < 2:
        return []
    parts = list(itertools.chain.from_iterable(in_ranges(file, division.part_bytes) for file in files))
    whole = SourceReader(source, system=system, files=parts)
    next(iter(whole), None)
    if len(parts) < 2 or whole.recognised is None:
        return []
    return [SourceReader(source, system=system, files=[part], recognised=whole.recognised) for part in parts]


def _file(folder: Path, number: int) -> Path:
    return folder / f"part-{number}"


def _read(file: Path) -> Iterator[StoredBatch]:
    with file.open("rb") as stream, suppress(EOFError):
        while True:
            yield pickle.load(stream)  # ours, from a folder that nobody else can write to
