"""The facts of a run, as run.json keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from qwen_tune.base import BaseCheckpoint
from qwen_tune.machine import device_name, library_versions, peak_memory_bytes, world_size
from qwen_tune.preparation import PreparedData
from qwen_tune.recipe import Recipe
from qwen_tune.schedule import Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_tune.trainer import LoraTrainer


def start_facts(
    recipe: Recipe,
    overrides: Sequence[str],
    base: BaseCheckpoint,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    schedule: Schedule,
    trainer: LoraTrainer,
) -> dict[str, Any]:
    """What is known before the first step."""
    template = tokenizer.chat_template
    assert isinstance(template, str)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return {
        "overrides": list(overrides),
        "engine": "single" if world_size() == 1 else "ddp",
        "world_size": world_size(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "base": {
            "id": base.id,
            "revision": base.revision,
            "local_path": str(base.path),
            "config_sha256": base.config_sha256(),
            "weights_fingerprint": base.weights_fingerprint(),
            "dtype": str(trainer.model.get_base_model().dtype).removeprefix("torch."),
        },
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "data_fingerprint": data.fingerprint(),
        **data.facts(),
        "schedule": schedule.facts(),
        "quantization": None,
        "adapter": {
            "dtype": str(trained[0].dtype).removeprefix("torch."),
            "init": recipe.lora.init_lora_weights,
            "targets": trainer.targets,
            "trainable_parameters": sum(parameter.numel() for parameter in trained),
        },
        "masking": {"loss_on": recipe.data.loss_on, "thinking": recipe.data.thinking},
        "attention": trainer.model.config._attn_implementation,
        "gradient_checkpointing": bool(trainer.args.gradient_checkpointing),
        "checkpoints": [],
    }


def end_facts(
    start: Mapping[str, Any], trainer: LoraTrainer, before: float | None, after: float | None
) -> dict[str, Any]:
    """What is known after the last step.

    Args:
        start: What was recorded before the first step.
        trainer: The trainer that has trained.
        before: Evaluation loss before the first step, nats a token.
        after: The same after the last.
    """
    losses = trainer.metrics.losses
    return {
        "steps": trainer.state.global_step,
        "losses": {
            "train_first": losses[0] if losses else None,
            "train_last": losses[-1] if losses else None,
            "eval_before": before,
            "eval_after": after,
        },
        "tokens": {
            **start["tokens"],
            "processed": trainer.tokens_processed,
            "padding": trainer.padding_processed,
        },
        "tokens_per_second": trainer.metrics.tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(),
    }
