"""What a linear layer under PEFT consists of at this moment, and why some are not computed here.

By the rules of `fused.rules`. It is asked at every forward, because an adapter can be switched off, merged or
joined by another, a hook can be put on a module, and autocast can begin or end.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from qwen_tune.compat import children_of, has_hooks, parameters_of
from qwen_tune.fused.lora_math import Projection
from qwen_tune.fused.rules import FOUR_BITS, PLAIN, adapter_fault, linear_fault, unknown_layer


class NotFused(Exception):  # noqa: N818 - an answer, not a fault
    """Half of a layer is not fused; the message says why."""


def require(fault: str | None) -> None:
    """Raises NotFused where a rule names a fault."""
    if fault is not None:
        raise NotFused(fault)


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
    parts = children_of(module)
    base = parts["base_layer"]
    assert base is not None
    # PEFT's layers are called like those below them; bitsandbytes' are named, not imported: it is not everywhere.
    kinds = (type(module).__name__, type(base).__name__)
    if kinds not in ((PLAIN, PLAIN), (FOUR_BITS, FOUR_BITS)):
        raise NotFused(unknown_layer(f"{kinds[0]} on {kinds[1]}"))
    if module.disable_adapters or module.merged:
        raise NotFused("the adapter is switched off or merged")
    active = module.active_adapters
    if len(active) != 1 or active[0] not in module.scaling:
        raise NotFused("not just one adapter is active")
    (name,) = active
    layer_a, dropout, layer_b = (_child(parts[part], name) for part in ("lora_A", "lora_dropout", "lora_B"))
    has_dropout = not isinstance(dropout, nn.Identity) and not (isinstance(dropout, nn.Dropout) and dropout.p == 0)
    is_variant, has_bias = name in module.lora_variant, module.lora_bias[name]
    require(adapter_fault(is_variant=is_variant, has_bias=has_bias, has_dropout=has_dropout))
    check_untouched((module, layer_a, dropout, layer_b))
    a, b = parameters_of(layer_a)["weight"], parameters_of(layer_b)["weight"]
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
        if has_hooks(module):
            raise NotFused("a module carries hooks")


def _child(module: nn.Module | None, name: str) -> nn.Module:
    child = children_of(module)[name] if module is not None else None
    assert child is not None
    return child


def _frozen(module: nn.Module, dtype: torch.dtype | None) -> Projection:
    """The weight and the bias of a linear layer without an adapter, or below one."""
    kind = type(module).__name__
    require(linear_fault(kind, is_trained=False))
    check_untouched((module,))
    parameters = parameters_of(module)
    weight, bias = parameters["weight"], parameters["bias"]
    assert weight is not None
    require(linear_fault(kind, is_trained=weight.requires_grad or (bias is not None and bias.requires_grad)))
    if type(module) is nn.Linear:
        if dtype not in (None, weight.dtype) and not torch.is_autocast_enabled(weight.device.type):
            raise NotFused(f"the input is in {dtype} and the weight in {weight.dtype}")
        return Projection(weight, bias)
    if kind == PLAIN:
        raise NotFused(unknown_layer(f"{type(module).__module__}.{PLAIN}"))
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        raise NotFused("the weight is packed for something else than training")
    if dtype is not None and module.compute_dtype not in (None, dtype):
        raise NotFused(f"4-bit weights are multiplied in {module.compute_dtype}, and all else in {dtype}")
    return Projection(weight, bias, state)
