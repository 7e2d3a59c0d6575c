"""Token ids and labels of one source on disk: written in one pass, memory-mapped for reading.

    ids.bin        4 bytes per token
    learned.bin    1 byte per token: 1 if it is supervised
    <column>.bin   a number per sample or example (see COLUMNS), and a sketch per example
    store.json     names, counts, and the hash of each file; written last

Nothing here depends on lengths, packs, weights or seeds, so these can change without tokenizing again.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from qwen_tune.chatml.encoder import EncodedSamples
from qwen_tune.chatml.template import IGNORED, TokenizedExample
from qwen_tune.data.mixing import Integers
from qwen_tune.data.near_duplicates import BINS, Sketches
from qwen_tune.disk import sha256
from qwen_tune.errors import DataError, Problem, first_line
from qwen_tune.recipe.schema import SourceSpec

DISTINCT_WARNINGS = 63
FURTHER_WARNINGS = "further kinds of warnings"

COLUMNS: dict[str, np.dtype[Any]] = {
    # a token
    "ids": np.dtype("<u4"),
    "learned": np.dtype("u1"),
    # a sample
    "length": np.dtype("<i4"),
    "supervised": np.dtype("<i4"),
    "straddling": np.dtype("<i4"),
    # an example
    "file_number": np.dtype("<i4"),
    "line": np.dtype("<i8"),
    "digest": np.dtype("<u8"),
    "lesson": np.dtype("<u8"),
    "samples": np.dtype("<i4"),
    "warnings": np.dtype("<u8"),
    "sketch": np.dtype(("<u2", (BINS,))),
}
"""The files of numbers, and the type of an entry."""


class StoredExample(NamedTuple):
    """What is stored of an example in addition to its tokens.

    `digest` is a hash of its text, `supervision_digest` of that and of which parts are supervised.
    """

    source: str
    digest: int
    supervision_digest: int
    samples: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class StoredBatch:
    """Some examples and their samples in the columns of a store.

    Two columns differ from the store's: `file_number` and `warnings` are places in this batch's `files` (names) and
    `warnings` (the combination of one example).
    """

    columns: Mapping[str, npt.NDArray[Any]]
    files: tuple[str, ...]
    warnings: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, encoded: EncodedSamples, examples: Sequence[StoredExample], sketches: Sketches) -> StoredBatch:
        first_tokens = np.cumsum(encoded.lengths) - encoded.lengths
        supervised = np.concatenate((np.zeros(1, np.int64), np.cumsum(encoded.loss_mask)))
        places = [example.source.rpartition(":") for example in examples]
        files: dict[str, int] = {}
        warnings: dict[tuple[str, ...], int] = {}
        values = {
            "ids": encoded.ids,
            "learned": encoded.loss_mask,
            "length": encoded.lengths,
            "supervised": supervised[first_tokens + encoded.lengths] - supervised[first_tokens],
            "straddling": encoded.straddling,
            "file_number": [files.setdefault(name, len(files)) for name, _, _ in places],
            "line": [int(line) for _, _, line in places],
            "digest": [example.digest for example in examples],
            "lesson": [example.supervision_digest for example in examples],
            "samples": [example.samples for example in examples],
            "warnings": [warnings.setdefault(example.warnings, len(warnings)) for example in examples],
            "sketch": sketches,
        }
        columns = {name: np.asarray(values[name], dtype.base) for name, dtype in COLUMNS.items()}
        return cls(columns, tuple(files), tuple(warnings))


@dataclass
class StoreWriter:
    """Writes a store into a directory, batch by batch; use it as a context, then call `finish`."""

    directory: Path
    _files: dict[str, BinaryIO] = field(default_factory=dict)
    _counts: Counter[str] = field(default_factory=Counter)
    _names: dict[str, int] = field(default_factory=dict)
    _warnings: dict[str, int] = field(default_factory=dict)
    _hashes: dict[str, Any] = field(default_factory=lambda: {name: hashlib.sha256() for name in COLUMNS})

    def __enter__(self) -> StoreWriter:
        for name in COLUMNS:
            self._files[name] = (self.directory / f"{name}.bin").open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def add(self, batch: StoredBatch) -> None:
        """Appends a batch."""
        files = [self._names.setdefault(name, len(self._names)) for name in batch.files]
        bits = [self._warning_bits(warnings) for warnings in batch.warnings]
        numbered = {"file_number": np.array(files), "warnings": np.array(bits, np.uint64)}
        for name, values in batch.columns.items():
            self._write(name, numbered[name][values] if name in numbered and len(values) else values)

    def finish(self, facts: dict[str, Any]) -> None:
        """Completes the store; `facts` are kept with it."""
        for column in self._files.values():
            column.flush()
        meta = {
            "files": list(self._names),
            "warnings": list(self._warnings),
            "entries": {name: self._counts[name] for name in COLUMNS},
            "sha256": {name: digest.hexdigest() for name, digest in self._hashes.items()},
            **facts,
        }
        (self.directory / "store.json").write_text(json.dumps(meta), encoding="utf-8")

    def _write(self, name: str, values: Any) -> None:
        data = np.asarray(values, COLUMNS[name].base).tobytes()
        self._files[name].write(data)
        self._hashes[name].update(data)
        self._counts[name] += len(data) // COLUMNS[name].itemsize

    def _warning_bits(self, warnings: Sequence[str]) -> int:
        bits = 0
        for warning in warnings:
            if warning not in self._warnings and len(self._warnings) >= DISTINCT_WARNINGS:
                warning = FURTHER_WARNINGS
            bits |= 1 << self._warnings.setdefault(warning, len(self._warnings))
        return bits


class TokenStore:
    """A finished store.

    Per sample: `lengths`, `supervised`, `straddling` (numbers of tokens). Per example: `samples` (how many),
    `first_sample`, `digests`, `supervision_digests`, `warnings` (a bit for each of `warning_names`) and `sketches`.
    """

    def __init__(self, directory: Path) -> None:
        """Opens a store.

        Raises:
            DataError: A file is missing or is not as it was written.
        """
        try:
            self._open(directory)
        except (OSError, ValueError, KeyError) as error:
            what = f"the prepared data are damaged: {first_line(error)}"
            raise DataError(Problem(str(directory), what, "remove this folder and run the command again")) from error

    def _open(self, directory: Path) -> None:
        self.directory = directory
        meta: dict[str, Any] = json.loads((directory / "store.json").read_text(encoding="utf-8"))
        self.facts = meta
        for name, expected in meta["sha256"].items():
            if sha256(directory / f"{name}.bin") != expected:
                raise ValueError(f"{name}.bin is not as it was written")
        # Of what trains; the places of the examples may change.
        self.sha256 = hashlib.sha256(
            str([meta["sha256"][name] for name in ("ids", "learned", "length")]).encode()
        ).hexdigest()
        self.files: list[str] = meta["files"]
        self.warning_names: list[str] = meta["warnings"]
        columns = {name: _mapped(directory / f"{name}.bin", meta["entries"][name], COLUMNS[name]) for name in COLUMNS}
        self.lengths: Integers = columns["length"].astype(np.int64)
        self.supervised: Integers = columns["supervised"].astype(np.int64)
        self.straddling: Integers = columns["straddling"].astype(np.int64)
        self.samples: Integers = columns["samples"].astype(np.int64)
        self.digests: npt.NDArray[np.uint64] = columns["digest"]
        self.supervision_digests: npt.NDArray[np.uint64] = columns["lesson"]
        self.warnings: npt.NDArray[np.uint64] = columns["warnings"]
        self.sketches: Sketches = columns["sketch"]
        self._file, self._line = columns["file_number"], columns["line"]
        self._ids, self._loss_mask = columns["ids"], columns["learned"]
        self.first_sample = np.cumsum(self.samples) - self.samples
        self._first_token = np.cumsum(self.lengths) - self.lengths

    @property
    def example_count(self) -> int:
        return len(self.samples)

    def source(self, example: int) -> str:
        """The place of an example, as `file:line`."""
        return f"{self.files[self._file[example]]}:{self._line[example]}"

    def example_of(self, sample: int) -> int:
        """The number of the example that a sample was made of."""
        return int(np.searchsorted(self.first_sample, sample, side="right")) - 1

    def tokens(self, sample: int, limit: int | None = None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids and labels of a sample, or of its first `limit` tokens."""
        start = int(self._first_token[sample])
        stop = start + (int(self.lengths[sample]) if limit is None else limit)
        ids = self._ids[start:stop].astype(np.int64)
        return ids, np.where(self._loss_mask[start:stop], ids, IGNORED)

    def supervised_within(self, sample: int, limit: int) -> int:
        """How many of a sample's first `limit` tokens are supervised."""
        start = int(self._first_token[sample])
        return int(np.count_nonzero(self._loss_mask[start : start + limit]))

    def sample(self, sample: int, source_name: str, limit: int | None = None) -> TokenizedExample:
        """A sample, or its first `limit` tokens."""
        ids, labels = self.tokens(sample, limit)
        return TokenizedExample(
            self.source(self.example_of(sample)),
            source_name,
            ids.tolist(),
            labels.tolist(),
            straddling=int(self.straddling[sample]),
            truncated=len(ids) < self.lengths[sample],
        )


