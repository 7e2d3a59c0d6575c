"""What may change between the start of a run and its resumption.

Everything that affects the result must stay the same: base, examples, template, tokenizer, processes, versions, and the
recipe except for the keys in `HARMLESS`. A change is refused by its name, unless the recipe's `train.allow_drift` names
it.
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

ENDS = (
    "train.num_train_epochs",
    "train.max_steps",
    "train.early_stopping_patience",
    "train.early_stopping_threshold",
    "train.load_best_model_at_end",
)
"""Where a run ends, and with which adapter: a finished run is resumed when one of these changes."""

ALLOWED = "train.allow_drift"

HARMLESS = (
    "name",
    "run",
    "tracking",
    "export",
    "hub",
    "train.num_processes",  # the number of running processes is compared instead
    "train.per_device_train_batch_size",  # the packs of a step stay the same
    "train.gradient_checkpointing",
    "train.logging_steps",
    "train.eval_steps",
    "train.eval_prompts",
    "train.save_steps",
    "train.save_total_limit",
    "train.max_hours",
    "train.on_bad_step",  # a run that met one has stopped, and resumes from before it
    "train.resume",
    *(f"train.trainer_args.dataloader_{name}" for name in ("num_workers", "prefetch_factor", "pin_memory")),
    "train.trainer_args.dataloader_persistent_workers",
    ALLOWED,
    *ENDS,
)
"""Keys that may change when a run is resumed; a section's name stands for all of its keys."""

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
"""Keys that determine the tensors of a checkpoint: if one changes, it cannot be read, whatever is allowed."""


@dataclass(frozen=True)
class Drift:
    """A field that changed since the run was started; `what` describes it if its name does not."""

    field: str
    was: Any
    now: Any
    what: str = ""

    def __str__(self) -> str:
        return f"{self.field} was {_shown(self.was)}, now {_shown(self.now)}"


def _is_in(field: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the field's own, or that of a section or list around it."""
    return any(field == name or field.startswith((f"{name}.", f"{name}[")) for name in names)


def changed_keys(started_with: str, recipe_yaml: str) -> list[Drift]:
    """The keys that affect the result and differ between two resolved recipes."""
    old, new = _flat(started_with), _flat(recipe_yaml)
    return [
        Drift(key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_in(key, HARMLESS)
    ]


def fixed_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of run.json that must not change during a run, by their dotted names."""
    return {field: _fact(facts, field) for field in FACTS}


def changed_facts(recorded: Mapping[str, Any], facts: Mapping[str, Any]) -> list[Drift]:
    """The fixed facts that differ from those recorded."""
    now = fixed_facts(facts)
    return [
        Drift(field, recorded[field], now[field], FACTS[field])
        for field in FACTS
        if field in recorded and recorded[field] != now[field]
    ]


def allowed_drift(recipe_yaml: str) -> list[str]:
    return list(_flat(recipe_yaml).get(ALLOWED) or ())


def require_allowed(drift: Sequence[Drift], allowed: Sequence[str]) -> None:
    """Refuses changes that are not allowed, or cannot be.

    Raises:
        RunError: One problem for each such field: what it was, what it is now, and how to resume.
    """
    refused = [found for found in drift if _is_in(found.field, SHAPES) or not _is_in(found.field, allowed)]
    # A bracket would end the proposed list.
    names = dict.fromkeys([*allowed, *(f.field.split("[")[0] for f in refused if not _is_in(f.field, SHAPES))])
    problems = []
    for found in refused:
        fix = "change it back to resume (the checkpoints have no tensors for another value), or start another run with "
        if not _is_in(found.field, SHAPES):
            fix = f"change it back, allow it with {ALLOWED}=[{', '.join(names)}], or start another run with "
        was, now = _shown(found.was), _shown(found.now)
        what = f"got {now}; the run in this directory was started with {was}"
        if found.what:
            what = f"{found.what} changed since the run was started: was {was}, now {now}"
        problems.append(Problem(found.field, what, f"{fix}run.dir="))
    if problems:
        raise RunError(problems)


def changes_end(started_with: str, recipe_yaml: str) -> bool:
    """Whether two resolved recipes differ in where the run ends, or with which adapter."""
    old, new = _flat(started_with), _flat(recipe_yaml)
    return any(old.get(key) != new.get(key) for key in ENDS)


def run_fingerprint(recipe_yaml: str, facts: Mapping[str, Any]) -> str:
    """sha256 over everything that affects a run's result."""
    recipe = {key: value for key, value in _flat(recipe_yaml).items() if not _is_in(key, HARMLESS)}
    text = json.dumps([recipe, fixed_facts(facts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _flat(recipe_yaml: str) -> dict[str, Any]:
    try:
        return dict(_leaves("", yaml.safe_load(recipe_yaml) or {}))
    except yaml.YAMLError:
        what = "the recipe of the existing run cannot be read"
        raise RunError(
            Problem("recipe.yaml", what, "set another run directory with run.dir=, or replace the run with --overwrite")
        ) from None


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of the recipe and its value; a mapping with free keys, such as a rank_pattern, is one value."""
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
