"""Rows into batches of a store: rendered one by one, encoded together."""

from __future__ import annotations

import gc
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qwen_tune.chatml.conversation import Conversation
from qwen_tune.chatml.encoder import NOT_ENDED, EncodedSamples, Encoder
from qwen_tune.chatml.rendering import Renderer
from qwen_tune.chatml.template import IGNORED, RenderedSample
from qwen_tune.data.documents import PretokenizedExample, TextExample, TrainingExample
from qwen_tune.data.near_duplicates import sketch
from qwen_tune.data.sources import PROBLEMS_KEPT
from qwen_tune.data.token_store import StoredBatch, StoredExample
from qwen_tune.errors import ExampleError, Problem
from qwen_tune.model.tokenizer import END_OF_TEXT

KEPT_AS_TEXT = "control token in the text, kept as plain text"
STRADDLES = "token that straddles the end of a prompt, trained as context"
BATCH_CHARACTERS = 1 << 20
BATCHES_A_COLLECTION = 16


@dataclass
class Problems:
    """What is wrong with some examples, each in their order, the first thousand.

    Answers that the tokenizer does not end are reported only where nothing else is wrong: once an example cannot be
    rendered they are not looked for any more, and what is reported must not depend on which examples were encoded
    before.
    """

    of_rows: list[Problem] = field(default_factory=list)
    not_ended: list[Problem] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.of_rows or self.not_ended)

    @property
    def are_enough(self) -> bool:
        """Whether nothing further would be reported."""
        return len(self.of_rows) >= PROBLEMS_KEPT

    @property
    def reported(self) -> list[Problem]:
        """Those that are reported."""
        return (self.of_rows or self.not_ended)[:PROBLEMS_KEPT]

    def add(self, others: Problems) -> None:
        """Adds those of later examples."""
        self.of_rows = (self.of_rows + others.of_rows)[:PROBLEMS_KEPT]
        self.not_ended = (self.not_ended + others.not_ended)[:PROBLEMS_KEPT]


class Batcher:
    """Makes batches of the examples of a source, or of a part of it.

    `rows` and `problems` are the number of examples so far, and what was wrong with them.
    """

    def __init__(self, items: Iterable[TrainingExample | Problem], renderer: Renderer, encoder: Encoder) -> None:
        self.rows = 0
        self.problems = Problems()
        self._items = items
        self._renderer = renderer
        self._encoder = encoder

    def batches(self) -> Iterator[StoredBatch | None]:
        """Batches of as many examples as memory allows; None for examples with which something is wrong.

        Once something is wrong nothing will be kept, and only further problems are looked for.

        Raises:
            FastEncoderError: See `Encoder.encode`.
        """
        batch = _Batch(self._renderer, self._encoder)
        for item in self._items:
            self.rows += 1
            if isinstance(item, Problem):
                self.problems.of_rows.append(item)
            else:
                try:
                    batch.add(item)
                except ExampleError as problem:
                    self.problems.of_rows.append(problem.at(item.source))
            if self.problems.are_enough:
                return
            if batch.is_full:
                yield self._written(batch)
                batch = _Batch(self._renderer, self._encoder)
        yield self._written(batch)

    def _written(self, batch: _Batch) -> StoredBatch | None:
        if self.problems.of_rows:
            return None
        encoded = batch.encode()
        self.problems.add(Problems(not_ended=batch.not_ended(encoded)))
        return None if self.problems else batch.stored(encoded)


