"""Finds what a chat template silently leaves out: tools, calls, turns and texts that it does not support."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_tune.chatml.conversation import Conversation, Message
from qwen_tune.errors import ExampleError


def refuse_lost_answer(message: Message, index: int, answer: str) -> None:
    """Checks that all of a trained turn is in its supervised text.

    Raises:
        ExampleError: Something is missing.
    """
    if _end_of_texts([message.reasoning_content, message.content], answer) is None:
        raise ExampleError(
            f"messages[{index}]: the chat template leaves out a part of this turn", "take it out of the example"
        )
    for call in message.tool_calls:
        function = call["function"]
        if not all(_is_spelled(part, answer) for part in (function["name"], *_leaves(function["arguments"]))):
            raise ExampleError(
                f'messages[{index}]: the chat template leaves out the call to "{function["name"]}" or a part of it',
                "use a checkpoint that supports tools",
            )


def refuse_lost_context(conversation: Conversation, end: int, prompt: str, *, reasoning: bool = False) -> None:
    """Checks that messages[:end] and the tools are in the prompt.

    Args:
        conversation: The example.
        end: The first message that is not in the prompt.
        prompt: The template's text.
        reasoning: Whether earlier reasoning must be in it too; templates leave it out of prompts on purpose.

    Raises:
        ExampleError: Something is missing.
    """
    for tool in conversation.tools:
        name = str(tool.get("function", tool)["name"])
        if not _is_spelled(name, prompt):
            raise ExampleError(
                f'the chat template leaves out the tool "{name}"', "use a checkpoint that supports tools"
            )
    position: int | None = 0
    for index, message in enumerate(conversation.messages[:end]):
        names = [call["function"]["name"] for call in message.tool_calls]
        thought = message.reasoning_content if reasoning else None
        position = _end_of_texts([thought, message.content], prompt, position or 0)
        if position is None or not all(_is_spelled(name, prompt) for name in names):
            raise ExampleError(
                f"messages[{index}]: the chat template leaves out this {message.role} turn or a part of it",
                "say it in the first system turn or in a user turn"
                if message.role == "system"
                else "take it out of the example",
            )


def _end_of_texts(texts: Sequence[str | None], rendered: str, position: int = 0) -> int | None:
    """The end of the last of some texts if they follow each other from a position; else None.

    Their order distinguishes a text that is left out from an equal text elsewhere.
    """
    for text in texts:
        stripped = (text or "").strip()
        position = rendered.find(stripped, position)
        if position < 0:
            return None
        position += len(stripped)
    return position


def _is_spelled(value: Any, rendered: str) -> bool:
    """Whether a text contains a value in one of the ways in which templates write values."""
    if isinstance(value, str):
        value = value.strip()
        if value in rendered:
            return True
        spellings = {form[1:-1] for form in (json.dumps(value, ensure_ascii=False), json.dumps(value), repr(value))}
    else:
        spellings = {str(value), "null" if value is None else str(value).lower()}
    return any(spelling in rendered for spelling in spellings)


def _leaves(value: Any) -> Iterator[Any]:
    """Every name and value in a call's arguments."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield name
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value
