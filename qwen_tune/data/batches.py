"""From examples to the batches of a store: examples are rendered one by one and encoded together."""

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
    """The first thousand problems of some examples, of each kind, in the order of the examples.

    Answers that the tokenizer does not end are reported only if there are no other problems: after the first example
    that cannot be rendered nothing is encoded any more, and the report must not depend on what was encoded before.
    """

    of_examples: list[Problem] = field(default_factory=list)
    not_ended: list[Problem] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.of_examples or self.not_ended)

    @property
    def are_enough(self) -> bool:
        """Whether no further problem would be reported."""
        return len(self.of_examples) >= PROBLEMS_KEPT

    @property
    def reported(self) -> list[Problem]:
        return (self.of_examples or self.not_ended)[:PROBLEMS_KEPT]

    def add(self, others: Problems) -> None:
        """Adds the problems of later examples."""
        self.of_examples = (self.of_examples + others.of_examples)[:PROBLEMS_KEPT]
        self.not_ended = (self.not_ended + others.not_ended)[:PROBLEMS_KEPT]


class Batcher:
    """Makes batches of the examples of a source, or of a part of it.

    `count` is the number of examples read so far, `problems` what is wrong with them.
    """

    def __init__(self, items: Iterable[TrainingExample | Problem], renderer: Renderer, encoder: Encoder) -> None:
        self.count = 0
        self.problems = Problems()
        self._items = items
        self._renderer = renderer
        self._encoder = encoder

    def batches(self) -> Iterator[StoredBatch | None]:
        """Yields batches of about `BATCH_CHARACTERS`, or None instead of a batch once there is a problem.

        After the first problem nothing will be stored; the rest is read only to report further problems.

        Raises:
            FastEncoderError: See `Encoder.encode`.
        """
        batch = _Batch(self._renderer, self._encoder)
        for item in self._items:
            self.count += 1
            if isinstance(item, Problem):
                self.problems.of_examples.append(item)
            else:
                try:
                    batch.add(item)
                except ExampleError as problem:
                    self.problems.of_examples.append(problem.at(item.source))
            if self.problems.are_enough:
                return
            if batch.is_full:
                yield self._stored(batch)
                batch = _Batch(self._renderer, self._encoder)
        yield self._stored(batch)

    def _stored(self, batch: _Batch) -> StoredBatch | None:
        if self.problems.of_examples:
            return None
        encoded = batch.encode()
        self.problems.add(Problems(not_ended=batch.not_ended(encoded)))
        return None if self.problems else batch.stored(encoded)


@contextmanager
def collecting_by_batch() -> Iterator[Callable[[], object]]:
    """Runs Python's garbage collector every few batches: by default it would scan millions of objects repeatedly."""
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
        self._examples: list[TrainingExample] = []
        self._samples: list[RenderedSample] = []
        self._counts: list[int] = []
        self._pretokenized: dict[int, PretokenizedExample] = {}  # by the number of the sample
        self._characters = 0

    @property
    def is_full(self) -> bool:
        """Whether to write it now, so that memory stays bounded."""
        return self._characters > BATCH_CHARACTERS

    def add(self, example: TrainingExample) -> None:
        """Renders an example.

        Raises:
            ExampleError: The example cannot be trained on.
        """
        if isinstance(example, Conversation):
            samples = self._renderer.render(example)
        elif isinstance(example, TextExample):
            samples = [render_text(example, self._renderer)]
        else:
            _require_known_ids(example, self._encoder)
            self._pretokenized[len(self._samples)] = example
            self._characters += 4 * len(example.input_ids)
            samples = [RenderedSample("", ())]
        self._examples.append(example)
        self._samples += samples
        self._counts.append(len(samples))
        self._characters += 100  # an example without samples takes memory as well
        for sample in samples:
            self._characters += len(sample.text)

    def encode(self) -> EncodedSamples:
        encoded = self._encoder.encode(self._samples)
        return _insert_pretokenized(encoded, self._pretokenized) if self._pretokenized else encoded

    def not_ended(self, encoded: EncodedSamples) -> list[Problem]:
        """A problem for each conversation with an answer that the tokenizer does not end."""
        if self._renderer.data.loss_on == "all" or encoded.ended.all():
            return []
        examples = [self._examples[index] for index in dict.fromkeys(self._owners()[~encoded.ended].tolist())]
        return [ExampleError(NOT_ENDED).at(example.source) for example in examples if isinstance(example, Conversation)]

    def stored(self, encoded: EncodedSamples) -> StoredBatch:
        owners = self._owners()
        warned: dict[str, set[int]] = {
            KEPT_AS_TEXT: {int(owners[index]) for index, sample in enumerate(self._samples) if sample.literals},
            STRADDLES: set(owners[encoded.straddling > 0].tolist()),
        }
        contents = [example.content_bytes() for example in self._examples]
        stored: list[StoredExample] = []
        for index, (example, count, content) in enumerate(zip(self._examples, self._counts, contents, strict=True)):
            found = [name for name, members in warned.items() if index in members]
            warnings = tuple(sorted({*example.warnings, *found})) if found else example.warnings
            digest = int(example.content_hash(content)[:16], 16)
            stored.append(StoredExample(example.source, digest, _supervision_digest(example, digest), count, warnings))
        return StoredBatch.of(encoded, stored, sketch(contents))

    def _owners(self) -> Any:
        return np.repeat(np.arange(len(self._examples)), self._counts)


