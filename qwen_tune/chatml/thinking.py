"""Reasoning in assistant turns: where a template reads it, and the checks of `data.thinking`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qwen_tune.chatml.conversation import Conversation, Message
from qwen_tune.errors import ExampleError

OPEN, CLOSE = "<think>", "</think>"

ReasoningPlace = Literal["field", "content", "nowhere"]
"""`field`: the template renders `reasoning_content`. `content`: it does not read that key, but its prompt opens a think
block that the answer continues, as QwQ's does. `nowhere`: `<think>` is ordinary text to it."""


@dataclass(frozen=True)
class InlineMessage(Message):
    """A turn with its reasoning in the content, for a template that parses it itself.

    The parts are kept unchanged and joined again for the template.
    """

    before: str = ""
    """The white space before the think block."""

    def for_template(self) -> dict[str, Any]:
        entry = super().for_template()
        entry["content"] = f"{self.before}{OPEN}{entry.pop('reasoning_content')}{CLOSE}{self.content}"
        return entry


def reasoning_apart(conversation: Conversation, place: ReasoningPlace, *, parses_blocks: bool) -> Conversation:
    """Separates inline `<think>…</think>` from the answer if the template supports reasoning.

    Args:
        conversation: The example as it was read.
        place: Where the template reads reasoning.
        parses_blocks: Whether the template itself parses think blocks in the content.

    Raises:
        ExampleError: Reasoning that the template would leave out or garble.
    """
    messages = [_apart(message, index, place, parses_blocks) for index, message in enumerate(conversation.messages)]
    return replace(conversation, messages=tuple(messages))


def as_in_content(message: Message) -> Message:
    """The turn with its reasoning in the content, as a model writes it, for templates that read it only there."""
    if message.reasoning_content is None:
        return message
    block = f"{OPEN}\n" + message.reasoning_content.strip("\n") + f"\n{CLOSE}\n\n"
    return replace(message, content=block + (message.content or "").lstrip("\n"), reasoning_content=None)


def refuse_unwanted(conversation: Conversation, trained: Sequence[int], thinking: str, place: ReasoningPlace) -> None:
    """Checks an example against `data.thinking`: `off` allows no reasoning, `require` demands it in each trained turn.

    Raises:
        ExampleError: It has reasoning that is not allowed, or lacks some.
    """
    reasons = [index for index, message in enumerate(conversation.messages) if message.reasoning_content is not None]
    if thinking == "off" and reasons:
        raise ExampleError(
            f"messages[{reasons[0]}] has reasoning; data.thinking is off",
            "remove the reasoning, or write thinking: auto",
        )
    if thinking == "require" and trained:
        if place == "nowhere":
            raise ExampleError(
                "this checkpoint's template does not support thinking; data.thinking is require",
                "write thinking: auto, or train a checkpoint that thinks",
            )
        for index in trained:
            if index not in reasons:
                raise ExampleError(
                    f"messages[{index}] has no reasoning; data.thinking is require",
                    "add reasoning_content, or write thinking: auto",
                )


def _apart(message: Message, index: int, place: ReasoningPlace, parses_blocks: bool) -> Message:
    reasoning, content = message.reasoning_content, message.content or ""
    if place == "nowhere":
        if reasoning is not None:
            raise ExampleError(
                f"messages[{index}] has reasoning_content, which this checkpoint's template leaves out",
                "remove it, or train a checkpoint that thinks",
            )
        return message
    if message.role != "assistant":
        return message
    if reasoning is not None and (OPEN in reasoning or CLOSE in reasoning):
        raise ExampleError(
            f"messages[{index}].reasoning_content spells think tags, which the template writes itself",
            f"take {OPEN} and {CLOSE} out of it",
        )
    if OPEN not in content and CLOSE not in content:
        return message
    before, opened, rest = content.partition(OPEN)
    inside, closed, answer = rest.partition(CLOSE)
    if before.strip() or not opened or not closed or OPEN in inside + answer or CLOSE in before + answer:
        raise ExampleError(
            f"messages[{index}] has a think block that is not opened, not closed, or not at the start of the answer",
            f"write {OPEN}…{CLOSE} once, before the answer, or use reasoning_content",
        )
    if reasoning is not None:
        raise ExampleError(f"messages[{index}] has both reasoning_content and a {OPEN} block", "keep one of them")
    if not answer.strip() and not message.tool_calls:
        raise ExampleError(
            f"messages[{index}] has no answer after its think block", "write the answer or remove the example"
        )
    if not inside.strip():
        # As with reasoning_content: a blank one must not switch thinking on.
        return replace(message, content=answer.lstrip("\n"))
    if parses_blocks:
        fields = {**vars(message), "content": answer, "reasoning_content": inside}
        return InlineMessage(**fields, before=before)
    # Line breaks around the tags are the template's; an indentation is the author's.
    return replace(message, content=answer.lstrip("\n"), reasoning_content=inside.strip("\n"))
