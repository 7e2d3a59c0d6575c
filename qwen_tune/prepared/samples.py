"""Samples in an order of their own, read from the stores of their sources when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from qwen_tune.chatml.template import TokenizedExample
from qwen_tune.prepared.mixing import Rows
from qwen_tune.prepared.token_store import TokenStore
from qwen_tune.recipe.schema import SourceSpec


@dataclass(frozen=True)
class PreparedSource:
    """A source of the recipe and its tokens; `first_row` is the number of its first row in a `RowTable`."""

    spec: SourceSpec
    store: TokenStore
    was_cached: bool
    first_row: int


@dataclass(frozen=True)
class Samples(Sequence[TokenizedExample]):
    """Samples in order, read from disk when they are asked for.

    `source` (number of the source), `sample` (number in its store), `lengths` and `supervised` (tokens that are kept,
    and those of them that carry loss) have one entry a sample.
    """

    sources: Sequence[PreparedSource]
    source: Rows
    sample: Rows
    lengths: Rows
    supervised: Rows

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
        return source.store.example(int(self.sample[index]), source.spec.name, int(self.lengths[index]))

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self[index] for index in range(len(self)))

    def subset(self, chosen: Rows) -> Samples:
        """Some of the samples, by their places."""
        columns = ("source", "sample", "lengths", "supervised")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def tokens(self, index: int) -> tuple[Rows, Rows]:
        """Ids and labels of a sample."""
        return self.sources[int(self.source[index])].store.tokens(int(self.sample[index]), int(self.lengths[index]))

    def place(self, index: int) -> str:
        """Where the row stands that a sample was made of, as `file:line`."""
        store = self.sources[int(self.source[index])].store
        return store.source(store.row_of(int(self.sample[index])))

    def source_name(self, index: int) -> str:
        """The recipe's name for the source of a sample."""
        return self.sources[int(self.source[index])].spec.name
