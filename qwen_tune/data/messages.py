"""Parses the turns of a conversation and checks what does not depend on the model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from qwen_tune.chatml.conversation import ROLES, SHARED_ROLES, Message, PlainTurns, Roles
from qwen_tune.data.values import check_json, kind, parse_json_text
from qwen_tune.errors import ExampleError, visible

LOSS_KEYS = ("weight", "loss", "loss_scale", "loss_weight", "mask", "masked", "trainable", "training", "labels")
MESSAGE_KEYS = frozenset({"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train"})
# Keys with which other tools change what is trained: ignoring them would silently train something else.
MEANINGFUL_FOREIGN_KEYS = {
    **dict.fromkeys(LOSS_KEYS, 'write "train": true or "train": false'),
    "function_call": 'write "tool_calls": [{"function": {"name": …, "arguments": {…}}}]',
    "thinking": 'write "reasoning_content"',
    "reasoning": 'write "reasoning_content"',
}


def parse_messages(raw: Any, name: str = "messages") -> tuple[Sequence[Message], tuple[str, ...]]:
    """Checks a list of OpenAI-style messages.

    Args:
        raw: The list, or JSON text of it.
        name: The column that holds it, for errors.

    Returns:
        The messages and warnings (keys that are ignored, turns in an unusual order).

    Raises:
        ExampleError: The first error in the list.
    """
    if isinstance(raw, str):
        raw = parse_json_text(raw, name)
    if not isinstance(raw, list):
        raise ExampleError(f"{name} is {kind(raw)}; expected a list of turns", 'write [{"role": …, "content": …}, …]')
    if not raw:
        what = f"{name} is empty; expected at least one user and one assistant turn"
        raise ExampleError(what, "add turns or remove the example")
    if (plain := _plain_turns(raw)) is not None:
        return plain, _check_order(plain.roles)
    warnings: list[str] = []
    messages = tuple([_parse_message(entry, f"{name}[{index}]", warnings) for index, entry in enumerate(raw)])
    of_order = _check_order(tuple([message.role for message in messages]))
    return messages, (*warnings, *of_order)


def _plain_turns(raw: list[Any]) -> PlainTurns | None:
    """The turns if each is a role and a text, without errors; else None."""
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
        raise ExampleError(
            f'{at} is {kind(entry)}; expected an object with "role" and "content"', "write such an object"
        )
    role = _parse_role(entry.get("role"), at)
    for key in entry.keys() - MESSAGE_KEYS:
        if fix := MEANINGFUL_FOREIGN_KEYS.get(key):
            if entry[key] is not None:
                raise ExampleError(f'{at} has the key "{key}", which is not supported', fix)
        elif entry[key] is not None:
            warnings.append(f'message key "{visible(key[:40])}" is not used')
    train = _parse_train(entry.get("train"), role, at)
    if isinstance(entry.get("content"), list):
        entry = joined_parts(entry, role, at)
    content = entry.get("content")
    if content is not None and not isinstance(content, str):
        raise ExampleError(f"{at}.content is {kind(content)}; expected a string", "write the text as a string")
    calls = _parse_tool_calls(entry.get("tool_calls"), role, at)
    reasoning = _optional_text(entry, "reasoning_content", at)
    if reasoning is not None and not reasoning.strip():
        # Blank reasoning would turn thinking on and train an empty think block.
        reasoning = None
    if reasoning is not None and role != "assistant":
        what = f"{at} is a {role} turn with reasoning_content; only assistant turns reason"
        raise ExampleError(what, "remove it from this turn")
    if not calls and (content is None or not content.strip()) and role != "tool":
        raise ExampleError(
            f"{at} ({role}) has {'no content' if content is None else 'blank content'}; expected text"
            + (" or tool_calls" if role == "assistant" else ""),
            "write the text or remove the example",
        )
    if role == "tool" and content is None:
        what = f"{at} (tool) has no content; expected the tool's result as a string"
        raise ExampleError(what, 'write the result, "" if there was none')
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
        raise ExampleError(f"{at} has no role; {expected}", 'write "role": "user" or whose turn it is')
    if not isinstance(role, str):
        raise ExampleError(f"{at}.role is {kind(role)}; {expected}", "write one of these roles")
    if role in ROLES:
        return SHARED_ROLES.get(role, role)
    nearest = difflib.get_close_matches(role[:40].lower(), ROLES, n=1)
    known = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "developer": "system"}
    suggestion = known.get(role.lower()) or (nearest[0] if nearest else None)
    raise ExampleError(
        f'{at} has the role "{role[:40]}"; {expected}',
        f'write "{suggestion}"' if suggestion else "write one of these roles",
    )


def _parse_train(train: Any, role: str, at: str) -> bool:
    if train is None:
        return True
    if not isinstance(train, bool):
        raise ExampleError(f"{at}.train is {kind(train)}; expected true or false", "write true or false")
    if role != "assistant":
        raise ExampleError(f'{at} is a {role} turn with "train"; only assistant turns are trained', 'remove "train"')
    return train


def _parse_tool_calls(raw: Any, role: str, at: str) -> tuple[Mapping[str, Any], ...]:
    if raw is None or raw == []:
        return ()
    if role != "assistant":
        what = f"{at} is a {role} turn with tool_calls; only assistant turns call tools"
        raise ExampleError(what, "remove them from this turn")
    if not isinstance(raw, list):
        raise ExampleError(f"{at}.tool_calls is {kind(raw)}; expected a list of calls", 'write [{"function": {…}}]')
    return tuple(_parse_tool_call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(raw))


def _parse_tool_call(call: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(call, dict):
        raise ExampleError(f"{at} is {kind(call)}; expected an object", 'write {"function": {…}}')
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ExampleError(f"{at} names no function", 'write {"function": {"name": …, "arguments": {…}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # Templates encode a string again (Qwen2.5) or pass it raw (Qwen3): only an object renders right in all.
        arguments = parse_json_text(arguments, f"{at}.arguments")
    if not isinstance(arguments, dict):
        what = f"{at}.arguments is {kind(arguments)}; expected an object, or an object as a JSON string"
        raise ExampleError(what, "write {} where there are none")
    check_json(arguments, f"{at}.arguments")
    parsed: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    if call.get("id") is not None:
        parsed["id"] = _optional_text(call, "id", at)
    return parsed


def _optional_text(entry: Mapping[str, Any], key: str, at: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ExampleError(f"{at}.{key} is {kind(value)}; expected a string", "write it as a string")
    return value


@lru_cache(maxsize=4096)  # most examples have their turns in one of a few orders
def _check_order(roles: Roles) -> tuple[str, ...]:
    if "assistant" not in roles:
        raise ExampleError("there is no assistant turn, so nothing to train on", "add the answer or remove the example")
    first = roles[0] if roles[0] != "system" else next(role for role in roles if role != "system")
    if first != "user":
        raise ExampleError(f"the first turn is from the {first}; expected the user", "start with what the user asked")
    if roles[-1] != "assistant":
        raise ExampleError(
            f"the last turn is from the {roles[-1]}; expected the assistant", "add the answer or cut the last turn"
        )
    warnings: list[str] = []
    if "system" in roles[1:]:
        warnings.append("system turn that is not the first")
    if ("user", "user") in pairwise(roles):
        warnings.append("two user turns in a row")
    return tuple(warnings)


def parse_tools(raw: Any) -> tuple[Mapping[str, Any], ...]:
    """Parses a list of JSON schemas, or a JSON string of one.

    Raises:
        ExampleError: It is neither, or a tool has no name.
    """
    if raw is None or raw == "":
        return ()
    if isinstance(raw, str):
        raw = parse_json_text(raw, "tools")
    if not isinstance(raw, list):
        raise ExampleError(f"tools is {kind(raw)}; expected a list of JSON schemas", "write [{…}], or remove tools")
    # In tables, tools of different shapes are text.
    tools = [parse_json_text(tool, f"tools[{i}]") if isinstance(tool, str) else tool for i, tool in enumerate(raw)]
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise ExampleError(
                f"tools[{index}] names no function", 'write {"function": {"name": …, "parameters": {…}}}'
            )
        check_json(tool, f"tools[{index}]")
    return tuple(tools)


_REASONING = ("reasoning", "thinking")
_MEDIA = ("image", "audio", "video", "file")


def joined_parts(entry: Mapping[str, Any], role: str, at: str) -> dict[str, Any]:
    """A message with one text instead of parts.

    Texts are joined without a separator, as chat templates do; reasoning and tool calls move to their own keys.
    Templates write reasoning, text and calls in this order, so parts in another order are an error.

    Args:
        entry: The message; its content is a list.
        role: Whose turn it is.
        at: The message's place, for errors.

    Raises:
        ExampleError: A part is not text, or no template would write it.
    """
    texts: list[str] = []
    reasons: list[str] = []
    calls: list[Any] = []
    for index, part in enumerate(entry["content"]):
        place = f"{at}.content[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise ExampleError(f"{place} is {kind(part)}; expected a part", 'write {"type": "text", "text": …}')
        part_kind = _part_kind(part, place)
        if part_kind == "text":
            if calls:
                raise ExampleError(f"{place} is text after a tool call, which templates write before it", "move it")
            texts.append(_part_text(part, "text", place))
            continue
        if role != "assistant":
            raise ExampleError(f"{place} is a {part_kind} part of a {role} turn; expected text", "remove it")
        if part_kind in _REASONING:
            if texts or calls:
                raise ExampleError(f"{place} is reasoning after the answer, which templates write before it", "move it")
            reasons.append(_part_text(part, part_kind, place))
        else:
            call = part.get("tool_call", part.get("value"))
            calls.append(parse_json_text(call, place) if isinstance(call, str) else call)
    joined = {**entry, "content": "".join(texts)}
    for key, found in (("reasoning_content", "".join(reasons)), ("tool_calls", calls)):
        if found:
            if entry.get(key):
                raise ExampleError(f"{at} has both {key} and parts of that type", "keep one of them")
            joined[key] = found
    return joined


def _part_kind(part: Mapping[str, Any], place: str) -> str:
    named = part.get("type", "text")
    if not isinstance(named, str):
        raise ExampleError(f"{place}.type is {kind(named)}; expected text", 'write "type": "text"')
    if medium := next((medium for medium in _MEDIA if medium in named or part.get(medium)), None):
        raise ExampleError(f"not yet: {place} holds {medium} data; only text is trained so far", "remove such examples")
    if named not in ("text", "tool_call", *_REASONING):
        what = f'{place} has the type "{named[:40]}"; expected text, reasoning, thinking or tool_call'
        raise ExampleError(what, 'write {"type": "text", "text": …}')
    for key in ("train", *LOSS_KEYS):
        if part.get(key) is not None:
            raise ExampleError(
                f'{place} has the key "{key}"; only whole turns can be left out of training',
                'write "train" in the turn',
            )
    return named


def _part_text(part: Mapping[str, Any], part_kind: str, place: str) -> str:
    for key in (part_kind, "text", "value"):
        if part.get(key) is not None:
            if isinstance(part[key], str):
                return str(part[key])
            raise ExampleError(f"{place}.{key} is {kind(part[key])}; expected a string", "write the text as a string")
    raise ExampleError(f"{place} has no text; expected a string", 'write {"type": "text", "text": …}')
