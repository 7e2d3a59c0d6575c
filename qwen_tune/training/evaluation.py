"""The evaluations of a run, and what follows from them: the best checkpoint, and an early stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen_tune.errors import Problem, TrainingError
from qwen_tune.recipe.schema import TrainSpec


@dataclass(frozen=True)
class Evaluation:
    """The loss on the held-out examples after a step, in nats/token."""

    step: int
    loss: float


class Evaluations:
    """The losses so far, and the lowest of those that have a checkpoint.

    Args:
        train: The recipe's train section.
        base: The base's name, for messages.
    """

    def __init__(self, train: TrainSpec, base: str) -> None:
        self.losses: list[Evaluation] = []
        self.best: Evaluation | None = None
        self._train = train
        self._base = base

    def add(self, step: int, loss: float) -> None:
        """Takes the loss after a step.

        Raises:
            TrainingError: It is not finite.
        """
        if not math.isfinite(loss):
            where, when = f"step {step}", f"after step {step}"
            fix = "lower train.learning_rate, and resume from an earlier checkpoint with train.resume="
            if not step:
                where, when = self._base, "before anything was trained"
                fix = "download the base again, or take a wider model.dtype"
            what = f"the loss on the held-out examples is not finite {when}"
            raise TrainingError(Problem(where, what, fix), met_by_all=True)
        self.losses.append(Evaluation(step, loss))

    def latest(self, step: int) -> float | None:
        """The loss after a step, where that was the last one evaluated."""
        return self.losses[-1].loss if self.losses and self.losses[-1].step == step else None

    def add_checkpoint(self, step: int) -> None:
        """Takes a checkpoint for the best one, where the loss after its step is the lowest."""
        loss = self.latest(step)
        if loss is not None and (self.best is None or loss < self.best.loss):
            self.best = Evaluation(step, loss)

    def patience_is_over(self) -> bool:
        """Whether the last evaluations have brought so little that the run stops early."""
        if self._train.early_stopping_patience is None:
            return False
        lowest, since = math.inf, 0
        for evaluation in self.losses:
            since += 1
            if evaluation.loss < lowest - self._train.early_stopping_threshold:
                lowest, since = evaluation.loss, 0
        return since >= self._train.early_stopping_patience

    def facts(self) -> dict[str, Any]:
        return {"evaluations": [vars(each) for each in self.losses], "best": vars(self.best) if self.best else None}

    def restore(self, facts: Mapping[str, Any]) -> None:
        self.losses = [Evaluation(**each) for each in facts["evaluations"]]
        self.best = Evaluation(**facts["best"]) if facts["best"] else None
