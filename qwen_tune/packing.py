"""Samples into packs of at most `max_length_tokens`, with as little room left as can be."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from qwen_tune.chatml import TokenizedExample
    from qwen_tune.recipe import DataSpec

Pack: TypeAlias = "list[TokenizedExample]"


def pack(examples: Sequence[TokenizedExample], data: DataSpec) -> list[Pack]:
    """The samples of each row that the trainer gets: packs, or one sample each when the recipe does without packing."""
    if not data.packing:
        return [[example] for example in examples]
    groups = best_fit_decreasing([len(example.input_ids) for example in examples], data.max_length_tokens)
    return [[examples[index] for index in group] for group in groups]


def pack_by_source(examples: Sequence[TokenizedExample], data: DataSpec) -> dict[str, list[Pack]]:
    """The rows of each source by its name, so that each can have a loss of its own."""
    sources: dict[str, list[TokenizedExample]] = {}
    for example in examples:
        sources.setdefault(example.source_name, []).append(example)
    return {name: pack(source, data) for name, source in sources.items()}


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs by best fit decreasing: the longest first, each into the pack that it fills most.

    Args:
        lengths: Tokens of each sample.
        capacity: Tokens that a pack holds.

    Returns:
        Indices into `lengths`, a list for each pack. Every index stands in exactly one pack, and equal input gives
        equal packs.

    Raises:
        ValueError: A sample is longer than the capacity.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into a pack of {capacity}")
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted; full packs are not kept
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        position = bisect_left(room, (length, 0))
        if position == len(room):
            left, pack = capacity, len(packs)
            packs.append([])
        else:
            left, pack = room.pop(position)
        packs[pack].append(index)
        if left > length:
            insort(room, (left - length, pack))
    return packs
