"""Which conversations train and which evaluate: shares held out, sources drawn by weight, nothing on both sides."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qwen_tune.conversation import Conversation
from qwen_tune.errors import DataError, Problem
from qwen_tune.recipe import DataSpec, EvalSpec, SourceSpec
from qwen_tune.sources import load_conversations, load_sources

IN_EVALUATION = "in_evaluation"


@dataclass
class Mixture:
    """Conversations of both sides, and what became of the rows that are on neither.

    A conversation stands in `train` as often as it is drawn; `repeated` counts the draws beyond the first.
    """

    train: list[Conversation]
    evaluation: list[Conversation]
    not_sampled: int = 0
    repeated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def mix(data: DataSpec, *, seed: int) -> Mixture:
    """Loads all sources of a recipe and decides what trains and what evaluates.

    Rows are held out before anything is drawn, so that drawing more of a source never trains what it evaluates on.

    Args:
        data: The recipe's data section.
        seed: Decides which conversations are held out and which are drawn.

    Raises:
        DataError: A source cannot be read, or nothing would be left to train on.
    """
    conversations = load_conversations(data)
    mixture = Mixture(conversations, [])
    if isinstance(data.eval, EvalSpec):
        mixture.train, mixture.evaluation = split_conversations(conversations, data.eval.fraction, seed)
    elif data.eval is not None:
        mixture.evaluation = _draw(load_sources(data.eval, system=data.system), data.eval, seed, mixture)
        held_out = {conversation.content_hash() for conversation in mixture.evaluation}
        mixture.train = [c for c in conversations if c.content_hash() not in held_out]
        if same := len(conversations) - len(mixture.train):
            mixture.dropped[IN_EVALUATION] = same
        if conversations and not mixture.train:
            what = "the evaluation sources hold every row of data.train, so that none is left to train on"
            raise DataError(Problem("data.eval", what, "take other rows, or write eval: {fraction: 0.05}"))
    mixture.train = _draw(mixture.train, data.train, seed, mixture)
    return mixture


def _draw(
    conversations: Sequence[Conversation], sources: Sequence[SourceSpec], seed: int, mixture: Mixture
) -> list[Conversation]:
    """Takes as much of each source as its `weight` or `rows` says, in the order of the files."""
    by_source: dict[str, list[Conversation]] = {source.name: [] for source in sources}
    for conversation in conversations:
        by_source[conversation.source_name].append(conversation)
    drawn: list[Conversation] = []
    for source in sources:
        there = by_source[source.name]
        wanted = source.rows if source.rows is not None else math.floor(source.weight * len(there) + 0.5)
        if not wanted and there:
            what = f"weight: {source.weight:g} of {len(there)} rows draws none"
            raise DataError(Problem(f"data ({source.name})", what, "raise the weight, or leave the source out"))
        times, rest = divmod(wanted, len(there)) if there else (0, 0)
        once_more = set(sorted(range(len(there)), key=lambda index: _order(seed, source.name, there[index]))[:rest])
        drawn += there * times + [there[index] for index in sorted(once_more)]
        if times == 0:
            mixture.not_sampled += len(there) - rest
        mixture.repeated += max(wanted - len(there), 0) if there else 0
    return drawn


def _order(seed: int, name: str, conversation: Conversation) -> str:
    """A place in the draw that depends on what the row says and where it stands, not on what else there is."""
    return hashlib.sha256(f"{seed}:{name}:{conversation.source}:{conversation.content_hash()}".encode()).hexdigest()


def split_conversations(
    conversations: Sequence[Conversation], fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Holds out a share of the conversations, equal ones always on the same side.

    Which ones are held out depends on their content and the seed alone, so rows that are added or reordered do not
    move others across.

    Returns:
        Conversations to train on and conversations to evaluate on; at least one of the latter.

    Raises:
        DataError: Nothing would be left to train on.
    """
    hashes = [hashlib.sha256(f"{seed}:{c.content_hash()}".encode()).hexdigest() for c in conversations]
    wanted = max(1, math.floor(fraction * len(conversations) + 0.5))
    held_out: set[str] = set()
    count = Counter(hashes)
    total = 0
    for digest in sorted(count):
        if total >= wanted:
            break
        held_out.add(digest)
        total += count[digest]
    if total >= len(conversations):
        raise DataError(
            Problem(
                "data.eval.fraction",
                f"{fraction} of {len(conversations)} rows leaves none to train on",
                "add rows or set data.eval=null",
            )
        )
    pairs = list(zip(conversations, hashes, strict=True))
    return [c for c, digest in pairs if digest not in held_out], [c for c, digest in pairs if digest in held_out]
