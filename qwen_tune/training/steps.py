"""What the processes of a run count and agree on at every optimizer step."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from qwen_tune.console import report
from qwen_tune.distributed.engine import any_process, make_control_group
from qwen_tune.machine import on_stop_signals, started_at
from qwen_tune.training.batches import StepPacks

if TYPE_CHECKING:
    from accelerate import Accelerator


# A launcher passes one Ctrl-C on several times within a moment; a person presses it again after reading.
SECONDS_OF_ONE_REQUEST = 1.0


class StopRequest:
    """Whether SIGINT or SIGTERM has asked this process to stop, or its time is up.

    Args:
        max_hours: Hours after the start of this process, or None for no limit.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._signalled = False
        self._first = 0.0
        self._end = math.inf if max_hours is None else started_at() + max_hours * 3600

    @property
    def requested(self) -> bool:
        """Whether the step that runs is the last."""
        return self._signalled or time.time() >= self._end

    @contextmanager
    def listening(self, *, quiet: bool = False) -> Iterator[None]:
        """Turns signals into a request for as long as this lasts; a second Ctrl-C ends the process at once.

        Args:
            quiet: Whether to say nothing when one comes (processes beside the first).
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread alone
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if not self._signalled:
                self._signalled, self._first = True, now
                if not quiet:
                    report("\nstopping after this step; Ctrl-C again stops without saving")
            elif number == signal.SIGINT and now - self._first > SECONDS_OF_ONE_REQUEST:
                raise KeyboardInterrupt

        with on_stop_signals(on_signal):
            yield


@dataclass
class TokenCounts:
    """Tokens that went through the model, over all processes; `padding` are those among them that no pack has."""

    processed: int = 0
    padding: int = 0

    @property
    def real(self) -> int:
        return self.processed - self.padding


class Steps:
    """Counts the tokens of steps, and ends a run after one, in all processes alike.

    Args:
        packs: Which packs each step has.
        stop: Whether this process was asked to stop.
    """

    def __init__(self, packs: StepPacks, stop: StopRequest) -> None:
        self.packs = packs
        self.stop = stop
        self.counts = TokenCounts()
        self.stop_agreed = False
        self._group: Any = None
        self._process = 0

    def connect(self, accelerator: Accelerator) -> None:
        """Takes this process's place among those of the run. They agree past the GPUs: asking these would wait."""
        self._group = make_control_group(accelerator)
        self._process = accelerator.process_index

    def begin(self, step: int, batches: Sequence[Mapping[str, Any]]) -> int:
        """Counts a step that is about to run.

        Args:
            step: Its number; the first is 1.
            batches: This process's micro-batches, as the collator makes them.

        Returns:
            The supervised tokens of the step in all processes, by which its loss is divided.
        """
        mine = self.packs.count(step, self._process).labels
        found = sum(batch["targets"].shape[0] for batch in batches)
        assert found == mine, f"step {step} has {found} labels here, and {mine} by the order of its packs"
        everywhere = self.packs.count(step)
        self.counts.processed += everywhere.tokens
        self.counts.padding += everywhere.padding
        if self._group is not None:
            self.stop_agreed = self.any_process(self.stop.requested)
        return everywhere.labels

    def must_stop(self) -> bool:
        """Whether the step that has ended is the last because someone asked for it."""
        if self._group is None:
            self.stop_agreed = self.stop.requested
        return self.stop_agreed

    def any_process(self, yes: bool) -> bool:
        """Whether any process says yes; every process has to call it."""
        return any_process(self._group, yes)
