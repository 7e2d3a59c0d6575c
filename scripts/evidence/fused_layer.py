"""A decoder layer under LoRA as PEFT trains it, and in its fused form: bytes kept, operations, seconds.

    python scripts/evidence/fused_layer.py [--tokens 512] [--rounds 5] [--dtype bfloat16] [--device cpu] [--threads 1]

Layers have the shapes of Qwen2.5-0.5B with random weights, adapters of rank 16 in float32 on all seven linear layers
and no dropout; 16-bit bases run under autocast, as training does. Bytes are those of distinct storages that the graph
holds between forward and backward, without parameters, per token and layer; operations are aten's in forward and
backward of a layer, all of them and those that compute. Both sides are timed in turns in one process, and the median
of a layer's forward and backward is taken. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from layer_costs import QWEN2_5_0_5B, adapted_layers, angles, forward, layer_costs  # noqa: E402

from qwen_tune.fused.install import fuse, unfuse  # noqa: E402


def main() -> None:
    """Both sides in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, options.dtype)
    model = adapted_layers(dtype, layers=options.layers).to(options.device)
    seconds: dict[str, list[float]] = {"peft": [], "fused": []}
    costs = {}
    for number in range(options.rounds + 1):
        for side, times in seconds.items():
            unfuse(model) if side == "peft" else fuse(model)
            if number == 0:  # the first pass also warms up
                costs[side] = asdict(layer_costs(model, dtype))
            taken = timed(model, options.tokens, dtype, options.device) / options.layers
            times += [taken] if number else []
    result = {
        "shapes": QWEN2_5_0_5B,
        **vars(options),
        "torch": torch.__version__,
        **{side: {**costs[side], "seconds": statistics.median(seconds[side])} for side in seconds},
    }
    result["peft_to_fused"] = {key: round(result["peft"][key] / result["fused"][key], 3) for key in result["peft"]}
    print(json.dumps(result))


def timed(model: torch.nn.Module, tokens: int, dtype: torch.dtype, device: str) -> float:
    """Seconds of forward and backward of all layers."""
    hidden = torch.randn(1, tokens, QWEN2_5_0_5B["hidden_size"], dtype=dtype, device=device).requires_grad_()
    rotations = angles(model, hidden)
    model.zero_grad(set_to_none=True)
    wait(device)
    start = time.perf_counter()
    output = forward(model, hidden, rotations)
    output.backward(torch.ones_like(output))
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
