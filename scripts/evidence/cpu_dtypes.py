"""Training in bfloat16 and in float32 on this CPU: speed, memory and held-out loss, in turns, with the same batches.

    .venv/bin/python scripts/evidence/cpu_dtypes.py BASE_DIR ROWS [--steps 30] [--length 512] [--rounds 1]

BASE_DIR is a checkpoint, ROWS a file of rows. Each measurement is a run of its own through `qwen-tune train`, one pack
a step. Prints one JSON line with the processor, medians of each type, and the ratios bfloat16 / float32.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT / "scripts"))

from processor import processor  # noqa: E402 - beside this folder

DTYPES = ("bfloat16", "float32")


def main() -> None:
    """Trains in turns and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {dtype: [] for dtype in DTYPES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for dtype in DTYPES:
                facts = train(options, dtype, Path(folder) / f"{dtype}-{number}")
                found[dtype].append(facts)
                print(f"{dtype}: {facts}", file=sys.stderr, flush=True)
    medians = {
        dtype: {key: statistics.median(facts[key] for facts in runs) for key in runs[0]}
        for dtype, runs in found.items()
    }
    ratios = {
        key: round(medians["bfloat16"][key] / medians["float32"][key], 3)
        for key in ("tokens_per_second", "peak_memory_bytes", "eval_after")
    }
    print(
        json.dumps(
            {"processor": processor(), "steps": options.steps, "length": options.length, **medians, "ratios": ratios}
        )
    )


def train(options: argparse.Namespace, dtype: str, run: Path) -> dict[str, Any]:
    """One run, and what its record says of it."""
    recipe = run.with_suffix(".yaml")
    recipe.write_text(
        json.dumps(
            {
                "name": run.name,
                "run": {"dir": str(run)},
                "model": {"base": str(options.base.resolve()), "dtype": dtype},
                "data": {
                    "train": [{"path": str(options.rows.resolve())}],
                    "eval": {"fraction": 0.1},
                    "max_length_tokens": options.length,
                },
                "train": {"max_steps": options.steps, "global_batch_size": 1, "learning_rate": 2e-4},
            }
        )
    )
    command = [sys.executable, "-m", "qwen_tune", "train", str(recipe)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return {
        "tokens_per_second": facts["tokens_per_second"],
        "peak_memory_bytes": facts["peak_memory_bytes"],
        "predicted_bytes": facts["plan"]["predicted_peak_bytes"],
        "eval_before": facts["losses"]["eval_before"],
        "eval_after": facts["losses"]["eval_after"],
        "train_last": facts["losses"]["train_last"],
    }


if __name__ == "__main__":
    main()
