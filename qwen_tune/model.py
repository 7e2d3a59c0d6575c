"""The base model in memory, and the adapter's shape on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qwen_tune.base import BaseCheckpoint
from qwen_tune.errors import ModelError, Problem
from qwen_tune.machine import uses_gpu
from qwen_tune.recipe import LoraSpec, ModelSpec

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")


def training_dtype(model: ModelSpec) -> torch.dtype:
    """The type that the frozen base is held and multiplied in.

    `auto` is bfloat16 on a GPU that has it, else float32; on a CPU always float32, where bfloat16 is emulated slowly.

    Raises:
        ModelError: The recipe asks for a type that this machine lacks.
    """
    cuda = uses_gpu()
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else cpu_has_bfloat16()
    if model.dtype == "auto":
        return torch.bfloat16 if cuda and has_bfloat16 else torch.float32
    if model.dtype == "bfloat16" and not has_bfloat16:
        raise ModelError(
            Problem(
                "model.dtype",
                f"bfloat16 is asked for, and this machine's {'GPU' if cuda else 'CPU'} has none",
                "write dtype: auto",
            )
        )
    if model.dtype == "float16" and not cuda:
        raise ModelError(
            Problem("model.dtype", "float16 is asked for, and there is no GPU to train it on", "write dtype: auto")
        )
    dtype = getattr(torch, model.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return False
    return re.search(r"\b(avx512_bf16|amx_bf16)\b", flags.read_text(encoding="utf-8")) is not None


def load_base_model(
    model: ModelSpec, base: BaseCheckpoint, *, dtype: torch.dtype, device: str | None = None
) -> PreTrainedModel:
    """Loads the base's weights.

    Args:
        model: The recipe's model section.
        base: Where the checkpoint lies.
        dtype: See `training_dtype`.
        device: Where to, for example `cuda:0`; the CPU when None.

    Raises:
        ModelError: The files do not make the model that config.json describes.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            base.path,
            dtype=dtype,
            attn_implementation="sdpa" if model.attention == "auto" else model.attention,
            device_map=device,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(Problem(base.id, f"the weights cannot be loaded: {line}", "download it again")) from error
    wrong = {kind: sorted(names)[:3] for kind, names in info.items() if names and kind != "unexpected_keys"}
    if wrong:
        raise ModelError(
            Problem(base.id, f"the weights do not make the model of its config.json ({wrong})", "download it again")
        )
    assert isinstance(loaded, nn.Module)
    return loaded


def target_modules(model: nn.Module, lora: LoraSpec) -> list[str]:
    """The names of the linear layers that get an adapter, as PEFT takes them.

    Raises:
        ModelError: A name that the recipe lists is no linear layer of the model.
    """
    output = getattr(model, "lm_head", None)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not output}
    last_parts = {name.rsplit(".", 1)[-1] for name in linear}
    if isinstance(lora.target_modules, str):
        groups = {"all-linear": ATTENTION_MODULES + MLP_MODULES, "attention": ATTENTION_MODULES, "mlp": MLP_MODULES}
        wanted: tuple[str, ...] = groups[lora.target_modules]
    else:
        wanted = tuple(lora.target_modules)
    missing = [name for name in wanted if name not in last_parts and not any(_is_suffix(name, full) for full in linear)]
    if missing:
        raise ModelError(
            Problem(
                "lora.target_modules",
                f"{', '.join(missing)} matches no linear layer of the model; it has {', '.join(sorted(last_parts))}",
                "use these names, or one of all-linear, attention, mlp",
            )
        )
    return sorted(wanted)


def lora_config(lora: LoraSpec, targets: list[str]) -> LoraConfig:
    """PEFT's configuration for the recipe's adapter."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        bias="none",
    )


def _is_suffix(name: str, full: str) -> bool:
    return full == name or full.endswith(f".{name}")
