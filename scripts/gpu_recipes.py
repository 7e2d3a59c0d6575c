"""Runs shipped recipes for a few steps on random weights of their real shapes and prints what they took.

    python scripts/gpu_recipes.py OUT_DIR [--steps 12] [--only NAME ...]

The shapes are those of the checkpoints' config.json. Losses mean nothing here; speed and memory do. Rows are long
generated chats, so that packs are full.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny-qwen"

QWEN25_05B = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN25_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Job:
    """A recipe, the shape of its base, and what is changed for the check."""

    name: str
    recipe: str
    shape: dict[str, int | bool]
    overrides: tuple[str, ...] = ()


FULL_PACKS = ("data.max_length_tokens=4096", "train.global_batch_size=1")
JOBS = (
    Job("0.5B LoRA", "qwen2.5-0.5b-lora.yaml", QWEN25_05B, FULL_PACKS),
    Job(
        "0.5B LoRA, no checkpointing",
        "qwen2.5-0.5b-lora.yaml",
        QWEN25_05B,
        (*FULL_PACKS, "train.gradient_checkpointing=none"),
    ),
    Job("0.5B QLoRA", "qwen2.5-0.5b-lora.yaml", QWEN25_05B, (*FULL_PACKS, "model.quantization=nf4")),
    Job("7B LoRA", "chat-lora.yaml", QWEN25_7B, FULL_PACKS),
    Job("7B LoRA, no checkpointing", "chat-lora.yaml", QWEN25_7B, (*FULL_PACKS, "train.gradient_checkpointing=none")),
    Job("7B QLoRA", "coder-qlora.yaml", QWEN25_7B, FULL_PACKS),
    Job("7B DoRA", "chat-lora.yaml", QWEN25_7B, (*FULL_PACKS, "lora.use_dora=true")),
)


def build_model(folder: Path, shape: dict[str, int | bool]) -> Path:
    """A checkpoint directory of a shape, with random bfloat16 weights and the tiny model's tokenizer."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**shape, **ends, max_position_embeddings=32768, dtype="bfloat16")
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(torch.float32)
    folder.mkdir(parents=True)
    model.save_pretrained(folder, max_shard_size="5GB")
    for file in TINY.glob("*.json*"):
        if file.name.startswith("tokenizer"):
            shutil.copy(file, folder)
    shutil.copy(TINY / "chat_template.jinja", folder)
    return folder


def write_rows(path: Path, rows: int = 600) -> Path:
    """Chats of about 300 to 1,500 tokens, two thirds of them answer."""
    generator = random.Random(0)
    source = (ROOT / "data" / "chat.jsonl").read_text(encoding="utf-8").split()
    words = [word for word in source if word.isalpha()]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            question, answer = (
                " ".join(generator.choices(words, k=generator.randint(40, 200) * times)) for times in (1, 2)
            )
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def run(job: Job, base: Path, rows: Path, out: Path, steps: int) -> dict[str, object]:
    """Trains a few steps in a process of its own and reads run.json and the last steps' speed."""
    run_dir = out / job.name.replace(" ", "-").replace(",", "")
    command = [
        *(sys.executable, "-m", "qwen_tune", "train", str(ROOT / "recipes" / job.recipe), "--overwrite"),
        *(f"model.base={base}", f"data.train.0.path={rows}", "data.eval=null", "train.eval_steps=null"),
        *("train.save_steps=null", "train.load_best_model_at_end=false", f"train.max_steps={steps}"),
        *("export.merge=false", f"run.dir={run_dir}", *job.overrides),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (out / f"{run_dir.name}.log").write_text(result.stdout + result.stderr, encoding="utf-8")
    if result.returncode:
        return {"job": job.name, "failed": (result.stderr.strip().splitlines() or ["?"])[-1][:100]}
    facts = json.loads((run_dir / "run.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    settled = [line["tokens_per_second"] for line in lines[len(lines) // 3 :]]
    return {
        "job": job.name,
        "tokens/s": round(sum(settled) / len(settled)),
        "peak GB": round(facts["peak_memory_bytes"] / 1e9, 1),
        "attention": facts["attention"],
        "checkpointing": facts["gradient_checkpointing"],
        "dtype": facts["dtype"],
        "device": facts["device"],
    }


def main() -> None:
    """Prints a line a job, then all of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=[job.name for job in JOBS])
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = write_rows(out / "rows.jsonl")
    results = []
    for job in JOBS:
        if job.name not in options.only:
            continue
        base = build_model(out / f"model-{job.shape['hidden_size']}", job.shape)
        results.append(run(job, base, rows, out, options.steps))
        print("  ".join(f"{key}: {value}" for key, value in results[-1].items()), flush=True)
    print(json.dumps(results))
    sys.exit(any("failed" in result for result in results))


if __name__ == "__main__":
    main()
