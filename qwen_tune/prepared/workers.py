"""Processes that share nothing with this one but what it held when they began, and files."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, TypeVar

from qwen_tune.errors import DataError, Problem, QwenTuneError
from qwen_tune.machine import signals_held, usable_cores

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
