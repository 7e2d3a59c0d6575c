"""Tiny models with adapters, and what they compute: for tests of the fused layers."""

from __future__ import annotations

import torch
from layer_costs import LINEAR
from peft import LoraConfig, get_peft_model
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FUSED = {"_InputsBackward", "_OutputBackward", "_MlpBackward"}
SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS = {
    "qwen2": lambda **more: Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **more})),
    # Heads that are wider together than the residual stream, as in Qwen3-0.6B.
    "qwen3": lambda **more: Qwen3ForCausalLM(Qwen3Config(**{**SIZES, "head_dim": 8, **more})),
}


def randomize(model, dtype):
    """Values in every parameter that a start would leave at zero or one, with float32 or wider adapters."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            values = 1 + 0.3 * values
        elif "lora_" in name or name.endswith("bias"):
            values = 0.3 * values
        else:
            values = values / parameter.shape[-1] ** 0.5
        wide = dtype if dtype == torch.float64 or "lora_" not in name else torch.float32
        parameter.data = values.to(wide)
    return model


def tuned(kind="qwen2", dtype=torch.float64, *, sizes=None, **lora):
    """A tiny model with an adapter whose B is not zero, ready to train."""
    settings = {"r": 3, "lora_alpha": 5, "target_modules": list(LINEAR), **lora}
    model = get_peft_model(KINDS[kind](**(sizes or {})), LoraConfig(task_type="CAUSAL_LM", **settings))
    return randomize(model, dtype).train()


def batch(rows=2, tokens=11):
    ids = torch.randint(0, SIZES["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(5))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def packed():
    """Three samples in one pack, separated by their positions alone."""
    lengths = (4, 1, 8)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {**batch(rows=1, tokens=sum(lengths)), "position_ids": positions}


def results(model, inputs):
    """Logits, loss, and the gradients of everything that is trained, by name; and the graph's own functions in it."""
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    used = nodes(outputs.loss) & FUSED
    outputs.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in found.values())
    return {"logits": outputs.logits.detach(), "loss": outputs.loss.detach(), **found}, used


def nodes(tensor):
    names, waiting, seen = set(), [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            waiting += [following for following, _ in node.next_functions]
    return names


def error(ours, theirs):
    """The largest difference of any two tensors, relative to the largest value in it."""
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in theirs)
