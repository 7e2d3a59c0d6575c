"""Rotary position embeddings (RoPE) and their gradient, without a rotated copy.

The halves of a head's channels, x = (x₁, x₂), are turned with c = (c₁, c₂) and s = (s₁, s₂), as Qwen's modules do:

    y₁ = c₁ x₁ - s₁ x₂        y₂ = c₂ x₂ + s₂ x₁

The map is linear in x, so that its gradient needs nothing of x:

    dx₁ = c₁ dy₁ + s₂ dy₂     dx₂ = c₂ dy₂ - s₁ dy₁
"""

from __future__ import annotations

from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the channels of every head.

    Args:
        x: Shape (batch, tokens, heads, channels).
        cos: Shape (batch or 1, tokens, 1, channels).
        sin: As `cos`.

    Returns:
        As x, in the wider type of the two.
    """
    y = x * cos
    (x1, x2), (s1, s2), (y1, y2) = (tensor.chunk(2, dim=-1) for tensor in (x, sin, y))
    y1.addcmul_(s1, x2, value=-1)
    y2.addcmul_(s2, x1)
    return y


def rotate_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of `rotate`, dx, from dy; shapes are the same."""
    x = grad * cos
    (y1, y2), (s1, s2), (x1, x2) = (tensor.chunk(2, dim=-1) for tensor in (grad, sin, x))
    x1.addcmul_(s2, y2)
    x2.addcmul_(s1, y1, value=-1)
    return x
