"""Turns whose content is a list of parts, as APIs of models that see and think write it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_tune.rows.errors import RowError, kind, parse_json_text

# With these other tools say what is learned: to pass over them would train something else without a word.
LOSS_KEYS = ("weight", "loss", "loss_scale", "loss_weight", "mask", "masked", "trainable", "training", "labels")

_REASONING = ("reasoning", "thinking")
_MEDIA = ("image", "audio", "video", "file")


def joined_parts(entry: Mapping[str, Any], role: str, at: str) -> dict[str, Any]:
    """A message with one text instead of parts.

    Texts are put together as they stand, which is what chat templates do with them; reasoning and tool calls go to the
    keys of their own. A template writes reasoning, text and calls in this order, so parts in another are refused.

    Args:
        entry: The message; its content is a list.
        role: Whose turn it is.
        at: The message's place in the row.

    Raises:
        RowError: A part is no text, or says what no template would write.
    """
    texts: list[str] = []
    reasons: list[str] = []
    calls: list[Any] = []
    for index, part in enumerate(entry["content"]):
        place = f"{at}.content[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise RowError(f"{place} is {kind(part)}; expected a part", 'write {"type": "text", "text": …}')
        part_kind = _part_kind(part, place)
        if part_kind == "text":
            if calls:
                raise RowError(f"{place} is text behind a tool call, which templates write before it", "move it")
            texts.append(_part_text(part, "text", place))
            continue
        if role != "assistant":
            raise RowError(f"{place} is a {part_kind} part of a {role} turn; expected text", "remove it")
        if part_kind in _REASONING:
            if texts or calls:
                raise RowError(f"{place} is reasoning behind the answer, which templates write before it", "move it")
            reasons.append(_part_text(part, part_kind, place))
        else:
            call = part.get("tool_call", part.get("value"))
            calls.append(parse_json_text(call, place) if isinstance(call, str) else call)
    joined = {**entry, "content": "".join(texts)}
    for key, found in (("reasoning_content", "".join(reasons)), ("tool_calls", calls)):
        if found:
            if entry.get(key):
                raise RowError(f"{at} has {key} beside parts that say the same", "keep one of them")
            joined[key] = found
    return joined


def _part_kind(part: Mapping[str, Any], place: str) -> str:
    named = part.get("type", "text")
    if not isinstance(named, str):
        raise RowError(f"{place}.type is {kind(named)}; expected text", 'write "type": "text"')
    if any(medium in named or part.get(medium) for medium in _MEDIA):
        what = f'not yet: {place} is a part of the type "{named[:40]}"; only text is trained so far'
        raise RowError(what, "remove these rows")
    if named not in ("text", "tool_call", *_REASONING):
        what = f'{place} has the type "{named[:40]}"; expected text, reasoning, thinking or tool_call'
        raise RowError(what, 'write {"type": "text", "text": …}')
    for key in ("train", *LOSS_KEYS):
        if part.get(key) is not None:
            raise RowError(
                f'{place} has the key "{key}"; whole turns are trained or not', 'write "train" into the turn'
            )
    return named


def _part_text(part: Mapping[str, Any], part_kind: str, place: str) -> str:
    for key in (part_kind, "text", "value"):
        if part.get(key) is not None:
            if isinstance(part[key], str):
                return str(part[key])
            raise RowError(f"{place}.{key} is {kind(part[key])}; expected a string", "write the text as a string")
    raise RowError(f"{place} has no text; expected a string", 'write {"type": "text", "text": …}')
