"""Conversations into token ids and labels, with every row and token accounted for.

`preview` and `train` both come through here, so what is shown is what trains.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from qwen_tune.chatml import ChatTemplate, TokenizedExample, tokenize
from qwen_tune.conversation import Conversation, RowError
from qwen_tune.errors import DataError, Problem
from qwen_tune.mixing import Mixture, mix
from qwen_tune.recipe import DataSpec
from qwen_tune.sources import PROBLEMS_KEPT

OVERLONG = "overlong"
NO_LABELS = "no_labels"


@dataclass
class PreparedSplit:
    """The samples of one side (training or evaluation) and what became of its rows."""

    examples: list[TokenizedExample] = field(default_factory=list)
    rows_read: int = 0
    rows_kept: int = 0
    rows_dropped: Counter[str] = field(default_factory=Counter)
    samples_dropped: Counter[str] = field(default_factory=Counter)
    expanded: int = 0
    warnings: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        """Tokens of all samples, once through."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return sum(example.supervised for example in self.examples)


@dataclass(frozen=True)
class PreparedData:
    """Everything that trains and evaluates, and the balance of rows and tokens."""

    train: PreparedSplit
    evaluation: PreparedSplit
    mixture: Mixture

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """The balance for run.json: rows.read is the sum of what became of them, prepared = supervised + context."""
        both = (self.train, self.evaluation)
        prepared, supervised = sum(s.tokens for s in both), sum(s.supervised for s in both)
        samples = {
            side: Counter(example.source_name for example in split.examples)
            for side, split in (("train", self.train), ("evaluation", self.evaluation))
        }
        dropped = self.train.rows_dropped + self.evaluation.rows_dropped + self.mixture.dropped
        not_sampled = self.mixture.not_sampled
        return {
            "sources": {
                name: {side: counts[name] for side, counts in samples.items()}
                for name in sorted({name for counts in samples.values() for name in counts})
            },
            "rows": {
                "read": sum(split.rows_read for split in both) + not_sampled + self.mixture.dropped.total(),
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
            "warnings": dict(self.train.warnings + self.evaluation.warnings),
        }

    def fingerprint(self) -> str:
        """sha256 over every token id and label, in order."""
        digest = hashlib.sha256()
        for split in (self.train, self.evaluation):
            digest.update(b"split")
            for example in split.examples:
                digest.update(array("q", [len(example.input_ids), *example.input_ids, *example.labels]).tobytes())
        return digest.hexdigest()


def prepare_data(data: DataSpec, template: ChatTemplate, *, seed: int) -> PreparedData:
    """Reads, renders and tokenizes all data of a recipe.

    Args:
        data: The recipe's data section.
        template: The checkpoint's chat template.
        seed: Decides which conversations are held out and drawn.

    Raises:
        DataError: Every row that cannot be trained on, or too little that can.
    """
    mixture = mix(data, seed=seed)
    problems: list[Problem] = []
    prepared = PreparedData(
        train=prepare_split(mixture.train, template, data, problems),
        evaluation=prepare_split(mixture.evaluation, template, data, problems),
        mixture=mixture,
    )
    if problems:
        raise DataError(problems)
    for split, name in ((prepared.train, "training"), (prepared.evaluation, "evaluation")):
        _require_samples(split, name)
    return prepared


def prepare_split(
    conversations: Iterable[Conversation], template: ChatTemplate, data: DataSpec, problems: list[Problem]
) -> PreparedSplit:
    """Tokenizes conversations; a row that cannot be trained on is added to `problems`."""
    split = PreparedSplit()
    # A row that is drawn several times is counted and tokenized once.
    known: dict[tuple[str, str], list[TokenizedExample]] = {}
    for conversation in conversations:
        row = (conversation.source_name, conversation.source)
        if row not in known:
            known[row] = _prepare_row(conversation, template, data, split, problems)
        split.examples += known[row]
    return split


def _prepare_row(
    conversation: Conversation,
    template: ChatTemplate,
    data: DataSpec,
    split: PreparedSplit,
    problems: list[Problem],
) -> list[TokenizedExample]:
    split.rows_read += 1
    split.warnings.update(set(conversation.warnings))
    try:
        samples = tokenize(conversation, template, data)
        fitted = [_fit(sample, data) for sample in samples]
    except RowError as problem:
        problems.append(problem.at(conversation.source))
        if len(problems) >= PROBLEMS_KEPT:
            raise DataError(problems) from None
        return []
    kept = [sample for sample in fitted if isinstance(sample, TokenizedExample)]
    reasons = [reason for reason in fitted if isinstance(reason, str)]
    split.samples_dropped.update(reasons)
    if kept:
        split.rows_kept += 1
        split.expanded += len(samples) - 1
    else:
        split.rows_dropped[reasons[0] if reasons else NO_LABELS] += 1
    if truncated := sum(sample.truncated for sample in kept):
        split.warnings["sample truncated before its end of turn"] += truncated
    if straddling := sum(sample.straddling for sample in samples):
        split.warnings["token that straddles the end of a prompt, trained as context"] += straddling
    return kept


def _fit(sample: TokenizedExample, data: DataSpec) -> TokenizedExample | str:
    """The sample as it fits into the length, or the reason for which it is dropped."""
    limit = data.max_length_tokens
    if len(sample.input_ids) > limit:
        if data.overlong == "error":
            raise RowError(
                f"the sample has {len(sample.input_ids)} tokens; at most {limit} fit (data.max_length_tokens)",
                "shorten it, or write overlong: drop",
            )
        if data.overlong == "drop":
            return OVERLONG
        sample = replace(sample, input_ids=sample.input_ids[:limit], labels=sample.labels[:limit], truncated=True)
    return sample if sample.supervised else NO_LABELS


def _require_samples(split: PreparedSplit, name: str) -> None:
    if not split.rows_read and name == "evaluation":
        return
    dropped = ", ".join(f"{count} {reason}" for reason, count in split.rows_dropped.items())
    if not split.examples:
        left = f"no row is left of {split.rows_read}" + (f" ({dropped} dropped)" if dropped else "")
        raise DataError(Problem(f"data ({name})", left, "see data.max_length_tokens" if dropped else "add rows"))
    if split.rows_dropped[NO_LABELS] > split.rows_read / 2:
        raise DataError(
            Problem(
                f"data ({name})",
                f"{split.rows_dropped[NO_LABELS]} of {split.rows_read} rows have no token to learn from",
                'see data.loss_on, "train": false in the rows, and data.max_length_tokens',
            )
        )
