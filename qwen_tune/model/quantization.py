"""A base held in 8 or 4 bits (QLoRA): bitsandbytes' configuration, and what a run remembers of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from qwen_tune.errors import ModelError, Problem, first_line
from qwen_tune.model.base import BaseCheckpoint, check_unquantized
from qwen_tune.recipe.schema import ModelSpec

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PreTrainedModel

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # 4-bit NormalFloat with the block scales quantized as well: 0.516 bytes a weight.
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def check_quantization(model: ModelSpec, base: BaseCheckpoint) -> None:
    """Looks whether the base can be quantized as the recipe wants, before its weights are loaded.

    Raises:
        ModelError: bitsandbytes does not run here, or the checkpoint is quantized already.
    """
    check_unquantized(base)
    if model.quantization == "none":
        return
    if torch.backends.mps.is_available() and not torch.cuda.is_available():
        raise _cannot_run(model, "bitsandbytes has no kernels for this machine's GPU")
    if find_spec("bitsandbytes") is None:
        raise _cannot_run(model, "bitsandbytes is not installed")
    try:
        import bitsandbytes  # noqa: F401
    except Exception as error:  # a native library that does not load raises what it likes
        raise _cannot_run(model, f"bitsandbytes does not load ({first_line(error)})") from error


def quantization_config(model: ModelSpec, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """The settings of bitsandbytes for a recipe; None for a base that is not quantized.

    Args:
        model: The recipe's model section.
        dtype: The type that weights are multiplied in, once they are unpacked.
    """
    if model.quantization == "none":
        return None
    return config_from_facts({**SETTINGS[model.quantization], "bnb_4bit_compute_dtype": dtype})


def config_from_facts(settings: Mapping[str, Any]) -> BitsAndBytesConfig:
    """The configuration that a run was trained with, from its record."""
    from transformers import BitsAndBytesConfig

    ours = {"library", "version", "quant_method", "_load_in_4bit", "_load_in_8bit"}
    return BitsAndBytesConfig(**{key: value for key, value in settings.items() if key not in ours})


def quantization_facts(model: PreTrainedModel) -> dict[str, Any] | None:
    """The whole configuration of a loaded model, with the library's version; None where nothing is quantized."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    settings = {key: _plain(value) for key, value in settings.items() if not key.startswith("_")}
    return {"library": "bitsandbytes", "version": version("bitsandbytes"), **settings}


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _cannot_run(model: ModelSpec, why: str) -> ModelError:
    return ModelError(
        Problem(
            "model.quantization",
            f"{model.quantization} is asked for, and {why}",
            "install bitsandbytes for this machine, or write quantization: none",
        )
    )
