"""What this process runs on: cores, threads, memory and its place among other processes."""

from __future__ import annotations

import gc
import logging
import os
import platform
import re
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qwen_tune.errors import Problem, RunError

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers")


def world_size() -> int:
    """How many processes the launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def local_rank() -> int:
    """The number of this process among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    """The number of this process among all of the run."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def check_world(num_processes: int | None) -> None:
    """Compares the processes that run with those that the recipe asks for.

    Raises:
        RunError: They differ.
    """
    running = world_size()
    if num_processes is not None and running != num_processes:
        hint = (
            "; on a CPU, `accelerate launch --cpu --num_processes N` starts one process whatever N says"
            if running == 1
            else ""
        )
        raise RunError(
            Problem(
                "train.num_processes",
                f"the recipe asks for {num_processes} processes and {running} run{hint}",
                f"start {num_processes} processes or set train.num_processes={running}",
            )
        )


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


def prepare_process() -> None:
    """Readies this process for heavy work. Must run before torch and the Hub's client are imported."""
    if world_size() == 1:
        use_one_gpu()
    wait_passively()
    keep_few_primitives()
    bring_in("torch")
    use_all_cores()
    quiet_libraries()


def wait_passively() -> None:
    """Lets torch's threads sleep while they have nothing to do. Must run before torch is imported."""
    # Threads that wait by spinning stop the whole step when another program takes a core: measured 10 times slower
    # beside one busy process. OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_few_primitives() -> None:
    """Bounds what oneDNN keeps of the kernels that it makes for each shape. Must run before torch is imported.

    Packs differ in their length, and a CPU that multiplies bfloat16 gets kernels of its own for each: by default the
    last 1,024, which grew by 70 MB a step to 1.3 GB (Qwen2.5-0.5B, packs of about 512). A step needs about 40 of them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def bring_in(*modules: str) -> None:
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


def use_one_gpu() -> None:
    """Hides all GPUs but the first.

    Where several are visible to one process, Transformers would spread batches over them with `nn.DataParallel`, which
    TRL refuses.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def quiet_libraries() -> None:
    """Leaves the talking to us, on the terminal and on the network."""
    # TRL reports model family, device and world size to the Hub at every start; nobody asked for that.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Deprecations among the libraries are for us to follow, not for the user to read.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate|torch)\b")
    # Where the CPU has AVX512-BF16, bitsandbytes misses a package for its own 4-bit inference when it is imported, also
    # where nothing is quantized; its layers do not go that way here (`model.quantized_layers`).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # It casts the inputs of its 8-bit product to float16, and says so at every layer and step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    bring_in("transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def use_all_cores() -> int:
    """Sets torch's threads to this machine's cores, shared evenly among the run's processes on it.

    Launchers leave one thread a process (`OMP_NUM_THREADS=1`), with which a CPU trains at a third of its speed.

    Returns:
        The threads of this process.
    """
    import torch

    threads = max(1, usable_cores() // local_world_size())
    torch.set_num_threads(threads)
    return threads


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


def available_memory_bytes() -> int:
    """What is free on this process' GPU; with several processes all of the smallest GPU's memory.

    Processes must come to the same plan before they can talk to each other. What is free may differ among them; the
    GPUs of a machine are told to all of its processes alike.
    """
    import torch

    if world_size() == 1:
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return min(int(torch.cuda.get_device_properties(gpu).total_memory) for gpu in range(torch.cuda.device_count()))


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
