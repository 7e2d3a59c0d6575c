"""Whether a run is resumed, and from which checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_tune.errors import Problem, RunError
from qwen_tune.runs.checkpoints import fault_of, newest_whole, read_manifest, step_of
from qwen_tune.runs.drift import Drift, changed_facts, require_allowed


@dataclass(frozen=True)
class Plan:
    """What a recipe does in a run directory: start, resume from a checkpoint, or nothing."""

    nothing_to_do: bool = False
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    """Checkpoints that were skipped, and why."""

    starts_over: bool = False
    """Whether the existing run ended before its first checkpoint."""

    drift: tuple[Drift, ...] = ()
    """Allowed changes of recipe keys since the run was started."""

    allowed: tuple[str, ...] = ()
    """Names that `train.allow_drift` lists."""


def choose_checkpoint(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, and those that were skipped; with `auto`, the newest undamaged one.

    Raises:
        RunError: The path is not a checkpoint of this run, or the checkpoint is damaged.
    """
    if resume == "auto":
        return newest_whole(folder)
    chosen = Path(resume).expanduser()
    if not chosen.is_dir():
        raise RunError(Problem("train.resume", f"{resume} does not exist; expected a checkpoint's directory"))
    if chosen.resolve().parent != folder.resolve():
        what = f"{resume} is not a checkpoint of this run; expected one in {folder}"
        fix = "write train.resume=auto, or set run.dir= to the run that it belongs to"
        raise RunError(Problem("train.resume", what, fix))
    if fault := fault_of(chosen):
        raise RunError(Problem("train.resume", f"{resume} is damaged: {fault}", "write train.resume=auto"))
    return folder / chosen.resolve().name, []


def check_resume(plan: Plan, recorded: Mapping[str, Any], facts: Mapping[str, Any], max_steps: int) -> dict[str, Any]:
    """Compares the facts that a checkpoint was written under with those that the run would resume with.

    Args:
        plan: Where it would resume.
        recorded: What run.json says now.
        facts: The facts that run.json would get.
        max_steps: The optimizer steps that the recipe asks for.

    Returns:
        `drift` for run.json: the allowed changes, each with the step after which it applies.

    Raises:
        RunError: A change is not allowed, or the checkpoint is past the last step.
    """
    if plan.checkpoint is None:
        return {"drift": []}
    drift = changed_facts(read_manifest(plan.checkpoint).get("facts", {}), facts)
    require_allowed(drift, plan.allowed)
    step = step_of(plan.checkpoint)
    if step > max_steps:
        what = f"the recipe asks for {max_steps} steps, but the run has already done {step}"
        raise RunError(Problem("train", what, "increase max_steps or num_train_epochs"))
    changes = [
        {"step": step, "field": found.field, "was": found.was, "now": found.now} for found in [*plan.drift, *drift]
    ]
    # Changes after this checkpoint were compared just now, or have been undone.
    earlier = [entry for entry in recorded.get("drift") or [] if entry["step"] < step]
    return {"drift": [*earlier, *changes]}
