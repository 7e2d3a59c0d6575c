"""What a run shows while it trains, and the same figures as JSON lines."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen_tune.errors import Problem, TrainingError
from qwen_tune.machine import memory_bytes

GIB = 1 << 30


class TokenCounts(Protocol):
    """Something that counts the tokens which went through the model."""

    tokens_processed: int


class MetricsLog(TrainerCallback):
    """Writes metrics.jsonl and drives the display, a step at a time."""

    def __init__(self, path: Path, counts: TokenCounts, display: Display) -> None:
        self.path = path
        self.counts = counts
        self.display = display
        self.losses: list[float] = []
        self._seconds = 0.0
        self._last_time = 0.0
        self._last_tokens = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the whole run's training time; evaluation and loading are not counted."""
        return self._last_tokens / self._seconds if self._seconds else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._last_time = time.perf_counter()
        self.display.start(state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Logs the last step too, where it is not one of `logging_steps`."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the line of a logged training step.

        Raises:
            TrainingError: The loss is no number any more.
        """
        if not logs or "loss" not in logs:
            return
        now, tokens = time.perf_counter(), self.counts.tokens_processed
        seconds, step_tokens = now - self._last_time, tokens - self._last_tokens
        self._last_time, self._last_tokens = now, tokens
        self._seconds += seconds
        self.losses.append(logs["loss"])
        line = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": tokens,
            "tokens_per_second": step_tokens / seconds if seconds else None,
            "memory_bytes": memory_bytes(),
        }
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({key: _json_number(value) for key, value in line.items()}) + "\n")
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                Problem(
                    f"step {state.global_step}",
                    f"the loss is {logs['loss']}",
                    "lower train.learning_rate, or raise train.warmup_steps",
                )
            )
        self.display.step(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leaves the display's last state on the screen."""
        self.display.stop()


class Display:
    """A live line in a terminal; elsewhere plain lines, about twenty a run."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console()
        self.quiet = quiet
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._max_steps = 0
        self._started = 0.0

    def start(self, max_steps: int) -> None:
        """Begins a run of so many optimizer steps."""
        self._max_steps = max_steps
        self._started = time.perf_counter()
        if self.quiet or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("  training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss [bold]{task.fields[loss]}[/]"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("{task.fields[memory]} GiB"),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=self.console,
        )
        self._task = self._progress.add_task("train", total=max_steps, loss="…", speed="…", memory="…", left="…")
        self._progress.start()

    def step(self, line: dict[str, Any]) -> None:
        """Shows a logged step's figures."""
        if self.quiet:
            return
        step = line["step"]
        elapsed = time.perf_counter() - self._started
        left = _clock(elapsed / step * (self._max_steps - step))
        speed, memory = f"{line['tokens_per_second']:,.0f}", f"{line['memory_bytes'] / GIB:.1f}"
        if self._progress is not None:
            self._progress.update(
                self._task, completed=step, loss=f"{line['loss']:.3f}", speed=speed, memory=memory, left=left
            )
        elif step == 1 or step == self._max_steps or step % max(1, self._max_steps // 20) == 0:
            self.console.print(
                f"  step {step}/{self._max_steps}  loss {line['loss']:.3f}  {speed} tokens/s  {memory} GiB  "
                f"left {left}",
                highlight=False,
            )

    def stop(self) -> None:
        """Ends the live line."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _json_number(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
