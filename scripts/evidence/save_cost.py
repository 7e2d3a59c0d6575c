"""What a step waits for a checkpoint of the size that LoRA of rank 16 on a 7B model has.

save_cost.py FOLDER

Three ways in turns, in a folder on the disk in question: the files written and flushed, and nothing else; that, then
hashing, then reading back, one after the other; and `save_checkpoint`, with the reading back on a thread of its own.
Prints JSON: median seconds of each.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwen_tune.disk import flush, sha256
from qwen_tune.runs.checkpoints import fault_of, save_checkpoint

PARAMETERS = 40_370_176  # Qwen2.5-7B, rank 16 on all linear layers
ROUNDS = 9


def main(folder: Path) -> None:
    """Measures and prints."""
    adapter = {f"layer-{index}": torch.randn(PARAMETERS // 100) for index in range(100)}
    optimizer = {f"layer-{index}": torch.randn(PARAMETERS // 100) for index in range(200)}

    def write(directory: Path) -> None:
        save_file(adapter, directory / "adapter_model.safetensors")
        save_file(optimizer, directory / "optimizer.safetensors")

    def write_and_flush(step: int) -> list[Path]:
        directory = folder / f"plain-{step}"
        directory.mkdir(parents=True)
        write(directory)
        for path in directory.iterdir():
            flush(path)
        return list(directory.iterdir())

    def in_a_row(step: int) -> None:
        files = write_and_flush(step)
        for path in [*files, *files]:
            sha256(path)

    reader = ThreadPoolExecutor(1)
    after = []

    def ours(step: int) -> None:
        after.append(reader.submit(fault_of, save_checkpoint(folder, step, {}, write)))

    ways: dict[str, Callable[[int], object]] = {
        "written and flushed": write_and_flush,
        "one after the other": in_a_row,
        "save_checkpoint": ours,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(ROUNDS):
        for name, way in ways.items():
            os.sync()  # what one way left to be written is not the next one's to wait for
            began = time.perf_counter()
            way(step)
            seconds[name].append(time.perf_counter() - began)
            assert [each.result() for each in after] == [None] * len(after)
            after.clear()
            shutil.rmtree(folder)
    print(json.dumps({name: round(statistics.median(values), 2) for name, values in seconds.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
