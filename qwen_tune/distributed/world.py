"""The process among those of its run: its place, as the launcher's environment has it, and its share of the machine.

Light: torch is imported only by functions that need it.
"""

from __future__ import annotations

import os

from qwen_tune.console import quiet_libraries
from qwen_tune.errors import Problem, RunError
from qwen_tune.machine import import_without_gc, usable_cores


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """How many of the run's processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))


def local_rank() -> int:
    """The number of this process among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def check_world(num_processes: int | None) -> None:
    """Compares the number of running processes with the recipe's.

    Raises:
        RunError: They differ.
    """
    running = world_size()
    if num_processes is not None and running != num_processes:
        hint = (
            "; on a CPU, `accelerate launch --cpu --num_processes N` starts one process whatever N is"
            if running == 1
            else ""
        )
        what = f"the recipe asks for {num_processes} processes, but {running} {'is' if running == 1 else 'are'} running"
        fix = f"start {num_processes} processes or set train.num_processes={running}"
        raise RunError(Problem("train.num_processes", what + hint, fix))


def prepare_process() -> None:
    """Prepares this process for heavy work. Must run before torch and the Hub's client are imported."""
    if world_size() == 1:
        # Where several GPUs are visible to one process, Transformers would spread batches over them with
        # `nn.DataParallel`, which TRL refuses.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    wait_passively()
    # Packs differ in length, and a CPU that multiplies bfloat16 gets oneDNN kernels of its own for each: by default
    # the last 1,024 are kept, which grew by 70 MB a step to 1.3 GB (Qwen2.5-0.5B, packs of about 512). A step needs
    # about 40 of them.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    import_without_gc("torch")
    import torch

    # Launchers leave one thread a process (`OMP_NUM_THREADS=1`), with which a CPU trains at a third of its speed.
    torch.set_num_threads(max(1, usable_cores() // local_world_size()))
    quiet_libraries()


def wait_passively() -> None:
    """Lets torch's threads sleep while they have nothing to do. Must run before torch is imported."""
    # Threads that wait by spinning stop the whole step when another program takes a core: measured 10 times slower
    # beside one busy process. OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def available_memory_bytes() -> int:
    """Free memory of this process's GPU; with several processes, all memory of the smallest GPU.

    Processes must reach the same plan before they can communicate. Free memory may differ among them; total memory is
    reported alike to all processes of a machine.
    """
    import torch

    if world_size() == 1:
        free, _ = torch.cuda.mem_get_info()
        return int(free)
    return min(int(torch.cuda.get_device_properties(gpu).total_memory) for gpu in range(torch.cuda.device_count()))
