"""What `model.dtype: auto` comes to on a CPU. Light: `estimate` asks as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from qwen_tune.machine import cpu_bfloat16_units

Dtype = Literal["bfloat16", "float16", "float32"]

SIXTEEN_BITS = ("bfloat16", "float16")


def automatic_cpu_dtype(config: Mapping[str, Any]) -> Dtype:
    """bfloat16 where the CPU multiplies in it and the checkpoint is stored in 16 bits, else float32.

    Elsewhere bfloat16 is emulated, at about a seventh of float32's speed; and a checkpoint that is stored in float32 is
    not rounded unasked.

    Args:
        config: The checkpoint's config.json, which names the type of its files as `dtype`, once `torch_dtype`.
    """
    stored = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if stored in SIXTEEN_BITS and cpu_bfloat16_units() else "float32"
