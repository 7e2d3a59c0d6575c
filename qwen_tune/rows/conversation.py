"""A conversation as it was taught: turns, tools, and where it came from.

Everything that a row may say wrong in a way that does not depend on the model is found here and in `messages`, so that
`validate` needs neither a tokenizer nor torch. What depends on the checkpoint's template is found in `chatml`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_tune.rows.errors import RowError, check_json, kind, parse_json_text
from qwen_tune.rows.messages import Message, PlainTurns


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row. `source` is `file:line`, `source_name` the recipe's name for the data it belongs to."""

    source: str
    source_name: str
    messages: Sequence[Message]
    tools: tuple[Mapping[str, Any], ...] = ()
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def plain(self) -> PlainTurns | None:
        """The turns, where they are no more than roles and texts and there is nothing beside them, as in most rows."""
        turns = self.messages
        return turns if isinstance(turns, PlainTurns) and not self.tools and not self.chat_template_kwargs else None

    def content_hash(self, content: bytes | None = None) -> str:
        """sha256 over what is said, whatever file it came from: equal conversations have equal hashes.

        Args:
            content: `content_bytes()`, from whoever has it already.
        """
        # Turns first, one a line, with the length of each text or all of it; then the texts: none runs into another.
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
        """What user, assistant and tools say, reasoning and calls included, in UTF-8: a line break between turns."""
        if (plain := self.plain) is not None:
            texts = plain.texts
            if "system" in plain.roles:
                texts = [text for role, text in zip(plain.roles, texts, strict=True) if role != "system"]
            return "\n".join(texts).encode()
        said: list[str] = []
        for message in self.messages:
            if message.role != "system":
                said += [text for text in (message.reasoning_content, message.content) if text]
                said += [
                    json.dumps(call["function"], sort_keys=True, ensure_ascii=False) for call in message.tool_calls
                ]
        return "\n".join(said).encode()

    def texts(self) -> list[str]:
        """Every string that a person wrote and a template would put into the prompt."""
        found: list[str] = []
        _collect_strings(self.tools, found)
        for message in self.messages:
            _collect_strings(message.for_template(), found)
        return found


def _digest_line(message: Message) -> str:
    if not message.is_plain:
        return json.dumps(message.for_template(), sort_keys=True)
    return json.dumps(message.content) if message.role == "system" else f"{message.role} {len(message.content or '')}"


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
        raise RowError(f"tools is {kind(raw)}; expected a list of JSON schemas", "write [{…}], or leave tools out")
    # Tables hold tools of different shapes as text.
    tools = [parse_json_text(tool, f"tools[{i}]") if isinstance(tool, str) else tool for i, tool in enumerate(raw)]
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise RowError(f"tools[{index}] names no function", 'write {"function": {"name": …, "parameters": {…}}}')
        check_json(tool, f"tools[{index}]")
    return tuple(tools)


def tool_name(tool: Mapping[str, Any]) -> str:
    """The function's name in a tool of `parse_tools`."""
    return str(tool.get("function", tool)["name"])


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
