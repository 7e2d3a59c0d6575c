"""Which halves of a decoder layer train in their fused form. Light: the planner decides from the recipe what
`reading` decides from a model's modules, by the same functions. Each returns why not, or None.
"""

from __future__ import annotations

PLAIN, FOUR_BITS = "Linear", "Linear4bit"
LINEAR_KINDS = {"none": PLAIN, "nf4": FOUR_BITS, "int8": "Linear8bitLt"}
"""The class of a base's linear layers, by the recipe's `model.quantization`."""


def unknown_layer(name: str) -> str:
    """The message for a module that has no fused form."""
    return f"{name} is not a layer that is known here"


def linear_fault(kind: str, *, is_trained: bool) -> str | None:
    """Of a linear layer of the base, by its class's name."""
    if kind not in (PLAIN, FOUR_BITS):
        return unknown_layer(kind)
    return "the base is trained" if is_trained else None


def norm_fault(*, is_trained: bool) -> str | None:
    return "a norm is trained" if is_trained else None


def activation_fault(name: str) -> str | None:
    return None if name == "silu" else f"the activation is {name}"


def adapter_fault(*, is_variant: bool, has_bias: bool, has_dropout: bool) -> str | None:
    """Of an adapter on a linear layer; a variant is DoRA and the like."""
    if is_variant:
        return "the adapter is DoRA or another variant of LoRA"
    if has_bias:
        return "the adapter has a bias"
    return "the adapter has dropout" if has_dropout else None
