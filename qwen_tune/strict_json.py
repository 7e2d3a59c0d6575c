"""JSON as rows may hold it: stricter than `json.loads`, which passes over what nobody meant to write."""

from __future__ import annotations

import json
from typing import Any


def decode(text: str) -> Any:
    """Parses one JSON value.

    Raises:
        ValueError: With a short reason: no JSON, a key twice, NaN or Infinity, half of a surrogate pair, or nested too
            deeply.
    """
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_text(value, text)
    return value


def check_text(value: Any, text: str) -> None:
    """Refuses a value that no text file could hold.

    Raises:
        ValueError: The value, parsed from the text, holds half of a surrogate pair.
    """
    # It can only come from an escape, so most lines skip the second look.
    if "\\ud" not in text and "\\uD" not in text:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which no text can contain") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{repeated}" stands twice')
    return mapping


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_constant)
