"""One source of rows, rendered and tokenized into a store of the cache."""

from __future__ import annotations

import gc
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from qwen_tune.cache import cached, key_of
from qwen_tune.chatml.encoder import NOT_ENDED, EncodedSamples, Encoder
from qwen_tune.chatml.fast_encoder import FastEncoderError
from qwen_tune.chatml.rendering import Renderer
from qwen_tune.chatml.template import IGNORED, ChatTemplate, RenderedSample
from qwen_tune.console import tell
from qwen_tune.disk import sha256
from qwen_tune.errors import DataError, Problem, first_line
from qwen_tune.machine import is_main_process
from qwen_tune.prepared.near_duplicates import sketch
from qwen_tune.prepared.token_store import StoreRow, StoreWriter, TokenStore
from qwen_tune.recipe.schema import DataSpec, SourceSpec
from qwen_tune.rows.conversation import Conversation
from qwen_tune.rows.documents import TextRow, TokenizedRow, TrainingRow
from qwen_tune.rows.errors import RowError
from qwen_tune.rows.source_file import SourceFile
from qwen_tune.rows.sources import PROBLEMS_KEPT, SourceReader, read_tools, source_files

LAYOUT = 4
"""Raised whenever the same data would give another store: a store of an older number is made anew."""

END_OF_TEXT = "<|endoftext|>"
KEPT_AS_TEXT = "control token in the text, kept as plain text"
STRADDLES = "token that straddles the end of a prompt, trained as context"
BATCH_CHARACTERS = 1 << 20
BATCHES_A_COLLECTION = 16
SECONDS_OF_SILENCE = 5.0

Stamp: TypeAlias = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""


class SourceStores:
    """Makes and finds the stores of sources, for one tokenizer, template and data section."""

    def __init__(self, data: DataSpec, template: ChatTemplate) -> None:
        self.data = data
        self.template = template
        self._tools: tuple[Renderer, Encoder] | None = None
        self._tokenizer_json: str = template.tokenizer.backend_tokenizer.to_str()
        self._template_key: dict[str, Any] = {
            "layout": LAYOUT,
            "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
            "tokenizer": hashlib.sha256(self._tokenizer_json.encode()).hexdigest(),
            "template": template.tokenizer.chat_template,
            "special_tokens": {name: str(token) for name, token in template.tokenizer.special_tokens_map.items()},
            "loss_on": data.loss_on,
            "thinking": data.thinking,
            "system": data.system,
            "special_tokens_in_text": data.special_tokens_in_text,
        }

    def open(self, source: SourceSpec) -> tuple[TokenStore, bool]:
        """The store of a source, made where the cache has none.

        Returns:
            The store, and whether it was there already.

        Raises:
            DataError: The source cannot be read, or holds rows that cannot be trained on: all of them are named.
        """
        files = source_files(source)
        stamps = _stamps(files)
        pinned, content = _content_of(source, files)
        ingredients = {
            **self._template_key,
            "content": content,
            "format": source.format,
            "columns": source.columns,
            "first_rows": source.rows if self.data.streaming else None,
            "tools": read_tools(source.tools),
        }

        def make(part: Path) -> None:
            try:
                self._make(pinned, files, stamps, part)
            except FastEncoderError:
                tell(f"{source.path}: once more, with the checkpoint's own tokenizer alone")
                self._tools = Renderer(self.template, self.data), Encoder(self.template, fast=False)
                self._make(pinned, files, stamps, part)

        return cached(key_of(ingredients), make, TokenStore)

    def _make(self, source: SourceSpec, files: list[SourceFile] | None, stamps: list[Stamp], directory: Path) -> None:
        if self._tools is None:
            self._tools = Renderer(self.template, self.data), Encoder(self.template, self._tokenizer_json)
        self._tools[1].expect(sum(size for size, _ in stamps))
        reader = SourceReader(source, system=self.data.system, files=files)
        problems: list[Problem] = []
        with StoreWriter(directory) as writer, _collecting_by_batch() as collect:
            for batch in self._batches(reader, source, problems):
                # Once something is wrong nothing will be kept, and only further problems are looked for.
                if not problems:
                    problems += batch.write(writer)
                collect()
            if problems:
                raise DataError(problems)
            if _stamps(files) != stamps:
                raise DataError(Problem(source.path, "the file changed while it was read", "run the command again"))
            writer.finish({"recognised": vars(reader.recognised) if reader.recognised else None})

    def _items(self, reader: SourceReader, source: SourceSpec) -> Iterator[TrainingRow | Problem]:
        try:
            yield from itertools.islice(reader, source.rows if self.data.streaming else None)
        except OSError as error:
            raise DataError(Problem(source.path, f"the file cannot be read: {first_line(error)}")) from error

    def _batches(self, reader: SourceReader, source: SourceSpec, problems: list[Problem]) -> Iterator[Batch]:
        """Rendered rows, as many at a time as memory allows; what is wrong with others is added to `problems`."""
        assert self._tools is not None
        batch = Batch(*self._tools)
        told = time.monotonic()
        for number, item in enumerate(self._items(reader, source), start=1):
            if isinstance(item, Problem):
                problems.append(item)
            else:
                try:
                    batch.add(item)
                except RowError as problem:
                    problems.append(problem.at(item.source))
            if len(problems) >= PROBLEMS_KEPT:
                return
            if batch.is_full:
                yield batch
                batch = Batch(*self._tools)
                if time.monotonic() > told + SECONDS_OF_SILENCE and is_main_process():
                    told = time.monotonic()
                    # Not on stdout, where a preview may write JSON.
                    tell(f"preparing {source.path}: {number:,} rows so far")
        yield batch


