"""Made-up rows with the lengths of chats: token ids drawn at random, an instruction without loss and its answer."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import TypedDict

SEED = 20261123
SIGMA = 0.47  # of the logarithm of the lengths: batches of 8 are padded to 1.8 times their tokens, as real chats are
ROWS_A_BATCH = 8  # the mean length is such that so many rows, TRL's batch, have the tokens of one pack
SHORTEST = 16
IDS = 1200  # the tiny tokenizer's without its control tokens; the output layer still has the whole vocabulary
SHARES = (0.3, 0.8)  # of a row that are supervised: 55 % in the mean
IGNORED = -100


class Row(TypedDict):
    """Token ids, and for each its own id where it is supervised or -100 where it is context."""

    input_ids: list[int]
    labels: list[int]


def describe(length: int) -> str:
    """The distribution in words."""
    return (
        f"lengths lognormal, mean {length // ROWS_A_BATCH} (before clipping), sigma {SIGMA}, clipped to "
        f"{SHORTEST}..{length}; loss on the last {SHARES[0]:.0%} to {SHARES[1]:.0%} of a row; "
        f"random ids below {IDS}; seed {SEED}"
    )


def draw_lengths(length: int, count: int, *, seed: int = SEED) -> list[int]:
    """Lengths of rows for packs of `length` tokens."""
    generator = random.Random(seed)
    middle = math.log(length / ROWS_A_BATCH) - SIGMA**2 / 2
    return [min(max(round(generator.lognormvariate(middle, SIGMA)), SHORTEST), length) for _ in range(count)]


def draw_rows(length: int, count: int, *, seed: int = SEED) -> list[Row]:
    """Rows for packs of `length` tokens."""
    generator = random.Random(seed + 1)
    rows = []
    for tokens in draw_lengths(length, count, seed=seed):
        ids = [generator.randrange(IDS) for _ in range(tokens)]
        context = tokens - max(1, round(tokens * generator.uniform(*SHARES)))
        rows.append(Row(input_ids=ids, labels=[IGNORED] * context + ids[context:]))
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """As JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_records(path: Path) -> list[Row]:
    """From JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def probe_examples(rows: list[Row], length: int) -> list[Row]:
    """The first rows that fit into one pack, at most a batch of them."""
    chosen: list[Row] = []
    for row in rows:
        if len(chosen) < ROWS_A_BATCH and sum(len(one["input_ids"]) for one in [*chosen, row]) <= length:
            chosen.append(row)
    return chosen


def labelled(rows: list[Row]) -> int:
    """Supervised tokens."""
    return sum(label != IGNORED for row in rows for label in row["labels"])
