"""The second half of a decoder layer: norm, gate and up projection, SwiGLU, down projection, and the residual.

    n = rms_norm(h)      e = gate(n)      g = up(n)      m = silu(e) g      y = h + down(m)

Kept are h, e and g, of which h is there anyway; n and m are computed again. The graph that it replaces keeps n, silu(e)
and m besides. Where memory is short, e and g are computed again as well: two products of the layer's seven more, and
what is kept of this half is h, which is there anyway, and r-wide products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen_tune.fused.elementwise import normalized, rms_norm, rms_norm_backward, swiglu, swiglu_backward
from qwen_tune.fused.lora_math import Projection, Stack, StackedGradients, project, project_backward, stacks


@dataclass(frozen=True)
class MlpWeights:
    """What of it is frozen, the type that it is multiplied in, and whether e and g are computed again."""

    norm: Tensor
    eps: float
    gate: Projection
    up: Projection
    down: Projection
    dtype: torch.dtype
    recompute: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        """How many projections of the norm have an adapter, and of the product."""
        return (self.gate.rank > 0) + (self.up.rank > 0), int(self.down.rank > 0)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: MlpWeights, hidden: Tensor, *adapters: Tensor) -> Tensor:
        inner, outer = stacks(adapters, weights.counts, weights.dtype)
        x = hidden.flatten(0, -2)
        normed, rstd = rms_norm(x, weights.norm, weights.eps)
        gate, up, reduced = _gate_and_up(normed.to(weights.dtype), weights, inner)
        product = swiglu(gate, up)
        down = product.new_empty((len(x), weights.down.features))
        product_reduced = project(product, (weights.down,), outer, (down,))
        ctx.weights = weights
        wide = (None, None) if weights.recompute else (gate, up)
        ctx.save_for_backward(x, rstd, *wide, reduced, product_reduced, *adapters)
        return (x + down).view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weights: MlpWeights = ctx.weights
        x, rstd, gate, up, reduced, product_reduced, *adapters = ctx.saved_tensors
        inner, outer = stacks(adapters, weights.counts, weights.dtype)
        if weights.recompute:
            normed, _ = rms_norm(x, weights.norm, weights.eps)
            gate, up, _ = _gate_and_up(normed.to(weights.dtype), weights, inner)
        gradients = StackedGradients(adapters, weights.counts, gate)
        inner_gradients, outer_gradients = gradients.stacks
        grad = grad_output.flatten(0, -2)
        product = swiglu(gate, up)
        grad_product = project_backward(
            (grad.to(weights.dtype),), product, product_reduced, (weights.down,), outer, outer_gradients
        )
        assert grad_product is not None
        del product
        grad_gate, grad_up = swiglu_backward(grad_product, gate, up)
        x_hat = normalized(x, rstd)
        wants_input = ctx.needs_input_grad[1]
        grad_normed = project_backward(
            (grad_gate, grad_up),
            x_hat.to(weights.dtype),
            reduced,
            (weights.gate, weights.up),
            inner,
            inner_gradients,
            column_scale=weights.norm,
            wants_input=wants_input,
        )
        grad_hidden = None
        if grad_normed is not None:
            grad_hidden = rms_norm_backward(grad_normed, x_hat, rstd, weights.norm, x.dtype, plus=grad).view_as(
                grad_output
            )
        return None, grad_hidden, *gradients.in_order()


def _gate_and_up(normed: Tensor, weights: MlpWeights, adapters: Stack) -> tuple[Tensor, Tensor, Tensor | None]:
    """E and g, shape (tokens, intermediate_size) each, and u of their adapters."""
    projections = (weights.gate, weights.up)
    gate, up = (normed.new_empty((len(normed), projection.features)) for projection in projections)
    return gate, up, project(normed, projections, adapters, (gate, up))


def mlp(hidden: Tensor, weights: MlpWeights, adapters: list[Tensor]) -> Tensor:
    """The residual stream after the second half of a layer.

    Args:
        hidden: The residual stream before it, shape (..., hidden_size).
        weights: The frozen part.
        adapters: A and B of gate, up and down projection, without those that have none.

    Returns:
        Of the shape of `hidden`.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        output: Tensor = _Mlp.apply(weights, hidden, *adapters)  # type: ignore[no-untyped-call]
    return output