@contextmanager
def _collecting_by_batch() -> Iterator[Callable[[], object]]:
    """Python's collector looks at every object again and again while millions come and go; now and then will do."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        batches = itertools.count(1)
        yield lambda: next(batches) % BATCHES_A_COLLECTION or gc.collect(0)
    finally:
        if was_enabled:
            gc.enable()


class Batch:
    """Rows on their way into a store: rendered one by one, encoded and written together."""

    def __init__(self, renderer: Renderer, encoder: Encoder) -> None:
        self._renderer = renderer
        self._encoder = encoder
        self._rows: list[TrainingRow] = []
        self._samples: list[RenderedSample] = []
        self._counts: list[int] = []
        self._given: dict[int, TokenizedRow] = {}  # by the number of the sample
        self._characters = 0

    @property
    def is_full(self) -> bool:
        """Whether it is time to write it, so that memory stays bounded."""
        return self._characters > BATCH_CHARACTERS

    def add(self, row: TrainingRow) -> None:
        """Renders a row.

        Raises:
            RowError: It cannot be trained on.
        """
        if isinstance(row, Conversation):
            samples = self._renderer.render(row)
        elif isinstance(row, TextRow):
            samples = [render_text(row, self._renderer)]
        else:
            _require_known_ids(row, self._encoder)
            self._given[len(self._samples)] = row
            self._characters += 4 * len(row.input_ids)
            samples = [RenderedSample("", ())]
        self._rows.append(row)
        self._samples += samples
        self._counts.append(len(samples))
        self._characters += 100  # a row without samples takes room as well
        for sample in samples:
            self._characters += len(sample.text)

    def write(self, writer: StoreWriter) -> list[Problem]:
        """Encodes and writes all rows, or nothing where one cannot be trained on; returns the problems."""
        encoded = self._encoder.encode(self._samples)
        if self._given:
            encoded = _with_given(encoded, self._given)
        owners = np.repeat(np.arange(len(self._rows)), self._counts)
        if self._renderer.data.loss_on != "all" and not encoded.ended.all():
            open_ended = [self._rows[index] for index in dict.fromkeys(owners[~encoded.ended].tolist())]
            problems = [RowError(NOT_ENDED).at(row.source) for row in open_ended if isinstance(row, Conversation)]
            if problems:
                return problems
        odd: dict[str, set[int]] = {
            KEPT_AS_TEXT: {int(owners[index]) for index, sample in enumerate(self._samples) if sample.literals},
            STRADDLES: set(owners[encoded.straddling > 0].tolist()),
        }
        contents = [row.content_bytes() for row in self._rows]
        stored: list[StoreRow] = []
        for index, (row, count, content) in enumerate(zip(self._rows, self._counts, contents, strict=True)):
            found = [name for name, members in odd.items() if index in members]
            warnings = tuple(sorted({*row.warnings, *found})) if found else row.warnings
            digest = int(row.content_hash(content)[:16], 16)
            stored.append(StoreRow(row.source, digest, _lesson(row, digest), count, warnings))
        writer.add(encoded, stored, sketch(contents))
        return []


def render_text(row: TextRow, renderer: Renderer) -> RenderedSample:
    """A plain text ends in `<|endoftext|>`, and all of it is learned.

    Raises:
        RowError: It spells a control token.
    """
    text = row.text + END_OF_TEXT
    tokens = list(renderer.template.control_tokens.finditer(row.text))
    if tokens and renderer.data.special_tokens_in_text == "reject":
        raise RowError(
            f"the text spells the control token {tokens[0].group()}",
            "remove it from the text, or write data.special_tokens_in_text: neutralize",
        )
    return RenderedSample(text, ((0, len(text)),), tuple(match.span() for match in tokens))


def _require_known_ids(row: TokenizedRow, encoder: Encoder) -> None:
    size = len(encoder.tokenizer)
    if max(row.input_ids) >= size:
        index = next(index for index, token in enumerate(row.input_ids) if token >= size)
        what = f"input_ids[{index}] is {row.input_ids[index]}; the tokenizer has {size:,} tokens"
        raise RowError(what, "tokenize the text with the tokenizer of model.base")


def _with_given(encoded: EncodedSamples, given: dict[int, TokenizedRow]) -> EncodedSamples:
    """Puts the tokens of tokenized rows into the places that were left for them."""
    ids, learned = [], []
    ends = np.cumsum(encoded.lengths)
    lengths = encoded.lengths.copy()
    for index, (end, length) in enumerate(zip(ends.tolist(), encoded.lengths.tolist(), strict=True)):
        if row := given.get(index):
            mask = np.array(row.labels, np.int64) != IGNORED
            mask[0] = False  # nothing precedes it, so nothing can predict it
            ids.append(np.array(row.input_ids, np.uint32))
            learned.append(mask)
            lengths[index] = len(row.input_ids)
        else:
            ids.append(encoded.ids[end - length : end])
            learned.append(encoded.learned[end - length : end])
    return EncodedSamples(np.concatenate(ids), np.concatenate(learned), lengths, encoded.straddling, encoded.ended)


def _lesson(row: TrainingRow, digest: int) -> int:
    """A hash of what a row teaches: the same words may be learned in one row and be context in another."""
    learned: Any
    if isinstance(row, Conversation):
        if row.plain is not None or (all(message.train for message in row.messages) and not row.chat_template_kwargs):
            return digest
        learned = [[message.train for message in row.messages], sorted(row.chat_template_kwargs.items())]
    elif isinstance(row, TokenizedRow):
        learned = [label == IGNORED for label in row.labels]
    else:
        return digest
    return int(hashlib.sha256(f"{digest} {learned}".encode()).hexdigest()[:16], 16)


def _content_of(source: SourceSpec, files: list[SourceFile] | None) -> tuple[SourceSpec, list[list[str]]]:
    """The source with what can move pinned, and what tells its content: names and hashes of bytes."""
    if files is None:
        return _hub_content(source)
    try:
        return source, [[file.name, sha256(file.path)] for file in files]
    except OSError as error:
        raise DataError(Problem(source.path, f"the file cannot be read: {first_line(error)}")) from error


def _stamps(files: list[SourceFile] | None) -> list[Stamp]:
    """What changes when somebody writes to a file."""
    stamps: list[Stamp] = []
    for file in files or ():
        try:
            stat = file.path.stat()
        except OSError as error:
            raise DataError(Problem(file.name, f"the file cannot be read: {first_line(error)}")) from error
        stamps.append((stat.st_size, stat.st_mtime_ns))
    return stamps


def _hub_content(source: SourceSpec) -> tuple[SourceSpec, list[list[str]]]:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    name = [source.path, source.subset or "", source.split or "train"]
    if not constants.HF_HUB_OFFLINE:
        try:
            commit = HfApi().dataset_info(source.path, revision=source.revision).sha
        except (HfHubHTTPError, OSError):
            commit = None  # reading it says what is wrong
        if commit:
            return source.model_copy(update={"revision": commit}), [[*name, commit]]
        return source, [[*name, source.revision or "main"]]
    import datasets

    try:
        table = datasets.load_dataset(
            source.path, name=source.subset, split=source.split or "train", revision=source.revision
        )
    except Exception:  # of every kind; here too, reading it says what is wrong
        return source, [name]
    return source, [[*name, str(table._fingerprint)]]
