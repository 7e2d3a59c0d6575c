"""Examples that are not conversations: plain text, and text that was tokenized before."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from qwen_tune.chatml.conversation import Conversation
from qwen_tune.data.values import kind, parse_json_text
from qwen_tune.errors import ExampleError

IGNORED_LABEL = -100
LARGEST_ID = (1 << 31) - 1  # far above every vocabulary; fits into four bytes


@dataclass(frozen=True, slots=True)
class TextExample:
    """A text without turns, all of which is supervised. `source` is `file:line`, `source_name` the recipe's name."""

    source: str
    source_name: str
    text: str
    warnings: tuple[str, ...] = ()

    def content_hash(self, content: bytes | None = None) -> str:
        """sha256 of the text, never equal to the hash of a conversation."""
        return hashlib.sha256(b"text\n" + (content or self.content_bytes())).hexdigest()

    def content_bytes(self) -> bytes:
        return self.text.encode()


@dataclass(frozen=True, slots=True)
class PretokenizedExample:
    """Token ids and labels: a token's own id where it is supervised, -100 where it is context."""

    source: str
    source_name: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    warnings: tuple[str, ...] = ()

    def content_hash(self, content: bytes | None = None) -> str:
        """sha256 of the ids, whichever of them are supervised."""
        return hashlib.sha256(b"ids\n" + (content or self.content_bytes())).hexdigest()

    def content_bytes(self) -> bytes:
        """The ids, four bytes each, little-endian."""
        return struct.pack(f"<{len(self.input_ids)}I", *self.input_ids)


TrainingExample: TypeAlias = Conversation | TextExample | PretokenizedExample


def to_text_example(
    record: Mapping[str, Any], *, source: str, source_name: str, warnings: tuple[str, ...] = ()
) -> TextExample:
    """Reads the column `text`.

    Raises:
        ExampleError: It is not text, or is blank.
    """
    text = record["text"]
    if not isinstance(text, str) or not text.strip():
        raise ExampleError(f"text is {kind(text)}; expected text", "write the text or remove the example")
    return TextExample(source, source_name, text, warnings)


def to_pretokenized_example(
    record: Mapping[str, Any], *, source: str, source_name: str, warnings: tuple[str, ...] = ()
) -> PretokenizedExample:
    """Reads the columns `input_ids` and, if only some tokens are supervised, `labels`.

    Raises:
        ExampleError: They are not token ids, or do not match each other.
    """
    ids = _integers(record["input_ids"], "input_ids")
    if not ids:
        raise ExampleError("input_ids is empty; expected at least one token id", "remove the example")
    if min(ids) < 0 or max(ids) > LARGEST_ID:
        wrong = next(index for index, token in enumerate(ids) if not 0 <= token <= LARGEST_ID)
        raise ExampleError(f"input_ids[{wrong}] is {ids[wrong]}; expected a token id", "tokenize the text again")
    labels = ids
    if record.get("labels") is not None:
        labels = _integers(record["labels"], "labels")
        _require_length(labels, ids, "labels")
        for index, (label, token) in enumerate(zip(labels, ids)):  # noqa: B905
            if label not in (token, IGNORED_LABEL):
                what = f"labels[{index}] is {label}; expected {token}, the token's own id, or {IGNORED_LABEL}"
                raise ExampleError(what, "do not shift labels: each is at the place of its own token")
    if record.get("attention_mask") is not None:
        mask = _integers(record["attention_mask"], "attention_mask")
        _require_length(mask, ids, "attention_mask")
        if set(mask) != {1}:
            what = (
                f"attention_mask[{next(i for i, seen in enumerate(mask) if seen != 1)}] is not 1; expected no padding"
            )
            raise ExampleError(what, "remove the padding from input_ids, labels and attention_mask")
    return PretokenizedExample(source, source_name, ids, labels, warnings)


def _integers(values: Any, name: str) -> tuple[int, ...]:
    if isinstance(values, str):
        values = parse_json_text(values, name)
    if not isinstance(values, list):
        raise ExampleError(f"{name} is {kind(values)}; expected a list of whole numbers", "write [1, 2, …]")
    if set(map(type, values)) - {int}:
        index = next(index for index, value in enumerate(values) if type(value) is not int)
        what = f"{name}[{index}] is {kind(values[index])}; expected a whole number"
        raise ExampleError(what, "write the tokenizer's ids")
    return tuple(values)


def _require_length(values: tuple[int, ...], ids: tuple[int, ...], name: str) -> None:
    if len(values) != len(ids):
        raise ExampleError(f"{name} has {len(values)} values; input_ids has {len(ids)}", "write one for each token")
