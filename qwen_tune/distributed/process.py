"""A process made ready for heavy work: threads, environment and GPU, before torch is imported."""

from __future__ import annotations

import os

from qwen_tune.console import quiet_libraries
from qwen_tune.distributed.world import local_world_size, world_size
from qwen_tune.machine import import_without_gc, usable_cores


def prepare_process() -> None:
    """Readies this process for heavy work. Must run before torch and the Hub's client are imported."""
    if world_size() == 1:
        use_one_gpu()
    wait_passively()
    limit_primitive_cache()
    import_without_gc("torch")
    use_all_cores()
    quiet_libraries()


def wait_passively() -> None:
    """Lets torch's threads sleep while they have nothing to do. Must run before torch is imported."""
    # Threads that wait by spinning stop the whole step when another program takes a core: measured 10 times slower
    # beside one busy process. OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def limit_primitive_cache() -> None:
    """Bounds what oneDNN keeps of the kernels that it makes for each shape. Must run before torch is imported.

    Packs differ in their length, and a CPU that multiplies bfloat16 gets kernels of its own for each: by default the
    last 1,024, which grew by 70 MB a step to 1.3 GB (Qwen2.5-0.5B, packs of about 512). A step needs about 40 of them.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def use_one_gpu() -> None:
    """Hides all GPUs but the first.

    Where several are visible to one process, Transformers would spread batches over them with `nn.DataParallel`, which
    TRL refuses.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


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


def available_memory_bytes() -> int:
    """What is free on this process' GPU; with several processes all of the smallest GPU's memory.

    Processes must come to the same plan before they can talk to each other. What is free may differ among them; the
    GPUs of a machine are reported to all of its processes alike.
    """
    import torch

    if world_size() == 1:
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return min(int(torch.cuda.get_device_properties(gpu).total_memory) for gpu in range(torch.cuda.device_count()))
