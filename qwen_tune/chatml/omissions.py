"""What a chat template passes over without a word: tools, calls, turns and texts that it does not know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwen_tune.chatml.conversation import Conversation, Message, tool_name
from qwen_tune.errors import ExampleError


def refuse_lost_answer(message: Message, index: int, answer: str) -> None:
    """Compares a trained turn with the text of it that is trained.

    Raises:
        ExampleError: Something that the turn teaches is not there.
    """
    if _behind([message.reasoning_content, message.content], answer) is None:
        raise ExampleError(
            f"messages[{index}]: the chat template leaves out a part of this turn", "take it out of the example"
        )
    for call in message.tool_calls:
        function = call["function"]
        if not all(_is_spelled(part, answer) for part in (function["name"], *_leaves(function["arguments"]))):
            raise ExampleError(
                f'messages[{index}]: the chat template leaves out the call to "{function["name"]}" or a part of it',
                "use a checkpoint that knows tools",
            )


def refuse_lost_context(conversation: Conversation, end: int, prompt: str, *, reasoning: bool = False) -> None:
    """Compares what the model answers to, messages[:end] and the tools, with the prompt.

    Args:
        conversation: What the example says.
        end: The first message that is not in the prompt.
        prompt: The template's text.
        reasoning: Whether earlier reasoning must be there too; templates leave it out of prompts on purpose.

    Raises:
        ExampleError: Something is not there.
    """
    for tool in conversation.tools:
        if not _is_spelled(tool_name(tool), prompt):
            raise ExampleError(
                f'the chat template leaves out the tool "{tool_name(tool)}"', "use a checkpoint that knows tools"
            )
    position: int | None = 0
    for index, message in enumerate(conversation.messages[:end]):
        names = [call["function"]["name"] for call in message.tool_calls]
        thought = message.reasoning_content if reasoning else None
        position = _behind([thought, message.content], prompt, position or 0)
        if position is None or not all(_is_spelled(name, prompt) for name in names):
            raise ExampleError(
                f"messages[{index}]: the chat template leaves out this {message.role} turn or a part of it",
                "say it in the first system turn or in a user turn"
                if message.role == "system"
                else "take it out of the example",
            )


def _behind(texts: Sequence[str | None], rendered: str, position: int = 0) -> int | None:
    """Where the last of some texts ends, if they stand one after another from a position on.

    Their order tells a text that is left out from the same text elsewhere.
    """
    for text in texts:
        stripped = (text or "").strip()
        position = rendered.find(stripped, position)
        if position < 0:
            return None
        position += len(stripped)
    return position


def _is_spelled(value: Any, rendered: str) -> bool:
    """Whether a value stands in a text, in one of the ways in which templates write values."""
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
