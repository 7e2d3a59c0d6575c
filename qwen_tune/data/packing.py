"""Joins samples to packs of at most `max_length_tokens`, as full as possible."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qwen_tune.data.cache import cached
from qwen_tune.disk import key_of
from qwen_tune.errors import DataError, Problem, first_line

if TYPE_CHECKING:
    from qwen_tune.data.mixing import Integers
    from qwen_tune.data.token_store import Samples
    from qwen_tune.recipe.schema import DataSpec


@dataclass(frozen=True)
class Packs:
    """Packs for the trainer: `members` are places in `samples`, pack after pack, `sizes` the samples in each pack."""

    samples: Samples
    members: Integers
    sizes: Integers

    def __len__(self) -> int:
        return len(self.sizes)

    def pack(self, index: int) -> dict[str, Integers]:
        """One pack: `input_ids`, `labels`, and `lengths` (tokens of each sample in it)."""
        parts = [self.samples.tokens(place) for place in self._members_of(index)]
        return {
            "input_ids": np.concatenate([ids for ids, _ in parts]),
            "labels": np.concatenate([labels for _, labels in parts]),
            "lengths": np.array([len(ids) for ids, _ in parts]),
        }

    def places(self, index: int) -> list[str]:
        """The places of the examples in one pack, as `file:line`, each once."""
        return list(dict.fromkeys(self.samples.place(place) for place in self._members_of(index)))

    def _members_of(self, index: int) -> list[int]:
        first = int(self._first[index])
        members: list[int] = self.members[first : first + int(self.sizes[index])].tolist()
        return members

    @cached_property
    def lengths(self) -> Integers:
        """Tokens of each pack."""
        return self._sums(self.samples.lengths)

    @cached_property
    def supervised(self) -> Integers:
        """Tokens of each pack that are supervised."""
        return self._sums(self.samples.supervised)

    def _sums(self, of_samples: Integers) -> Integers:
        # `reduceat` fails without packs.
        sums: Integers = np.add.reduceat(of_samples[self.members], self._first) if len(self) else self.sizes
        return sums

    @cached_property
    def _first(self) -> Integers:
        first: Integers = np.cumsum(self.sizes) - self.sizes
        return first


def pack(samples: Samples, data: DataSpec) -> Packs:
    """Packs samples, or takes the packs from the cache; without `data.packing` a pack is one sample.

    Raises:
        DataError: The cache cannot be written.
    """
    if not data.packing:
        return Packs(samples, np.arange(len(samples)), np.ones(len(samples), np.int64))
    lengths = np.ascontiguousarray(samples.lengths, "<i8")
    key = key_of({"layout": 2, "of": hashlib.sha256(lengths.tobytes()).hexdigest(), "into": data.max_length_tokens})

    def store(directory: Path) -> None:
        np.save(directory / "packs.npy", best_fit_decreasing(lengths, data.max_length_tokens))

    pack_of, _ = cached(key, store, lambda directory: _load_packs(directory, len(lengths)))
    return Packs(samples, np.argsort(pack_of, kind="stable"), np.bincount(pack_of))


def _load_packs(directory: Path, count: int) -> Integers:
    try:
        packs: Integers = np.load(directory / "packs.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(Problem(str(directory), f"damaged: {first_line(error)}")) from error
    if len(packs) != count:
        raise DataError(Problem(str(directory), f"{len(packs)} samples; expected {count}"))
    return packs


def pack_by_source(samples: Samples, data: DataSpec) -> dict[str, Packs]:
    """The packs of each source by its name, for a loss per source."""
    names = [source.spec.name for source in samples.sources]
    numbers = dict.fromkeys(samples.source.tolist())
    return {names[number]: pack(samples.subset(np.flatnonzero(samples.source == number)), data) for number in numbers}


def best_fit_decreasing(lengths: Integers, capacity: int) -> Integers:
    """Packs by best fit decreasing: the longest sample first, each into the fullest pack that has room for it.

    Args:
        lengths: Tokens of each sample.
        capacity: Tokens of a full pack.

    Returns:
        The number of each sample's pack; the same for the same input.

    Raises:
        ValueError: A sample is longer than the capacity.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a sample of {lengths.max()} tokens does not fit into a pack of {capacity}")
    pack_of = np.empty(len(lengths), np.int64)
    packs = 0
    open_packs: dict[int, array[int]] = {}  # by the tokens left in them; full packs are not kept
    room: list[int] = []  # its keys, sorted
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        position = bisect_left(room, length)
        if position == len(room):
            left, pack = capacity, packs
            packs += 1
        else:
            left = room[position]
            pack = open_packs[left].pop()
            if not open_packs[left]:
                del open_packs[left], room[position]
        pack_of[index] = pack
        if left > length:
            if left - length not in open_packs:
                open_packs[left - length] = array("q")
                insort(room, left - length)
            open_packs[left - length].append(pack)
    return pack_of
