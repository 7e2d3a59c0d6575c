"""Whether a run that goes on is still the run that was begun, and what of it may be another one.

A run is the same while everything that decides its result is: base, rows, template, tokenizer, processes, versions, and
the recipe but for the keys in `HARMLESS`. What differs is refused by its name, unless the recipe's `train.allow_drift`
names it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from qwen_tune.errors import Problem, RunError
from qwen_tune.recipe.errors import known_sections
from qwen_tune.recipe.rules import FACTS

LENGTH = ("train.num_train_epochs", "train.max_steps")
"""How long a run goes on; a run may be made longer, also when it has finished."""

ENDS = (
    *LENGTH,
    "train.early_stopping_patience",
    "train.early_stopping_threshold",
    "train.load_best_model_at_end",
)
"""What decides where a run ends and with which adapter: a finished one goes on when they change."""

ALLOWED = "train.allow_drift"

HARMLESS = (
    "name",
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
    "train.on_bad_step",  # a run that met one has stopped there, and resumes from before it
    "train.resume",
    *(f"train.trainer_args.dataloader_{name}" for name in ("num_workers", "prefetch_factor", "pin_memory")),
    "train.trainer_args.dataloader_persistent_workers",
    ALLOWED,
    *LENGTH,
)
"""Keys that may change between the parts of a run; a section's name stands for all of its keys."""

SHAPES = (
    "lora.r",
    "lora.target_modules",
    "lora.init_lora_weights",
    "lora.use_dora",
    "lora.bias",
    "lora.rank_pattern",
    "lora.exclude_modules",
    "lora.modules_to_save",
    "lora.trainable_token_indices",
    "lora.target_parameters",
    "train.optim",
    "train.loraplus_lr_ratio",  # with one there are more parameter groups
)
"""Keys that decide which tensors a checkpoint holds: with others it cannot be read, whatever is allowed."""


@dataclass(frozen=True)
class Drift:
    """One field that is not as it was when the run was begun; `what` says what it is where its name does not."""

    field: str
    was: Any
    now: Any
    what: str = ""

    def is_in(self, names: Iterable[str]) -> bool:
        """Whether one of some names stands for this field: its own, or that of something that holds it."""
        return any(is_within(self.field, name) for name in names)

    def __str__(self) -> str:
        return f"{self.field} was {_shown(self.was)}, now {_shown(self.now)}"


def is_within(field: str, name: str) -> bool:
    """Whether a name is a field's own, or that of something that holds it."""
    return field == name or field.startswith((f"{name}.", f"{name}["))


def recipe_drift(begun_with: str, recipe_yaml: str) -> list[Drift]:
    """The keys in which a recipe would make another run of the one that is there; texts are resolved recipes."""
    old, new = _flat(begun_with), _flat(recipe_yaml)
    return [
        Drift(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_harmless(key)
    ]


def same_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of run.json's facts those that a run has to be the same in, each under its own name."""
    return {field: _fact(facts, field) for field in FACTS}


def fact_drift(recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Drift]:
    """The facts in which a run would be another one than it was; `recorded` is what `same_facts` gave."""
    now = same_facts(facts)
    return [
        Drift(field, recorded[field], now[field], FACTS[field])
        for field in FACTS
        if field in recorded and recorded[field] != now[field]
    ]


def allowed_drift(recipe_yaml: str) -> list[str]:
    """What a resolved recipe allows."""
    return list(_flat(recipe_yaml).get(ALLOWED) or ())


def refuse(drift: Sequence[Drift], allowed: Iterable[str]) -> None:
    """Refuses what is not allowed, or cannot be.

    Raises:
        RunError: A line for every such field: what it was, what it is, and how to go on.
    """
    allowed = list(allowed)
    open_fields = [found for found in drift if found.is_in(SHAPES) or not found.is_in(allowed)]
    # A bracket would end the list that the names are proposed in.
    names = dict.fromkeys([*allowed, *(f.field.split("[")[0] for f in open_fields if not f.is_in(SHAPES))])
    problems = []
    for found in open_fields:
        fix = "put it back to go on (its checkpoints have no tensors for another), or begin another run with run.dir="
        if not found.is_in(SHAPES):
            fix = f"put it back, allow it with {ALLOWED}=[{', '.join(names)}], or begin another run with run.dir="
        problems.append(Problem(found.field, _told(found), fix))
    if problems:
        raise RunError(problems)


def extends_run(begun_with: str, recipe_yaml: str) -> bool:
    """Whether a recipe differs in where the run ends, or with which adapter."""
    old, new = _flat(begun_with), _flat(recipe_yaml)
    return any(old.get(key) != new.get(key) for key in ENDS)


def run_fingerprint(recipe_yaml: str, facts: Mapping[str, Any]) -> str:
    """sha256 over everything that decides a run's result; a checkpoint's manifest carries it."""
    recipe = {key: value for key, value in _flat(recipe_yaml).items() if not _is_harmless(key)}
    text = json.dumps([recipe, same_facts(facts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _told(found: Drift) -> str:
    if found.what:
        return f"{found.what} changed since the run was begun: was {_shown(found.was)}, now {_shown(found.now)}"
    return f"got {_shown(found.now)}; the run in this directory was begun with {_shown(found.was)}"


def _is_harmless(key: str) -> bool:
    return any(is_within(key, harmless) for harmless in HARMLESS)


def _flat(recipe_yaml: str) -> dict[str, Any]:
    try:
        return dict(_leaves("", yaml.safe_load(recipe_yaml) or {}))
    except yaml.YAMLError:
        what = "the recipe of the run that is there cannot be read any more"
        raise RunError(Problem("recipe.yaml", what, "set another directory with run.dir=, or --overwrite")) from None


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of the recipe and its value; what is a mapping by itself, such as a rank_pattern, is one value."""
    section = re.sub(r"\[\d+\]", "[]", prefix)
    if isinstance(value, dict) and value and (section in known_sections() or section == "train.trainer_args"):
        for key, item in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from _leaves(f"{prefix}[{index}]", item)
    else:
        yield prefix, value


def _fact(facts: Mapping[str, Any], field: str) -> Any:
    section, _, name = field.partition(".")
    value = facts.get(section)
    if not name:
        return value
    return value.get(name) if isinstance(value, Mapping) else None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:12]}…"
