"""Preparation in several forked processes, which return results through pipes and files."""

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
"""Free memory that is required for each process; they need less (docs/data.md)."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class WorkerError(Exception):
    """A worker process failed; `killed_by` is the signal that ended it, if one did."""

    def __init__(self, what: str, killed_by: int | None = None) -> None:
        super().__init__(what)
        self.killed_by = killed_by


def processes_that_fit() -> int:
    """How many processes this machine has cores and free memory for; 1 on systems other than Linux, without fork."""
    if sys.platform != "linux":
        return 1
    import psutil

    return max(1, min(usable_cores(), psutil.virtual_memory().available // BYTES_EACH))


def in_processes(work: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
    """Yields the results of all tasks, in their order, computed by several processes.

    Processes are forked, so that they share what this process has imported and loaded. Each gets its next task when it
    has finished one. They end with this process, however it ends, and with this iterator.

    Args:
        work: Does one task; its result goes through a pipe.
        tasks: Go through a pipe as well.
        processes: How many run at once.

    Raises:
        WorkerError: A process was killed, or `work` raised another exception, which the message quotes.
        DataError: No process can be started.
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
        with suppress(OSError):  # the worker has ended: `_received` reports it
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
    # Tokenizers would warn after a fork, and switch to one thread as well.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    context = get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(work, theirs, os.getpid()), daemon=True)
    with warnings.catch_warnings():
        # Python warns about forking with threads. Those of torch and the tokenizers sleep, and no worker wakes them.
        warnings.simplefilter("ignore", DeprecationWarning)
        worker.start()
    theirs.close()
    return ours, worker


def _serve(work: Callable[[Any], Any], connection: Connection, parent: int) -> None:
    # A parent that is killed cannot end its workers: the kernel does.
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
"""Bytes of data above which several processes are faster than one: about a second of work."""

PARTS_EACH = 16
"""Parts per process: small enough that all processes finish at about the same time."""

SMALLEST_PART, LARGEST_PART = 1 << 20, 32 << 20  # bytes

FIXES: dict[int | None, str] = {
    signal.SIGKILL: "free memory, which the system may have lacked, or use fewer cores: taskset -c 0,1 qwen-tune …",
    signal.SIGTERM: "run the command again",
}
"""What helps after a process was killed from outside; other signals are bugs."""


@dataclass(frozen=True)
class Division:
    """Among how many processes a source is divided, and into ranges of lines of about how many bytes."""

    processes: int
    part_bytes: int

    @classmethod
    def of(cls, data_bytes: int) -> Division:
        """The division for an amount of data on this machine."""
        processes = processes_that_fit() if data_bytes >= WORTH_PROCESSES else 1
        part = data_bytes // (processes * PARTS_EACH)
        return cls(processes, min(max(part, SMALLEST_PART), LARGEST_PART))


@dataclass(frozen=True)
class _Done:
    """What a process reports of a part; its batches are in the part's file."""

    count: int
    problems: Problems
    columns_missed: set[str] | None
    encoded_rightly: bool


class ParallelBatcher:
    """Makes batches of the examples of a source in several processes, with the interface of `Batcher`.

    The bytes of the batches and the problems do not depend on the number of processes.
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
        """Reads nothing yet.

        Args:
            parts: A reader for each part, in order.
            source: The source that they are parts of.
            renderer: Renders examples in every process.
            encoder: Encodes them.
            folder: Where processes write their batches.
            processes: How many run at once.
        """
        self.count = 0
        self.problems = Problems()
        self._parts = parts
        self._source = source
        self._tools = renderer, encoder
        self._folder = folder
        self._processes = processes

    def batches(self) -> Iterator[StoredBatch | None]:
        """Yields the batches of all parts in order, or None once there is a problem.

        Raises:
            DataError: A process was killed, or raised it.
            FastEncoderError: See `Encoder.encode`.
            WorkerError: A process failed otherwise: a bug here or in a library.
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
                self.count += done.count
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
        return _Done(batcher.count, batcher.problems, reader.columns_missed, encoded_rightly)


def part_readers(
    source: SourceSpec, files: Iterable[SourceFile], division: Division, *, system: str | None
) -> list[SourceReader]:
    """A reader for each part of a source; none if a single process is to read it.

    Args:
        source: The recipe's source.
        files: Its files.
        division: How the source is divided.
        system: A system text for conversations that have none.

    Raises:
        OSError: A file cannot be read.
        DataError: The first example cannot be read.
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
            yield pickle.load(stream)  # our own, from a folder that nobody else can write to
