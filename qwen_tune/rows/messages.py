"""The turns of a conversation, and what can be wrong with one whatever the model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeAlias, overload

from qwen_tune.errors import visible
from qwen_tune.rows.errors import RowError, check_json, kind, parse_json_text
from qwen_tune.rows.parts import LOSS_KEYS, joined_parts

ROLES = ("system", "user", "assistant", "tool")
SHARED_ROLES = {role: role for role in ROLES}  # a million rows share these strings instead of holding each its own
Roles: TypeAlias = "tuple[str, ...]"
MESSAGE_KEYS = frozenset({"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train"})
# Keys with which other tools change what is trained: to pass over them would train something else without a word.
MEANINGFUL_FOREIGN_KEYS = {
    **dict.fromkeys(LOSS_KEYS, 'write "train": true or "train": false'),
    "function_call": 'write "tool_calls": [{"function": {"name": …, "arguments": {…}}}]',
    "thinking": 'write "reasoning_content"',
    "reasoning": 'write "reasoning_content"',
}


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

    @property
    def is_plain(self) -> bool:
        """Whether the turn is a role and a text, and nothing else that a template would see."""
        return (
            not self.tool_calls and self.reasoning_content is None and self.tool_call_id is None and self.name is None
        )

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


class PlainTurns(Sequence[Message]):
    """Turns that are no more than a role and a text each, as in most rows: made into messages when somebody asks."""

    __slots__ = ("_messages", "roles", "texts")

    def __init__(self, roles: Roles, texts: list[str]) -> None:
        self.roles = roles
        self.texts = texts
        self._messages: tuple[Message, ...] | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns as messages."""
        if self._messages is None:
            self._messages = tuple(map(Message, self.roles, self.texts))
        return self._messages

    def __len__(self) -> int:
        return len(self.roles)

    @overload
    def __getitem__(self, index: int) -> Message: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Message, ...]: ...

    def __getitem__(self, index: int | slice) -> Message | tuple[Message, ...]:
        return self.messages[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.messages == tuple(other)

    def __hash__(self) -> int:
        return hash(self.messages)

    def __repr__(self) -> str:
        return repr(self.messages)


def parse_messages(raw: Any, name: str = "messages") -> tuple[Sequence[Message], tuple[str, ...]]:
    """Checks a list of OpenAI-style messages.

    Args:
        raw: The list, or JSON text of it.
        name: The column that holds it, for errors.

    Returns:
        The messages and warnings (keys that were passed over, turns that are odd but legal).

    Raises:
        RowError: The first thing in the list that cannot be trained on.
    """
    if isinstance(raw, str):
        raw = parse_json_text(raw, name)
    if not isinstance(raw, list):
        raise RowError(f"{name} is {kind(raw)}; expected a list of turns", 'write [{"role": …, "content": …}, …]')
    if not raw:
        what = f"{name} is empty; expected at least one user and one assistant turn"
        raise RowError(what, "add turns or remove the row")
    if (plain := _plain_turns(raw)) is not None:
        return plain, _check_order(plain.roles)
    warnings: list[str] = []
    messages = tuple([_parse_message(entry, f"{name}[{index}]", warnings) for index, entry in enumerate(raw)])
    odd = _check_order(tuple([message.role for message in messages]))
    return messages, (*warnings, *odd)


def _plain_turns(raw: list[Any]) -> PlainTurns | None:
    """The turns, where each is a role and a text and nothing about them is wrong."""
    roles: list[str] = []
    texts: list[str] = []
    for entry in raw:
        if type(entry) is not dict or len(entry) != 2:
            return None
        role, content = entry.get("role"), entry.get("content")
        if type(role) is not str or role not in SHARED_ROLES:
            return None
        if type(content) is not str or not content or content.isspace():
            return None
        roles.append(SHARED_ROLES[role])
        texts.append(content)
    return PlainTurns(tuple(roles), texts)


def _parse_message(entry: Any, at: str, warnings: list[str]) -> Message:
    if not isinstance(entry, dict):
        raise RowError(f'{at} is {kind(entry)}; expected an object with "role" and "content"', "write such an object")
    role = _parse_role(entry.get("role"), at)
    for key in entry.keys() - MESSAGE_KEYS:
        if fix := MEANINGFUL_FOREIGN_KEYS.get(key):
            if entry[key] is not None:
                raise RowError(f'{at} has the key "{key}", which is not one of ours', fix)
        elif entry[key] is not None:
            warnings.append(f'message key "{visible(key[:40])}" is not used')
    train = _parse_train(entry.get("train"), role, at)
    if isinstance(entry.get("content"), list):
        entry = joined_parts(entry, role, at)
    content = entry.get("content")
    if content is not None and not isinstance(content, str):
        raise RowError(f"{at}.content is {kind(content)}; expected a string", "write the text as a string")
    calls = _parse_tool_calls(entry.get("tool_calls"), role, at)
    reasoning = _optional_text(entry, "reasoning_content", at)
    if reasoning is not None and not reasoning.strip():
        # Blank reasoning is none: it would switch thinking on and teach an empty think block.
        reasoning = None
    if reasoning is not None and role != "assistant":
        what = f"{at} is a {role} turn with reasoning_content; only assistant turns reason"
        raise RowError(what, "remove it from this turn")
    if not calls and (content is None or not content.strip()) and role != "tool":
        raise RowError(
            f"{at} ({role}) has {'no content' if content is None else 'blank content'}; expected text"
            + (" or tool_calls" if role == "assistant" else ""),
            "write the text or remove the row",
        )
    if role == "tool" and content is None:
        what = f"{at} (tool) has no content; expected the tool's result as a string"
        raise RowError(what, 'write the result, "" if there was none')
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
    expected = f"expected one of {', '.join(ROLES)}"
    if role is None:
        raise RowError(f"{at} has no role; {expected}", 'write "role": "user" or whose turn it is')
    if not isinstance(role, str):
        raise RowError(f"{at}.role is {kind(role)}; {expected}", "write one of these roles")
    if role in ROLES:
        return SHARED_ROLES.get(role, role)
    nearest = difflib.get_close_matches(role[:40].lower(), ROLES, n=1)
    known = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
    suggestion = known.get(role.lower()) or (nearest[0] if nearest else None)
    raise RowError(
        f'{at} has the role "{role[:40]}"; {expected}',
        f'write "{suggestion}"' if suggestion else "write one of these roles",
    )


def _parse_train(train: Any, role: str, at: str) -> bool:
    if train is None:
        return True
    if not isinstance(train, bool):
        raise RowError(f"{at}.train is {kind(train)}; expected true or false", "write true or false")
    if role != "assistant":
        raise RowError(f'{at} is a {role} turn with "train"; only assistant turns are trained', 'remove "train"')
    return train


def _parse_tool_calls(raw: Any, role: str, at: str) -> tuple[Mapping[str, Any], ...]:
    if raw is None or raw == []:
        return ()
    if role != "assistant":
        what = f"{at} is a {role} turn with tool_calls; only assistant turns call tools"
        raise RowError(what, "remove them from this turn")
    if not isinstance(raw, list):
        raise RowError(f"{at}.tool_calls is {kind(raw)}; expected a list of calls", 'write [{"function": {…}}]')
    return tuple(_parse_tool_call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(raw))


def _parse_tool_call(call: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(call, dict):
        raise RowError(f"{at} is {kind(call)}; expected an object", 'write {"function": {…}}')
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError(f"{at} names no function", 'write {"function": {"name": …, "arguments": {…}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # Templates encode a string again (Qwen2.5) or pass it raw (Qwen3): only an object renders right in all.
        arguments = parse_json_text(arguments, f"{at}.arguments")
    if not isinstance(arguments, dict):
        what = f"{at}.arguments is {kind(arguments)}; expected an object, or an object as a JSON string"
        raise RowError(what, "write {} where there are none")
    check_json(arguments, f"{at}.arguments")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        parsed["id"] = _optional_text(call, "id", at)
    return parsed


def _optional_text(entry: Mapping[str, Any], key: str, at: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise RowError(f"{at}.{key} is {kind(value)}; expected a string", "write it as a string")
    return value


@lru_cache(maxsize=4096)  # of a million rows, most have their turns in one of a few orders
def _check_order(roles: Roles) -> tuple[str, ...]:
    if "assistant" not in roles:
        raise RowError("there is no assistant turn, so nothing to learn", "add the answer or remove the row")
    first = roles[0] if roles[0] != "system" else next(role for role in roles if role != "system")
    if first != "user":
        raise RowError(f"the first turn is from the {first}; expected the user", "start with what the user asked")
    if roles[-1] != "assistant":
        raise RowError(
            f"the last turn is from the {roles[-1]}; expected the assistant", "add the answer or cut the last turn"
        )
    warnings: list[str] = []
    if "system" in roles[1:]:
        warnings.append("system turn that is not the first")
    if ("user", "user") in pairwise(roles):
        warnings.append("two user turns in a row")
    return tuple(warnings)
