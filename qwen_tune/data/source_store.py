"""Renders and tokenizes a source into a store in the cache."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from qwen_tune.chatml.encoder import Encoder
from qwen_tune.chatml.fast_encoder import FastEncoderError
from qwen_tune.chatml.rendering import Renderer
from qwen_tune.chatml.template import ChatTemplate
from qwen_tune.console import report
from qwen_tune.data.batches import Batcher, collecting_by_batch
from qwen_tune.data.cache import cached
from qwen_tune.data.documents import TrainingExample
from qwen_tune.data.parallel import Division, ParallelBatcher, part_readers
from qwen_tune.data.source_file import SourceFile
from qwen_tune.data.sources import SourceReader, read_tools, source_files
from qwen_tune.data.token_store import StoreWriter, TokenStore
from qwen_tune.disk import key_of, sha256
from qwen_tune.errors import DataError, Problem, first_line
from qwen_tune.recipe.schema import DataSpec, SourceSpec

LAYOUT = 4
"""Increased whenever the same data would give another store; stores of an older layout are made again."""

REPORT_SECONDS = 5.0

Stamp: TypeAlias = tuple[int, int]
"""Size in bytes and modification time in nanoseconds."""


class SourceStores:
    """Opens the stores of sources, or makes them, for one tokenizer, template and data section."""

    def __init__(
        self,
        data: DataSpec,
        template: ChatTemplate,
        *,
        division: Division | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        """Hashes what all sources have in common.

        Args:
            data: The recipe's data section.
            template: The checkpoint's chat template.
            division: How each source is divided among processes; None to choose by its size and this machine.
            encoder: For the tokenizer; None for the default.
        """
        self.data = data
        self.template = template
        self._division = division
        tokenizer_json: str = template.tokenizer.backend_tokenizer.to_str()
        self._encoder = encoder or Encoder(template, tokenizer_json)
        self._template_key: dict[str, Any] = {
            "layout": LAYOUT,
            "versions": {name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
            "tokenizer": hashlib.sha256(tokenizer_json.encode()).hexdigest(),
            "template": template.tokenizer.chat_template,
            "special_tokens": {name: str(token) for name, token in template.tokenizer.special_tokens_map.items()},
            "loss_on": data.loss_on,
            "thinking": data.thinking,
            "system": data.system,
            "special_tokens_in_text": data.special_tokens_in_text,
        }

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.template, self.data)

    def open(self, source: SourceSpec) -> tuple[TokenStore, bool]:
        """Opens the store of a source, after making it if the cache has none.

        Returns:
            The store, and whether it was in the cache.

        Raises:
            DataError: The source cannot be read, or with a problem for every example that cannot be trained on.
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
                report(f"{source.path}: tokenizing again with the checkpoint's own tokenizer only")
                self._encoder = Encoder(self.template, fast=None)
                self._make(pinned, files, stamps, part)

        return cached(key_of(ingredients), make, TokenStore)

    def _make(self, source: SourceSpec, files: list[SourceFile] | None, stamps: list[Stamp], directory: Path) -> None:
        size = sum(size for size, _ in stamps)
        self._encoder.expect(size)  # before the fork, so that all processes share the fast encoder
        made, reader = self._batches(source, files, self._division or Division.of(size), directory)
        with StoreWriter(directory) as writer, collecting_by_batch() as collect:
            reported = time.monotonic()
            for batch in made.batches():
                if batch is not None:
                    writer.add(batch)
                collect()
                if time.monotonic() > reported + REPORT_SECONDS:
                    reported = time.monotonic()
                    # Not on stdout, where a preview may write JSON.
                    report(f"preparing {source.path}: {made.count:,} examples so far")
            if made.problems:
                raise DataError(made.problems.reported)
            if _stamps(files) != stamps:
                raise DataError(Problem(source.path, "the file changed while it was read", "run the command again"))
            writer.finish({"recognised": vars(reader.recognised) if reader.recognised else None})

    def _batches(
        self, source: SourceSpec, files: list[SourceFile] | None, division: Division, folder: Path
    ) -> tuple[Batcher | ParallelBatcher, SourceReader]:
        """The batcher of a source, and a reader that knows the format of its examples afterwards."""
        limit = source.rows if self.data.streaming else None
        if files and limit is None:
            try:
                parts = part_readers(source, files, division, system=self.data.system)
            except OSError as error:
                raise _unreadable(source.path, error) from error
            if parts:
                made = ParallelBatcher(
                    parts, source, self._renderer, self._encoder, folder=folder, processes=division.processes
                )
                return made, parts[0]
        reader = SourceReader(source, system=self.data.system, files=files)
        examples = _until_unreadable(itertools.islice(reader, limit), source)
        return Batcher(examples, self._renderer, self._encoder), reader


def _until_unreadable(
    items: Iterator[TrainingExample | Problem], source: SourceSpec
) -> Iterator[TrainingExample | Problem]:
    try:
        yield from items
    except OSError as error:
        raise _unreadable(source.path, error) from error


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(Problem(name, f"the file cannot be read: {first_line(error)}"))


def _content_of(source: SourceSpec, files: list[SourceFile] | None) -> tuple[SourceSpec, list[list[str]]]:
    """The source with its revision pinned, and what identifies its content: names and hashes."""
    if files is None:
        return _hub_content(source)
    try:
        return source, [[file.name, sha256(file.path)] for file in files]
    except OSError as error:
        raise _unreadable(source.path, error) from error


def _stamps(files: list[SourceFile] | None) -> list[Stamp]:
    """Size and modification time of each file, to detect a change while it is read."""
    stamps: list[Stamp] = []
    for file in files or ():
        try:
            stat = file.path.stat()
        except OSError as error:
            raise _unreadable(file.name, error) from error
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
            commit = None  # reading the data set reports the problem
        if commit:
            return source.model_copy(update={"revision": commit}), [[*name, commit]]
        return source, [[*name, source.revision or "main"]]
    import datasets

    try:
        table = datasets.load_dataset(
            source.path, name=source.subset, split=source.split or "train", revision=source.revision
        )
    except Exception:  # of any type; reading the data set reports the problem
        return source, [name]
    return source, [[*name, str(table._fingerprint)]]
