"""Losses on held-out rows over a run, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """The loss on the held-out rows behind a step, in nats a token."""

    step: int
    loss: float


def evaluations_without_gain(evaluations: Sequence[Evaluation], threshold: float) -> int:
    """How many evaluations at the end were not lower, by more than a threshold, than the lowest before them."""
    lowest, since = float("inf"), 0
    for evaluation in evaluations:
        since += 1
        if evaluation.loss < lowest - threshold:
            lowest, since = evaluation.loss, 0
    return since
