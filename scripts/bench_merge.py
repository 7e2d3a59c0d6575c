"""Merging by qwen-tune and by PEFT (`merge_and_unload` and `save_pretrained`), in turns, on the same base and adapter.

    .venv/bin/python scripts/bench_merge.py [BASE_DIR | --size 0.5b|1.5b|6b] [--rounds 3] [--rank 16] [--only SIDE]

Without BASE_DIR a base of the true shapes with random bfloat16 weights is written to a temporary directory (set TMPDIR
to choose the disk: four times the model's size is needed). Each measurement is a whole process, imports included.
The base lies in the page cache. qwen-tune also hashes what it writes and waits for the disk; PEFT does neither. Beside
them as many bytes are written to the same disk past the cache: nothing that waits for a disk is faster. Checks that
all tensors are equal to the bit. Prints one JSON line: medians, ratios of PEFT / qwen-tune, and qwen-tune / writing.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from processor import processor

WEIGHTS = "*.safetensors"
SIDES = ("peft", "qwen-tune")
MEASURED = ("wall_seconds", "cpu_seconds", "peak_memory_bytes")
REST_SECONDS = 10
# Shapes of Qwen2.5: hidden, intermediate, layers, heads, key-value heads, vocabulary, tied. 6b is the 7B model with
# fewer layers, four times the size of 1.5b.
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "6b": (3584, 18944, 22, 28, 4, 152064, False),
}
BY_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
"""


def main() -> None:
    """Runs both sides in turns and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, nargs="?")
    parser.add_argument("--size", choices=SHAPES, default="1.5b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", choices=SIDES)
    options = parser.parse_args()
    sides = [options.only] if options.only else SIDES
    results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    writing: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = options.base.resolve() if options.base else work / "base"
        # A child starts with its parent's record of memory, so this process must stay small.
        in_a_process(make, None if options.base else options.size, base, work / "adapter", options.rank)
        for number in range(options.rounds):
            for side in sides:
                shutil.rmtree(work / side, ignore_errors=True)
                # What was done before (files removed, pages to be written) must not slow what is measured.
                os.sync()
                time.sleep(REST_SECONDS)
                read_all(base)
                if side == "qwen-tune":
                    writing.append(
                        write_seconds(work / "bytes", sum(file.stat().st_size for file in base.glob(WEIGHTS)))
                    )
                    time.sleep(REST_SECONDS)
                results[side].append(measure(side, base, work / "adapter", work / side))
                print(f"{side} {number + 1}: {results[side][-1]}", file=sys.stderr)
        equal = options.only or in_a_process(same_tensors, work / "peft", work / "qwen-tune")
        size = sum(file.stat().st_size for file in base.glob(WEIGHTS))
    medians = {side: {key: statistics.median(one[key] for one in results[side]) for key in MEASURED} for side in sides}
    line: dict[str, Any] = {
        "base": options.base.name if options.base else f"random {options.size}",
        "base_bytes": size,
        "rank": options.rank,
        "rounds": options.rounds,
        "processor": processor(),
        **{f"{side} {key}": round(value, 2) for side in sides for key, value in medians[side].items()},
    }
    if writing:
        seconds = statistics.median(writing)
        line |= {
            "write_seconds": round(seconds, 2),
            "over_writing": round(medians["qwen-tune"]["wall_seconds"] / seconds, 2),
        }
    if not options.only:
        ratios = {key: round(medians["peft"][key] / medians["qwen-tune"][key], 2) for key in MEASURED}
        line |= {"same_tensors": equal, **{f"{key.rsplit('_', 1)[0]}_ratio": ratio for key, ratio in ratios.items()}}
    print(json.dumps(line))


def measure(side: str, base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """One merge in a process of its own: seconds, seconds of CPU, and the most memory it held."""
    ours = ["-m", "qwen_tune", "merge", str(adapter), "--output", str(output)]
    command = [
        sys.executable,
        *(ours if side == "qwen-tune" else ["-c", BY_PEFT, str(base), str(adapter), str(output)]),
    ]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{side} failed: {' '.join(command)}")
    return {
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    }


def write_seconds(path: Path, size: int) -> float:
    """How long it takes to write random bytes to a disk, 8 MB at a time past the page cache, and to wait for it."""
    block = mmap.mmap(-1, 8 << 20)
    block[:] = os.urandom(1 << 20) * 8
    start = time.perf_counter()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0))
    try:
        for _ in range(size // len(block)):
            os.write(file, block)
        os.fsync(file)
    finally:
        os.close(file)
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def read_all(folder: Path) -> None:
    """Reads a checkpoint, so that both sides find it in the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns that is called in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def make(size: str | None, base: Path, adapter: Path, rank: int) -> None:
    """An adapter, and its base unless there is one."""
    if size:
        make_base(base, size)
    make_adapter(adapter, base, rank)


def make_base(folder: Path, size: str) -> None:
    """Random weights of true shapes, a file at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config

    hidden, inner, layers, heads, kv_heads, vocabulary, tied = SHAPES[size]
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )
    config.save_pretrained(folder)
    narrow = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.q_proj.bias": (hidden,),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.k_proj.bias": (narrow,),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.v_proj.bias": (narrow,),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    parts: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)},
        *({f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()} for layer in range(layers)),
    ]
    if not tied:
        parts.append({"lm_head.weight": (vocabulary, hidden)})
    # Files of about 4 GB, as on the Hub.
    a_file = max(1, int(4e9 / (2 * sum(h * (w[0] if w else 1) for h, *w in shapes.values()))))
    groups = [parts[start : start + a_file] for start in range(0, len(parts), a_file)]
    torch.manual_seed(1)
    where = {}
    for number, group in enumerate(groups, start=1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        tensors = {
            tensor: (torch.randn(shape) * 0.02).to(torch.bfloat16) for part in group for tensor, shape in part.items()
        }
        where |= dict.fromkeys(tensors, name)
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(groups) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def make_adapter(folder: Path, base: Path, rank: int) -> None:
    """A LoRA with random matrices on every linear layer."""
    import torch
    from peft import LoraConfig
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.manual_seed(2)
    tensors = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if name.endswith("_proj.weight"):
                    rows, columns = weights.get_slice(name).get_shape()
                    module = f"base_model.model.{name.removesuffix('.weight')}"
                    tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns) * 0.02
                    tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
    targets = sorted({name.split(".")[-3] for name in tensors})
    LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    ).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def same_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit by bit."""
    import torch
    from safetensors import safe_open

    places = []
    for folder in (one, other):
        files = [safe_open(file, framework="pt") for file in sorted(folder.glob("*.safetensors"))]
        places.append({name: file for file in files for name in file.keys()})  # noqa: SIM118
    return places[0].keys() == places[1].keys() and all(
        torch.equal(file.get_tensor(name), places[1][name].get_tensor(name)) for name, file in places[0].items()
    )


if __name__ == "__main__":
    main()
