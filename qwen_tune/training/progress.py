"""What a run shows while it trains, and the same figures as JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qwen_tune.console import make_console
from qwen_tune.hardware import GIB
from qwen_tune.machine import memory_bytes
from qwen_tune.runs.directory import RunDir
from qwen_tune.training.steps import Steps

if TYPE_CHECKING:
    from qwen_tune.tracking.tracking import Tracker


class MetricsLog(TrainerCallback):
    """Writes metrics.jsonl, feeds trackers and drives the display, a step at a time."""

    def __init__(self, run: RunDir, steps: Steps, display: Display) -> None:
        self.run = run
        self.steps = steps
        self.display = display
        self.trackers: Sequence[Tracker] = ()
        self.seconds = 0.0
        self._last_time = 0.0
        self._last_tokens = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens over the whole run's training time; evaluation, saving and loading are not counted."""
        return self._last_tokens / self.seconds if self.seconds else 0.0

    def restore(self, seconds: float, tokens: int) -> None:
        """Continues the clock of an interrupted run."""
        self.seconds, self._last_tokens = seconds, tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock of the training speed."""
        began = time.perf_counter()
        yield
        self._last_time += time.perf_counter() - began

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint's state holds the intervals of the recipe that wrote it; they may have changed since.
        state.compute_steps(args, state.max_steps)
        self._last_time = time.perf_counter()
        self.display.start(state.max_steps, done=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends a run that was asked to stop, and logs a run's last step and those that are saved."""
        if self.steps.must_stop():
            control.should_training_stop = control.should_save = True
        if state.global_step >= state.max_steps or control.should_save or control.should_evaluate:
            # After a save, which an evaluation may lead to, the losses of steps that were not logged yet would be lost
            # to a resumed run.
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "eval_loss" in logs:
            losses = {key: value for key, value in logs.items() if key.startswith("eval_")}
            self._write(state, {"step": state.global_step, "epoch": state.epoch, **losses})
            self.display.evaluation(state.global_step, losses)
        if not logs or "loss" not in logs:
            return
        now, tokens = time.perf_counter(), self.steps.counts.real
        seconds, step_tokens = now - self._last_time, tokens - self._last_tokens
        self._last_time, self._last_tokens = now, tokens
        self.seconds += seconds
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
        self._write(state, line)
        self.display.step(line)

    def _write(self, state: TrainerState, line: Mapping[str, float | None]) -> None:
        if not state.is_world_process_zero:
            return
        numbers = {key: _json_number(value) for key, value in line.items()}
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(numbers) + "\n")
        figures = {key: value for key, value in numbers.items() if key != "step" and value is not None}
        for tracker in self.trackers:
            tracker.log(state.global_step, figures)

    def show_answer(self, step: int, prompt: str, answer: str) -> None:
        """Keeps an answer to one of the recipe's prompts and prints it."""
        with self.run.answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}, ensure_ascii=False) + "\n")
        self.display.note(f"? {prompt}\n  > {answer}")


class Display:
    """A live line in a terminal; elsewhere plain lines, about twenty a run."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = make_console()
        self.quiet = quiet
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._max_steps = 0
        self._first_step = 0
        self._started = 0.0

    def start(self, max_steps: int, *, done: int = 0) -> None:
        """Starts the display of `max_steps` optimizer steps, of which some may be done."""
        self._max_steps = max_steps
        self._first_step = done
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
        self._task = self._progress.add_task(
            "train", total=max_steps, completed=done, loss="…", speed="…", memory="…", left="…"
        )
        self._progress.start()

    def step(self, line: dict[str, Any]) -> None:
        if self.quiet:
            return
        step = line["step"]
        elapsed = time.perf_counter() - self._started
        left = _clock(elapsed / max(step - self._first_step, 1) * (self._max_steps - step))
        speed, memory = f"{line['tokens_per_second']:,.0f}", f"{line['memory_bytes'] / GIB:.1f}"
        if self._progress is not None:
            self._progress.update(
                self._task, completed=step, loss=f"{line['loss']:.3f}", speed=speed, memory=memory, left=left
            )
        elif step == self._first_step + 1 or step == self._max_steps or step % max(1, self._max_steps // 20) == 0:
            self.console.print(
                f"  step {step}/{self._max_steps}  loss {line['loss']:.3f}  {speed} tokens/s  {memory} GiB  "
                f"left {left}",
                highlight=False,
            )

    def evaluation(self, step: int, losses: Mapping[str, float]) -> None:
        """Shows the losses of an evaluation: in all, and of each source where there are several."""
        sources = {key[len("eval_") : -len("_loss")]: loss for key, loss in losses.items() if key != "eval_loss"}
        several = "  ".join(f"{name} {loss:.3f}" for name, loss in sources.items()) if len(sources) > 1 else ""
        self.note(f"step {step}  held out {losses['eval_loss']:.3f}" + (f"  ({several})" if several else ""))

    def note(self, text: str) -> None:
        """Prints above the live line."""
        if not self.quiet:
            self.console.print(f"  {text}", highlight=False, markup=False)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _json_number(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
