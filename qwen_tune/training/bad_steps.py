"""Steps that ruin a model: their loss or gradient is not finite, or the loss is far above that of guessing.

A model that gives every token of its vocabulary the same probability has a loss of ln(vocabulary) nats; twice that is
no bad batch any more. Losses stay on the device until somebody asks: in a run that stops at a bad step, when it logs;
in one that skips it, before every step of the optimizer, which costs a wait each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qwen_tune.errors import Problem, TrainingError

PlacesOf = Callable[[int, Sequence[int] | None], list[str]]
"""`file:line` of the examples of some micro-batches of a step, numbered through all processes; of all for None."""

WORSE_THAN_GUESSING = 2.0
MOST_IN_A_ROW = 10
ROWS_SHOWN = 5


@dataclass(frozen=True)
class BadStep:
    """A step that would have ruined the model; losses in nats/token, None for what is not finite."""

    step: int
    loss: float | None
    grad_norm: float | None
    rows: list[str]
    """`file:line` of the examples that were in it; where some of its batches alone were bad, those of these."""

    def __str__(self) -> str:
        measures = {"loss": self.loss, "gradient norm": self.grad_norm}
        wrong = [name for name, value in measures.items() if value is None]
        what = f"the {' and the '.join(wrong)} {'are not finite' if len(wrong) > 1 else 'is not finite'}"
        if not wrong:
            what = f"the loss is {self.loss:.4g}, more than twice that of guessing"
        shown = ", ".join(self.rows[:ROWS_SHOWN])
        rest = f" and {len(self.rows) - ROWS_SHOWN} more (bad_steps in run.json)" if len(self.rows) > ROWS_SHOWN else ""
        return f"{what}; its examples are {shown}{rest}"


class StepWatch:
    """Keeps the losses of micro-batches and the gradient norms of steps until they are looked at.

    Args:
        vocabulary: The size of the model's vocabulary.
        skips: Whether bad steps are left out, instead of ending the run.
        judges_gradients: Whether a gradient that is not finite is bad; under float16 the loss scale deals with it.
        gather: Puts the numbers of all processes together, process by process.
        places_of: Tells the examples of a step.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        skips: bool,
        judges_gradients: bool,
        gather: Callable[[Tensor], Tensor],
        places_of: PlacesOf,
    ) -> None:
        self.limit = WORSE_THAN_GUESSING * math.log(vocabulary)
        self.skips = skips
        self.found: list[BadStep] = []
        self._judges_gradients = judges_gradients
        self._gather = gather
        self._rows_of = places_of
        self._good: list[float] = []
        self._batches: list[Tensor] = []
        self._steps: list[tuple[list[Tensor], Tensor]] = []

    def restore(self, recorded: Sequence[dict[str, Any]], step: int) -> None:
        """Restores the bad steps that a run recorded up to a step."""
        self.found = [BadStep(**entry) for entry in recorded if entry["step"] <= step]

    def add(self, loss: Tensor) -> None:
        """Takes a micro-batch's share of its step's loss, which is the mean of these shares over processes, summed."""
        self._batches.append(loss.detach())

    def end_step(self, grad_norm: Tensor | float) -> None:
        """Takes the norm of the gradient after the last micro-batch of a step."""
        self._steps.append((self._batches, torch.as_tensor(grad_norm)))
        self._batches = []

    def judge(self, last_step: int) -> list[BadStep]:
        """What was bad of the steps since the last time, the same in all processes.

        Args:
            last_step: The number of the newest of them.
        """
        steps, self._steps = self._steps, []
        bad = []
        for step, (batches, norm) in enumerate(steps, start=last_step - len(steps) + 1):
            numbers = torch.stack([*batches, norm.to(batches[0])])
            # an example a process: its micro-batches, then the norm
            table = self._gather(numbers[None]).reshape(-1, len(numbers)).tolist()
            losses = [row[:-1] for row in table]
            loss, grad_norm = sum(map(sum, losses)) / len(losses), table[0][-1]
            broken = self._judges_gradients and not math.isfinite(grad_norm)
            if math.isfinite(loss) and loss <= self.limit and not broken:
                self._good.append(loss)
                continue
            guilty = [
                number * len(losses) + process
                for process, row in enumerate(losses)
                for number, share in enumerate(row)
                if not math.isfinite(share)
            ]
            rows = self._rows_of(step, sorted(guilty) or None)
            bad.append(BadStep(step, _number(loss), _number(grad_norm), rows))
            if not self.skips:
                break  # what follows is ruined by it
        self.found += bad
        return bad

    def mean_loss(self) -> float:
        """The mean loss of the good steps since the last time, in nats/token; NaN where there was none."""
        good, self._good = self._good, []
        return sum(good) / len(good) if good else math.nan

    def facts(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.found]

    def require_good(self, bad: Sequence[BadStep]) -> None:
        """Ends the run where a bad step is to end it, or too many of them stand in a row.

        Raises:
            TrainingError: It has to end.
        """
        if bad and not self.skips:
            fix = (
                "fix these examples (and allow that with train.allow_drift=[data_fingerprint]); or lower "
                "train.learning_rate (train.allow_drift=[train.learning_rate]); or leave such steps out with "
                "train.on_bad_step=skip. The run resumes from its last checkpoint"
            )
            raise TrainingError(Problem(f"step {bad[0].step}", str(bad[0]), fix), met_by_all=True)
        numbers = [entry.step for entry in self.found[-MOST_IN_A_ROW:]]
        if bad and len(numbers) == MOST_IN_A_ROW and numbers[-1] - numbers[0] == MOST_IN_A_ROW - 1:
            fix = "lower train.learning_rate, and resume from an earlier checkpoint with train.resume="
            what = f"{MOST_IN_A_ROW} bad steps in a row; {bad[-1]}"
            raise TrainingError(Problem(f"step {numbers[-1]}", what, fix), met_by_all=True)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
