"""Going on with a run: from which checkpoint, and whether it is still the same run.

A run is the same while everything that decides its result is: base, rows, template, tokenizer, processes, and the
recipe but for the keys in `HARMLESS`. A run that would go on as another one is refused with the key's name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from qwen_tune.errors import Problem, RunError
from qwen_tune.runs.checkpoints import fault_of, newest_whole, read_manifest, step_of

LENGTH = ("train.num_train_epochs", "train.max_steps")
"""How long a run goes on; a run may be made longer, also when it has finished."""

HARMLESS = (
    "run",
    "tracking",
    "export",
    "hub",
    "train.num_processes",  # the number that runs is compared, not the one that is asked for
    "train.per_device_train_batch_size",  # the rows of a step stay the same
    "train.gradient_checkpointing",
    "train.logging_steps",
    "train.eval_steps",
    "train.eval_prompts",
    "train.early_stopping_patience",
    "train.early_stopping_threshold",
    "train.load_best_model_at_end",
    "train.save_steps",
    "train.save_total_limit",
    "train.max_hours",
    "train.resume",
    *LENGTH,
)
"""Keys that may change between the parts of a run; a section's name stands for all of its keys."""

SAME_FACTS = {
    "base.weights_fingerprint": "the base's weights",
    "tokenizer_sha256": "the tokenizer",
    "template_sha256": "the chat template",
    "data_fingerprint": "the rows (their token ids and labels)",
    "world_size": "the number of processes",
}
"""What run.json has to say again, and what it is."""


class RecordedRun(Protocol):
    """A run directory, which lies above this room."""

    def recorded_facts(self) -> dict[str, Any]:
        """run.json as it is; empty where there is none."""


@dataclass(frozen=True)
class Plan:
    """What a recipe does in a run directory: begin, go on from a checkpoint, or nothing."""

    nothing_to_do: bool = False
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()
    """Checkpoints that were passed over, and why."""

    begins_anew: bool = False
    """Whether what is there ended before its first checkpoint."""


def recipe_drift(begun_with: str, recipe_yaml: str) -> list[Problem]:
    """The keys in which a recipe would make another run of the one that is there; texts are resolved recipes."""
    old, new = _flat(begun_with), _flat(recipe_yaml)
    return [
        Problem(
            key,
            f"got {_shown(new.get(key))}; the run in this directory was begun with {_shown(old.get(key))}",
            "put it back to go on, or begin another run with run.dir=",
        )
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not is_harmless(key)
    ]


def asks_for_more(begun_with: str, recipe_yaml: str) -> bool:
    """Whether a recipe differs in how long it trains."""
    old, new = _flat(begun_with), _flat(recipe_yaml)
    return any(old.get(key) != new.get(key) for key in LENGTH)


def is_harmless(key: str) -> bool:
    """Whether a key may change between the parts of a run."""
    return any(key == harmless or key.startswith(f"{harmless}.") for harmless in HARMLESS)


def choose_checkpoint(folder: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and those that were passed over.

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


def run_fingerprint(recipe_yaml: str, facts: Mapping[str, Any]) -> str:
    """sha256 over everything that decides a run's result; a checkpoint's manifest carries it."""
    recipe = {key: value for key, value in _flat(recipe_yaml).items() if not is_harmless(key)}
    text = json.dumps([recipe, [_fact(facts, key) for key in SAME_FACTS]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_resume(plan: Plan, run: RecordedRun, facts: Mapping[str, Any], max_steps: int) -> None:
    """Compares what a run was begun with and what it would go on with.

    Args:
        plan: Where it would go on.
        run: The run, with what it has recorded.
        facts: What run.json would say, with the run's `fingerprint`.
        max_steps: The optimizer steps that the recipe asks for.

    Raises:
        RunError: They differ, the checkpoint was written by another run, or it is past the last step.
    """
    if plan.checkpoint is None:
        return
    recorded = run.recorded_facts()
    problems = [
        Problem(
            what,
            f"changed since the run was begun: {key} was {_shown(_fact(recorded, key))}, "
            f"now {_shown(_fact(facts, key))}",
            "put it back to go on, or begin another run with run.dir=",
        )
        for key, what in SAME_FACTS.items()
        if _fact(recorded, key) != _fact(facts, key)
    ]
    if not problems and read_manifest(plan.checkpoint).get("fingerprint") != facts["fingerprint"]:
        what = "it was written by another run"
        problems.append(Problem(str(plan.checkpoint), what, "remove it, or begin another run with run.dir="))
    if not problems and step_of(plan.checkpoint) > max_steps:
        what = f"{max_steps} steps are asked for, and the run has done {step_of(plan.checkpoint)} already"
        problems.append(Problem("train", what, "ask for more of max_steps or num_train_epochs"))
    if problems:
        raise RunError(problems)


def _flat(recipe_yaml: str) -> dict[str, Any]:
    try:
        return dict(_leaves("", yaml.safe_load(recipe_yaml) or {}))
    except yaml.YAMLError:
        what = "the recipe of the run that is there cannot be read any more"
        raise RunError(Problem("recipe.yaml", what, "set another directory with run.dir=, or --overwrite")) from None


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from _leaves(f"{prefix}[{index}]", item)
    else:
        yield prefix, value


def _fact(facts: Mapping[str, Any], key: str) -> Any:
    value: Any = facts
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:12]}…"
