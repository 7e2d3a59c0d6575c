"""What a checkpoint holds beside the adapter: optimizer, scheduler, loss scale and random numbers.

Tensors go to safetensors and everything else to JSON, so that no checkpoint is ever unpickled. JSON gives Python's
floats back to the last bit.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen_tune.compat import set_last_rates
from qwen_tune.disk import is_full
from qwen_tune.errors import Problem, TrainingError, first_line
from qwen_tune.runs.checkpoints import fault_of, list_checkpoints, rotate, save_checkpoint
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.drift import fixed_facts

TENSORS = "optimizer.safetensors"
VALUES = "optimizer.json"


def save_optimizer(directory: Path, saved: Mapping[str, Any], scheduler: Any, scaler: Any | None) -> None:
    """Writes the states of optimizer (`saved`), scheduler and, under float16, gradient scaler."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for path, value in _leaves("", saved["state"]):
        if isinstance(value, Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()  # 8-bit states share a table
        else:
            values[path] = value
    save_file(tensors, directory / TENSORS)
    state = {
        "values": values,
        "param_groups": saved["param_groups"],
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    (directory / VALUES).write_text(json.dumps(state) + "\n", encoding="utf-8")


def load_optimizer(directory: Path, optimizer: Any, scheduler: Any, scaler: Any | None) -> None:
    """Puts back what `save_optimizer` wrote, but for what the recipe says: rates, decay, and how the rate falls.

    Where the recipe is as it was, these are the same to the bit. In a run that was made longer, or whose learning rate
    was allowed to change, they are not.
    """
    of_recipe = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    base_rates = scheduler.base_lrs
    saved = json.loads((directory / VALUES).read_text(encoding="utf-8"))
    state: dict[Any, Any] = {}
    # Copies: what is read maps the file, which is deleted when its checkpoint is rotated away.
    tensors = {path: tensor.clone() for path, tensor in load_file(directory / TENSORS).items()}
    for path, value in [*tensors.items(), *saved["values"].items()]:
        _put(state, path.split("/"), value)
    state = {int(index): entry for index, entry in state.items()}
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    scheduler.load_state_dict({**saved["scheduler"], "base_lrs": base_rates})
    rates = [rate * share(scheduler.last_epoch) for rate, share in zip(base_rates, scheduler.lr_lambdas, strict=True)]
    for group, settings, rate in zip(optimizer.param_groups, of_recipe, rates, strict=True):
        group.update({**settings, "lr": rate})
    set_last_rates(scheduler, rates)
    if scaler is not None and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])


def random_state() -> dict[str, Any]:
    """The state of every random number generator of this process, as JSON can hold it."""
    version, python, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(python), gauss],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores what `random_state` returned."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(digits: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every value of nested mappings under the path of its keys."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{prefix}/{key}" if prefix else str(key), item)
    else:
        yield prefix, value


def _put(state: dict[Any, Any], path: list[str], value: Any) -> None:
    for key in path[:-1]:
        state = state.setdefault(key, {})
    state[path[-1]] = value


@dataclass
class Saves:
    """What checkpoints cost in this process: how many, the seconds that training waited, bytes of the last."""

    count: int = 0
    seconds: float = 0.0
    bytes: int = 0

    def add(self, seconds: float, size: int) -> None:
        self.count, self.seconds, self.bytes = self.count + 1, round(self.seconds + seconds, 3), size


class SavedCheckpoints:
    """Saves into a run's folder of checkpoints; for the first process.

    Args:
        run: Where they go, and where their names and costs are recorded.
        keep: How many stay, beside the best.
        note: Says a line to the user.
    """

    def __init__(self, run: RunDir, keep: int, note: Callable[[str], None]) -> None:
        self.saves = Saves()
        self._run = run
        self._keep = keep
        self._note = note
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._reading: Future[str | None] | None = None
        self._newest: Path | None = None
        self._best_step: int | None = None

    def save(self, step: int, best_step: int | None, write: Callable[[Path], None]) -> None:
        """Makes the checkpoint of a step.

        Args:
            step: Optimizer steps done.
            best_step: The step whose checkpoint is never deleted.
            write: Writes the checkpoint's files into the directory that it is given.

        Raises:
            TrainingError: The disk is full. The older checkpoints are as they were.
        """
        began = time.perf_counter()
        self.settle()
        written_under = {
            "recipe": self._run.recipe.read_text(encoding="utf-8"),
            "facts": fixed_facts(self._run.facts),
        }
        try:
            path = save_checkpoint(self._run.checkpoints, step, written_under, write)
        except Exception as error:  # a full disk has another type in every library
            if not is_full(error):
                raise
            raise TrainingError(self._no_room(step, error)) from error
        self.saves.add(time.perf_counter() - began, sum(file.stat().st_size for file in path.iterdir()))
        self._newest, self._best_step = path, best_step
        self._reading = self._reader.submit(fault_of, path)
        self._note(f"saved {path}")

    def settle(self, *, wait: bool = True) -> None:
        """Deletes what the newest checkpoint replaces, once it has been read back."""
        if self._reading is None or not (wait or self._reading.done()):
            return
        fault, self._reading = self._reading.result(), None
        folder = self._run.checkpoints
        if fault:
            self._note(f"warning: {self._newest} is not whole ({fault}); the older checkpoints are kept")
        else:
            rotate(folder, keep=self._keep, best_step=self._best_step)
        checkpoints = [checkpoint.name for checkpoint in list_checkpoints(folder)]
        self._run.record({"checkpoints": checkpoints, "saves": vars(self.saves)})

    def _no_room(self, step: int, error: Exception) -> Problem:
        there = list_checkpoints(self._run.checkpoints)
        last = f"the last whole checkpoint is {there[-1].name}" if there else "there is no earlier checkpoint"
        what = f"the checkpoint of step {step} does not fit on the disk ({first_line(error)}); {last}"
        fix = "free some room and run the same command again, or keep fewer with train.save_total_limit"
        return Problem(str(self._run.checkpoints), what, fix)
