"""Examples into samples that train and evaluate, with every example and token accounted for.

`preview`, `prepare` and `train` come through here, so what is shown is what trains. Sources are tokenized into stores
of the cache; everything after that is arithmetic on a few numbers an example.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qwen_tune.chatml.template import ChatTemplate
from qwen_tune.data.mixing import ExampleTable, Mixture, Rows, mix
from qwen_tune.data.source_store import SourceStores
from qwen_tune.data.sources import PROBLEMS_KEPT
from qwen_tune.data.token_store import PreparedSource, Samples
from qwen_tune.errors import DataError, Problem
from qwen_tune.recipe.schema import DataSpec

OVERLONG = "overlong"
NO_LABELS = "no_labels"
REASONS = ("", OVERLONG, NO_LABELS)
TRUNCATED = "sample truncated before its end of turn"


@dataclass
class PreparedSplit:
    """The samples of one side (training or evaluation) and what became of its examples.

    `dropped_examples` and `warned_examples` hold the examples (numbers as in `mixing.Rows`) by reason; an example is
    counted once, however often it is drawn.
    """

    examples: Samples
    rows_read: int = 0
    rows_kept: int = 0
    dropped_examples: dict[str, Rows] = field(default_factory=dict)
    samples_dropped: Counter[str] = field(default_factory=Counter)
    expanded: int = 0
    warned_examples: dict[str, Rows] = field(default_factory=dict)

    @property
    def rows_dropped(self) -> Counter[str]:
        """Rows that are not trained, by reason."""
        return Counter({reason: len(rows) for reason, rows in self.dropped_examples.items() if len(rows)})

    @property
    def warnings(self) -> Counter[str]:
        """Rows that look odd, by what does."""
        return Counter({warning: len(rows) for warning, rows in self.warned_examples.items() if len(rows)})

    @property
    def tokens(self) -> int:
        """Tokens of all samples, once through."""
        return int(self.examples.lengths.sum())

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return int(self.examples.supervised.sum())


@dataclass(frozen=True)
class PreparedData:
    """Everything that trains and evaluates, and the balance of examples and tokens."""

    train: PreparedSplit
    evaluation: PreparedSplit
    mixture: Mixture
    sources: Sequence[PreparedSource]

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """The balance for run.json: rows.read is the sum of what became of them, prepared = supervised + context."""
        both = (self.train, self.evaluation)
        prepared, supervised = sum(s.tokens for s in both), sum(s.supervised for s in both)
        mixed = Counter({reason: len(rows) for reason, rows in self.mixture.dropped.items() if len(rows)})
        dropped = self.train.rows_dropped + self.evaluation.rows_dropped + mixed
        not_sampled = self.mixture.not_sampled
        return {
            "sources": self._sources(),
            "rows": {
                "read": sum(split.rows_read for split in both) + not_sampled + mixed.total(),
                "trained": self.train.rows_kept,
                "evaluation": self.evaluation.rows_kept,
                "not_sampled": not_sampled,
                "dropped": dict(dropped),
            },
            "samples": {
                "train": len(self.train.examples),
                "evaluation": len(self.evaluation.examples),
                "expanded": sum(split.expanded for split in both),
                "repeated": self.mixture.repeated,
                "dropped": dict(self.train.samples_dropped + self.evaluation.samples_dropped),
            },
            "tokens": {"prepared": prepared, "supervised": supervised, "context": prepared - supervised},
            "duplicates": {
                "exact": len(self.mixture.duplicates),
                "near": len(self.mixture.near_duplicates),
                "evaluation_near_training": len(self.mixture.contaminated),
            },
            "warnings": dict(self.train.warnings + self.evaluation.warnings),
        }

    def _sources(self) -> dict[str, dict[str, int]]:
        names = [source.spec.name for source in self.sources]
        found: dict[str, dict[str, int]] = {name: {"train": 0, "evaluation": 0} for name in sorted(set(names))}
        for side, split in (("train", self.train), ("evaluation", self.evaluation)):
            counts = np.bincount(split.examples.source, minlength=len(names))
            for name, count in zip(names, counts.tolist(), strict=True):
                found[name][side] += count
        return found

    def place(self, row: int) -> str:
        """Where an example stands, as `file:line`."""
        source = next(source for source in reversed(self.sources) if source.first_row <= row)
        return source.store.source(row - source.first_row)

    def fingerprint(self) -> str:
        """sha256 over every token id and label, in order."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(source.store.sha256.encode())
        for split in (self.train, self.evaluation):
            digest.update(b"split")
            for column in (split.examples.source, split.examples.sample, split.examples.lengths):
                digest.update(np.ascontiguousarray(column, "<i8").tobytes())
        return digest.hexdigest()


