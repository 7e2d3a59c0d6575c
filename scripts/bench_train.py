"""Training speed and memory of qwen-tune and of TRL as it comes, in turns, on the same rows, base and adapter.

    .venv/bin/python scripts/bench_train.py BASE_DIR ROWS.json [--max-length 512] [--steps 8] [--rounds 2]

Rows are instruction/output pairs. Both sides train a LoRA of rank 16 on all linear layers on packs, without gradient
checkpointing, one pack a step, in float32 on a CPU and bfloat16 on a GPU, with loss on the answers. Each measurement is
a process of its own; the first two steps are not counted. Prints one JSON line with tokens per second, peak memory and
their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 2
MEASURED = ("tokens_per_second", "peak_memory_bytes")


def main() -> None:
    """Runs both sides in turns and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=["trl", "qwen-tune"], help="measure one side in this process")
    options = parser.parse_args()
    if options.side:
        measure = measure_trl if options.side == "trl" else measure_qwen_tune
        print(json.dumps(measure(options)))
        return
    results: dict[str, list[dict[str, float]]] = {"trl": [], "qwen-tune": []}
    for _ in range(options.rounds):
        for side, measurements in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measurements.append(json.loads(output.splitlines()[-1]))
            print(f"{side}: {measurements[-1]}", file=sys.stderr)
    print(json.dumps(summary(options, results)))


def summary(options: argparse.Namespace, results: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both sides and their ratios (above 1: qwen-tune is better)."""

    def median(side: str, key: str) -> float:
        return statistics.median(measurement[key] for measurement in results[side])

    return {
        "base": options.base.name,
        "rows": options.rows.name,
        "max_length": options.max_length,
        "steps": options.steps,
        "rounds": options.rounds,
        **{f"{side} {key}": median(side, key) for side in results for key in MEASURED},
        "speed_ratio": median("qwen-tune", "tokens_per_second") / median("trl", "tokens_per_second"),
        "memory_ratio": median("trl", "peak_memory_bytes") / median("qwen-tune", "peak_memory_bytes"),
    }


def measure_qwen_tune(options: argparse.Namespace) -> dict[str, float]:
    """Trains through the package's own entry and reads the run's metrics."""
    from qwen_tune.train import train

    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "bench.yaml"
        recipe.write_text(
            json.dumps(
                {
                    "run": {"dir": f"{folder}/run"},
                    "model": {"base": str(options.base.resolve())},
                    "data": {"train": [{"path": str(options.rows)}], "max_length_tokens": options.max_length},
                    "train": {"max_steps": options.steps, "global_batch_size": 1, "gradient_checkpointing": "none"},
                }
            )
        )
        train(recipe)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    counted = lines[WARM_UP_STEPS:]
    tokens = counted[-1]["tokens"] - lines[WARM_UP_STEPS - 1]["tokens"]
    before = lines[WARM_UP_STEPS - 1]["tokens"]
    seconds = 0.0
    for line in counted:
        seconds += (line["tokens"] - before) / line["tokens_per_second"]
        before = line["tokens"]
    return {"tokens_per_second": tokens / seconds, "peak_memory_bytes": peak_memory_bytes(), "loss": lines[-1]["loss"]}


def measure_trl(options: argparse.Namespace) -> dict[str, float]:
    """Trains with TRL's own packing, collator, loss head and defaults."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = [as_prompt_and_completion(row) for row in json.loads(options.rows.read_text(encoding="utf-8"))]
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16 if cuda else torch.float32)
    clock = Clock()

    class Timer(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock.step_ended()

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=folder,
                packing=True,
                max_length=options.max_length,
                per_device_train_batch_size=1,
                gradient_accumulation_steps=1,
                gradient_checkpointing=False,
                max_steps=options.steps,
                learning_rate=2e-4,
                bf16=cuda,
                use_cpu=not cuda,
                save_strategy="no",
                report_to="none",
                logging_steps=1,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options.base),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM",
                r=16,
                lora_alpha=32,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            ),
            callbacks=[Timer()],
        )
        collate = trainer.data_collator

        def counting_collate(examples: list[Any]) -> Any:
            batch = collate(examples)
            clock.batches.append(batch["input_ids"].numel())
            return batch

        trainer.data_collator = counting_collate
        trainer.train()
    return {
        "tokens_per_second": clock.tokens_per_second(),
        "peak_memory_bytes": peak_memory_bytes(),
        "loss": trainer.state.log_history[-2]["loss"],
    }


class Clock:
    """Tokens and times of a run's steps."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.ends: list[float] = []

    def step_ended(self) -> None:
        """Notes the time."""
        self.ends.append(time.perf_counter())

    def tokens_per_second(self) -> float:
        """Over all steps behind the warm-up."""
        tokens = sum(self.batches[WARM_UP_STEPS : len(self.ends)])
        return tokens / (self.ends[-1] - self.ends[WARM_UP_STEPS - 1])


def as_prompt_and_completion(row: dict[str, str]) -> dict[str, Any]:
    """An Alpaca row as TRL takes it for loss on the answer alone."""
    question = f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def peak_memory_bytes() -> int:
    """Of the GPU if there is one, else of this process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
