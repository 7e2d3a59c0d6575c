"""What a linear layer under PEFT consists of at this moment, and why some are not computed here.

This is the one place that decides; it is asked at every forward, because an adapter can be switched off, merged or
joined by another, a hook can be put on a module, and autocast can begin or end.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwen_tune.fused.lora_math import Projection

# PEFT's layers, with the layers below them; those of bitsandbytes are named, not imported: it is not everywhere.
PLAIN = "Linear"
FOUR_BITS = "Linear4bit"


class NotFused(Exception):  # noqa: N818 - an answer, not a fault
    """A part of a layer goes its usual way; the message says why."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The type that linear layers multiply an input in: autocast's, where it is on, else the input's own."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:  # which autocast leaves alone
        return x.dtype
    return torch.get_autocast_dtype(device)


def read_projection(module: nn.Module, dtype: torch.dtype | None) -> tuple[Projection, list[Tensor]]:
    """The frozen weight of a linear layer, and A and B of its adapter, if it has one.

    Args:
        module: A linear layer, or PEFT's in its place.
        dtype: The type that it is to be multiplied in; None when that is not known yet.

    Raises:
        NotFused: It does more than a plain LoRA layer does, or something else.
    """
    if not isinstance(module, LoraLayer):
        return _frozen(module, dtype), []
    # Straight from the dictionaries: a module's attributes take a way that would cost as much as the layer's kernels.
    parts = module._modules
    base = parts["base_layer"]
    assert base is not None
    kinds = (type(module).__name__, type(base).__name__)
    if kinds not in ((PLAIN, PLAIN), (FOUR_BITS, FOUR_BITS)):
        raise NotFused(f"{kinds[0]} on {kinds[1]} is not a layer that is known here")
    if module.disable_adapters or module.merged:
        raise NotFused("the adapter is switched off or merged")
    active = module.active_adapters
    if len(active) != 1 or active[0] not in module.scaling:
        raise NotFused("not just one adapter is active")
    (name,) = active
    if name in module.lora_variant:
        raise NotFused("the adapter is DoRA or another variant of LoRA")
    if module.lora_bias[name]:
        raise NotFused("the adapter has a bias")
    layer_a, dropout, layer_b = (_child(parts[part], name) for part in ("lora_A", "lora_dropout", "lora_B"))
    if not isinstance(dropout, nn.Identity) and not (isinstance(dropout, nn.Dropout) and dropout.p == 0):
        raise NotFused("the adapter has dropout")
    check_untouched((module, layer_a, dropout, layer_b))
    a, b = layer_a._parameters["weight"], layer_b._parameters["weight"]
    if a is None or b is None or not (a.requires_grad and b.requires_grad):
        raise NotFused("the adapter is frozen")
    if a.dtype != b.dtype:
        raise NotFused("the adapter's halves are in different types")
    # Without autocast PEFT multiplies an adapter in its own type, whatever the base's is.
    if dtype is not None and a.dtype != dtype and not torch.is_autocast_enabled(a.device.type):
        raise NotFused(f"the adapter is in {a.dtype} and the base in {dtype}, without autocast")
    frozen = _frozen(base, dtype)
    rank, scale = a.shape[0], float(module.scaling[name])
    return Projection(frozen.weight, frozen.bias, frozen.quant_state, rank, scale), [a, b]


def check_untouched(modules: Iterable[nn.Module]) -> None:
    """Raises NotFused where a module carries hooks or a forward of its own, which going around it would skip."""
    for module in modules:
        if "forward" in vars(module):
            raise NotFused("a module has a forward of its own")
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise NotFused("a module carries hooks")


def _child(module: nn.Module | None, name: str) -> nn.Module:
    child = module._modules[name] if module is not None else None
    assert child is not None
    return child


def _frozen(module: nn.Module, dtype: torch.dtype | None) -> Projection:
    """The weight and the bias of a linear layer without an adapter, or below one."""
    if type(module).__name__ not in (PLAIN, FOUR_BITS):
        raise NotFused(f"{type(module).__name__} is not a layer that is known here")
    check_untouched((module,))
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    assert weight is not None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise NotFused("the base is trained")
    if type(module) is nn.Linear:
        if dtype not in (None, weight.dtype) and not torch.is_autocast_enabled(weight.device.type):
            raise NotFused(f"the input is in {dtype} and the weight in {weight.dtype}")
        return Projection(weight, bias)
    if type(module).__name__ == PLAIN:
        raise NotFused(f"{type(module).__module__}.{PLAIN} is not a layer that is known here")
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise NotFused("the weight is packed for something else than training")
    if dtype is not None and module.compute_dtype not in (None, dtype):
        raise NotFused(f"4-bit weights are multiplied in {module.compute_dtype}, and all else in {dtype}")
    return Projection(weight, bias, state)
