"""What decoder layers cost: bytes that they keep for the backward, and operations of forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2Model

QWEN2_5_0_5B = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Operations that only look at memory, or get it.
LOOKS = (
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "unsqueeze",
    "expand",
    "slice",
    "select",
    "split",
    "split_with_sizes",
)
LOOKS += ("detach", "alias", "empty", "new_empty", "empty_like", "ones_like")


class Operations(TorchDispatchMode):
    """Counts aten's operations, and apart those that compute or copy something."""

    def __init__(self) -> None:
        super().__init__()
        self.every = self.computing = 0

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.every += 1
        self.computing += function._schema.name.removeprefix("aten::") not in LOOKS
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Costs:
    """Of a layer: bytes a token that are kept, aten's operations, and those of them that compute."""

    bytes: float
    operations: float
    computing: float


def adapted_layers(
    dtype: torch.dtype, *, rank: int = 16, layers: int = 2, adapters: torch.dtype | None = None
) -> PeftModel:
    """Layers of Qwen2.5-0.5B with random weights and adapters on all linear layers, in float32 unless given."""
    config = Qwen2Config(**QWEN2_5_0_5B, num_hidden_layers=layers, vocab_size=8)
    model = get_peft_model(Qwen2Model(config).to(dtype), LoraConfig(r=rank, target_modules=list(LINEAR)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (0.02 * torch.randn_like(parameter)).to(adapters or torch.float32)
    return model.train()


def angles(model: PeftModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions, which all layers share."""
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotations: tuple[Tensor, Tensor] = model.base_model.model.rotary_emb(hidden, positions)
    return rotations


def forward(model: PeftModel, hidden: Tensor, rotations: tuple[Tensor, Tensor]) -> Tensor:
    """The residual stream after the layers, under autocast where they are in 16 bits; hidden: (1, tokens, size)."""
    narrow = hidden.dtype in (torch.bfloat16, torch.float16)
    context: AbstractContextManager[Any] = nullcontext()
    if narrow:
        context = torch.autocast(hidden.device.type, hidden.dtype)
    with context:
        for layer in model.base_model.model.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotations)
    return hidden


def layer_costs(model: PeftModel, dtype: torch.dtype, tokens: tuple[int, int] = (8, 24)) -> Costs:
    """The costs of a layer; bytes are the difference of two lengths, so that what is kept once does not count."""
    operations = Operations()
    few = bytes_kept(model, dtype, tokens[0])
    many = bytes_kept(model, dtype, tokens[1], operations)
    layers = len(model.base_model.model.layers)
    kept = (many - few) / (tokens[1] - tokens[0]) / layers
    return Costs(kept, operations.every / layers, operations.computing / layers)


def bytes_kept(
    model: PeftModel, dtype: torch.dtype, tokens: int, operations: AbstractContextManager[Any] | None = None
) -> int:
    """Bytes of all storages that the layers keep between their forward and their backward, without parameters."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    device = next(model.parameters()).device
    hidden = torch.randn(1, tokens, QWEN2_5_0_5B["hidden_size"], dtype=dtype, device=device).requires_grad_()
    rotations = angles(model, hidden)
    kept: list[Tensor] = []
    model.zero_grad(set_to_none=True)
    with operations or nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            output = forward(model, hidden, rotations)
        output.backward(torch.ones_like(output))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in parameters)
