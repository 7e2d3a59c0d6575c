"""Preparation of chats by qwen-tune and by TRL, in turns, on the same examples and tokenizer: tokens, labels and packs.

    .venv/bin/python scripts/bench_prepare.py BASE_DIR [--rows 20000] [--max-length 2048] [--rounds 3] [--sides SIDE …]

BASE_DIR needs a tokenizer and the template of a Qwen2.5 checkpoint. The chats are generated anew from the bundled
examples and invented words. Each measurement is a separate process, timed after its imports and with the
tokenizer loaded:

    qwen-tune   from the file to packs, with an empty cache: reading, checking, rendering, tokenizing, labels,
                hashes, near-duplicates, writing the cache, packing; on all cores
    qwen-tune-1 the same on one core
    trl-1       from the file to packs: load_dataset, then what SFTTrainer does with the data set: rendering and
                tokenizing with assistant_only_loss, labels, packing (best fit decreasing)
    trl         the same with dataset_num_proc, a process a core

The start of the fast encoder, which is in qwen-tune's figures, is timed once more by itself. Checks that all hold the
same token ids, sample by sample. Prints one JSON line; the ratios are TRL / qwen-tune, each side's faster way.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from processor import processor

from qwen_tune.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent
ENDS = (",", ".", "", ":\n")
SIDES = ("trl-1", "trl", "qwen-tune-1", "qwen-tune")


def main() -> None:
    """Runs both sides in turns and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", choices=SIDES, nargs="+", default=list(SIDES))
    parser.add_argument("--side", choices=SIDES, help="measure one side in this process")
    parser.add_argument("--chats", type=Path, help="rows to measure that side on")
    options = parser.parse_args()
    if options.side:
        measure = measure_trl if options.side.startswith("trl") else measure_qwen_tune
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder) / "chats.jsonl"
        write_chats(chats, options.rows)
        for _ in range(options.rounds):
            for side, measurements in results.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--chats", str(chats)]
                environment = {**os.environ, "QWEN_TUNE_CACHE": f"{folder}/{side}-{len(measurements)}"}
                output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
                measurements.append(json.loads(output.splitlines()[-1]))
                print(f"{side}: {measurements[-1]}", file=sys.stderr)
    print(json.dumps(summary(options, results)))


