"""The weights that an adapter is merged into: the base's own, or what 4 or 8 bits left of them in training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qwen_tune.model.tensor_files import TensorSpan

if TYPE_CHECKING:
    from torch import Tensor

# What bitsandbytes quantizes of a dense model: the matrices of its layers, and not the output matrix.
QUANTIZED = re.compile(r"(?:(?!\.layers\.\d).)*\.layers\.\d+\..*_proj\.weight")


class BaseWeights:
    """The base's tensors as training saw them.

    `rewritten` names those that are not the base's own: quantized and unpacked again.
    """

    def __init__(self, tensors: Mapping[str, TensorSpan], quantization: Mapping[str, Any] | None) -> None:
        self._settings = dict(quantization or {})
        self.rewritten = frozenset(name for name in tensors if quantization and QUANTIZED.fullmatch(name))

    def unpacked(self, name: str, span: TensorSpan) -> Tensor | None:
        """What is left of a tensor in 4 or 8 bits, in its own type: all at once, as its scales belong together.

        None for a tensor that stays as the base has it.
        """
        if name not in self.rewritten:
            return None
        import bitsandbytes as bnb
        import torch

        from qwen_tune.merging.arithmetic import read_tensor

        weight = read_tensor(span)
        unpacked: Tensor
        if self._settings.get("load_in_8bit"):
            packed = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
            unpacked = bnb.functional.int8_vectorwise_dequant(packed.data, packed.SCB)
        else:
            packed = bnb.nn.Params4bit(
                weight,
                requires_grad=False,
                quant_type=self._settings.get("bnb_4bit_quant_type", "fp4"),
                compress_statistics=bool(self._settings.get("bnb_4bit_use_double_quant")),
                quant_storage=getattr(torch, self._settings.get("bnb_4bit_quant_storage", "uint8")),
            ).to("cpu")
            unpacked = bnb.functional.dequantize_4bit(packed.data, packed.quant_state)
        return unpacked.to(weight.dtype)
