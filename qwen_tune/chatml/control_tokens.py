"""Text of an example that spells a control token: an error, or kept as plain text.

For `neutralize` the example is rendered with stand-ins for such text, so that neither the template nor the search for
the end of an answer mistakes it for a token. Afterwards it is restored, and its places in the text are returned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qwen_tune.chatml.conversation import Conversation, Message
from qwen_tune.errors import ExampleError


@dataclass(frozen=True)
class StandIns:
    """A character for each control token that an example spells, which is repeated to the length of the token."""

    token_of: Mapping[str, str]

    def restore(self, text: str) -> tuple[str, tuple[tuple[int, int], ...]]:
        """The original text, and its character ranges that only look like control tokens.

        Raises:
            ExampleError: The template has changed a stand-in.
        """
        if not self.token_of:
            return text, ()
        ranges: list[tuple[int, int]] = []

        def token(match: re.Match[str]) -> str:
            ranges.append(match.span())
            return self.token_of[match.group()[0]]

        text = re.sub("|".join(char * len(token) for char, token in self.token_of.items()), token, text)
        for char, spelled in self.token_of.items():
            # An escaped stand-in would stay in the text and be supervised.
            if char in text or json.dumps(char)[1:-1] in text.lower():
                raise ExampleError(
                    f"the chat template changes text that spells {spelled}, so it cannot be kept as plain text",
                    "remove it from the text",
                )
        return text, tuple(ranges)


class ControlTokens:
    """The special tokens of a tokenizer, which text must not be mistaken for."""

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        # What all of them start with: a quick test for the many texts without any.
        self._prefix = "<|" if tokens and all(token.startswith("<|") for token in tokens) else ""

    def first_in(self, text: str) -> str | None:
        """The first control token that a text spells, if any."""
        if self._prefix[:1] not in text or self._prefix not in text:
            return None
        match = self._pattern.search(text)
        return match.group() if match else None

    def finditer(self, text: str) -> Iterator[re.Match[str]]:
        """Every place in a text that spells a control token."""
        return self._pattern.finditer(text)

    def refuse(self, conversation: Conversation) -> None:
        """Raises ExampleError if a text of the conversation spells a control token."""
        # A single search, since this runs for every example.
        texts = [*conversation.texts(), *map(str, conversation.chat_template_kwargs.values())]
        if token := self.first_in("\0".join(texts)):
            raise ExampleError(
                f"the text spells the control token {token}, which would be read as the end or start of a turn",
                "remove it from the text, or write data.special_tokens_in_text: neutralize",
            )

    def hide(self, conversation: Conversation) -> tuple[Conversation, StandIns]:
        """The conversation with stand-ins for every control token that its text spells."""
        spelled: set[str] = set()
        written: set[str] = set()

        def collect(text: str) -> str:
            spelled.update(self._pattern.findall(text))
            written.update(text)
            return text

        _with_texts(conversation, collect)
        # Rare letters: filters trim, escape or change most other characters (repr escapes private-use characters).
        rare = (chr(code) for code in range(0x2A6D6, 0x20000, -1) if chr(code) not in written)
        char_of = dict(zip(sorted(spelled), rare, strict=False))
        hidden = _with_texts(
            conversation,
            lambda text: self._pattern.sub(lambda match: char_of[match.group()] * len(match.group()), text),
        )
        return hidden, StandIns({char: token for token, char in char_of.items()})


def _with_texts(conversation: Conversation, change: Callable[[str], str]) -> Conversation:
    """The conversation with every text that reaches the template changed."""

    def deep(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, Mapping):
            return {deep(key): deep(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [deep(item) for item in value]
        return value

    def of(message: Message) -> Message:
        return replace(
            message,
            content=deep(message.content),
            reasoning_content=deep(message.reasoning_content),
            tool_calls=tuple(deep(message.tool_calls)),
            tool_call_id=deep(message.tool_call_id),
            name=deep(message.name),
        )

    return replace(
        conversation,
        messages=tuple(of(message) for message in conversation.messages),
        tools=tuple(deep(conversation.tools)),
        chat_template_kwargs=deep(conversation.chat_template_kwargs),
    )
