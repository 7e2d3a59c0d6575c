"""What the processes of a run count and agree on at every optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_tune.distributed.engine import any_process, make_control_group
from qwen_tune.training.batches import StepPacks
from qwen_tune.training.recording import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator


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
