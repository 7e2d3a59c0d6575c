"""bitsandbytes' linear layers on a CPU, made to compute in evaluation what they compute in training.

Imports bitsandbytes, so it is imported only where a base is quantized.
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn


def keep_training_function(model: nn.Module) -> None:
    """Makes the quantized layers that are on a CPU one function of their weights, in `train()` and in `eval()`.

    Left alone, bitsandbytes (0.50) changes on a CPU what a layer computes:

    - NF4, where the CPU has AVX512-BF16: the first forward in evaluation repacks the weights for good and rounds the
      scales of their blocks to bfloat16. All outputs after it, those of training too, differ by about 0.3 %.
    - int8, on every CPU: training multiplies by the unpacked weights, evaluation rounds the inputs to 8 bits as well.

    On a GPU both modes compute the same. These layers are changed, not the library. Call it after loading.
    """
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit) and layer.weight.device.type == "cpu":
            layer.support_avx512bf16_for_cpu = False
        elif isinstance(layer, bnb.nn.Linear8bitLt) and layer.weight.device.type == "cpu":
            layer.__class__ = UnpackedLinear8bit


class UnpackedLinear8bit(bnb.nn.Linear8bitLt):
    """Multiplies inputs of shape (…, in) by the unpacked weights in both modes, as `Linear8bitLt` does in training."""

    training: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (…, out)."""
        is_training: bool = self.training
        self.training = True  # bitsandbytes looks at nothing else to choose its product
        try:
            output: torch.Tensor = super().forward(x)
        finally:
            self.training = is_training
        return output
