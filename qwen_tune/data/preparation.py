"""From examples to the samples that train and evaluate, with every example and token accounted for.

`preview`, `prepare` and `train` all use this, so what is shown is what trains. Sources are tokenized into stores of the
cache; everything after that is arithmetic on a few numbers per example.
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
from qwen_tune.data.mixing import ExampleTable, Integers, Mixture, mix
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

    `dropped_examples` and `warned_examples` hold numbers of examples by reason; an example is counted once, however
    often it is drawn.
    """

    samples: Samples
    examples_read: int = 0
    examples_kept: int = 0
    dropped_examples: dict[str, Integers] = field(default_factory=dict)
    samples_dropped: Counter[str] = field(default_factory=Counter)
    expanded: int = 0
    warned_examples: dict[str, Integers] = field(default_factory=dict)

    @property
    def dropped_counts(self) -> Counter[str]:
        """How many examples were dropped, by reason."""
        return Counter({reason: len(examples) for reason, examples in self.dropped_examples.items() if len(examples)})

    @property
    def warnings(self) -> Counter[str]:
        """How many examples have each warning."""
        return Counter({warning: len(examples) for warning, examples in self.warned_examples.items() if len(examples)})

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        return int(self.samples.lengths.sum())

    @property
    def supervised(self) -> int:
        return int(self.samples.supervised.sum())


