"""Puts the fused halves into a model's decoder layers, and says which layers go their usual way and why.

Only the `forward` of decoder layers is replaced, on the instance; parameters, names and files stay PEFT's. A layer's
two halves are decided on one by one, at every forward: see `reading`. Without gradients, in evaluation and with a
cache, the layers are Transformers' own.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from qwen_tune.compat import attention_of, checkpointed, is_checkpointed_by_call
from qwen_tune.families.family import Family
from qwen_tune.families.known import FAMILIES
from qwen_tune.fused.attention import InputWeights, attention_inputs, attention_output
from qwen_tune.fused.compiled import compiled
from qwen_tune.fused.lora_math import Projection
from qwen_tune.fused.mlp import MlpWeights, mlp
from qwen_tune.fused.reading import NotFused, check_untouched, product_dtype, read_projection, require
from qwen_tune.fused.rules import activation_fault, norm_fault, unknown_layer


def _classes(name: str) -> dict[type, Family]:
    """The classes of one name in all architectures."""
    return {getattr(import_module(family.modeling), f"{family.prefix}{name}"): family for family in FAMILIES.values()}


LAYERS, ATTENTIONS, MLPS, NORMS = map(_classes, ("DecoderLayer", "Attention", "MLP", "RMSNorm"))


@dataclass(frozen=True)
class Fused:
    """What `fuse` found.

    Attributes:
        layers: Decoder layers of the model.
        attention: Layers whose first half is fused.
        mlp: Layers whose second half is fused.
        reasons: Why halves are not, each with the number of halves.
        plain: Why the element-wise steps of fused halves are not compiled to a kernel each; None where they are.
        whole: Whether fused layers are compiled as a whole.
    """

    layers: int
    attention: int
    mlp: int
    reasons: Mapping[str, int]
    plain: str | None
    whole: bool = False

    def __str__(self) -> str:
        why = "".join(f"; {count} not: {reason}" for reason, count in self.reasons.items())
        compiled = ", their element-wise steps compiled" if self.plain is None else ""
        compiled = ", compiled as a whole (in the first step, for about a minute)" if self.whole else compiled
        return f"{self.attention} attentions and {self.mlp} MLPs of {self.layers} layers fused{compiled}{why}"


def fuse(model: nn.Module, *, recompute_mlp: bool = False, compile_layers: bool = False) -> Fused:
    """Lets decoder layers train in their fused form, where they have one; `unfuse` undoes it.

    Args:
        model: A model of Transformers with or without PEFT around it; adapters added later are seen as well.
        recompute_mlp: Whether gate and up projection are computed again in the backward, to keep less.
        compile_layers: Whether layers are compiled as a whole. PEFT's own halves may not let themselves be.
    """
    body = compiled(_halves) if compile_layers else _halves
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    reasons: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for layer in layers:
        if type(layer) not in LAYERS:
            reasons[unknown_layer(type(layer).__name__)] += 2
            continue
        layer.recomputes_mlp, layer.body = recompute_mlp, body
        fused = 0
        for name, read in (("attention", _read_attention), ("mlp", _read_mlp)):
            try:
                read(layer, None)
                fused += 1
                counts[name] += 1
            except NotFused as reason:
                reasons[str(reason)] += 1
        if fused and "forward" not in vars(layer):
            layer.forward = types.MethodType(_forward, layer)
    plain = _compile_steps(model, compile_layers) if counts["attention"] + counts["mlp"] else "nothing is fused"
    return Fused(len(layers), counts["attention"], counts["mlp"], dict(reasons), plain, compile_layers)


def _compile_steps(model: nn.Module, whole: bool) -> str | None:
    """Compiles the element-wise steps where that pays; returns why not elsewhere."""
    if whole:
        return "they are compiled with their layers"
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return "on a CPU a step of a layer takes far longer than starting it"
    from qwen_tune.fused.self_check import compile_steps

    return compile_steps(weight.device, torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32)


def unfuse(model: nn.Module) -> None:
    """Restores the decoder layers' own forward."""
    for module in model.modules():
        own = vars(module).get("forward")
        if isinstance(own, types.MethodType) and own.__func__ is _forward:
            del module.forward
        for name in ("recomputes_mlp", "body"):
            vars(module).pop(name, None)


