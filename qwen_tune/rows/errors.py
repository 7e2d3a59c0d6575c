"""A row's error, and the words in which rows are spoken of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwen_tune.errors import Problem
from qwen_tune.rows.strict_json import decode, unlike_json

_SHOWN_CHARACTERS = 300


class RowError(ValueError):
    """A row that cannot be trained on; becomes a `Problem` with the row's file and line."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def at(self, where: str) -> Problem:
        """The problem with its place."""
        return Problem(where, self.what, self.fix)


def check_json(value: Any, name: str) -> None:
    """Refuses what a template could not write as JSON.

    Raises:
        RowError: The value holds a table's date, an infinite number, or too many levels.
    """
    if found := unlike_json(value):
        raise RowError(f"{name} holds {found}; expected plain JSON", "write it as text or as a number")


def parse_json_text(text: str, name: str) -> Any:
    """Parses JSON that a row carries inside a string.

    Raises:
        RowError: The string is not JSON.
    """
    try:
        return decode(text)
    except ValueError as error:
        raise RowError(f"{name} is a string that is not JSON ({error}); expected JSON", "mend the string") from None


def kind(value: Any) -> str:
    """The value's JSON type in words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return f"the number {str(value)[:40]}"
    if isinstance(value, str):
        return "a string" if value.strip() else "an empty string"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return type(value).__name__


def shown_row(row: Mapping[str, Any]) -> str:
    """A row for an error message: its columns and the beginnings of their values, in at most 300 characters."""
    text = "{" + ", ".join(f'"{name[:40]}": {_shown(value, 2)}' for name, value in row.items()) + "}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"


def _shown(value: Any, levels: int) -> str:
    if isinstance(value, str):
        return json.dumps(value if len(value) <= 40 else f"{value[:39]}…", ensure_ascii=False)
    if not isinstance(value, (list, dict)):
        return json.dumps(value) if value is None or isinstance(value, (bool, float)) else str(value)[:40]
    if not value or not levels:
        return ("[…]" if value else "[]") if isinstance(value, list) else ("{…}" if value else "{}")
    more = ", …" if len(value) > 3 else ""
    if isinstance(value, list):
        return f"[{', '.join(_shown(item, levels - 1) for item in value[:3])}{more}]"
    items = list(value.items())[:3]
    return "{" + ", ".join(f'"{str(key)[:40]}": {_shown(item, levels - 1)}' for key, item in items) + more + "}"
