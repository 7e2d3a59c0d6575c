"""The base model in memory: in which type, how quantized, and on which device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen_tune.distributed.world import local_rank
from qwen_tune.errors import ModelError, Problem, first_line
from qwen_tune.hardware import automatic_cpu_dtype
from qwen_tune.machine import cpu_bfloat16_units, uses_gpu
from qwen_tune.model.base import BaseCheckpoint
from qwen_tune.recipe.schema import ModelSpec

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel


def check_dtype(model: ModelSpec) -> None:
    """Looks whether this machine computes in the type that the recipe asks for.

    Raises:
        ModelError: It does not.
    """
    cuda = uses_gpu()
    has_bfloat16 = gpu_has_bfloat16() if cuda else cpu_bfloat16_units() is not None
    if model.dtype == "bfloat16" and not has_bfloat16:
        raise ModelError(
            Problem(
                "model.dtype",
                f"bfloat16 is asked for, and this machine's {'GPU' if cuda else 'CPU'} has none",
                "write dtype: auto",
            )
        )
    if model.dtype == "float16" and not cuda:
        raise ModelError(Problem("model.dtype", "float16 needs a GPU, and no GPU is available", "write dtype: auto"))


def training_dtype(model: ModelSpec, base: BaseCheckpoint) -> torch.dtype:
    """The type that the frozen base is held and multiplied in: the recipe's, or see `automatic_dtype`."""
    if model.dtype == "auto":
        return automatic_dtype(base.config)
    dtype = getattr(torch, model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def automatic_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """bfloat16 on a GPU that has it, else float32; on a CPU see `automatic_cpu_dtype`.

    Args:
        config: The checkpoint's config.json.
    """
    if uses_gpu():
        return torch.bfloat16 if gpu_has_bfloat16() else torch.float32
    dtype = getattr(torch, automatic_cpu_dtype(config))
    assert isinstance(dtype, torch.dtype)
    return dtype


def gpu_has_bfloat16() -> bool:
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def own_device() -> str:
    """The GPU of this process, or the CPU."""
    return f"cuda:{local_rank()}" if uses_gpu() else "cpu"


def load_base_model(
    model: ModelSpec,
    base: BaseCheckpoint,
    *,
    dtype: torch.dtype,
    device: str | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Loads the base's weights.

    Args:
        model: The recipe's model section.
        base: Where the checkpoint lies.
        dtype: See `training_dtype`.
        device: Where to, for example `cuda:0`; the CPU when None.
        quantization: How to quantize linear layers while they are loaded; see `quantization`.

    Raises:
        ModelError: The files do not make the model that config.json describes, or the attention that the recipe asks
            for is not here.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from qwen_tune.model.attention import choose_attention

    attention = choose_attention(model, dtype, base.shape)
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            attn_implementation=attention,
            # One whole model a process: `auto` would spread a quantized one over all GPUs.
            device_map={"": device} if device else None,
            quantization_config=quantization,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            what = "there is not enough memory for its weights"
            raise ModelError(Problem(base.id, what, "write quantization: nf4, or choose a smaller base")) from error
        what = f"the weights cannot be loaded: {first_line(error)}"
        raise ModelError(Problem(base.id, what, "download it again")) from error
    wrong = {kind: sorted(names)[:3] for kind, names in info.items() if names and kind != "unexpected_keys"}
    if wrong:
        raise ModelError(
            Problem(base.id, f"the weights do not make the model of its config.json ({wrong})", "download it again")
        )
    assert isinstance(loaded, nn.Module)
    if quantization is not None:
        from qwen_tune.model.quantized_layers import keep_training_function

        keep_training_function(loaded)
    return loaded