def summary(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both sides and their ratios (above 1: qwen-tune is better)."""

    def median(side: str, key: str) -> float:
        return statistics.median(measurement[key] for measurement in results[side])

    found: dict[str, Any] = {"processor": processor(), "rows": options.rows, "rounds": options.rounds}
    found |= {"tokens": results[options.sides[0]][0]["tokens"], "max_length": options.max_length}
    for side in options.sides:
        found |= {f"{side} {key}": round(median(side, key), 3) for key in ("wall_seconds", "cpu_seconds")}
        found |= {f"{side} {key}": results[side][0][key] for key in ("filled", "labels")}
    found["same_ids"] = len({results[side][0]["ids_sha256"] for side in options.sides}) == 1
    fastest = {
        ours: min(median(side, "wall_seconds") for side in options.sides if side.startswith(ours))
        for ours in ("trl", "qwen-tune")
        if any(side.startswith(ours) for side in options.sides)
    }
    if len(fastest) == 2:
        found["wall_ratio"] = round(fastest["trl"] / fastest["qwen-tune"], 2)
    for ours in fastest:
        if {ours, f"{ours}-1"} <= set(options.sides):
            pairs = zip(results[f"{ours}-1"], results[ours], strict=True)
            ratios = [one["wall_seconds"] / every["wall_seconds"] for one, every in pairs]
            found[f"{ours} all_cores_ratios"] = [round(ratio, 2) for ratio in sorted(ratios)]
    if {"trl-1", "qwen-tune-1"} <= set(options.sides):
        cpu = {side: median(side, "cpu_seconds") for side in ("trl-1", "qwen-tune-1")}
        start = median("qwen-tune-1", "start_cpu_seconds")
        found["cpu_ratio"] = round(cpu["trl-1"] / cpu["qwen-tune-1"], 2)
        found["qwen-tune start_cpu_seconds"] = round(start, 3)
        found["cpu_ratio_without_start"] = round(cpu["trl-1"] / (cpu["qwen-tune-1"] - start), 2)
    return found


def write_chats(path: Path, rows: int) -> None:
    """Chats of one to three turns, about 200 tokens each."""
    chosen = random.Random(4)
    texts = []
    for file in sorted((ROOT / "data").glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            texts += re.findall(r'"((?:[^"\\]|\\.){20,})"', line)
    words = [word for text in texts for word in json.loads(f'"{text}"').split()]
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en", "is")]

    def say(length: int) -> str:
        said: list[str] = []
        while len(said) < length:
            start = chosen.randrange(len(words))
            said += words[start : start + chosen.randint(3, 12)]
            if chosen.random() < 0.3:  # names and other words that nobody has seen before
                said.append("".join(chosen.choices(syllables, k=chosen.randint(2, 4))) + chosen.choice(ENDS))
        return " ".join(said)

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = []
            for _ in range(chosen.randint(1, 3)):
                messages.append({"role": "user", "content": say(chosen.randint(4, 20))})
                messages.append({"role": "assistant", "content": say(chosen.randint(8, 48))})
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def measure_qwen_tune(options: argparse.Namespace) -> dict[str, Any]:
    """Prepares through the package's own entry."""
    if options.side == "qwen-tune-1":
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from transformers import AutoTokenizer

    import qwen_tune.data.source_store  # noqa: F401  with all that it needs
    from qwen_tune.chatml.fast_encoder import FastEncoder
    from qwen_tune.chatml.template import ChatTemplate
    from qwen_tune.data.packing import pack
    from qwen_tune.data.preparation import prepare_data
    from qwen_tune.recipe.schema import DataSpec, SourceSpec

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    data = DataSpec(train=[SourceSpec(path=str(options.chats))], max_length_tokens=options.max_length)
    clock = Clock()
    samples = prepare_data(data, ChatTemplate(tokenizer), seed=1).train.samples
    packs = pack(samples, data)
    measured = clock.read()
    start = Clock()
    assert FastEncoder.verified(tokenizer)
    tokens = int(samples.lengths.sum())
    return {
        **measured,
        "start_cpu_seconds": start.read()["cpu_seconds"],
        "tokens": tokens,
        "labels": int(samples.supervised.sum()),
        "filled": tokens / (len(packs) * options.max_length),
        "ids_sha256": fingerprint(example.input_ids for example in samples),
    }


def measure_trl(options: argparse.Namespace) -> dict[str, Any]:
    """Prepares with the method that SFTTrainer's construction calls, on a trainer of a model of no size."""
    import datasets
    from datasets import Dataset, load_dataset
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    rows = [json.loads(line) for line in options.chats.read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            assistant_only_loss=True,
            packing=True,
            max_length=options.max_length,
            report_to="none",
            use_cpu=True,
            dataset_num_proc=None if options.side == "trl-1" else usable_cores(),
        )
        model, few = Qwen2ForCausalLM(config), Dataset.from_list(rows[:2])
        trainer = SFTTrainer(model, arguments, train_dataset=few, processing_class=tokenizer)
        clock = Clock()
        loaded = load_dataset("json", data_files=str(options.chats), split="train", cache_dir=folder)
        packed = trainer._prepare_dataset(loaded, trainer.processing_class, arguments, True, None, "train")
        measured = clock.read()
    samples, labels = [], 0
    for row in packed:
        position = 0
        for length in row["seq_lengths"]:
            samples.append(row["input_ids"][position : position + length])
            position += length
        labels += sum(label != -100 for label in row["labels"])
    tokens = sum(map(len, samples))
    return {
        **measured,
        "tokens": tokens,
        "labels": labels,
        "filled": tokens / (len(packed) * options.max_length),
        "ids_sha256": fingerprint(samples),
    }


def fingerprint(samples: Iterable[list[int]]) -> str:
    """A hash of all samples, whatever their order."""
    each = sorted(hashlib.sha256(json.dumps(sample).encode()).hexdigest() for sample in samples)
    return hashlib.sha256("".join(each).encode()).hexdigest()


class Clock:
    """Seconds since it was made: of this process on all cores, and on the wall."""

    def __init__(self) -> None:
        self.cpu, self.wall = self._cpu(), time.perf_counter()

    def _cpu(self) -> float:
        return sum(os.times()[:4])  # children included

    def read(self) -> dict[str, float]:
        """Both since the start."""
        return {"cpu_seconds": self._cpu() - self.cpu, "wall_seconds": time.perf_counter() - self.wall}


if __name__ == "__main__":
    main()
