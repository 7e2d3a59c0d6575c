"""Element-wise steps of a decoder layer and their gradients: RMSNorm, rotary embeddings, SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen_tune.fused.compiled import OneKernel


@OneKernel
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


@OneKernel
def normalized(x: Tensor, rstd: Tensor) -> Tensor:
    """x̂, in the type of r."""
    return x * rstd


@OneKernel
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


@OneKernel
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


@OneKernel
def rotate_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of `rotate`, dx, from dy; shapes are the same."""
    x = grad * cos
    (y1, y2), (s1, s2), (x1, x2) = (tensor.chunk(2, dim=-1) for tensor in (grad, sin, x))
    x1.addcmul_(s2, y2)
    x2.addcmul_(s1, y1, value=-1)
    return x


@OneKernel
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """m, from e and g, shape (tokens, intermediate_size) each."""
    return silu(gate).mul_(up)


@OneKernel
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """De and dg, from dm, e and g. Writes into dm's memory: wide tensors are what a backward is short of."""
    grad_up = silu(gate).mul_(grad)
    scaled = grad.mul_(up)
    return torch.ops.aten.silu_backward(scaled, gate, grad_input=scaled), grad_up
