"""CPU time of the loss and its gradient: as Transformers computes it, as TRL does, and as qwen-tune does, in turns.

    python scripts/evidence/loss_time.py [--tokens 1024] [--labelled 0.55] [--rounds 5]

The shapes are Qwen2.5-0.5B's: hidden size 896, 151,936 tokens of vocabulary, float32, the output matrix frozen. "trl,
labelled only" is what TRL does where it has Triton. Every round takes all of them once; the first round warms up and
does not count. Checks that all give the same loss and gradient over the labelled tokens. Prints one JSON line: the
median of CPU and wall seconds, and those over qwen-tune's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from live_bytes import our_loss, trl_loss, trl_loss_of_labelled  # noqa: E402

HIDDEN, VOCABULARY, IGNORED = 896, 151_936, -100


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    """As Transformers computes it: logits of all tokens, those without a label left out of the sum."""
    labels = torch.full_like(targets, IGNORED).index_copy(0, positions, targets[positions])
    return cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORED, reduction="sum")


LOSSES = {"plain": plain_loss, "trl": trl_loss, "trl, labelled only": trl_loss_of_labelled, "qwen-tune": our_loss}


def main() -> None:
    """All sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--labelled", type=float, default=0.55)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    hidden = torch.randn(options.tokens, HIDDEN)
    weight = torch.randn(VOCABULARY, HIDDEN) * HIDDEN**-0.5
    targets = torch.randint(0, VOCABULARY, (options.tokens,))
    positions = torch.randperm(options.tokens)[: int(options.tokens * options.labelled)].sort().values
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in LOSSES}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for number in range(options.rounds + 1):
        for name, loss in LOSSES.items():
            states = hidden.clone().requires_grad_()
            start = time.process_time(), time.perf_counter()
            total = loss(states, weight, targets, positions)
            total.backward()
            spent = time.process_time() - start[0], time.perf_counter() - start[1]
            seconds[name] += [spent] if number else []
            assert states.grad is not None
            found[name] = total.detach(), states.grad
    expected, gradient = found["plain"]
    for name in ("trl, labelled only", "qwen-tune"):
        assert torch.allclose(found[name][0], expected, rtol=1e-5), name
        assert (found[name][1] - gradient).norm() < 1e-4 * gradient.norm(), name
    medians = {
        name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in seconds.items()
    }
    result: dict[str, Any] = {
        **vars(options),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
        "cpu_seconds": {name: round(cpu, 3) for name, (cpu, _) in medians.items()},
        "wall_seconds": {name: round(wall, 3) for name, (_, wall) in medians.items()},
        "cpu_over_qwen_tune": {name: round(cpu / medians["qwen-tune"][0], 2) for name, (cpu, _) in medians.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
