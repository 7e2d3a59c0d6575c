"""Resuming a run: whether, and from which checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qwen_tune.errors import Problem, RunError
from qwen_tune.runs.checkpoints import fault_of, newest_whole, read_manifest, step_of
from qwen_tune.runs.drift import Drift, fact_drift, refuse


class RecordedRun(Protocol):
    """A run directory, which lies above this room."""

    def recorded_facts(self) -> dict[str, Any]:
        """run.json as it is; empty where there is none."""


@dataclass(frozen=True)
class Plan:
    """What a recipe does in a run directory: begin, resume from a checkpoint, or nothing."""

    nothing_to_do: bool = False
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    """Checkpoints that were passed over, and why."""

    begins_anew: bool = False
    """Whether what is there ended before its first checkpoint."""

    drift: tuple[Drift, ...] = ()
    """Keys of the recipe that are not as the run was begun with, and allowed."""

    allowed: tuple[str, ...] = ()
    """What else may differ."""


def choose_checkpoint(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and those that were passed over.

    Args:
        folder: The run's checkpoints.
        resume: `auto` for the newest whole one, or a checkpoint's path.

    Raises:
        RunError: The path is no checkpoint of this run, or it is damaged.
    """
    if resume == "auto":
        return newest_whole(folder)
    chosen = Path(resume).expanduser()
    if not chosen.is_dir():
        raise RunError(Problem("train.resume", f"{resume} is not there; expected a checkpoint's directory"))
    if chosen.resolve().parent != folder.resolve():
        raise RunError(
            Problem(
                "train.resume",
                f"{resume} is a checkpoint of another run; expected one of {folder}",
                "write train.resume=auto, or set run.dir= to the run that it belongs to",
            )
        )
    if fault := fault_of(chosen):
        raise RunError(Problem("train.resume", f"{resume} is damaged: {fault}", "write train.resume=auto"))
    return folder / chosen.resolve().name, []


def check_resume(plan: Plan, run: RecordedRun, facts: Mapping[str, Any], max_steps: int) -> dict[str, Any]:
    """Compares what a run's checkpoint was written under and what it would resume with.

    Args:
        plan: Where it would go on.
        run: The run, with what it has recorded.
        facts: What run.json would say.
        max_steps: The optimizer steps that the recipe asks for.

    Returns:
        For run.json: `drift`, what was allowed to change: after which step, from what and to what.

    Raises:
        RunError: They differ in what is not allowed, or the checkpoint is past the last step.
    """
    if plan.checkpoint is None:
        return {"drift": []}
    drift = fact_drift(read_manifest(plan.checkpoint).get("facts", {}), facts)
    refuse(drift, plan.allowed)
    step = step_of(plan.checkpoint)
    if step > max_steps:
        what = f"{max_steps} steps are asked for, and the run has done {step} already"
        raise RunError(Problem("train", what, "ask for more of max_steps or num_train_epochs"))
    changes = [
        {"step": step, "field": found.field, "was": found.was, "now": found.now} for found in [*plan.drift, *drift]
    ]
    # What changed after this checkpoint was compared with it just now, or has not happened any more.
    earlier = [entry for entry in run.recorded_facts().get("drift") or [] if entry["step"] < step]
    return {"drift": [*earlier, *changes]}
