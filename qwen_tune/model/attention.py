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

from qwen_tune.families import attention
from qwen_tune.families.attention import VARLEN
from qwen_tune.families.shape import Shape
from qwen_tune.machine import repeats_key_heads, uses_gpu
from qwen_tune.recipe.schema import ModelSpec


def choose_attention(model: ModelSpec, dtype: torch.dtype, shape: Shape) -> str:
    """The attention of a recipe on this machine; see `families.attention.choose_attention`.

    Raises:
        ModelError: The recipe asks for one that is not available here.
    """
    has_flash = uses_gpu() and torch.cuda.get_device_capability() >= attention.FLASH_CAPABILITY
    name = str(dtype).removeprefix("torch.")
    return attention.choose_attention(model.attention, name, shape, has_flash=has_flash, missing=_missing)


def _missing(name: str) -> str | None:
    """Why the package of an attention is not there, after "which"; None where it is."""
    package = attention.FLASH_PACKAGES.get(name)
    if package and importlib.util.find_spec(package) is None:
        return f"needs the package {package}, which is not installed"
    if name == VARLEN and importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"this torch ({torch.__version__}) does not have"
    return None


def needs_no_mask(implementation: str, batch: Any) -> bool:
    """Whether an attention separates a batch's samples by their boundaries alone."""
    return implementation == VARLEN and batch.get("cu_seq_lens_q") is not None


def no_mask(device: torch.device) -> Tensor:
    """A mask of no tokens, which `varlen_attention` takes for none.

    Transformers hands a mask of four dimensions on as it is, in every architecture. For None it would make one of
    tokens x tokens, and wait for the GPU to see whether positions start over in the batch.
    """
    return torch.empty((0, 0, 0, 0), device=device)


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
        attention_mask: None or `no_mask`; with another this is SDPA.
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
    if attention_mask is not None and not attention_mask.numel():
        attention_mask = None
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
