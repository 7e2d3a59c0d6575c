"""What this process runs on: cores, threads, memory and its place among other processes."""

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
    """Whether this run trains on a GPU: there is one, and the launcher was not told to do without."""
    import torch

    refused = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return not refused and torch.cuda.is_available()


def repeats_key_heads() -> bool:
    """Whether `varlen_attn` of the installed torch takes no fewer key heads than query heads, so that we repeat them.

    torch 2.12 brought `enable_gqa`. Told from the version, so that a plan can be made without importing torch.
    """
    major, minor = version("torch").split(".")[:2]
    return (int(major), int(minor)) < (2, 12)


@cache
def cpu_bfloat16_units() -> str | None:
    """The instructions in which this CPU multiplies bfloat16: AMX or AVX512-BF16; None where it has neither.

    Read from Linux' /proc/cpuinfo, without torch. Other systems and processors are taken for machines without.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
    return next((name for flag, name in units.items() if re.search(rf"\b{flag}\b", flags)), None)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def signals_held() -> Iterator[None]:
    """Lets SIGINT and SIGTERM wait while a process is forked.

    Their handlers raise, and Python passes over what is raised in its hooks around a fork: the signal would be lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def import_without_gc(*modules: str) -> None:
    """Imports large libraries with the garbage collector off, and never looks through them again.

    An import leaves nothing to collect; looking for it all the same took 0.4 of torch's 2 seconds and 3.7 of TRL's 12,
    and as much again of torch's when the process ends.
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
    """The most memory that was in use: of the GPU if there is one, else of this process."""
    import torch

    if uses_gpu():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def started_at() -> float:
    """When this process began, in seconds since 1970: a scheduler's limit counts its imports, too."""
    import psutil

    return float(psutil.Process().create_time())


def memory_bytes() -> int:
    """The memory in use now: of the GPU if there is one, else of this process."""
    import torch

    if uses_gpu():
        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def device_name() -> str:
    """The accelerator's name, or the processor's architecture: what a card may say of a machine."""
    import torch

    if uses_gpu():
        return str(torch.cuda.get_device_name())
    parts = [platform.machine(), f"{usable_cores()} cores", *filter(None, [cpu_bfloat16_units()])]
    return f"cpu ({', '.join(parts)})"


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    versions = {"python": platform.python_version(), "qwen-tune": _own_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _own_version() -> str:
    from qwen_tune import __version__

    return __version__


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Lets a handler answer SIGINT and SIGTERM for as long as this lasts. For the main thread."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
