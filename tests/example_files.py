"""Examples and data files for several tests."""

from __future__ import annotations

import json
import random
from pathlib import Path

from qwen_tune.data.documents import TrainingExample
from qwen_tune.data.sources import load_sources
from qwen_tune.recipe.schema import DataSpec, SourceSpec

WORDS = (
    "alder",
    "birch",
    "cedar",
    "dogwood",
    "elm",
    "fir",
    "ginkgo",
    "hazel",
    "juniper",
    "larch",
    "maple",
    "oak",
    "pine",
)
LONG = "one two three four five six seven eight nine ten " * 8


def prose(seed: int, words: int = 40) -> str:
    chosen = random.Random(seed)
    return " ".join(f"{chosen.choice(WORDS)}{chosen.choice(WORDS)}" for _ in range(words))


def nearly(text: str, place: int = 20) -> str:
    words = text.split(" ")
    return " ".join([*words[:place], "instead", *words[place + 1 :]])


def chat(question: str, answer: str = "yes", **turn) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **turn}]}


def write(path: Path, *rows: dict, **source) -> SourceSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec(path=str(path), **source)


def lines(samples) -> list[int]:
    return [int(example.source.rpartition(":")[2]) for example in samples]


def load_training_examples(data: DataSpec) -> list[TrainingExample]:
    return load_sources(data.train, system=data.system)
