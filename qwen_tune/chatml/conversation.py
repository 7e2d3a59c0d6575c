"""A conversation as chat templates see it: turns, tools, and its place in a data file.

Imports neither a tokenizer nor torch, which `validate` does not need. Data files are parsed in `data.messages`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, overload

ROLES = ("system", "user", "assistant", "tool")


SHARED_ROLES = {role: role for role in ROLES}  # shared strings save memory over a million examples


Roles: TypeAlias = "tuple[str, ...]"


@dataclass(frozen=True)
class Message:
    """One turn. `train` is False for an assistant turn that is context only."""

    role: str
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether the turn is only a role and a text for a template."""
        return (
            not self.tool_calls and self.reasoning_content is None and self.tool_call_id is None and self.name is None
        )

    def for_template(self) -> dict[str, Any]:
        """The mapping for a chat template: keys without a value are absent, never null.

        `content` is the exception: templates read it from every turn, so a turn with only tool calls has an empty text
        (which every Qwen template renders like an absent one).
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
    """Turns that are only a role and a text, as in most examples; converted to messages on demand."""

    __slots__ = ("_messages", "roles", "texts")

    def __init__(self, roles: Roles, texts: list[str]) -> None:
        self.roles = roles
        self.texts = texts
        self._messages: tuple[Message, ...] | None = None

    @property
    def messages(self) -> tuple[Message, ...]:
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


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example. `source` is `file:line`, `source_name` the recipe's name of its source."""

    source: str
    source_name: str
    messages: Sequence[Message]
    tools: tuple[Mapping[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def plain(self) -> PlainTurns | None:
        """The turns if the conversation is only roles and texts, as most are; else None."""
        turns = self.messages
        return turns if isinstance(turns, PlainTurns) and not self.tools and not self.chat_template_kwargs else None

    def content_hash(self, content: bytes | None = None) -> str:
        """sha256 of the conversation's content, the same for equal conversations of different files.

        Args:
            content: `content_bytes()`, if already computed.
        """
        # First a line per turn with the length of its text, or all of it; then the texts. So none runs into another.
        plain = self.plain
        if plain is not None and "system" not in plain.roles:
            lines = list(map("{} {}".format, plain.roles, map(len, plain.texts)))
        else:
            lines = [json.dumps(self.tools, sort_keys=True)] if self.tools else []
            lines += map(_digest_line, self.messages)
        digest = hashlib.sha256("\n".join(lines).encode())
        digest.update(self.content_bytes() if content is None else content)
        return digest.hexdigest()

    def content_bytes(self) -> bytes:
        """The texts of user, assistant and tools, with reasoning and calls, in UTF-8; a line break between turns."""
        if (plain := self.plain) is not None:
            texts = plain.texts
            if "system" in plain.roles:
                texts = [text for role, text in zip(plain.roles, texts, strict=True) if role != "system"]
            return "\n".join(texts).encode()
        texts = []
        for message in self.messages:
            if message.role != "system":
                texts += [text for text in (message.reasoning_content, message.content) if text]
                texts += [
                    json.dumps(call["function"], sort_keys=True, ensure_ascii=False) for call in message.tool_calls
                ]
        return "\n".join(texts).encode()

    def texts(self) -> list[str]:
        """Every string of the conversation that a template may write."""
        found: list[str] = []
        _collect_strings(self.tools, found)
        for message in self.messages:
            _collect_strings(message.for_template(), found)
        return found


def _digest_line(message: Message) -> str:
    if not message.is_plain:
        return json.dumps(message.for_template(), sort_keys=True)
    return json.dumps(message.content) if message.role == "system" else f"{message.role} {len(message.content or '')}"


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
