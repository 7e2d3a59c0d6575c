"""Which examples train and which evaluate: shares held out, sources drawn by weight, nothing on both sides.

This depends on the content of the examples (their digests and sketches), the recipe and the seed alone, not on the
order of files or on the tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qwen_tune.data.near_duplicates import Sketches, near_groups
from qwen_tune.errors import DataError, Problem
from qwen_tune.recipe.schema import DataSpec, EvalSpec, SourceSpec

IN_EVALUATION = "in_evaluation"
NEAR_EVALUATION = "near_evaluation"
DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"

Integers = npt.NDArray[np.int64]
"""Numbers of examples run through all sources: first those of data.train, then those of data.eval."""

Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ExampleTable:
    """What mixing needs of each example: the number of its source (those of data.train first), a hash of its text, a
    hash of that and of which parts are supervised, and its sketch.
    """

    sources: npt.NDArray[np.int64]
    digests: Digests
    supervision_digests: Digests
    sketches: Sketches


@dataclass
class Mixture:
    """The examples of both sides, and those that are on neither.

    An example is in `train` as often as it is drawn; `repeated` counts the draws beyond the first. `duplicates` and
    `near_duplicates` have the same, or almost the same, text as an earlier example. `contaminated` are evaluation
    examples for which an almost equal example is trained nevertheless.
    """

    train: Integers
    evaluation: Integers
    not_sampled: int = 0
    repeated: int = 0
    dropped: dict[str, Integers] = field(default_factory=dict)
    duplicates: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    near_duplicates: Integers = field(default_factory=lambda: np.empty(0, np.int64))
    contaminated: Integers = field(default_factory=lambda: np.empty(0, np.int64))


def mix(table: ExampleTable, data: DataSpec, *, seed: int) -> Mixture:
    """Decides what trains and what evaluates.

    Examples are held out before any are drawn, so drawing more of a source never trains on its evaluation examples.

    Args:
        table: The examples of all sources.
        data: The recipe's data section.
        seed: Decides which examples are held out and which are drawn.

    Raises:
        DataError: No example would be left to train on, or the weight of a source draws none.
    """
    groups = near_groups(table.digests, table.sketches)
    numbers = np.arange(len(groups))
    is_training = table.sources < len(data.train)
    train, evaluation = numbers[is_training], numbers[~is_training]
    mixture = Mixture(train, evaluation)
    _count_duplicates(mixture, table, groups)
    if isinstance(data.eval, EvalSpec):
        train, evaluation = hold_out(table.digests, groups, data.eval.fraction, seed)
    elif data.eval is not None:
        evaluation = _draw(evaluation, table, data.eval, len(data.train), seed, mixture, streaming=data.streaming)
        same = np.isin(table.digests[train], table.digests[evaluation])
        near = np.isin(groups[train], groups[evaluation]) & ~same
        if len(train) and (same | near).all():
            what = "the evaluation sources contain every example of data.train; none is left to train on"
            raise DataError(Problem("data.eval", what, "use other examples, or write eval: {fraction: 0.05}"))
        mixture.dropped |= {IN_EVALUATION: train[same], NEAR_EVALUATION: train[near]}
        train = train[~(same | near)]
    if data.deduplicate:
        train = _without_duplicates(train, table, groups, data, mixture)
    mixture.contaminated = evaluation[np.isin(groups[evaluation], groups[train])]
    mixture.train = _draw(train, table, data.train, 0, seed, mixture, streaming=data.streaming)
    mixture.evaluation = evaluation
    return mixture


def hold_out(digests: Digests, groups: Integers, fraction: float, seed: int) -> tuple[Integers, Integers]:
    """Holds out a share of the examples and keeps almost equal ones on the same side.

    The choice depends on their text and the seed alone, so adding or reordering examples does not move others to the
    other side. If chains of similar examples are longer than the share, only equal examples are kept together.

    Returns:
        Examples to train on and examples to evaluate on; at least one of the latter.

    Raises:
        DataError: No example would be left to train on.
    """
    count = len(digests)
    wanted = max(1, math.floor(fraction * count + 0.5))
    order = _scrambled(digests, str(seed))
    held_out = _whole_groups(groups, order, wanted, largest=wanted)
    if held_out.sum() < wanted and np.bincount(groups, minlength=1).max() > wanted:
        _, equal = np.unique(digests, return_inverse=True)
        held_out = _whole_groups(equal, order, wanted, largest=wanted)
        if not held_out.any():
            held_out = _whole_groups(equal, order, 1, largest=count)
    if wanted >= count or not held_out.any():
        raise DataError(
            Problem(
                "data.eval.fraction",
                f"holding out {fraction} of {count} examples leaves none to train on",
                "add examples or set data.eval=null",
            )
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _whole_groups(groups: Integers, order: Digests, wanted: int, *, largest: int) -> npt.NDArray[np.bool_]:
    """Holds out whole groups of at most `largest` examples until `wanted` examples are held out."""
    _, member_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    place = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(place, member_of, order)
    candidates = np.flatnonzero(sizes <= largest)
    candidates = candidates[np.argsort(place[candidates], kind="stable")]
    before = np.cumsum(sizes[candidates]) - sizes[candidates]
    # At least one group stays for training.
    candidates = candidates[before < wanted][: len(sizes) - 1]
    chosen = np.zeros(len(sizes), bool)
    chosen[candidates] = True
    held: npt.NDArray[np.bool_] = chosen[member_of]
    return held


def _count_duplicates(mixture: Mixture, table: ExampleTable, groups: Integers) -> None:
    repeats = _repeats(table.digests)
    mixture.duplicates = np.flatnonzero(repeats)
    mixture.near_duplicates = np.flatnonzero((groups != np.arange(len(groups))) & ~repeats)


def _repeats(values: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Which values have occurred before."""
    _, first = np.unique(values, return_index=True)
    repeats = np.ones(len(values), bool)
    repeats[first] = False
    return repeats


