"""Has the element-wise steps compiled, and tries them out on random inputs before anything is trained with them."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen_tune.errors import first_line
from qwen_tune.fused.attention import InputWeights, attention_inputs
from qwen_tune.fused.elementwise import (
    normalized,
    rms_norm,
    rms_norm_backward,
    rotate,
    rotate_backward,
    swiglu,
    swiglu_backward,
)
from qwen_tune.fused.lora_math import Projection
from qwen_tune.fused.mlp import MlpWeights, mlp

STEPS = (rms_norm, normalized, rms_norm_backward, rotate, rotate_backward, swiglu, swiglu_backward)
TOKENS, HIDDEN, WIDE, CHANNELS, RANK = 24, 128, 192, 64, 4


def compile_steps(device: torch.device, dtype: torch.dtype) -> str | None:
    """Has the steps compiled where the compiled ones give what the plain ones give.

    Args:
        device: Where they will run.
        dtype: The type of the model.

    Returns:
        Why they stay plain; None where they are compiled.
    """
    plain = _half_layers(device, dtype)
    for step in STEPS:
        step.compile()
    try:
        compiled = _half_layers(device, dtype)
    except Exception as error:  # a compiler has faults of every kind, and a GPU machine may have no compiler at all
        reason = f"they cannot be compiled here ({first_line(error)[:100]})"
    else:
        tolerance = 0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-4
        apart = max(((one - other).norm() / one.norm()).item() for one, other in zip(plain, compiled, strict=True))
        if apart <= tolerance:
            return None
        reason = f"compiled here, they give something else (apart by {apart:.2g})"
    for step in STEPS:
        step.stay_plain()
    return reason


def _half_layers(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of the two halves of a layer of random weights, in float32."""
    generator = torch.Generator().manual_seed(0)

    def random_tensor(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    def projection(features: int, size: int) -> Projection:
        return Projection(random_tensor(features, size, scale=size**-0.5), random_tensor(features), rank=RANK)

    def adapters(*sizes: tuple[int, int]) -> list[Tensor]:
        pairs = [
            (random_tensor(RANK, size, scale=0.1), random_tensor(features, RANK, scale=0.1)) for features, size in sizes
        ]
        return [tensor.requires_grad_() for pair in pairs for tensor in pair]

    hidden = random_tensor(1, TOKENS, HIDDEN).requires_grad_()
    cos, sin = (random_tensor(1, TOKENS, CHANNELS) for _ in range(2))
    square, wide, narrow = (HIDDEN, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)
    query, key, value = (projection(*square) for _ in range(3))
    head_norms = (random_tensor(CHANNELS), random_tensor(CHANNELS))
    heads = InputWeights(random_tensor(HIDDEN), 1e-6, query, key, value, head_norms, CHANNELS, dtype)
    of_heads = adapters(square, square, square)
    layers = MlpWeights(random_tensor(HIDDEN), 1e-6, projection(*wide), projection(*wide), projection(*narrow), dtype)
    of_layers = adapters(wide, wide, narrow)
    outputs = [*attention_inputs(hidden, cos, sin, heads, of_heads), mlp(hidden, layers, of_layers)]
    trained = [hidden, *of_heads, *of_layers]
    gradients = torch.autograd.grad(outputs, trained, [random_tensor(*output.shape) for output in outputs])
    return [tensor.detach().float() for tensor in (*outputs, *gradients)]
