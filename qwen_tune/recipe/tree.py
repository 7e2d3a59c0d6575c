"""Recipe values with their places, and the faults found in them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from qwen_tune.errors import Problem
from qwen_tune.recipe.secret_values import Secrets

KeyPath: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """Where a value is written: a line of a file, or an override on the command line."""

    source: str
    """The file as the user named it, or `command line: key=value`."""

    line: int | None
    """From 1; None for an override."""

    rank: int = 0
    """Order of the sources: the recipe, the files it extends, the overrides."""

    override: KeyPath | None = None
    """The key path that the override names."""

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True)
class Located:
    """A value and where it is written."""

    value: dict[str, Located] | list[Located] | str | int | float | bool | None
    place: Place

    def plain(self) -> Any:
        """The value as plain dicts, lists and scalars."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value

    def child(self, part: str | int) -> Located | None:
        if isinstance(self.value, dict):
            return self.value.get(str(part))
        if isinstance(self.value, list) and isinstance(part, int) and part < len(self.value):
            return self.value[part]
        return None

    def find(self, path: KeyPath) -> Located | None:
        node: Located | None = self
        for part in path:
            node = node.child(part) if node else None
        return node

    def nearest(self, path: KeyPath) -> Located:
        """The value at a key path, or the innermost existing one around it."""
        node = self
        for part in path:
            inner = node.child(part)
            if inner is None:
                break
            node = inner
        return node

    def merged(self, over: Located) -> Located:
        """The value overridden by another one: mappings merge, everything else is replaced."""
        if not isinstance(self.value, dict) or not isinstance(over.value, dict):
            return over
        items = dict(self.value)
        for key, item in over.value.items():
            items[key] = items[key].merged(item) if key in items else item
        return Located(items, over.place)


def to_text(path: KeyPath) -> str:
    """A key path as users write it: `data.train[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def to_path(text: str) -> KeyPath:
    """The key path of a text such as `data.train[0].path` or `data.train.0.path`."""
    parts = re.sub(r"\[([0-9]+)\]", r".\1", text).split(".")
    return tuple(int(part) if re.fullmatch(r"[0-9]{1,6}", part) else part for part in parts)


@dataclass(frozen=True)
class Fault:
    """One fault of a recipe, and the key path that it concerns."""

    place: Place
    path: KeyPath
    what: str
    fix: str = ""
    hides_others: bool = False
    """Whether other faults at or below its path are not reported."""


class UnusableRecipeError(Exception):
    """The faults found so far leave too little to validate."""


@dataclass
class Faults:
    """All faults of a recipe, and the secrets that no message may show."""

    found: list[Fault] = field(default_factory=list)
    secrets: Secrets = field(default_factory=Secrets)

    def add(self, place: Place, path: KeyPath, what: str, fix: str = "", hides_others: bool = False) -> None:
        self.found.append(Fault(place, path, what, fix, hides_others))

    def stop(self, place: Place, path: KeyPath, what: str, fix: str) -> NoReturn:
        """Adds a fault after which there is too little left to validate."""
        self.add(place, path, what, fix)
        raise UnusableRecipeError

    def problems(self) -> list[Problem]:
        """What to report, in the order of the files and their lines."""
        hidden = {(fault.place.source, fault.path) for fault in self.found if fault.hides_others}
        reported: dict[Problem, None] = {}
        for fault in sorted(self.found, key=lambda fault: (fault.place.rank, fault.place.line or 0)):
            source = fault.place.source
            if not fault.hides_others and any(
                (source, fault.path[:end]) in hidden for end in range(len(fault.path) + 1)
            ):
                continue
            # An override names its key already.
            named = "" if not fault.path or fault.path == fault.place.override else f"{to_text(fault.path)}: "
            redact = self.secrets.redact
            where = redact(str(fault.place)) if fault.place.override else str(fault.place)
            reported[Problem(where, redact(named + fault.what), redact(fault.fix))] = None
        return list(reported)
