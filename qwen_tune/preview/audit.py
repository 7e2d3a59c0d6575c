"""What became of the examples: the balance, what was dropped and why, and warnings, with places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_tune.data.mixing import DUPLICATE, IN_EVALUATION, NEAR_DUPLICATE, NEAR_EVALUATION, Integers
from qwen_tune.data.preparation import NO_LABELS, OVERLONG, PreparedData, PreparedSplit
from qwen_tune.recipe.schema import DataSpec

PLACES_SHOWN = 5
BARS = 24
SHARES_KEPT = (0.9, 0.99, 1.0)

IN_WORDS = {
    OVERLONG: "longer than data.max_length_tokens",
    NO_LABELS: "no supervised tokens",
    IN_EVALUATION: "also an evaluation example",
    NEAR_EVALUATION: "almost the same as an evaluation example",
    DUPLICATE: "the same as an earlier example",
    NEAR_DUPLICATE: "almost the same as an earlier example",
}


@dataclass(frozen=True)
class Found:
    """Examples with one finding: what it is, how many there are, and the places of the first (`file:line`)."""

    what: str
    examples: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class SourceFacts:
    """One source: its format and why it was recognised as that, its examples, and the samples and tokens from it.

    `train` and `evaluation` count samples, as often as they are drawn.
    """

    name: str
    path: str
    format: str
    why: str
    examples: int
    train: int
    evaluation: int
    tokens: int
    supervised: int
    was_cached: bool


@dataclass(frozen=True)
class Lengths:
    """Lengths of all samples in tokens, before any is dropped or truncated.

    `bars` are the (from, to, samples) of a histogram, the last extended to the longest sample; `keeping` maps shares of
    the samples (such as "90%") to the data.max_length_tokens that would keep them; `over` samples exceed `limit`.
    """

    limit: int
    median: int
    longest: int
    over: int
    keeping: Mapping[str, int]
    bars: Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class Audit:
    facts: Mapping[str, Any]
    sources: Sequence[SourceFacts]
    lengths: Lengths
    dropped: Sequence[Found]
    warnings: Sequence[Found]
    duplicates: Sequence[Found]
    silent_sources: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "facts": dict(self.facts)}


def audit(data: PreparedData, spec: DataSpec) -> Audit:
    """Summarizes the prepared data.

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
        "in the evaluation, with a similar one in training": mixture.contaminated,
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


def _merged(parts: Iterable[Mapping[str, Integers]]) -> dict[str, Integers]:
    merged: dict[str, Integers] = {}
    for part in parts:
        for name, examples in part.items():
            merged[name] = np.union1d(merged[name], examples) if name in merged else examples
    return merged


def _found(data: PreparedData, kinds: Mapping[str, Integers], in_words: Mapping[str, str]) -> list[Found]:
    return [
        Found(in_words.get(name, name), len(numbers), tuple(map(data.place, numbers[:PLACES_SHOWN].tolist())))
        for name, numbers in kinds.items()
        if len(numbers)
    ]


def _source_facts(data: PreparedData, number: int) -> SourceFacts:
    source = data.sources[number]
    recognised = source.store.facts.get("recognised") or {"name": "none", "reason": "no examples"}

    def of(split: PreparedSplit) -> npt.NDArray[np.bool_]:
        own: npt.NDArray[np.bool_] = split.samples.source == number
        return own

    train, evaluation = of(data.train), of(data.evaluation)
    return SourceFacts(
        name=source.spec.name,
        path=source.spec.path,
        format=recognised["name"],
        why=recognised["reason"],
        examples=source.store.example_count,
        train=int(train.sum()),
        evaluation=int(evaluation.sum()),
        tokens=int(data.train.samples.lengths[train].sum() + data.evaluation.samples.lengths[evaluation].sum()),
        supervised=int(
            data.train.samples.supervised[train].sum() + data.evaluation.samples.supervised[evaluation].sum()
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
        # The longest sample of this share of the shortest ones.
        keeping={f"{share:.0%}": int(lengths[int(np.ceil(share * len(lengths))) - 1]) for share in SHARES_KEPT},
        bars=_bars(lengths, limit),
    )


def _bars(lengths: Integers, limit: int) -> list[tuple[int, int, int]]:
    """A histogram of sorted lengths, whose scale neither a few long samples nor a distant limit dominate."""
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
    """The smallest of 1, 2, 5, 10, 20, 50 … that is at least `least`."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= least:
                return step * power
        power *= 10