def prepare_data(data: DataSpec, template: ChatTemplate, *, seed: int) -> PreparedData:
    """Reads, renders and tokenizes all data of a recipe, or finds them in the cache.

    Args:
        data: The recipe's data section.
        template: The checkpoint's chat template.
        seed: Decides which examples are held out and drawn.

    Raises:
        DataError: Every example that cannot be trained on, or too little that can.
    """
    sources = _open_sources(data, template)
    stores = [source.store for source in sources]
    table = ExampleTable(
        sources=np.repeat(np.arange(len(stores)), [store.rows for store in stores]),
        digests=np.concatenate([store.digests for store in stores]),
        supervision_digests=np.concatenate([store.supervision_digests for store in stores]),
        sketches=stores[0].sketches if len(stores) == 1 else np.concatenate([store.sketches for store in stores]),
    )
    mixture = mix(table, data, seed=seed)
    problems: list[Problem] = []
    prepared = PreparedData(
        train=_prepare_split(mixture.train, table, sources, data, problems),
        evaluation=_prepare_split(mixture.evaluation, table, sources, data, problems),
        mixture=mixture,
        sources=sources,
    )
    if problems:
        raise DataError(problems)
    for split, name in ((prepared.train, "training"), (prepared.evaluation, "evaluation")):
        _require_samples(split, name)
    return prepared


def _open_sources(data: DataSpec, template: ChatTemplate) -> list[PreparedSource]:
    """The stores of all sources; problems of all of them are reported at once."""
    stores = SourceStores(data, template)
    sources: list[PreparedSource] = []
    problems: list[Problem] = []
    for spec in [*data.train, *(data.eval if isinstance(data.eval, list) else ())]:
        try:
            store, was_cached = stores.open(spec)
        except DataError as error:
            problems += error.problems
            if len(problems) >= PROBLEMS_KEPT:
                break
            continue
        first_row = sources[-1].first_row + sources[-1].store.rows if sources else 0
        sources.append(PreparedSource(spec, store, was_cached, first_row))
    if problems:
        raise DataError(problems)
    return sources


def _prepare_split(
    drawn: Rows, table: ExampleTable, sources: Sequence[PreparedSource], data: DataSpec, problems: list[Problem]
) -> PreparedSplit:
    """The samples of some examples, those that do not fit or teach nothing left out."""
    rows = np.unique(drawn)
    once = _samples_of(rows, table, sources)
    row_of = np.repeat(rows, _counts(rows, sources))
    fits = once.lengths <= data.max_length_tokens
    warned: dict[str, Rows] = {}
    reason = np.zeros(len(once), np.int8)  # a place in REASONS; 0: kept
    if data.overlong == "error":
        first = np.flatnonzero(~fits)[: PROBLEMS_KEPT - len(problems)]
        problems += [_overlong(once, index, data) for index in first.tolist()]
    elif data.overlong == "drop":
        reason[~fits] = REASONS.index(OVERLONG)
    else:
        once = _truncated(once, fits, data.max_length_tokens)
    reason[(reason == 0) & (once.supervised == 0)] = REASONS.index(NO_LABELS)
    kept = reason == 0
    rows_kept = np.unique(row_of[kept])
    lost = ~np.isin(rows, rows_kept)
    # Of an example with several samples, the first one's reason stands for the example.
    first = np.searchsorted(row_of, rows[lost])
    has_samples = np.isin(rows[lost], row_of)
    reasons = np.full(int(lost.sum()), REASONS.index(NO_LABELS), np.int8)
    reasons[has_samples] = reason[first[has_samples]]
    if data.overlong == "truncate":
        warned[TRUNCATED] = np.unique(row_of[kept & ~fits])
    split = PreparedSplit(
        examples=_as_drawn(once, kept, row_of, drawn),
        rows_read=len(rows),
        rows_kept=len(rows_kept),
        dropped_examples={name: rows[lost][reasons == code] for code, name in enumerate(REASONS) if code},
        samples_dropped=Counter({name: int((reason == code).sum()) for code, name in enumerate(REASONS) if code}),
        expanded=int(np.maximum(_counts(rows_kept, sources) - 1, 0).sum()),
        warned_examples={**_warned(rows, table, sources), **warned},
    )
    split.samples_dropped = +split.samples_dropped
    return split


