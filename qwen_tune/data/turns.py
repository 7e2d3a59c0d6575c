"""Converts the various spellings of turns to OpenAI's: a role and a content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_tune.data.values import kind, parse_json_text
from qwen_tune.errors import ExampleError

TURN_COLUMNS = ("messages", "conversations", "conversation")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_TURN_FIX = 'write {"role": "user", "content": …}'


def list_column(record: Mapping[str, Any], column: str) -> list[Any]:
    """Reads a column with a list of turns, or JSON text of one.

    Raises:
        ExampleError: It is something else.
    """
    value = record.get(column)
    if isinstance(value, str):
        value = parse_json_text(value, column)
    if not isinstance(value, list):
        raise ExampleError(f"{column} is {kind(value)}; expected a list of turns", f"{_TURN_FIX} for each turn")
    return value


def spelling(turn: Any) -> str | None:
    """How a turn is written: `role and content`, `from and value` or `human and assistant`; None if unknown."""
    if not isinstance(turn, dict):
        return None
    if "role" in turn:
        return "role and content"
    if "from" in turn:
        return "from and value"
    return "human and assistant" if "human" in turn or "assistant" in turn else None


def to_messages(turns: list[Any], column: str) -> list[Any]:
    """Converts turns in any spelling to messages.

    Raises:
        ExampleError: The spelling of a turn is unknown.
    """
    for turn in turns:
        if type(turn) is not dict or "role" not in turn:
            break
    else:
        return turns
    messages: list[Any] = []
    for index, turn in enumerate(turns):
        at = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise ExampleError(f"{at} is {kind(turn)}; expected a turn", _TURN_FIX)
        spelled = spelling(turn)
        if spelled == "from and value":
            messages.append(_from_and_value(turn, at))
        elif spelled == "human and assistant":
            messages += _human_and_assistant(turn, at, is_first=index == 0)
        elif spelled or "content" in turn:
            messages.append(turn)
        else:
            keys = ", ".join(str(key)[:40] for key in list(turn)[:8]) or "no keys"
            what = f'{at} has {keys}; expected "role" and "content", "from" and "value", or "human" and "assistant"'
            raise ExampleError(what, _TURN_FIX)
    return messages


def history_pairs(record: Mapping[str, Any]) -> list[Any]:
    """The turns of the column `history`, a list of [question, answer] pairs.

    Raises:
        ExampleError: It is something else.
    """
    history = record.get("history") or []
    if isinstance(history, str):
        history = parse_json_text(history, "history")
    fix = "write [[question, answer], …]"
    if not isinstance(history, list):
        raise ExampleError(f"history is {kind(history)}; expected a list of [question, answer] pairs", fix)
    messages: list[Any] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            found = f"{kind(pair)} of {len(pair)}" if isinstance(pair, (list, tuple)) else kind(pair)
            raise ExampleError(f"history[{index}] is {found}; expected a [question, answer] pair", fix)
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _spoken(text, f"history[{index}]")})
    return messages


def text_column(record: Mapping[str, Any], column: str) -> str:
    """The text of a column.

    Raises:
        ExampleError: It is not text, or is blank.
    """
    return _spoken(record.get(column), column)


def _spoken(value: Any, at: str) -> str:
    if isinstance(value, str) and value and not value.isspace():
        return value
    raise ExampleError(f"{at} is {kind(value)}; expected text", "write the text or remove the example")


def _from_and_value(turn: dict[str, Any], at: str) -> dict[str, Any]:
    speaker, value = turn["from"], turn.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        found = f'"{speaker[:40]}"' if isinstance(speaker, str) else kind(speaker)
        raise ExampleError(f"{at}.from is {found}; expected one of {', '.join(SHAREGPT_ROLES)}", "rename the speaker")
    role = SHAREGPT_ROLES[speaker]
    if len(turn) == 2 and speaker != "function_call":
        return {"role": role, "content": value}
    # Other keys of the turn (train, reasoning_content, weight …) are read or refused like those of a message.
    others = {key: item for key, item in turn.items() if key not in ("from", "value")}
    if speaker == "function_call":
        call = parse_json_text(value, f"{at}.value") if isinstance(value, str) else value
        calls = call if isinstance(call, list) else [call]
        return {**others, "role": role, "content": None, "tool_calls": calls}
    return {**others, "role": role, "content": value}


def _human_and_assistant(turn: dict[str, Any], at: str, *, is_first: bool) -> list[Any]:
    if unknown := turn.keys() - {"human", "assistant", "system"}:
        # The turn becomes two messages: it is unclear to which of them another key belongs.
        what = f'{at} has the key "{min(unknown)[:40]}"; expected human, assistant and system'
        raise ExampleError(what, 'remove it, or write turns with "role" and "content"')
    messages = [
        {"role": role, "content": _spoken(turn.get(key), f"{at}.{key}")}
        for key, role in (("human", "user"), ("assistant", "assistant"))
    ]
    if turn.get("system"):
        if not is_first:
            raise ExampleError(f"{at} has a system text; expected it in the first turn only", "move it there")
        messages.insert(0, {"role": "system", "content": turn["system"]})
    return messages
