"""The first half of a decoder layer but for the attention itself: what goes into it, and what comes out of it.

    n = rms_norm(h)      q, k, v = rotate(norm_q(q_proj(n))), rotate(norm_k(k_proj(n))), v_proj(n)
    y = h + o_proj(attention(q, k, v))

Qwen3 has norms of heads, Qwen2 has none. Kept are h, which is there anyway, and with norms of heads their inputs; q, k,
v and the attention's output are kept by the attention. n is computed again, and the rotation's backward needs nothing
of its input. The graph that it replaces keeps n and, in bfloat16, a copy of it per adapter in the adapter's type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen_tune.fused.elementwise import normalized, rms_norm, rms_norm_backward, rotate, rotate_backward
from qwen_tune.fused.lora_math import Projection, StackedGradients, project, project_backward, stacks


@dataclass(frozen=True)
class InputWeights:
    """The frozen part of an attention's inputs, and the type that it is multiplied in.

    Attributes:
        norm: The weight of the layer's norm, shape (hidden_size,).
        eps: Of all the norms.
        query: The query projection.
        key: The key projection.
        value: The value projection.
        head_norms: The weights of the norms of query and key heads, shape (channels,) each.
        channels: Of a head.
        dtype: The type of the products.
    """

    norm: Tensor
    eps: float
    query: Projection
    key: Projection
    value: Projection
    head_norms: tuple[Tensor, Tensor] | None
    channels: int
    dtype: torch.dtype

    @property
    def projections(self) -> tuple[Projection, Projection, Projection]:
        return self.query, self.key, self.value

    @property
    def counts(self) -> tuple[int]:
        """How many projections have an adapter."""
        return (sum(projection.rank > 0 for projection in self.projections),)

    def head_norm(self) -> Tensor | None:
        """The weights of the norms of all query heads and key heads, shape (heads, channels)."""
        if self.head_norms is None:
            return None
        heads = [projection.features // self.channels for projection in (self.query, self.key)]
        return torch.cat([norm.expand(n, -1) for norm, n in zip(self.head_norms, heads, strict=True)])


class _Inputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: InputWeights, hidden: Tensor, cos: Tensor, sin: Tensor, *adapters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden.flatten(0, -2)
        shape = (*hidden.shape[:-1], -1, weights.channels)
        normed, rstd = rms_norm(x, weights.norm, weights.eps)
        normed = normed.to(weights.dtype)
        split = weights.query.features
        # Queries and keys are turned together; values lie apart, because they live on when the unturned ones do not.
        raw = normed.new_empty((len(x), split + weights.key.features))
        value = normed.new_empty((len(x), weights.value.features))
        [stack] = stacks(adapters, weights.counts, weights.dtype)
        reduced = project(normed, weights.projections, stack, (raw[:, :split], raw[:, split:], value))
        heads = raw.view(shape)
        head_norm = weights.head_norm()
        kept = [x, rstd, reduced, cos, sin]
        if head_norm is not None:
            unnormed = heads
            heads, head_rstd = rms_norm(unnormed, head_norm, weights.eps)
            kept += [unnormed, head_rstd]
        turned = rotate(heads, cos.unsqueeze(2), sin.unsqueeze(2)).to(weights.dtype)
        ctx.weights = weights
        ctx.save_for_backward(*kept, *adapters)
        query, key = turned.tensor_split([split // weights.channels], dim=2)
        return query.transpose(1, 2), key.transpose(1, 2), value.view(shape).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights: InputWeights = ctx.weights
        x, rstd, reduced, cos, sin, *rest = ctx.saved_tensors
        head_norm = weights.head_norm()
        grad_query, grad_key, grad_value = (grad.transpose(1, 2) for grad in grads)
        grad_heads = torch.cat((grad_query, grad_key), dim=2)
        grad_heads = rotate_backward(grad_heads, cos.unsqueeze(2), sin.unsqueeze(2))
        if head_norm is not None:
            unnormed, head_rstd, *rest = rest
            x_hat = normalized(unnormed, head_rstd)
            grad_heads = rms_norm_backward(grad_heads, x_hat, head_rstd, head_norm, weights.dtype)
        grad_raw = grad_heads.to(weights.dtype).view(len(x), -1)
        split = weights.query.features
        x_hat = normalized(x, rstd)
        [stack] = stacks(rest, weights.counts, weights.dtype)
        gradients = StackedGradients(rest, weights.counts, grad_raw)
        grad_normed = project_backward(
            (grad_raw[:, :split], grad_raw[:, split:], grad_value.reshape(len(x), -1)),
            x_hat.to(weights.dtype),
            reduced,
            weights.projections,
            stack,
            *gradients.stacks,
            column_scale=weights.norm,
            wants_input=ctx.needs_input_grad[1],
        )
        grad_hidden = None
        if grad_normed is not None:
            grad_hidden = rms_norm_backward(grad_normed, x_hat, rstd, weights.norm, x.dtype)
            grad_hidden = grad_hidden.view(*grad_query.shape[:2], -1)
        return None, grad_hidden, None, None, *gradients.in_order()


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projection: Projection, dtype: torch.dtype, attended: Tensor, hidden: Tensor, *adapters: Tensor
    ) -> Tensor:
        x = attended.flatten(0, -2).to(dtype)
        output = x.new_empty((len(x), projection.features))
        [stack] = stacks(adapters, (len(adapters) // 2,), dtype)
        reduced = project(x, (projection,), stack, (output,))
        ctx.projection, ctx.dtypes = projection, (attended.dtype, hidden.dtype)
        ctx.save_for_backward(x, reduced, *adapters)
        return hidden + output.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, reduced, *adapters = ctx.saved_tensors
        attended, hidden = ctx.dtypes
        grad = grad_output.flatten(0, -2).to(x.dtype)
        [stack] = stacks(adapters, (len(adapters) // 2,), x.dtype)
        gradients = StackedGradients(adapters, (len(adapters) // 2,), grad)
        grad_x = project_backward((grad,), x, reduced, (ctx.projection,), stack, *gradients.stacks)
        assert grad_x is not None
        grad_attended = grad_x.to(attended).view(*grad_output.shape[:-1], -1)
        return None, None, grad_attended, grad_output.to(hidden), *gradients.in_order()


def attention_inputs(
    hidden: Tensor, cos: Tensor, sin: Tensor, weights: InputWeights, adapters: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """What an attention gets from the residual stream.

    Args:
        hidden: The residual stream, shape (batch, tokens, hidden_size).
        cos: Shape (batch or 1, tokens, channels).
        sin: As `cos`.
        weights: The frozen part.
        adapters: A and B of query, key and value projection, without those that have none.

    Returns:
        Queries, keys and values, shape (batch, heads, tokens, channels) each.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        inputs: tuple[Tensor, Tensor, Tensor] = _Inputs.apply(  # type: ignore[no-untyped-call]
            weights, hidden, cos, sin, *adapters
        )
    return inputs


def attention_output(
    attended: Tensor, hidden: Tensor, projection: Projection, dtype: torch.dtype, adapters: Sequence[Tensor]
) -> Tensor:
    """The residual stream after an attention.

    Args:
        attended: The attention's output, shape (batch, tokens, heads * channels).
        hidden: The residual stream before it, shape (batch, tokens, hidden_size).
        projection: The output projection.
        dtype: The type of its products.
        adapters: A and B of the projection, or nothing.

    Returns:
        Of the shape of `hidden`.
    """
    with torch.autocast(attended.device.type, enabled=False):
        output: Tensor = _Output.apply(projection, dtype, attended, hidden, *adapters)  # type: ignore[no-untyped-call]
    return output
