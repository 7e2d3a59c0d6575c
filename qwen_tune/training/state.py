"""What a checkpoint holds beside the adapter: optimizer, scheduler, loss scale and random numbers.

Tensors go to safetensors and everything else to JSON, so that no checkpoint is ever unpickled. JSON gives Python's
floats back to the last bit.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS = "optimizer.safetensors"
VALUES = "optimizer.json"


def save_optimizer(directory: Path, optimizer: Any, scheduler: Any, scaler: Any | None) -> None:
    """Writes the state dicts of optimizer, scheduler and, under float16, gradient scaler."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    saved = optimizer.state_dict()
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
    scheduler._last_lr = rates
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
    """Puts back what `random_state` gave."""
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
