"""JSON values of data files: decoding (strict), checks, and descriptions for messages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from qwen_tune.errors import ExampleError

DEEPEST = 100
"""Levels of nesting allowed in a tool, the arguments of a call, or an argument of the template."""


def decode(text: str) -> Any:
    """Parses one JSON value.

    Raises:
        ValueError: With a short reason: it is not JSON, has a key twice, NaN or Infinity, half of a surrogate pair, or
            a number of too many digits, or is nested too deeply.
    """
    try:
        value = _decode_line(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(_reason(error)) from None
    check_text(value, text)
    return value


def decode_at(text: str, position: int) -> tuple[Any, int]:
    """Parses the value at a position; returns it and the position after it.

    Raises:
        ValueError: See `decode`; a `json.JSONDecodeError`, with its place, if it is not JSON.
    """
    try:
        value, end = DECODER.raw_decode(text, position)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(_reason(error)) from None
    check_text(value, text[position:end])
    return value, end


def check_text(value: Any, text: str) -> None:
    """Checks a value parsed from a text.

    Raises:
        ValueError: It holds half of a surrogate pair, which UTF-8 cannot encode, or is nested too deeply.
    """
    # Surrogates can only come from escapes, so most lines skip the slow check.
    if "\\u" not in text or ("\\ud" not in text and "\\uD" not in text):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is not valid text") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unlike_json(value: Any, *, level: int = 0) -> str | None:
    """Why a value cannot be written as JSON again, for messages (a date of a table, an infinite number); else None."""
    if value is None or isinstance(value, (str, bool, int)):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"the number {value}"
    if not isinstance(value, (dict, list)):
        return f"a {type(value).__name__}"
    if level == DEEPEST:
        return f"more than {DEEPEST} levels"
    items = value.values() if isinstance(value, dict) else value
    return next((found for item in items if (found := unlike_json(item, level=level + 1))), None)


def _decode_line(text: str) -> Any:
    # `JSONDecoder.decode` skips white space around the value, which takes as long as parsing a short line.
    if text.startswith("{"):
        value, end = DECODER.raw_decode(text)
        if text[end:] in _LINE_ENDS:
            return value
    return DECODER.decode(text)


def _reason(error: ValueError) -> str:
    return "a number has too many digits" if "integer string conversion" in str(error) else str(error)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{repeated[:40]}" occurs twice')
    return mapping


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
_LINE_ENDS = ("", "\n", "\r\n")


_SHOWN_CHARACTERS = 300


def check_json(value: Any, name: str) -> None:
    """Checks that a template can write a value as JSON.

    Raises:
        ExampleError: It holds a date from a table, an infinite number, or too many levels.
    """
    if found := unlike_json(value):
        raise ExampleError(f"{name} holds {found}; expected plain JSON", "write it as text or as a number")


def parse_json_text(text: str, name: str) -> Any:
    """Parses JSON text inside a column.

    Raises:
        ExampleError: The string is not JSON.
    """
    try:
        return decode(text)
    except ValueError as error:
        raise ExampleError(f"{name} is a string that is not JSON ({error}); expected JSON", "fix the string") from None


def kind(value: Any) -> str:
    """The JSON type of a value, for messages."""
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


def shown_record(record: Mapping[str, Any]) -> str:
    """A record for messages: columns and shortened values, in at most 300 characters."""
    text = "{" + ", ".join(f'"{name[:40]}": {_shown(value, 2)}' for name, value in record.items()) + "}"
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