def _without_duplicates(
    train: Integers, table: ExampleTable, groups: Integers, data: DataSpec, mixture: Mixture
) -> Integers:
    # Examples with equal text of which different turns are supervised are both kept.
    repeats = _repeats(table.supervision_digests[train])
    same = _repeats(table.digests[train])
    near = _repeats(groups[train]) & ~same if data.deduplicate == "near" else np.zeros(len(train), bool)
    mixture.dropped |= {DUPLICATE: train[repeats], NEAR_DUPLICATE: train[near]}
    kept: Integers = train[~(repeats | near)]
    return kept


def _draw(
    examples: Integers,
    table: ExampleTable,
    sources: Sequence[SourceSpec],
    first_source: int,
    seed: int,
    mixture: Mixture,
    *,
    streaming: bool,
) -> Integers:
    """Draws from each source as many examples as its `weight` or `rows` says, in the order of the files."""
    drawn: list[Integers] = []
    of_source = table.sources[examples]
    for number, source in enumerate(sources, start=first_source):
        there = examples[of_source == number]
        if source.rows is None:
            wanted = math.floor(source.weight * len(there) + 0.5)
        elif streaming or source.rows <= int((table.sources == number).sum()):
            wanted = min(source.rows, len(there))  # never repeat examples in place of those held out
        else:
            wanted = source.rows
        if not wanted and len(there):
            what = f"weight: {source.weight:g} draws none of {len(there)} examples"
            raise DataError(Problem(f"data ({source.name})", what, "raise the weight, or remove the source"))
        times, rest = divmod(wanted, len(there)) if len(there) else (0, 0)
        # The place of an example in the draw depends on its text, not on the other examples.
        order = np.argsort(_scrambled(table.digests[there], f"{seed}:{source.name}"), kind="stable")
        drawn += [there] * times + [there[np.sort(order[:rest])]]
        if times == 0:
            mixture.not_sampled += len(there) - rest
        mixture.repeated += max(wanted - len(there), 0) if len(there) else 0
    return np.concatenate(drawn) if drawn else examples[:0]


def _scrambled(digests: Digests, salt: str) -> Digests:
    """A hash of each digest with a salt (the finalizer of splitmix64 by Sebastiano Vigna)."""
    key = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little")
    mixed = digests ^ np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: Digests = mixed ^ (mixed >> np.uint64(31))
    return scrambled
