"""What is put on a trainer, the same on every side: a clock, counts of real tokens, memory, and a probe of its loss."""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from training_bench.cases import Case
from training_bench.rows import IDS, IGNORED, Row, labelled

WINDOWS = 3
ADAPTER_SCALE = 0.05
STATUS = Path("/proc/self/status")

Examples = Callable[[Any, Sequence[Row]], list[Mapping[str, Any]]]
"""A trainer and rows into what its collator takes for one batch of them."""


class Gauges(TrainerCallback):
    """Measures the steps after the warm-up, and before the first one probes loss and gradient on given rows."""

    def __init__(self, trainer: Any, case: Case, probe: Sequence[Row], examples: Examples) -> None:
        self.trainer = trainer
        self.case = case
        self.probe = probe
        self.examples = examples
        self.batches: list[tuple[int, int, int]] = []  # of each step: real tokens, all tokens, labelled ones
        self.marks: list[Any] = []
        self.found: dict[str, Any] = {}
        self.own_peak = False

    def install(self) -> None:
        """Counts what the collator hands out, and listens to the loop."""
        collate = self.trainer.data_collator

        def counting(examples: Any) -> Any:
            batch = collate(examples)
            self.batches.append(count(batch))
            return batch

        self.collate = collate
        self.trainer.data_collator = counting
        self.trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model is ready to train here, with whatever the trainer wraps around it."""
        batch = self.collate(self.examples(self.trainer, self.probe))
        self.found |= probe_loss(self.trainer, batch, labelled(list(self.probe)))
        self.found["packed"] = "attention_mask" not in batch
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.found["adapter_dtype"] = str(trained[0].dtype).removeprefix("torch.")
        self.found["trained_parameters"] = sum(p.numel() for p in trained)
        self.found["checkpoints"] = any(
            getattr(module, "gradient_checkpointing", False) for module in self.trainer.model.modules()
        )
        self.own_peak = reset_peak()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Marks the time, on a GPU in its own queue, so that nothing has to wait for it."""
        if torch.cuda.is_available():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def result(self) -> dict[str, Any]:
        """Everything that was measured.

        Raises:
            ValueError: Something trained wrongly, or not at all.
        """
        memory = peaks(own=self.own_peak)
        logs = [log for log in self.trainer.state.log_history if "grad_norm" in log]
        loss, norm = float(logs[-1]["loss"]), float(logs[-1]["grad_norm"])
        for name, value in (("loss", loss), ("grad_norm", norm), *self.found["probe"].items()):
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} is {value}; expected a finite number above 0")
        steps = range(self.case.warm_up_steps, self.case.warm_up_steps + self.case.measured_steps)
        if len(self.marks) <= steps[-1]:
            raise ValueError(f"{len(self.marks)} steps were run; expected {steps[-1] + 1}")
        size = len(steps) // WINDOWS
        windows = [steps[number * size : (number + 1) * size] for number in range(WINDOWS)]
        counted = [self.batches[step] for step in steps]
        real, every, with_loss = (sum(column) for column in zip(*counted, strict=True))
        return {
            "tokens_per_second": [
                sum(self.batches[step][0] for step in window)
                / seconds_between(self.marks[window[0] - 1], self.marks[window[-1]])
                for window in windows
            ],
            **memory,
            "real_tokens_per_step": real / len(steps),
            "processed_tokens_per_step": every / len(steps),
            "padding_share": 1 - real / every,
            "supervised_share": with_loss / real,
            "train_loss": loss,
            "train_grad_norm": norm,
            "attention": self.trainer.model.config._attn_implementation,
            **self.found,
        }


def count(batch: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Real tokens of a batch, all that are computed, and those with loss."""
    ids = batch["input_ids"]
    real = int((ids < IDS).sum())  # no row has the padding's id, so this holds for packs that are padded, too
    labels = batch["labelled"].numel() if "labelled" in batch else int((batch["labels"] != IGNORED).sum())
    return real, ids.numel(), labels


def probe_loss(trainer: Any, batch: Mapping[str, Any], labels: int) -> dict[str, Any]:
    """Mean loss a labelled token and the norm of its gradient, with adapters that are the same on every side.

    The adapters are put back as they were.
    """
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    set_adapters(trained)
    model = trainer.model_wrapped
    model.train()
    inputs = trainer._prepare_inputs(dict(batch))
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=torch.tensor(labels, device=trainer.args.device))
    trainer.accelerator.backward(loss)
    squares = [p.grad.double().square().sum() for p in trained.values() if p.grad is not None]
    found = {"loss": float(loss.detach()), "grad_norm": math.sqrt(sum(float(square) for square in squares))}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(before[name])
    return {"probe": found}


@torch.no_grad()
def set_adapters(trained: Mapping[str, nn.Parameter]) -> None:
    """Random values that depend on a matrix's place alone."""
    generator = torch.Generator().manual_seed(7)
    for name in sorted(trained, key=lambda name: re.sub(r".*?layers\.", "", name)):
        values = torch.randn(trained[name].shape, generator=generator) * ADAPTER_SCALE
        trained[name].copy_(values)


def seconds_between(first: Any, last: Any) -> float:
    """Of two marks."""
    if isinstance(first, float):
        return float(last - first)
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1000


def reset_peak() -> bool:
    """Begins to look for the most memory anew: loading and the probe do not count. Whether that is possible here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peaks(*, own: bool) -> dict[str, Any]:
    """The most memory since `reset_peak`, or since the process began where that is not possible."""
    if torch.cuda.is_available():
        return {
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    if own and (found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return {"peak_rss_bytes": int(found[1]) * 1024, "peak_of": "training"}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "peak_of": "process"}
