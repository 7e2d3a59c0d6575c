"""What training costs, counted without a GPU: padding, memory of the loss, operations of a step.

    python scripts/evidence/training_proxies.py

Memory is counted tensor by tensor on tensors that hold nothing (`tests/live_bytes.py`), so that any size takes a
moment; operations are torch's count over the fewest (`tests/step_flops.py`). Nothing is timed. Prints one JSON line.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from live_bytes import extra_bytes_of_loss, our_loss, plain_loss, trl_loss, trl_loss_of_labelled  # noqa: E402
from step_flops import step_flops  # noqa: E402
from training_bench.rows import ROWS_A_BATCH, draw_lengths  # noqa: E402

from qwen_tune.data.packing import best_fit_decreasing  # noqa: E402

LOSSES = {"plain": plain_loss, "trl": trl_loss, "trl, labelled only": trl_loss_of_labelled, "qwen-tune": our_loss}
LENGTHS = (512, 2048, 4096, 8192)


def main() -> None:
    """Prints all counts."""
    warnings.simplefilter("ignore")
    float32 = {name: extra_bytes_of_loss(loss) for name, loss in LOSSES.items()}
    bfloat16 = {name: extra_bytes_of_loss(loss, tokens=8192, dtype=torch.bfloat16) for name, loss in LOSSES.items()}
    result = {
        "torch": torch.__version__,
        "tokens computed over real tokens": {length: padding(length) for length in LENGTHS},
        "bytes of the loss, 1,024 tokens in float32": float32,
        "bytes of the loss, 8,192 tokens in bfloat16": bfloat16,
        "operations of a step over the fewest": {
            "peft, checkpointing": step_flops(ours=False, checkpointing=True),
            "peft": step_flops(ours=False),
            "qwen-tune": step_flops(ours=True),
        },
    }
    print(json.dumps(result))


def padding(length: int) -> dict[str, float]:
    """Of packs of a length, and of batches of 8 in a random order, padded to their longest row."""
    lengths = np.array(draw_lengths(length, 20_000))
    packs = len(np.unique(best_fit_decreasing(lengths, length)))
    batches = lengths.reshape(-1, ROWS_A_BATCH)
    return {
        "packs": packs * length / int(lengths.sum()),
        "batches of 8": float((batches.max(axis=1) * ROWS_A_BATCH).sum() / lengths.sum()),
    }


if __name__ == "__main__":
    main()