def _counts(rows: Rows, sources: Sequence[PreparedSource]) -> Rows:
    """How many samples each of some examples has."""
    every = np.concatenate([source.store.samples for source in sources])
    counts: Rows = every[rows]
    return counts


def _samples_of(rows: Rows, table: ExampleTable, sources: Sequence[PreparedSource]) -> Samples:
    """All samples of some examples, whole."""
    counts = _counts(rows, sources)
    first = np.concatenate([source.store.first_sample for source in sources])[rows]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    sample = np.repeat(first, counts) + within
    source = np.repeat(table.sources[rows], counts)
    offsets = np.cumsum([0, *(len(one.store.lengths) for one in sources)])[:-1]
    place = sample + offsets[source]
    return Samples(
        sources,
        source,
        sample,
        np.concatenate([one.store.lengths for one in sources])[place],
        np.concatenate([one.store.supervised for one in sources])[place],
    )


def _as_drawn(once: Samples, kept: npt.NDArray[np.bool_], row_of: Rows, drawn: Rows) -> Samples:
    """The kept samples of each example, as often and in the order in which examples are drawn."""
    places = np.flatnonzero(kept)
    owners = row_of[places]
    first = np.searchsorted(owners, drawn, side="left")
    counts = np.searchsorted(owners, drawn, side="right") - first
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    return once.subset(places[np.repeat(first, counts) + within])


def _truncated(once: Samples, fits: npt.NDArray[np.bool_], limit: int) -> Samples:
    supervised = once.supervised.copy()
    for index in np.flatnonzero(~fits):
        store = once.sources[once.source[index]].store
        supervised[index] = store.supervised_within(int(once.sample[index]), limit)
    return replace(once, lengths=np.minimum(once.lengths, limit), supervised=supervised)


def _overlong(once: Samples, index: int, data: DataSpec) -> Problem:
    store = once.sources[once.source[index]].store
    where = store.source(store.row_of(int(once.sample[index])))
    what = f"the sample has {once.lengths[index]} tokens; at most {data.max_length_tokens} fit (data.max_length_tokens)"
    return Problem(where, what, "shorten it, or write overlong: drop")


def _warned(rows: Rows, table: ExampleTable, sources: Sequence[PreparedSource]) -> dict[str, Rows]:
    """The examples of each warning."""
    warned: dict[str, list[Rows]] = {}
    for number, source in enumerate(sources):
        own = rows[table.sources[rows] == number]
        bits = source.store.warnings[own - source.first_row]
        for bit, name in enumerate(source.store.warning_names):
            warned.setdefault(name, []).append(own[(bits >> np.uint64(bit)) & np.uint64(1) == 1])
    return {name: np.concatenate(parts) for name, parts in warned.items()}


def _require_samples(split: PreparedSplit, name: str) -> None:
    if not split.rows_read and name == "evaluation":
        return
    dropped = ", ".join(f"{count} {reason}" for reason, count in split.rows_dropped.items())
    if not len(split.examples):
        left = f"no example is left of {split.rows_read}" + (f" ({dropped} dropped)" if dropped else "")
        raise DataError(Problem(f"data ({name})", left, "see data.max_length_tokens" if dropped else "add examples"))
    if split.rows_dropped[NO_LABELS] > split.rows_read / 2:
        raise DataError(
            Problem(
                f"data ({name})",
                f"{split.rows_dropped[NO_LABELS]} of {split.rows_read} examples have no token to learn from",
                'see data.loss_on, "train": false in the examples, and data.max_length_tokens',
            )
        )
    if split.rows_dropped.total() > split.rows_read / 2:
        raise DataError(
            Problem(
                f"data ({name})",
                f"more than half of the examples would be dropped: {dropped} of {split.rows_read}",
                "raise data.max_length_tokens, or write overlong: truncate",
            )
        )
