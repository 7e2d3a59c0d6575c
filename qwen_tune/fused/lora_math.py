"""Linear layers with a LoRA adapter: the product and its gradients, by hand.

For an input x of shape (tokens, in), a frozen weight W (out, in), a bias b, and an adapter A (r, in), B (out, r) with
its scale s = alpha / r (alpha / sqrt(r) in rsLoRA):

    u = x Aᵀ                                   (tokens, r)
    y = x Wᵀ + b + s u Bᵀ                      (tokens, out)

and with dy = dL/dy, by the chain rule:

    du = s dy B        dB = s dyᵀ u
    dA = duᵀ x         dx = dy W + du A

So the backward needs x, and u, which is r wide and cheaper kept than computed again; W and b get no gradient. Several
projections of one x share a stacked A: one product makes all their u, one makes all their dA, one adds to dx.

PEFT's graph for the same keeps x once per adapter in the adapter's type, and the unscaled product besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    """The frozen side of a linear layer, and the shape of its adapter.

    Attributes:
        weight: Shape (out, in), or the packed bytes of bitsandbytes' 4 bits.
        bias: Shape (out,).
        quant_state: How bitsandbytes unpacks the weight; None for a plain one.
        rank: The adapter's r; 0 without an adapter.
        scale: What the adapter's product is multiplied by.
    """

    weight: Tensor
    bias: Tensor | None = None
    quant_state: Any = None
    rank: int = 0
    scale: float = 1.0

    @property
    def features(self) -> int:
        """The width of its output."""
        shape = self.weight.shape if self.quant_state is None else self.quant_state.shape
        return int(shape[0])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as it is multiplied, shape (out, in); unpacked anew in every product, and never kept."""
        if self.quant_state is None:
            return self.weight.to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        unpacked: Tensor = dequantize_4bit(self.weight, self.quant_state)
        return unpacked.to(dtype)


@dataclass(frozen=True)
class Stack:
    """The adapters of projections of one input, or their gradients: all A one below the other, and each B.

    Attributes:
        a: Shape (sum of ranks, in); None without any adapter.
        b: Shape (out, r) each.
    """

    a: Tensor | None
    b: Sequence[Tensor]


def stacks(adapters: Sequence[Tensor], counts: Sequence[int], dtype: torch.dtype) -> list[Stack]:
    """Adapters in the type that is computed in.

    Args:
        adapters: A and B of each, all in one type.
        counts: How many of them belong to each input, in their order.
        dtype: The type of the products.
    """
    groups = _groups(adapters, counts)
    if not adapters or adapters[0].dtype == dtype:
        # A single A is a stack already.
        return [Stack(torch.cat(g[0::2]) if len(g) > 2 else g[0], g[1::2]) if g else Stack(None, ()) for g in groups]
    # One copy and one cast for all of them: each alone would be a small kernel of its own.
    return _views(torch.cat([tensor.flatten() for group in groups for tensor in _in_memory(group)]).to(dtype), groups)


class StackedGradients:
    """Room for the gradients of `stacks`: in one piece of memory, so that one cast makes them the adapters' type."""

    def __init__(self, adapters: Sequence[Tensor], counts: Sequence[int], like: Tensor) -> None:
        self._groups = _groups(adapters, counts)
        self._flat = like.new_empty(sum(adapter.numel() for adapter in adapters))
        self.stacks = _views(self._flat, self._groups)

    def in_order(self) -> list[Tensor]:
        """The gradients in the order and the type of the adapters."""
        if not any(self._groups):
            return []
        dtype = next(group[0].dtype for group in self._groups if group)
        gradients = []
        for group, stack in zip(self._groups, _views(self._flat.to(dtype), self._groups), strict=True):
            each_a = torch.split_with_sizes(stack.a, [a.shape[0] for a in group[0::2]]) if stack.a is not None else ()
            gradients += [gradient for pair in zip(each_a, stack.b, strict=True) for gradient in pair]
        return gradients