def _forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The forward of a decoder layer; arguments are those of Transformers."""
    if args or not (self.training and torch.is_grad_enabled()) or kwargs.get("past_key_values") is not None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    if self.gradient_checkpointing and not is_checkpointed_by_call():
        # As the class's own forward does it, which this one stands in front of.
        return checkpointed(self, partial(self.body, self, **kwargs), hidden_states)
    return self.body(self, hidden_states, **kwargs)


def _halves(layer: Any, hidden: Tensor, **kwargs: Any) -> Tensor:
    try:
        attention = _read_attention(layer, product_dtype(hidden))
    except NotFused:
        hidden = hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **kwargs)[0]
    else:
        hidden = _attend(layer.self_attn, hidden, attention, **kwargs)
    try:
        weights, adapters = _read_mlp(layer, product_dtype(hidden))
    except NotFused:
        output: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return output
    return mlp(hidden, weights, adapters)


@dataclass(frozen=True)
class _Attention:
    inputs: InputWeights
    input_adapters: list[Tensor]
    output: Projection
    output_adapters: list[Tensor]


def _attend(
    attention: Any,
    hidden: Tensor,
    parts: _Attention,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: None = None,
    **kwargs: Any,
) -> Tensor:
    """The first half of a layer; the attention itself is called as Transformers' modules call it."""
    cos, sin = position_embeddings
    query, key, value = attention_inputs(hidden, cos, sin, parts.inputs, parts.input_adapters)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(attention.config), eager_attention_forward)
    attended, _ = interface(
        attention,
        query,
        key,
        value,
        attention_mask,
        dropout=attention.attention_dropout,
        scaling=attention.scaling,
        sliding_window=attention.sliding_window,
        **kwargs,
    )
    attended = attended.reshape(*hidden.shape[:-1], -1)
    return attention_output(attended, hidden, parts.output, parts.inputs.dtype, parts.output_adapters)


def _read_attention(layer: Any, dtype: torch.dtype | None) -> _Attention:
    """The first half of a layer; without a dtype only what does not depend on it is checked."""
    attention = layer.self_attn
    if type(attention) not in ATTENTIONS:
        raise NotFused(unknown_layer(type(attention).__name__))
    check_untouched((attention,))
    eps = [_read_norm(layer.input_layernorm)]
    head_norms = None
    if ATTENTIONS[type(attention)].head_norms:
        eps += [_read_norm(attention.q_norm), _read_norm(attention.k_norm)]
        head_norms = (attention.q_norm.weight, attention.k_norm.weight)
    if len(set(eps)) != 1:
        raise NotFused("norms of one layer differ")
    projections, adapters = [], []
    for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection, own = read_projection(module, dtype)
        projections.append(projection)
        adapters.append(own)
    query, key, value, output = projections
    inputs = InputWeights(
        layer.input_layernorm.weight, eps[0], query, key, value, head_norms, attention.head_dim, dtype or torch.float32
    )
    return _Attention(inputs, _one_type(adapters[:3]), output, adapters[3])


def _read_mlp(layer: Any, dtype: torch.dtype | None) -> tuple[MlpWeights, list[Tensor]]:
    """The second half of a layer; without a dtype only what does not depend on it is checked."""
    module = layer.mlp
    if type(module) not in MLPS:
        raise NotFused(unknown_layer(type(module).__name__))
    require(activation_fault(module.config.hidden_act))
    check_untouched((module, module.act_fn))
    eps = _read_norm(layer.post_attention_layernorm)
    gate, up, down = (read_projection(part, dtype) for part in (module.gate_proj, module.up_proj, module.down_proj))
    norm, dtype = layer.post_attention_layernorm.weight, dtype or torch.float32
    weights = MlpWeights(norm, eps, gate[0], up[0], down[0], dtype, layer.recomputes_mlp)
    return weights, _one_type([gate[1], up[1], down[1]])


def _read_norm(module: Any) -> float:
    if type(module) not in NORMS:
        raise NotFused(unknown_layer(type(module).__name__))
    check_untouched((module,))
    require(norm_fault(is_trained=module.weight.requires_grad))
    return float(module.variance_epsilon)


def _one_type(adapters: list[list[Tensor]]) -> list[Tensor]:
    flat = [tensor for pair in adapters for tensor in pair]
    if len({tensor.dtype for tensor in flat}) > 1:
        raise NotFused("adapters of one layer are in different types")
    return flat
