"""Which modules of a model an adapter changes, by their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from qwen_tune.errors import ModelError, Problem
from qwen_tune.families.family import ONLY_IF_NAMED, Family
from qwen_tune.recipe.schema import LoraSpec


def listed_targets(lora: LoraSpec, family: Family) -> Sequence[str]:
    """The names that a recipe lists, or those of the group that it names.

    Raises:
        ModelError: The architecture has no such group.
    """
    if isinstance(lora.target_modules, list):
        return lora.target_modules
    if lora.target_modules not in family.groups:
        what = f"got {lora.target_modules}; {family.title} has {', '.join(family.groups)}, and its experts stay frozen"
        raise ModelError(Problem("lora.target_modules", what, f"write {next(iter(family.groups))}"))
    return family.groups[lora.target_modules]


def wanted_modules(linear: Sequence[str], lora: LoraSpec, family: Family) -> set[str]:
    """The linear layers that get an adapter.

    Args:
        linear: The whole names of a model's linear layers, without its output layer.
        lora: The recipe's lora section.
        family: The model's architecture.

    Raises:
        ModelError: A name that the recipe lists is none of them, or `exclude_modules` leaves none, or a pattern for
            ranks or alphas matches none.
    """
    found = {name: [full for full in linear if _is_meant(name, full)] for name in listed_targets(lora, family)}
    if missing := [name for name, modules in found.items() if not modules]:
        has = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise ModelError(
            Problem(
                "lora.target_modules",
                f"{', '.join(missing)} matches no linear layer of the model; it has {has}",
                f"use these names, or one of {', '.join(family.groups)}",
            )
        )
    excluded = tuple(lora.exclude_modules or ())
    wanted = {full for modules in found.values() for full in modules if not ends_with_any(full, excluded)}
    if not wanted:
        what = f"{', '.join(excluded)} leaves no layer of lora.target_modules"
        raise ModelError(Problem("lora.exclude_modules", what, "exclude fewer"))
    for key in ("rank_pattern", "alpha_pattern"):
        _require_matches(f"lora.{key}", getattr(lora, key), wanted)
    return wanted


def rank_of(module: str, lora: LoraSpec) -> int:
    """The rank of a module's adapter: of the first pattern that matches its name, as PEFT takes it, else `r`."""
    return next((rank for pattern, rank in lora.rank_pattern.items() if _matches(pattern, module)), lora.r)


def ends_with_any(full: str, names: Iterable[str]) -> bool:
    """Whether a module's full name is one of some names, or ends with one after a dot."""
    return any(full == name or full.endswith(f".{name}") for name in names)


def _require_matches(key: str, patterns: Iterable[str], targets: Iterable[str]) -> None:
    for pattern in patterns:
        try:
            matches = any(_matches(pattern, name) for name in targets)
        except re.error as error:
            raise ModelError(Problem(key, f"{pattern} is not a regular expression ({error})", "correct it")) from None
        if not matches:
            what = f"{pattern} matches no layer that gets an adapter"
            raise ModelError(Problem(key, what, "write the end of a module's name, such as layers.0.self_attn.q_proj"))


def _matches(pattern: str, name: str) -> bool:
    """As PEFT looks patterns up: the end of a name, or a regular expression for it."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _is_meant(name: str, full: str) -> bool:
    if not ends_with_any(full, [name]):
        return False
    return ONLY_IF_NAMED.search(full) is None or ONLY_IF_NAMED.search(name) is not None
