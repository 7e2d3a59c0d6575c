"""Which attention a model computes with, and FlashAttention 2 as torch has it, for packs.

`varlen` takes the boundaries of a pack's samples (`cu_seq_lens_q/k`, `max_length_q/k`) from the batch and needs no
mask. Without them (generation, padded batches) it is SDPA with SDPA's mask, so that it is right wherever a model is
called.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qwen_tune.errors import ModelError, Problem
from qwen_tune.machine import repeats_key_heads, uses_gpu
from qwen_tune.recipe.schema import ModelSpec

VARLEN = "varlen"
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
CAPABILITY = (8, 0)  # Ampere: what torch's FlashAttention 2 is compiled for
LARGEST_HEAD = 256


def choose_attention(model: ModelSpec, dtype: torch.dtype, head_dim: int) -> str:
    """The attention of a recipe, as Transformers calls it; `auto` is the fastest that is here and computes packs.

    Args:
        model: The recipe's model section.
        dtype: What the model computes in.
        head_dim: Channels of a head.

    Raises:
        ModelError: The recipe asks for one that is not here.
    """
    asked = model.attention
    if asked == "auto":
        usable = [name for name in (VARLEN, *reversed(FLASH_PACKAGES)) if not _missing(name, dtype, head_dim)]
        return usable[0] if usable else "sdpa"
    if reason := _missing(asked, dtype, head_dim):
        raise ModelError(Problem("model.attention", f"got {asked}, which {reason}", "write attention: auto"))
    return asked


def _missing(name: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why an attention cannot be used here; None where it can."""
    if name in ("eager", "sdpa"):
        return None
    if not uses_gpu() or torch.cuda.get_device_capability() < CAPABILITY:
        return "needs an NVIDIA GPU of compute capability 8.0 or more"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, and the model in {str(dtype).removeprefix('torch.')}"
    if head_dim > LARGEST_HEAD:
        return f"takes heads of at most {LARGEST_HEAD} channels, and the model's have {head_dim}"
    package = FLASH_PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        return f"needs the package {package}, which is not installed"
    if name == VARLEN and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"this torch ({torch.__version__}) does not have"
    return None


def needs_no_mask(implementation: str, batch: Any) -> bool:
    """Whether an attention tells a batch's samples apart by their boundaries alone."""
    return implementation == VARLEN and batch.get("cu_seq_lens_q") is not None


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sample of a pack.

    Args:
        module: The attention module.
        query: Shape (1, heads, tokens, channels).
        key: Shape (1, key-value heads, tokens, channels).
        value: As `key`.
        attention_mask: None; with one this is SDPA.
        dropout: Of the attention's weights; with any this is SDPA.
        scaling: Of the products.
        sliding_window: How many tokens each sees, itself among them; None for all before it.
        cu_seq_lens_q: Where samples begin and the last one ends, int32, shape (samples + 1,). Without it this is SDPA.
        cu_seq_lens_k: The same.
        max_length_q: The tokens of the longest sample.
        max_length_k: The same.
        **kwargs: What else SDPA takes.

    Returns:
        Shape (1, tokens, heads, channels).
    """
    if cu_seq_lens_q is None or attention_mask is not None or dropout:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    from torch.nn.attention.varlen import varlen_attn

    tokens_first = [states.squeeze(0).transpose(0, 1) for states in (query, key, value)]
    group_size = query.shape[1] // key.shape[1]
    grouped: dict[str, Any] = {}
    if group_size > 1 and repeats_key_heads():
        tokens_first[1:] = [states.repeat_interleave(group_size, dim=1) for states in tokens_first[1:]]
    elif group_size > 1:
        grouped["enable_gqa"] = True
    assert cu_seq_lens_k is not None
    assert max_length_q is not None
    assert max_length_k is not None
    attended = varlen_attn(
        tokens_first[0],
        tokens_first[1],
        tokens_first[2],
        cu_seq_lens_q,
        cu_seq_lens_k,
        max_length_q,
        max_length_k,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **grouped,
    )
    assert isinstance(attended, Tensor)
    return attended.unsqueeze(0), None


AttentionInterface.register(VARLEN, varlen_attention)
# Without a mask function of its own, Transformers would hand over no mask at all, also where one is needed.
AttentionMaskInterface.register(VARLEN, sdpa_mask)
