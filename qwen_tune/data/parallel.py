"""Processes that share nothing with this one but what it held when they began, and files."""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from qwen_tune.chatml.encoder import Encoder
from qwen_tune.chatml.fast_encoder import FastEncoderError
from qwen_tune.chatml.rendering import Renderer
from qwen_tune.data.batches import Batcher, Problems, collecting_by_batch
from qwen_tune.data.files import in_ranges
from qwen_tune.data.source_file import SourceFile
from qwen_tune.data.sources import SourceReader, missed_columns
from qwen_tune.data.token_store import StoredBatch
from qwen_tune.errors import DataError, Problem, QwenTuneError
from qwen_tune.machine import signals_held, usable_cores
from qwen_tune.recipe.schema import SourceSpec

Task = TypeVar("Task")
Result = TypeVar("Result")

BYTES_EACH = 1 << 30
"""Of memory that is free for each process there may be one; they take less (docs/data.md)."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerError(Exception):
    """A process that works for this one has failed; `killed_by` is the signal that ended it, if one did."""

    def __init__(self, what: str, killed_by: int | None = None) -> None:
        super().__init__(what)
        self.killed_by = killed_by


def processes_that_fit() -> int:
    """How many processes this machine has cores and free memory for; 1 where they cannot be forked (all but Linux)."""
    if sys.platform != "linux":
        return 1
    import psutil

    return max(1, min(usable_cores(), psutil.virtual_memory().available // BYTES_EACH))


def in_processes(work: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
    """The results of all tasks, in their order, computed by several processes.

    They are forked, so that what was imported and loaded here is there at once and takes its memory once. Each gets the
    next task when it has done one. They end with this process, however it ends, and with this iterator.

    Args:
        work: Does one task; its result goes through a pipe.
        tasks: What there is to do; none is needed where it is forked, but each goes through a pipe.
        processes: How many at once.

    Raises:
        WorkerError: A process was killed, or `work` raised something, which the message tells.
        DataError: Not one process can be started.
        OSError, QwenTuneError: `work` raised it.
    """
    workers: dict[Connection, ForkProcess] = {}
    running: dict[Connection, int] = {}
    waiting = iter(enumerate(tasks))
    results: dict[int, Result] = {}
    try:
        for _ in range(min(processes, len(tasks))):
            with signals_held():  # until the worker is among those that are ended below
                try:
                    connection, worker = _fork(work)
                except OSError as error:  # no more processes, memory or file descriptors
                    if workers:
                        break
                    what = f"no process can be started: {error}"
                    fix = "allow more processes or memory, or use one core: taskset -c 0 qwen-tune …"
                    raise DataError(Problem("qwen-tune", what, fix)) from None
                workers[connection] = worker
            _assign(connection, waiting, running)
        for number in range(len(tasks)):
            while number not in results:
                for connection in (one for one in wait(list(running)) if isinstance(one, Connection)):
                    results[running.pop(connection)] = _received(connection, workers[connection])
                    _assign(connection, waiting, running)
            yield results.pop(number)
    finally:
        for worker in workers.values():
            worker.kill()
        for connection, worker in workers.items():
            worker.join()
            connection.close()


def _assign(connection: Connection, waiting: Iterator[tuple[int, Any]], running: dict[Connection, int]) -> None:
    """Gives a worker the next task, if there is one."""
    if task := next(waiting, None):
        running[connection] = task[0]
        with suppress(OSError):  # it has ended: receiving says so
            connection.send(task[1])


def _received(connection: Connection, worker: ForkProcess) -> Any:
    try:
        succeeded, result = connection.recv()
    except (EOFError, OSError):
        worker.join()
        code = worker.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise WorkerError(f"a process that worked on it {how}", -code if code < 0 else None) from None
    if isinstance(result, OSError | QwenTuneError):
        raise result
    if not succeeded:
        raise WorkerError(f"a process that worked on it failed:\n{result}")
    return result


def _fork(work: Callable[[Any], Any]) -> tuple[Connection, ForkProcess]:
    # Set before there is a second process: the tokenizers warn of a fork otherwise, and use one thread then as well.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(work, theirs, os.getpid()), daemon=True)
    with warnings.catch_warnings():
        # Python warns of forking beside threads. Those of torch and the tokenizers sleep, and no worker wakes them.
        warnings.simplefilter("ignore", DeprecationWarning)
        worker.start()
    theirs.close()
    return ours, worker


def _serve(work: Callable[[Any], Any], connection: Connection, parent: int) -> None:
    # Whoever is killed takes its workers along: nothing else would tell them.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    while True:
        task = connection.recv()
        try:
            answer: tuple[bool, Any] = True, work(task)
        except (OSError, QwenTuneError) as error:
            answer = False, error
        except Exception:
            answer = False, traceback.format_exc()
        connection.send(answer)


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
    """The examples of a source as batches, made by several processes; has what a `Batcher` has.

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
            renderer: What renders examples in every process.
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
        """The batches of all parts, in order; None for examples with which something is wrong.

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
        DataError: The first example cannot be.
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