def _mapped(path: Path, entries: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    size = path.stat().st_size
    if size != entries * dtype.itemsize:
        raise ValueError(f"{path.name} has {size} bytes; expected {entries * dtype.itemsize}")
    shape = (entries, *dtype.shape)
    # Empty files cannot be mapped.
    return np.memmap(path, dtype.base, "r", shape=shape) if entries else np.empty(shape, dtype.base)


@dataclass(frozen=True)
class PreparedSource:
    """A source of the recipe and its tokens; `first_example` is its first place in an `ExampleTable`."""

    spec: SourceSpec
    store: TokenStore
    was_cached: bool
    first_example: int


@dataclass(frozen=True)
class Samples(Sequence[TokenizedExample]):
    """Samples in order, read from disk on access.

    Per sample: `source` (number of the source), `sample` (number in its store), `lengths` and `supervised` (tokens that
    are kept, and how many of them are supervised).
    """

    sources: Sequence[PreparedSource]
    source: Integers
    sample: Integers
    lengths: Integers
    supervised: Integers

    def __len__(self) -> int:
        return len(self.sample)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | Samples:
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        source = self.sources[int(self.source[index])]
        return source.store.sample(int(self.sample[index]), source.spec.name, int(self.lengths[index]))

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[index] for index in range(len(self)))

    def subset(self, chosen: Integers) -> Samples:
        """The samples at some places."""
        columns = ("source", "sample", "lengths", "supervised")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def tokens(self, index: int) -> tuple[Integers, Integers]:
        """Ids and labels of a sample."""
        return self.sources[int(self.source[index])].store.tokens(int(self.sample[index]), int(self.lengths[index]))

    def place(self, index: int) -> str:
        """The place of the example that a sample was made of, as `file:line`."""
        store = self.sources[int(self.source[index])].store
        return store.source(store.example_of(int(self.sample[index])))
