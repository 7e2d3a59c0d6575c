"""What became of the examples, with places: the balance, what was left out and why, what looks odd."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_tune.data.mixing import DUPLICATE, IN_EVALUATION, NEAR_DUPLICATE, NEAR_EVALUATION, Rows
from qwen_tune.data.preparation import NO_LABELS, OVERLONG, PreparedData, PreparedSplit
from qwen_tune.recipe.schema import DataSpec

PLACES_SHOWN = 5
BARS = 24
SHARES_KEPT = (0.9, 0.99, 1.0)

IN_WORDS = {
    OVERLONG: "longer than data.max_length_tokens",
    NO_LABELS: "nothing to learn from",
    IN_EVALUATION: "also an evaluation example",
    NEAR_EVALUATION: "almost the same as an evaluation example",
    DUPLICATE: "the same as an earlier example",
    NEAR_DUPLICATE: "almost the same as an earlier example",
}


@dataclass(frozen=True)
class Found:
    """Rows of one kind: what they are, how many, and where the first of them stand (`file:line`)."""

    what: str
    rows: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class SourceFacts:
    """One source: its form and why it was taken for that, its examples, and the samples and tokens that it contributes.

    `train` and `evaluation` count samples, as often as they are drawn.
    """

    name: str
    path: str
    format: str
    why: str
    rows: int
    train: int
    evaluation: int
    tokens: int
    supervised: int
    was_cached: bool


@dataclass(frozen=True)
class Lengths:
    """Lengths of all samples in tokens, before any is dropped or cut.

    `bars` are (from, to, samples) of a histogram, the last of them open to the longest; `keeping` says for shares of
    the samples (as "90%") which data.max_length_tokens would keep them; `over` samples are longer than `limit`.
    """

    limit: int
    median: int
    longest: int
    over: int
    keeping: Mapping[str, int]
    bars: Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Audit:
    """See the module."""

    facts: Mapping[str, Any]
    sources: Sequence[SourceFacts]
    lengths: Lengths
    dropped: Sequence[Found]
    warnings: Sequence[Found]
    duplicates: Sequence[Found]
    silent_sources: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "facts": dict(self.facts)}


def audit(data: PreparedData, spec: DataSpec) -> Audit:
    """Looks at all that was prepared.

    Args:
        data: The samples of both sides.
        spec: The recipe's data section.
    """
    sources = [_source_facts(data, number) for number in range(len(data.sources))]
    mixture = data.mixture
    both = (data.train, data.evaluation)
    dropped = _merged([mixture.dropped, *(split.dropped_examples for split in both)])
    gone = np.concatenate([np.empty(0, np.int64), *dropped.values()])
    duplicates = {
        IN_WORDS[DUPLICATE]: np.setdiff1d(mixture.duplicates, gone),
        IN_WORDS[NEAR_DUPLICATE]: np.setdiff1d(mixture.near_duplicates, gone),
        "evaluated, while something similar is trained": mixture.contaminated,
    }
    return Audit(
        facts=data.facts,
        sources=sources,
        lengths=_lengths(data, spec.max_length_tokens),
        dropped=_found(data, dropped, IN_WORDS),
        warnings=_found(data, _merged([split.warned_examples for split in both]), {}),
        duplicates=_found(data, duplicates, {}),
        silent_sources=[source.name for source in sources if not source.train + source.evaluation],
    )


def _merged(parts: Iterable[Mapping[str, Rows]]) -> dict[str, Rows]:
    merged: dict[str, Rows] = {}
    for part in parts:
        for name, rows in part.items():
            merged[name] = np.union1d(merged[name], rows) if name in merged else rows
    return merged


def _found(data: PreparedData, kinds: Mapping[str, Rows], in_words: Mapping[str, str]) -> list[Found]:
    return [
        Found(in_words.get(name, name), len(rows), tuple(data.place(row) for row in rows[:PLACES_SHOWN].tolist()))
        for name, rows in kinds.items()
        if len(rows)
    ]


def _source_facts(data: PreparedData, number: int) -> SourceFacts:
    source = data.sources[number]
    recognised = source.store.facts.get("recognised") or {"name": "none", "reason": "no examples"}

    def of(split: PreparedSplit) -> npt.NDArray[np.bool_]:
        own: npt.NDArray[np.bool_] = split.examples.source == number
        return own

    train, evaluation = of(data.train), of(data.evaluation)
    return SourceFacts(
        name=source.spec.name,
        path=source.spec.path,
        format=recognised["name"],
        why=recognised["reason"],
        rows=source.store.rows,
        train=int(train.sum()),
        evaluation=int(evaluation.sum()),
        tokens=int(data.train.examples.lengths[train].sum() + data.evaluation.examples.lengths[evaluation].sum()),
        supervised=int(
            data.train.examples.supervised[train].sum() + data.evaluation.examples.supervised[evaluation].sum()
        ),
        was_cached=source.was_cached,
    )


def _lengths(data: PreparedData, limit: int) -> Lengths:
    lengths = np.sort(np.concatenate([source.store.lengths for source in data.sources]))
    if not len(lengths):
        return Lengths(limit, 0, 0, 0, {}, [])
    return Lengths(
        limit=limit,
        median=int(lengths[len(lengths) // 2]),
        longest=int(lengths[-1]),
        over=int((lengths > limit).sum()),
        # The longest of the shortest so many: what is not longer is kept.
        keeping={f"{share:.0%}": int(lengths[int(np.ceil(share * len(lengths))) - 1]) for share in SHARES_KEPT},
        bars=_bars(lengths, limit),
    )


def _bars(lengths: Rows, limit: int) -> list[tuple[int, int, int]]:
    """A histogram of lengths in ascending order, in which neither a few long ones nor a far limit squeeze the rest."""
    longest = int(lengths[-1])
    most = 2 * int(lengths[int(0.99 * (len(lengths) - 1))])
    end = min(longest, max(most, limit + limit // 4 if longest > limit else 0))
    width = _round_number(end / BARS)
    count = -(-end // width)
    counts = np.bincount(np.clip((lengths - 1) // width, 0, count - 1), minlength=count).tolist()
    bars = [(bar * width + 1, (bar + 1) * width, samples) for bar, samples in enumerate(counts)]
    first, last, samples = bars[-1]
    return [*bars[:-1], (first, max(last, longest), samples)]


def _round_number(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 … that is not below a number."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= least:
                return step * power
        power *= 10