def render_text(example: TextExample, renderer: Renderer) -> RenderedSample:
    """A plain text with `<|endoftext|>` after it, all of which is supervised.

    Raises:
        ExampleError: The text spells a control token.
    """
    text = example.text + END_OF_TEXT
    tokens = list(renderer.template.control_tokens.finditer(example.text))
    if tokens and renderer.data.special_tokens_in_text == "reject":
        raise ExampleError(
            f"the text spells the control token {tokens[0].group()}",
            "remove it from the text, or write data.special_tokens_in_text: neutralize",
        )
    return RenderedSample(text, ((0, len(text)),), tuple(match.span() for match in tokens))


def _require_known_ids(example: PretokenizedExample, encoder: Encoder) -> None:
    size = len(encoder.tokenizer)
    if max(example.input_ids) >= size:
        index = next(index for index, token in enumerate(example.input_ids) if token >= size)
        what = f"input_ids[{index}] is {example.input_ids[index]}; the tokenizer has {size:,} tokens"
        raise ExampleError(what, "tokenize the text with the tokenizer of model.base")


def _insert_pretokenized(encoded: EncodedSamples, given: dict[int, PretokenizedExample]) -> EncodedSamples:
    """Inserts the tokens of tokenized examples, which were encoded as empty texts."""
    ids, loss_mask = [], []
    ends = np.cumsum(encoded.lengths)
    lengths = encoded.lengths.copy()
    for index, (end, length) in enumerate(zip(ends.tolist(), encoded.lengths.tolist(), strict=True)):
        if example := given.get(index):
            mask = np.array(example.labels, np.int64) != IGNORED
            mask[0] = False  # nothing precedes it, so nothing can predict it
            ids.append(np.array(example.input_ids, np.uint32))
            loss_mask.append(mask)
            lengths[index] = len(example.input_ids)
        else:
            ids.append(encoded.ids[end - length : end])
            loss_mask.append(encoded.loss_mask[end - length : end])
    return EncodedSamples(np.concatenate(ids), np.concatenate(loss_mask), lengths, encoded.straddling, encoded.ended)


def _supervision_digest(example: TrainingExample, digest: int) -> int:
    """A hash of the text and of which parts are supervised: a text may be supervised here and context elsewhere."""
    supervised: Any
    if isinstance(example, Conversation):
        all_train = all(message.train for message in example.messages)
        if example.plain is not None or (all_train and not example.chat_template_kwargs):
            return digest
        supervised = [[message.train for message in example.messages], sorted(example.chat_template_kwargs.items())]
    elif isinstance(example, PretokenizedExample):
        supervised = [label == IGNORED for label in example.labels]
    else:
        return digest
    return int(hashlib.sha256(f"{digest} {supervised}".encode()).hexdigest()[:16], 16)