@dataclass(frozen=True)
class PreparedData:
    """Everything that trains and evaluates, and the balance of examples and tokens."""

    train: PreparedSplit
    evaluation: PreparedSplit
    mixture: Mixture
    sources: Sequence[PreparedSource]

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """The balance for run.json: rows.read is the sum of the other counts, prepared = supervised + context."""
        both = (self.train, self.evaluation)
        prepared, supervised = sum(s.tokens for s in both), sum(s.supervised for s in both)
        mixed = Counter({reason: len(examples) for reason, examples in self.mixture.dropped.items() if len(examples)})
        dropped = self.train.dropped_counts + self.evaluation.dropped_counts + mixed
        not_sampled = self.mixture.not_sampled
        return {
            "sources": self._sources(),
            "rows": {
                "read": sum(split.examples_read for split in both) + not_sampled + mixed.total(),
                "trained": self.train.examples_kept,
                "evaluation": self.evaluation.examples_kept,
                "not_sampled": not_sampled,
                "dropped": dict(dropped),
            },
            "samples": {
                "train": len(self.train.samples),
                "evaluation": len(self.evaluation.samples),
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
            counts = np.bincount(split.samples.source, minlength=len(names))
            for name, count in zip(names, counts.tolist(), strict=True):
                found[name][side] += count
        return found

    def place(self, example: int) -> str:
        """The place of an example, as `file:line`."""
        source = next(source for source in reversed(self.sources) if source.first_example <= example)
        return source.store.source(example - source.first_example)

    def fingerprint(self) -> str:
        """sha256 of all token ids and labels, in order."""
        digest = hashlib.sha256()
        for source in self.sources:
            digest.update(source.store.sha256.encode())
        for split in (self.train, self.evaluation):
            digest.update(b"split")
            for column in (split.samples.source, split.samples.sample, split.samples.lengths):
                digest.update(np.ascontiguousarray(column, "<i8").tobytes())
        return digest.hexdigest()


def prepare_data(data: DataSpec, template: ChatTemplate, *, seed: int) -> PreparedData:
    """Reads, renders and tokenizes all data of a recipe, or takes them from the cache.

    Args:
        data: The recipe's data section.
        template: The checkpoint's chat template.
        seed: Decides which examples are held out and drawn.

    Raises:
        DataError: With a problem for every example that cannot be trained on, or because too few can.
    """
    sources = _open_sources(data, template)
    stores = [source.store for source in sources]
    table = ExampleTable(
        sources=np.repeat(np.arange(len(stores)), [store.example_count for store in stores]),
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
        first_example = sources[-1].first_example + sources[-1].store.example_count if sources else 0
        sources.append(PreparedSource(spec, store, was_cached, first_example))
    if problems:
        raise DataError(problems)
    return sources


def _prepare_split(
    drawn: Integers, table: ExampleTable, sources: Sequence[PreparedSource], data: DataSpec, problems: list[Problem]
) -> PreparedSplit:
    """The samples of the examples drawn, without those that are too long or have no supervised token."""
    examples = np.unique(drawn)
    once = _samples_of(examples, table, sources)
    example_of = np.repeat(examples, _counts(examples, sources))
    fits = once.lengths <= data.max_length_tokens
    warned: dict[str, Integers] = {}
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
    examples_kept = np.unique(example_of[kept])
    lost = ~np.isin(examples, examples_kept)
    # An example with several samples is reported with the reason of the first.
    first = np.searchsorted(example_of, examples[lost])
    has_samples = np.isin(examples[lost], example_of)
    reasons = np.full(int(lost.sum()), REASONS.index(NO_LABELS), np.int8)
    reasons[has_samples] = reason[first[has_samples]]
    if data.overlong == "truncate":
        warned[TRUNCATED] = np.unique(example_of[kept & ~fits])
    return PreparedSplit(
        samples=_as_drawn(once, kept, example_of, drawn),
        examples_read=len(examples),
        examples_kept=len(examples_kept),
        dropped_examples={name: examples[lost][reasons == code] for code, name in enumerate(REASONS) if code},
        samples_dropped=+Counter({name: int((reason == code).sum()) for code, name in enumerate(REASONS) if code}),
        expanded=int(np.maximum(_counts(examples_kept, sources) - 1, 0).sum()),
        warned_examples={**_warned(examples, table, sources), **warned},
    )


def _counts(examples: Integers, sources: Sequence[PreparedSource]) -> Integers:
    """How many samples each example has."""
    every = np.concatenate([source.store.samples for source in sources])
    counts: Integers = every[examples]
    return counts


def _samples_of(examples: Integers, table: ExampleTable, sources: Sequence[PreparedSource]) -> Samples:
    """All samples of some examples, not truncated."""
    counts = _counts(examples, sources)
    first = np.concatenate([source.store.first_sample for source in sources])[examples]
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    sample = np.repeat(first, counts) + within
    source = np.repeat(table.sources[examples], counts)
    offsets = np.cumsum([0, *(len(one.store.lengths) for one in sources)])[:-1]
    place = sample + offsets[source]
    return Samples(
        sources,
        source,
        sample,
        np.concatenate([one.store.lengths for one in sources])[place],
        np.concatenate([one.store.supervised for one in sources])[place],
    )


def _as_drawn(once: Samples, kept: npt.NDArray[np.bool_], example_of: Integers, drawn: Integers) -> Samples:
    """The kept samples of the examples, in the order in which these are drawn, repeats included."""
    places = np.flatnonzero(kept)
    owners = example_of[places]
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
    where = store.source(store.example_of(int(once.sample[index])))
    limit = data.max_length_tokens
    what = f"the sample has {once.lengths[index]} tokens; expected at most {limit} (data.max_length_tokens)"
    return Problem(where, what, "shorten it, or write overlong: drop")


def _warned(examples: Integers, table: ExampleTable, sources: Sequence[PreparedSource]) -> dict[str, Integers]:
    """The examples of each warning."""
    warned: dict[str, list[Integers]] = {}
    for number, source in enumerate(sources):
        own = examples[table.sources[examples] == number]
        bits = source.store.warnings[own - source.first_example]
        for bit, name in enumerate(source.store.warning_names):
            warned.setdefault(name, []).append(own[(bits >> np.uint64(bit)) & np.uint64(1) == 1])
    return {name: np.concatenate(parts) for name, parts in warned.items()}


def _require_samples(split: PreparedSplit, name: str) -> None:
    if not split.examples_read and name == "evaluation":
        return
    dropped = ", ".join(f"{count} {reason}" for reason, count in split.dropped_counts.items())
    if not len(split.samples):
        left = f"none of {split.examples_read} examples is left" + (f" ({dropped} dropped)" if dropped else "")
        raise DataError(Problem(f"data ({name})", left, "see data.max_length_tokens" if dropped else "add examples"))
    if split.dropped_counts[NO_LABELS] > split.examples_read / 2:
        raise DataError(
            Problem(
                f"data ({name})",
                f"{split.dropped_counts[NO_LABELS]} of {split.examples_read} examples have no supervised token",
                'see data.loss_on, "train": false in the examples, and data.max_length_tokens',
            )
        )
    if split.dropped_counts.total() > split.examples_read / 2:
        raise DataError(
            Problem(
                f"data ({name})",
                f"more than half of the examples would be dropped: {dropped} of {split.examples_read}",
                "raise data.max_length_tokens, or write overlong: truncate",
            )
        )
