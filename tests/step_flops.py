"""Floating-point operations of a training step's forward and backward, as torch counts them, over the fewest."""

from __future__ import annotations

import sys
from typing import Any

import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.append(str(ROOT / "scripts"))

from training_bench.shapes import LINEAR, Shape, flops

from qwen_tune.chatml.template import IGNORED
from qwen_tune.fused.install import fuse
from qwen_tune.training.batches import PackCollator
from qwen_tune.training.loss import add_supervised_loss

# A quarter of Qwen2.5-0.5B's width and a sixth of its layers; head and adapters have the share that they have there.
QUARTER = Shape("quarter", 224, 1216, 4, 14, 2, 6332, True)
RANK = 4
LENGTHS = (120, 61, 43, 32)
LABELLED = 0.55


def step_flops(*, ours: bool, checkpointing: bool = False) -> float:
    """Counted operations over the fewest.

    Attention counts whole packs squared on both sides: that is what SDPA computes on a CPU, whatever is masked.

    Args:
        ours: Fused layers and the loss of labelled tokens; else PEFT's layers and the model's own loss.
        checkpointing: Whether layers are computed again in the backward.
    """
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**QUARTER.config(), attn_implementation="sdpa"))
    if ours:
        add_supervised_loss(model)
    tuned = get_peft_model(model, LoraConfig(r=RANK, target_modules=list(LINEAR))).train()
    if ours:
        assert fuse(tuned).reasons == {}
    if checkpointing:
        tuned.enable_input_require_grads()
        tuned.gradient_checkpointing_enable({"use_reentrant": False})
    batch = PackCollator()([pack()])
    labelled = len(batch["targets"])
    if not ours:
        ids, positions = batch["input_ids"], batch["position_ids"]
        labels = torch.full_like(ids, IGNORED)
        labels[0, batch["labelled"] + 1] = batch["targets"]
        batch = {"input_ids": ids, "position_ids": positions, "labels": labels, "use_cache": False}
    counter = FlopCounterMode(display=False, custom_mapping=NOT_COUNTED)
    with counter:
        result = tuned(**batch)
        (result if ours else result.loss).backward()
    assert all(p.grad is not None for p in tuned.parameters() if p.requires_grad)
    fewest = flops(QUARTER, [sum(LENGTHS)], labelled, RANK, causal=False)
    return counter.get_total_flops() / sum(fewest.values())


def pack() -> dict[str, Any]:
    """Samples of random ids whose last tokens are supervised."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, QUARTER.vocab_size, (sum(LENGTHS),), generator=generator).tolist()
    labels = []
    for length in LENGTHS:
        context = length - round(LABELLED * length)
        start = len(labels)
        labels += [IGNORED] * context + ids[start + context : start + length]
    return {"input_ids": ids, "labels": labels, "lengths": list(LENGTHS)}


def _attention(query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    """Two products of (queries, channels, keys) for each query head; torch 2.11's own count refuses grouped heads."""
    batch, heads, queries, channels = query
    return 2 * 2 * batch * heads * queries * channels * key[2]


def _attention_backward(grad: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    """Five such products: the scores once more, and the gradients of values, scores, queries and keys."""
    return _attention(query, key) * 5 // 2


def _added_product(total: Any, one: Any, other: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * int(one[0]) * int(one[1]) * int(other[1])


# What torch's counter passes over: attention that is not a GPU's, and products that are added in place.
NOT_COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.aten.addmm_: _added_product,
}
