"""RMSNorm whose output is not kept: its backward starts from the input and one number a token.

With x of shape (..., size), a frozen weight w (size,) and r = (mean(x²) + eps)^(-1/2), as Qwen's modules compute it:

    x̂ = x r        y = w x̂

From dr/dx = -r³ x / size follows, with g = w dy:

    dx = r (g - x̂ mean(g x̂))

x is the residual stream, which the graph holds anyway; x̂ is computed again from it. Sums are in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of the last dimension.

    Args:
        x: Shape (..., size).
        weight: Shape (size,), or any that spreads over x.
        eps: Added to the mean of squares.

    Returns:
        y, shape (..., size), rounded where Qwen's modules round; and r, shape (..., 1), in float32 at least.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    lengths = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = lengths.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    # Written in x's type at once; the product itself is in that of r.
    return torch.mul(x, rstd, out=torch.empty_like(x)) * weight, rstd


def normalized(x: Tensor, rstd: Tensor) -> Tensor:
    """x̂, in the type of r."""
    return x * rstd


def rms_norm_backward(
    grad: Tensor, x_hat: Tensor, rstd: Tensor, weight: Tensor, dtype: torch.dtype, *, plus: Tensor | None = None
) -> Tensor:
    """The gradient of `rms_norm`, dx.

    Args:
        grad: dy, shape (..., size).
        x_hat: What `normalized` returns.
        rstd: r, from `rms_norm`.
        weight: As in `rms_norm`.
        dtype: The type of dx.
        plus: A gradient that x has from elsewhere, to be added before the last rounding, shape (..., size).

    Returns:
        Shape (..., size).
    """
    scaled = grad * weight
    shared = (scaled * x_hat).mean(dim=-1, keepdim=True)
    inner = torch.addcmul(scaled, x_hat, shared, value=-1)
    grad_x = torch.empty_like(inner, dtype=dtype)
    return torch.mul(inner, rstd, out=grad_x) if plus is None else torch.addcmul(plus, inner, rstd, out=grad_x)
