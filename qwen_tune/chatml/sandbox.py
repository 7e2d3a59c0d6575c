"""A chat template's first rendering, in a process with limits on time and memory.

Templates are programs that come with checkpoints. Jinja's sandbox keeps them from files and the network, but not from
an endless loop or a text of gigabytes.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from qwen_tune.errors import ModelError, Problem
from qwen_tune.machine import signals_held

SECONDS = 20
"""CPU time for a few short conversations, which usually take milliseconds."""

BYTES = 1 << 30
"""Memory in addition to what this process uses."""

_FIX = "use the checkpoint's own template, or check what this one does"


def render_with_limits(render: Callable[[], object]) -> None:
    """Renders in a child process with limits. Other errors are ignored: the caller renders again.

    Raises:
        ModelError: The template takes too long, or too much memory.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = 0
    try:
        with signals_held():
            child = os.fork()
            if child == 0:
                _run_limited(render)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        what = f"it takes more than {SECONDS} seconds for one question and answer"
        raise ModelError(Problem("chat template", what, _FIX))
    if code != 0:
        what = f"it takes more than {BYTES >> 30} GiB of memory for one question and answer"
        raise ModelError(Problem("chat template", what, _FIX))


def _run_limited(render: Callable[[], object]) -> None:
    """The child: exits with 0 unless memory runs out; the system ends it when its time is up."""
    code = 0
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in (signal.SIGXCPU, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        resource.setrlimit(resource.RLIMIT_CPU, (_seconds_used() + SECONDS, _seconds_used() + SECONDS + 5))
        most = _address_space() + BYTES
        if most > BYTES:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        render()
    except MemoryError:
        code = 1
    except BaseException:  # the caller's own rendering raises it again
        code = 0
    finally:
        os._exit(code)  # without running the parent's exit handlers


def _seconds_used() -> int:
    """CPU seconds of this process: after a fork some systems start at zero, others at the parent's."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return int(used.ru_utime + used.ru_stime) + 1


def _address_space() -> int:
    """Bytes of address space of this process; 0, for no limit, where the system does not report it (macOS)."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return 0
