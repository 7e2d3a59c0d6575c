"""A conversation as it was taught: turns, tools, and where it came from.

Everything that a row may say wrong in a way that does not depend on the model is found here, so that `validate`
needs neither a tokenizer nor torch. What depends on the checkpoint's template is found in `chatml`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from qwen_tune.errors import Problem
from qwen_tune.strict_json import decode

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset({"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train"})
# Keys with which other tools change what is trained: to pass over them would train something else without a word.
MEANINGFUL_FOREIGN_KEYS = {
    "weight": 'write "train": true or "train": false',
    "function_call": 'write "tool_calls": [{"function": {"name": …, "arguments": {…}}}]',
    "thinking": 'write "reasoning_content"',
    "reasoning": 'write "reasoning_content"',
}


class RowError(ValueError):
    """A row that cannot be a conversation; becomes a `Problem` with the row's file and line."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def at(self, where: str) -> Problem:
        """The problem with its place."""
        return Problem(where, self.what, self.fix)


@dataclass(frozen=True)
class Message:
    """One turn. `train` is False where the row says that an assistant turn is context only."""

    role: str
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool = True

    def for_template(self) -> dict[str, Any]:
        """The mapping that a chat template sees: keys without a value are absent, never null.

        `content` is the exception: templates read it from every turn, so a turn of tool calls alone carries an empty
        text (which every Qwen template renders like an absent one).
        """
        entry: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.reasoning_content is not None:
            entry["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            entry["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            entry["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            entry["name"] = self.name
        return entry


@dataclass(frozen=True)
class Conversation:
    """One row. `source` is `file:line`, `source_name` the recipe's name for the data it belongs to."""

    source: str
    source_name: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def content_hash(self) -> str:
        """sha256 over what is said, whatever file it came from: equal conversations have equal hashes."""
        content = [self.tools, [message.for_template() for message in self.messages]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def texts(self) -> list[str]:
        """Every string that a person wrote and a template would put into the prompt."""
        found: list[str] = []
        _collect_strings(self.tools, found)
        for message in self.messages:
            _collect_strings(message.for_template(), found)
        return found


def parse_messages(raw: Any) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Checks a list of OpenAI-style messages.

    Returns:
        The messages and warnings (keys that were passed over, turns that are odd but legal).

    Raises:
        RowError: The first thing in the list that cannot be trained on.
    """
    if isinstance(raw, str):
        raw = parse_json_text(raw, "messages")
    if not isinstance(raw, list):
        raise RowError(f"messages is {kind(raw)}; expected a list of turns")
    if not raw:
        raise RowError("messages is empty; expected at least one user and one assistant turn")
    warnings: list[str] = []
    messages = tuple(_parse_message(entry, index, warnings) for index, entry in enumerate(raw))
    _check_order(messages, warnings)
    return messages, tuple(warnings)


def parse_tools(raw: Any) -> tuple[Mapping[str, Any], ...]:
    """Tools as a list of JSON schemas, or as a JSON string of one.

    Raises:
        RowError: It is neither.
    """
    if raw is None or raw == "":
        return ()
    if isinstance(raw, str):
        raw = parse_json_text(raw, "tools")
    if not isinstance(raw, list):
        raise RowError(f"tools is {kind(raw)}; expected a list of JSON schemas")
    for index, tool in enumerate(raw):
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"tools[{index}] names no function", 'write {"function": {"name": …, "parameters": {…}}}')
    return tuple(raw)


def tool_name(tool: Mapping[str, Any]) -> str:
    """The function's name in a tool of `parse_tools`."""
    return str(tool.get("function", tool)["name"])


def parse_json_text(text: str, name: str) -> Any:
    """Parses JSON that a row carries inside a string.

    Raises:
        RowError: The string is not JSON.
    """
    try:
        return decode(text)
    except ValueError as error:
        raise RowError(f"{name} is a string that is not JSON ({error}); expected JSON") from None


def kind(value: Any) -> str:
    """The value's JSON type in words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return "a string" if value.strip() else "an empty string"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return type(value).__name__


def _parse_message(entry: Any, index: int, warnings: list[str]) -> Message:
    at = f"messages[{index}]"
    if not isinstance(entry, dict):
        raise RowError(f'{at} is {kind(entry)}; expected an object with "role" and "content"')
    role = _parse_role(entry.get("role"), at)
    for key in entry.keys() - MESSAGE_KEYS:
        if fix := MEANINGFUL_FOREIGN_KEYS.get(key):
            if entry[key] is not None:
                raise RowError(f'{at} has the key "{key}", which is not one of ours', fix)
        elif entry[key] is not None:
            warnings.append(f'message key "{key}" is not used')
    train = _parse_train(entry.get("train"), role, at)
    if train is None:
        train = True
    content = entry.get("content")
    if isinstance(content, list):
        raise RowError(f"not yet: {at}.content is a list of parts; expected a string", "join its text parts")
    if content is not None and not isinstance(content, str):
        raise RowError(f"{at}.content is {kind(content)}; expected a string")
    calls = _parse_tool_calls(entry.get("tool_calls"), role, at)
    reasoning = _optional_text(entry, "reasoning_content", at)
    if reasoning is not None and not reasoning.strip():
        # Blank reasoning is none: it would switch thinking on and teach an empty think block.
        reasoning = None
    if reasoning is not None and role != "assistant":
        raise RowError(f"{at} is a {role} turn with reasoning_content; only assistant turns reason")
    if not calls and (content is None or not content.strip()) and role != "tool":
        raise RowError(
            f"{at} ({role}) has {'no content' if content is None else 'blank content'}; expected text"
            + (" or tool_calls" if role == "assistant" else ""),
            "write the text or remove the row",
        )
    if role == "tool" and content is None:
        raise RowError(f"{at} (tool) has no content; expected the tool's result as a string")
    return Message(
        role=role,
        content=content,
        reasoning_content=reasoning,
        tool_calls=calls,
        tool_call_id=_optional_text(entry, "tool_call_id", at),
        name=_optional_text(entry, "name", at),
        train=train,
    )


def _parse_role(role: Any, at: str) -> str:
    if role is None:
        raise RowError(f"{at} has no role; expected one of {', '.join(ROLES)}")
    if role in ROLES:
        return str(role)
    nearest = difflib.get_close_matches(str(role).lower(), ROLES, n=1)
    known = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
    suggestion = known.get(str(role).lower()) or (nearest[0] if nearest else None)
    raise RowError(
        f'{at} has the role "{role}"; expected one of {", ".join(ROLES)}',
        f'write "{suggestion}"' if suggestion else "use one of these roles",
    )


def _parse_train(train: Any, role: str, at: str) -> bool | None:
    if train is None:
        return None
    if not isinstance(train, bool):
        raise RowError(f"{at}.train is {kind(train)}; expected true or false")
    if role != "assistant":
        raise RowError(f'{at} is a {role} turn with "train"; only assistant turns are trained', 'remove "train"')
    return train


def _parse_tool_calls(raw: Any, role: str, at: str) -> tuple[Mapping[str, Any], ...]:
    if raw is None or raw == []:
        return ()
    if role != "assistant":
        raise RowError(f"{at} is a {role} turn with tool_calls; only assistant turns call tools")
    if not isinstance(raw, list):
        raise RowError(f"{at}.tool_calls is {kind(raw)}; expected a list of calls")
    return tuple(_parse_tool_call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(raw))


def _parse_tool_call(call: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(call, dict):
        raise RowError(f"{at} is {kind(call)}; expected an object")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{at} names no function", 'write {"function": {"name": …, "arguments": {…}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # Templates encode a string again (Qwen2.5) or pass it raw (Qwen3): only an object renders right in all.
        arguments = parse_json_text(arguments, f"{at}.arguments")
    if not isinstance(arguments, dict):
        raise RowError(f"{at}.arguments is {kind(arguments)}; expected an object, or an object as a JSON string")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        parsed["id"] = call["id"]
    return parsed


def _optional_text(entry: Mapping[str, Any], key: str, at: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{at}.{key} is {kind(value)}; expected a string")
    return value


def _check_order(messages: Sequence[Message], warnings: list[str]) -> None:
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise RowError("there is no assistant turn, so nothing to learn", "add the answer or remove the row")
    first = next((role for role in roles if role != "system"), None)
    if first != "user":
        raise RowError(f"the first turn is from the {first}; expected the user", "start with what the user asked")
    if roles[-1] != "assistant":
        raise RowError(
            f"the last turn is from the {roles[-1]}; expected the assistant", "add the answer or cut the last turn"
        )
    if "system" in roles[1:]:
        warnings.append("system turn that is not the first")
    if any(one == two == "user" for one, two in pairwise(roles)):
        warnings.append("two user turns in a row")


def _collect_strings(value: Any, found: list[str]) -> None:
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            found.append(str(key))
            _collect_strings(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect_strings(item, found)
