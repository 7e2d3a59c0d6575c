"""The attention that a recipe's model computes with on a device. Planner and training choose here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from qwen_tune.errors import ModelError, Problem
from qwen_tune.families.shape import Shape
from qwen_tune.hardware import SIXTEEN_BITS

Kernel = Literal["eager", "sdpa", "varlen"]
"""How attention is computed, as far as memory and time depend on it."""

VARLEN = "varlen"
"""FlashAttention 2 as torch has it, given the boundaries of a pack's samples; registered by `model.attention`."""

FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}

AUTOMATIC = (VARLEN, "flash_attention_3", "flash_attention_2")
"""What `attention: auto` tries, the fastest first; SDPA is everywhere."""

FLASH_CAPABILITY = (8, 0)
"""NVIDIA's compute capability from which FlashAttention 2 is compiled: Ampere."""

LARGEST_FLASH_HEAD = 256
"""Channels of a head, at most, that FlashAttention 2 takes."""


def choose_attention(
    asked: str,
    dtype: str,
    shape: Shape,
    *,
    has_flash: bool,
    missing: Callable[[str], str | None] = lambda name: None,
) -> str:
    """The attention of a recipe on a device, as Transformers calls it.

    Args:
        asked: The recipe's `model.attention`; `auto` is the fastest that the device computes packs with.
        dtype: What the model computes in.
        shape: The model.
        has_flash: Whether the device is an NVIDIA GPU of `FLASH_CAPABILITY` or more.
        missing: Why the package of an attention is not there, after "which"; None where it is.

    Raises:
        ModelError: The recipe asks for one that is not available.
    """

    def fault(name: str) -> str | None:
        return _fault(name, dtype, shape, has_flash) or missing(name)

    if asked == "auto":
        return next((name for name in AUTOMATIC if fault(name) is None), "sdpa")
    if reason := fault(asked):
        raise ModelError(Problem("model.attention", f"got {asked}, which {reason}", "write attention: auto"))
    return asked


def kernel_of(attention: str) -> Kernel:
    """The kind of an attention; every FlashAttention takes the samples' boundaries, as `varlen` does."""
    return "eager" if attention == "eager" else "sdpa" if attention == "sdpa" else "varlen"


def _fault(name: str, dtype: str, shape: Shape, has_flash: bool) -> str | None:
    if name not in shape.family.packing:
        return f"was not shown to keep the samples of a pack apart in {shape.family.title}"
    if name in ("eager", "sdpa"):
        return None
    if not has_flash:
        return "needs an NVIDIA GPU of compute capability 8.0 or more"
    if dtype not in SIXTEEN_BITS:
        return f"computes in bfloat16 or float16, and the model in {dtype}"
    if shape.head_dim > LARGEST_FLASH_HEAD:
        return f"takes heads of at most {LARGEST_FLASH_HEAD} channels, and the model's have {shape.head_dim}"
    return None
