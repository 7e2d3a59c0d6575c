"""SwiGLU and its gradient. With σ the logistic function, silu(e) = e σ(e) and silu'(e) = σ(e) (1 + e (1 - σ(e))):

m = silu(e) g        dg = dm silu(e)        de = dm g silu'(e)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from qwen_tune.fused.compiled import OneKernel


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
