"""What this process runs on: cores, memory, libraries, signals."""

from __future__ import annotations

import gc
import os
import platform
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


def uses_gpu() -> bool:
    """Whether this run trains on a GPU: there is one, and the launcher does not force the CPU."""
    import torch

    refused = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return not refused and torch.cuda.is_available()


def repeats_key_heads() -> bool:
    """Whether `varlen_attn` of the installed torch needs as many key heads as query heads, so that we repeat them.

    torch 2.12 added `enable_gqa`. Read from the version, so that a plan needs no import of torch.
    """
    major, minor = version("torch").split(".")[:2]
    return (int(major), int(minor)) < (2, 12)


@cache
def cpu_bfloat16_units() -> str | None:
    """The CPU's instructions for bfloat16 products: AMX or AVX512-BF16; None if it has neither.

    Read from Linux's /proc/cpuinfo, without torch; other systems count as having neither.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
    return next((name for flag, name in units.items() if re.search(rf"\b{flag}\b", flags)), None)


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def signals_held() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM while a process is forked.

    Their handlers raise, and Python ignores exceptions in its hooks around a fork: the signal would be lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def import_without_gc(*modules: str) -> None:
    """Imports large libraries with the garbage collector off, and excludes them from later collections.

    An import leaves nothing to collect; collecting anyway took 0.4 of torch's 2 seconds and 3.7 of TRL's 12, and as
    much again of torch's when the process ends.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        for module in modules:
            import_module(module)
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def peak_memory_bytes() -> int:
    """Peak memory in use: of the GPU if there is one, else of this process."""
    import torch

    if uses_gpu():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def started_at() -> float:
    """Start of this process, in seconds since 1970: a scheduler's time limit includes the imports."""
    import psutil

    return float(psutil.Process().create_time())


def memory_bytes() -> int:
    """Memory in use now: of the GPU if there is one, else of this process."""
    import torch

    if uses_gpu():
        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def device_name() -> str:
    """The GPU's name, or the processor's architecture and cores: as much as a card may reveal about a machine."""
    import torch

    if uses_gpu():
        return str(torch.cuda.get_device_name())
    parts = [platform.machine(), f"{usable_cores()} cores", *filter(None, [cpu_bfloat16_units()])]
    return f"cpu ({', '.join(parts)})"


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect a result."""
    from qwen_tune import __version__

    versions = {"python": platform.python_version(), "qwen-tune": __version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Installs a handler for SIGINT and SIGTERM during the block. For the main thread."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