@contextmanager
def collecting_by_batch() -> Iterator[Callable[[], object]]:
    """Python's collector looks at every object again and again while millions come and go; now and then will do."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        batches = itertools.count(1)
        yield lambda: next(batches) % BATCHES_A_COLLECTION or gc.collect(0)
    finally:
        if was_enabled:
            gc.enable()


class _Batch:
    def __init__(self, renderer: Renderer, encoder: Encoder) -> None:
        self._renderer = renderer
        self._encoder = encoder
        self._rows: list[TrainingExample] = []
        self._samples: list[RenderedSample] = []
        self._counts: list[int] = []
        self._given: dict[int, PretokenizedExample] = {}  # by the number of the sample
        self._characters = 0

    @property
    def is_full(self) -> bool:
        """Whether it is time to write it, so that memory stays bounded."""
        return self._characters > BATCH_CHARACTERS

    def add(self, row: TrainingExample) -> None:
        """Renders an example.

        Raises:
            ExampleError: It cannot be trained on.
        """
        if isinstance(row, Conversation):
            samples = self._renderer.render(row)
        elif isinstance(row, TextExample):
            samples = [render_text(row, self._renderer)]
        else:
            _require_known_ids(row, self._encoder)
            self._given[len(self._samples)] = row
            self._characters += 4 * len(row.input_ids)
            samples = [RenderedSample("", ())]
        self._rows.append(row)
        self._samples += samples
        self._counts.append(len(samples))
        self._characters += 100  # an example without samples takes room as well
        for sample in samples:
            self._characters += len(sample.text)

    def encode(self) -> EncodedSamples:
        """The tokens of all samples."""
        encoded = self._encoder.encode(self._samples)
        return _with_given(encoded, self._given) if self._given else encoded

    def not_ended(self, encoded: EncodedSamples) -> list[Problem]:
        """The conversations with an answer that the tokenizer does not end."""
        if self._renderer.data.loss_on == "all" or encoded.ended.all():
            return []
        rows = [self._rows[index] for index in dict.fromkeys(self._owners()[~encoded.ended].tolist())]
        return [ExampleError(NOT_ENDED).at(row.source) for row in rows if isinstance(row, Conversation)]

    def stored(self, encoded: EncodedSamples) -> StoredBatch:
        """All examples as a store holds them."""
        owners = self._owners()
        odd: dict[str, set[int]] = {
            KEPT_AS_TEXT: {int(owners[index]) for index, sample in enumerate(self._samples) if sample.literals},
            STRADDLES: set(owners[encoded.straddling > 0].tolist()),
        }
        contents = [row.content_bytes() for row in self._rows]
        stored: list[StoredExample] = []
        for index, (row, count, content) in enumerate(zip(self._rows, self._counts, contents, strict=True)):
            found = [name for name, members in odd.items() if index in members]
            warnings = tuple(sorted({*row.warnings, *found})) if found else row.warnings
            digest = int(row.content_hash(content)[:16], 16)
            stored.append(StoredExample(row.source, digest, _supervision_digest(row, digest), count, warnings))
        return StoredBatch.of(encoded, stored, sketch(contents))

    def _owners(self) -> Any:
        return np.repeat(np.arange(len(self._rows)), self._counts)


def render_text(row: TextExample, renderer: Renderer) -> RenderedSample:
    """A plain text ends in `<|endoftext|>`, and all of it is loss_mask.

    Raises:
        ExampleError: It spells a control token.
    """
    text = row.text + END_OF_TEXT
    tokens = list(renderer.template.control_tokens.finditer(row.text))
    if tokens and renderer.data.special_tokens_in_text == "reject":
        raise ExampleError(
            f"the text spells the control token {tokens[0].group()}",
            "remove it from the text, or write data.special_tokens_in_text: neutralize",
        )
    return RenderedSample(text, ((0, len(text)),), tuple(match.span() for match in tokens))


def _require_known_ids(row: PretokenizedExample, encoder: Encoder) -> None:
    size = len(encoder.tokenizer)
    if max(row.input_ids) >= size:
        index = next(index for index, token in enumerate(row.input_ids) if token >= size)
        what = f"input_ids[{index}] is {row.input_ids[index]}; the tokenizer has {size:,} tokens"
        raise ExampleError(what, "tokenize the text with the tokenizer of model.base")


def _with_given(encoded: EncodedSamples, given: dict[int, PretokenizedExample]) -> EncodedSamples:
    """Puts the tokens of tokenized examples into the places that were left for them."""
    ids, loss_mask = [], []
    ends = np.cumsum(encoded.lengths)
    lengths = encoded.lengths.copy()
    for index, (end, length) in enumerate(zip(ends.tolist(), encoded.lengths.tolist(), strict=True)):
        if row := given.get(index):
            mask = np.array(row.labels, np.int64) != IGNORED
            mask[0] = False  # nothing precedes it, so nothing can predict it
            ids.append(np.array(row.input_ids, np.uint32))
            loss_mask.append(mask)
            lengths[index] = len(row.input_ids)
        else:
            ids.append(encoded.ids[end - length : end])
            loss_mask.append(encoded.loss_mask[end - length : end])
    return EncodedSamples(np.concatenate(ids), np.concatenate(loss_mask), lengths, encoded.straddling, encoded.ended)


def _supervision_digest(row: TrainingExample, digest: int) -> int:
    """A hash of what an example teaches: the same words may be supervised in one example and be context in another."""
    supervised: Any
    if isinstance(row, Conversation):
        if row.plain is not None or (all(message.train for message in row.messages) and not row.chat_template_kwargs):
            return digest
        supervised = [[message.train for message in row.messages], sorted(row.chat_template_kwargs.items())]
    elif isinstance(row, PretokenizedExample):
        supervised = [label == IGNORED for label in row.labels]
    else:
        return digest
    return int(hashlib.sha256(f"{digest} {supervised}".encode()).hexdigest()[:16], 16)
