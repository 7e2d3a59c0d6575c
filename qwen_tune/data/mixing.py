"""Which examples train and which evaluate: shares held out, sources drawn by weight, nothing on both sides.

Everything here is decided by what the examples say (their digests and sketches), the recipe and the seed: not by the
order of files, nor by the tokens.
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

Rows = npt.NDArray[np.int64]
"""Numbers of examples, counted through all sources: first those of data.train, then those of data.eval."""

Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class ExampleTable:
    """What mixing knows of the examples, for each: its source (counted likewise), hashes of what it says and of what is
    supervised of it, and its sketch.
    """

    sources: npt.NDArray[np.int64]
    digests: Digests
    supervision_digests: Digests
    sketches: Sketches


@dataclass
class Mixture:
    """Rows of both sides, and those that are on neither.

    An example stands in `train` as often as it is drawn; `repeated` counts the draws beyond the first. `duplicates` and
    `near_duplicates` are examples that say, or almost say, what an example before them says; `contaminated` are
    examples of the evaluation for which an example that almost says the same is trained nevertheless.
    """

    train: Rows
    evaluation: Rows
    not_sampled: int = 0
    repeated: int = 0
    dropped: dict[str, Rows] = field(default_factory=dict)
    duplicates: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    near_duplicates: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    contaminated: Rows = field(default_factory=lambda: np.empty(0, np.int64))


def mix(table: ExampleTable, data: DataSpec, *, seed: int) -> Mixture:
    """Decides what trains and what evaluates.

    Examples are held out before anything is drawn, so that drawing more of a source never trains what it evaluates on.

    Args:
        table: All examples of the recipe's sources.
        data: The recipe's data section.
        seed: Decides which examples are held out and which are drawn.

    Raises:
        DataError: Nothing would be left to train on.
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
            what = "the evaluation sources hold every example of data.train, so that none is left to train on"
            raise DataError(Problem("data.eval", what, "take other examples, or write eval: {fraction: 0.05}"))
        mixture.dropped |= {IN_EVALUATION: train[same], NEAR_EVALUATION: train[near]}
        train = train[~(same | near)]
    if data.deduplicate:
        train = _without_duplicates(train, table, groups, data, mixture)
    mixture.contaminated = evaluation[np.isin(groups[evaluation], groups[train])]
    mixture.train = _draw(train, table, data.train, 0, seed, mixture, streaming=data.streaming)
    mixture.evaluation = evaluation
    return mixture


def hold_out(digests: Digests, groups: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Holds out a share of the examples, those that say almost the same always on the same side.

    Which ones are held out depends on what they say and the seed alone, so examples that are added or reordered do not
    move others across. Where chains of similar examples are longer than the share, only equal examples are kept
    together.

    Returns:
        Examples to train on and examples to evaluate on; at least one of the latter.

    Raises:
        DataError: Nothing would be left to train on.
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
                f"{fraction} of {count} examples leaves none to train on",
                "add examples or set data.eval=null",
            )
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _whole_groups(groups: Rows, order: Digests, wanted: int, *, largest: int) -> npt.NDArray[np.bool_]:
    """Whole groups, of no more than `largest` examples each, until as many examples as wanted are held out."""
    _, member_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    place = np.full(len(sizes), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(place, member_of, order)
    candidates = np.flatnonzero(sizes <= largest)
    candidates = candidates[np.argsort(place[candidates], kind="stable")]
    before = np.cumsum(sizes[candidates]) - sizes[candidates]
    # One group stays for training, whatever the last one's size: somebody has to train.
    candidates = candidates[before < wanted][: len(sizes) - 1]
    chosen = np.zeros(len(sizes), bool)
    chosen[candidates] = True
    held: npt.NDArray[np.bool_] = chosen[member_of]
    return held


def _count_duplicates(mixture: Mixture, table: ExampleTable, groups: Rows) -> None:
    repeats = _repeats(table.digests)
    mixture.duplicates = np.flatnonzero(repeats)
    mixture.near_duplicates = np.flatnonzero((groups != np.arange(len(groups))) & ~repeats)


def _repeats(values: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Which values have stood before."""
    _, first = np.unique(values, return_index=True)
    repeats = np.ones(len(values), bool)
    repeats[first] = False
    return repeats


def _without_duplicates(train: Rows, table: ExampleTable, groups: Rows, data: DataSpec, mixture: Mixture) -> Rows:
    # Examples that say the same and teach different turns of it are both kept.
    repeats = _repeats(table.supervision_digests[train])
    same = _repeats(table.digests[train])
    near = _repeats(groups[train]) & ~same if data.deduplicate == "near" else np.zeros(len(train), bool)
    mixture.dropped |= {DUPLICATE: train[repeats], NEAR_DUPLICATE: train[near]}
    kept: Rows = train[~(repeats | near)]
    return kept


def _draw(
    rows: Rows,
    table: ExampleTable,
    sources: Sequence[SourceSpec],
    first_source: int,
    seed: int,
    mixture: Mixture,
    *,
    streaming: bool,
) -> Rows:
    """Takes as much of each source as its `weight` or `rows` says, in the order of the files."""
    drawn: list[Rows] = []
    of_source = table.sources[rows]
    for number, source in enumerate(sources, start=first_source):
        there = rows[of_source == number]
        if source.rows is None:
            wanted = math.floor(source.weight * len(there) + 0.5)
        elif streaming or source.rows <= int((table.sources == number).sum()):
            wanted = min(source.rows, len(there))  # what is held out or left out is no reason to repeat others
        else:
            wanted = source.rows
        if not wanted and len(there):
            what = f"weight: {source.weight:g} of {len(there)} examples draws none"
            raise DataError(Problem(f"data ({source.name})", what, "raise the weight, or leave the source out"))
        times, rest = divmod(wanted, len(there)) if len(there) else (0, 0)
        # The place in the draw depends on what an example says, not on what else there is.
        order = np.argsort(_scrambled(table.digests[there], f"{seed}:{source.name}"), kind="stable")
        drawn += [there] * times + [there[np.sort(order[:rest])]]
        if times == 0:
            mixture.not_sampled += len(there) - rest
        mixture.repeated += max(wanted - len(there), 0) if len(there) else 0
    return np.concatenate(drawn) if drawn else rows[:0]


def _scrambled(digests: Digests, salt: str) -> Digests:
    """Another hash of what the examples say, one for each salt (splitmix64's last steps, by Sebastiano Vigna)."""
    key = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "little")
    mixed = digests ^ np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    scrambled: Digests = mixed ^ (mixed >> np.uint64(31))
    return scrambled