def project(x: Tensor, projections: Sequence[Projection], stack: Stack, outputs: Sequence[Tensor]) -> Tensor | None:
    """Several linear layers of one input.

    Args:
        x: Shape (tokens, in), in the type that is computed in.
        projections: The layers.
        stack: The adapters of those that have one.
        outputs: Where the results go, shape (tokens, out) each; their rows may lie apart.

    Returns:
        u of all adapters side by side, shape (tokens, sum of ranks), for the backward.
    """
    for projection, output in zip(projections, outputs, strict=True):
        weight = projection.dense(x.dtype).t()
        if torch.compiler.is_compiling():
            # Rows that lie apart cannot be written to there; the copy becomes part of a kernel that reads them.
            output.copy_(x @ weight if projection.bias is None else torch.addmm(projection.bias.to(x.dtype), x, weight))
        elif projection.bias is None:
            torch.mm(x, weight, out=output)
        else:
            torch.addmm(projection.bias.to(x.dtype), x, weight, out=output)
    if stack.a is None:
        return None
    reduced = x @ stack.a.t()
    adapted = [(p, output) for p, output in zip(projections, outputs, strict=True) if p.rank]
    parts = torch.split_with_sizes(reduced, [p.rank for p, _ in adapted], dim=1)
    for (projection, output), part, b in zip(adapted, parts, stack.b, strict=True):
        output.addmm_(part, b.t(), alpha=projection.scale)
    return reduced


def project_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    reduced: Tensor | None,
    projections: Sequence[Projection],
    stack: Stack,
    gradients: Stack,
    *,
    column_scale: Tensor | None = None,
    wants_input: bool = True,
) -> Tensor | None:
    """The gradients of `project`.

    Args:
        grads: dy of each layer, shape (tokens, out), in the type of x.
        x: The input, shape (tokens, in), but for `column_scale`.
        reduced: What `project` returned.
        projections: As in `project`.
        stack: As in `project`.
        gradients: Where dA and dB go.
        column_scale: What x still has to be multiplied by, shape (in,); dA takes it at less cost.
        wants_input: Whether dx is needed.

    Returns:
        dx, shape (tokens, in), with respect to the input as `project` had it.
    """
    grad_x: Tensor | None = None
    if wants_input:
        for projection, grad in zip(projections, grads, strict=True):
            weight = projection.dense(x.dtype)
            grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
    if stack.a is None or reduced is None or gradients.a is None:
        return grad_x
    adapted = [(p, grad) for p, grad in zip(projections, grads, strict=True) if p.rank]
    ranks = [projection.rank for projection, _ in adapted]
    grad_reduced = torch.empty_like(reduced)
    parts = zip(
        torch.split_with_sizes(reduced, ranks, dim=1), torch.split_with_sizes(grad_reduced, ranks, dim=1), strict=True
    )
    for (projection, grad), (part, grad_part), b, grad_b in zip(adapted, parts, stack.b, gradients.b, strict=True):
        # The scale comes with the product; beta=0 overwrites what is there.
        grad_part.addmm_(grad, b, beta=0, alpha=projection.scale)
        grad_b.addmm_(grad.t(), part, beta=0, alpha=projection.scale)
    torch.mm(grad_reduced.t(), x, out=gradients.a)
    if column_scale is not None:
        gradients.a.mul_(column_scale)
    return grad_x if grad_x is None else grad_x.addmm_(grad_reduced, stack.a)


def _groups(adapters: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    remaining = iter(adapters)
    return [[next(remaining) for _ in range(2 * count)] for count in counts]


def _in_memory(group: Sequence[Tensor]) -> list[Tensor]:
    """The order in which a stack lies in memory."""
    return [*group[0::2], *group[1::2]]


def _views(flat: Tensor, groups: Sequence[Sequence[Tensor]]) -> list[Stack]:
    """A flat tensor as stacks of the shapes of some adapters."""
    sizes = [s for g in groups if g for s in (sum(a.numel() for a in g[0::2]), *(b.numel() for b in g[1::2]))]
    parts = iter(torch.split_with_sizes(flat, sizes))
    return [
        Stack(next(parts).view(-1, g[0].shape[1]), [next(parts).view_as(b) for b in g[1::2]]) if g else Stack(None, ())
        for g in groups
    ]
