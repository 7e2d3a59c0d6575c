"""The facts of a run, as run.json keeps them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from qwen_tune.compat import attention_of
from qwen_tune.data.files import names_hub_data_set
from qwen_tune.data.inputs import Inputs
from qwen_tune.distributed.world import world_size
from qwen_tune.machine import device_name, library_versions, peak_memory_bytes
from qwen_tune.model.adapter import trained_modules
from qwen_tune.model.quantization import quantization_facts
from qwen_tune.planner.choice import Choice
from qwen_tune.recipe.files import to_yaml
from qwen_tune.recipe.schema import Recipe
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.drift import run_fingerprint
from qwen_tune.training.batch_plan import Schedule

if TYPE_CHECKING:
    from qwen_tune.training.trainer import LoraTrainer


def start_facts(
    recipe: Recipe,
    overrides: Sequence[str],
    inputs: Inputs,
    schedule: Schedule,
    batch_plan: Choice,
    dtype: torch.dtype,
    *,
    pretrained_only: bool,
) -> dict[str, Any]:
    """What is known before the weights are loaded, with the `fingerprint` of all that decides the result."""
    base, data, tokenizer = inputs.base, inputs.data, inputs.tokenizer
    template = tokenizer.chat_template
    assert isinstance(template, str)
    facts = {
        "overrides": list(overrides),
        "engine": "single" if world_size() == 1 else "ddp",
        "world_size": world_size(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": library_versions(),
        "base": {
            "id": base.id,
            "revision": base.revision,
            "local_path": str(base.path),
            "config_sha256": base.config_sha256(),
            "weights_fingerprint": base.weights_fingerprint(),
            "untuned": pretrained_only,
        },
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "data_fingerprint": data.fingerprint(),
        "data_sets": _data_sets(recipe),
        **data.facts,
        "schedule": schedule.facts(),
        "plan": batch_plan.facts(),
        "masking": {"loss_on": recipe.data.loss_on, "thinking": recipe.data.thinking},
    }
    return {**facts, "fingerprint": run_fingerprint(to_yaml(recipe), facts)}


def _data_sets(recipe: Recipe) -> list[str]:
    """The sources that are Hub data sets. Recorded now: later a folder of such a name may be gone."""
    held_out = recipe.data.eval if isinstance(recipe.data.eval, list) else []
    paths = [source.path for source in [*recipe.data.train, *held_out]]
    return sorted({path for path in paths if names_hub_data_set(path)})


def model_facts(trainer: LoraTrainer) -> dict[str, Any]:
    model = trainer.model
    config = model.peft_config["default"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modules = trained_modules(model)
    return {
        "dtype": str(model.get_base_model().dtype).removeprefix("torch."),
        "quantization": quantization_facts(model.get_base_model()),
        "adapter": {
            "dtype": str(trained[0].dtype).removeprefix("torch."),
            "init": trainer.job.recipe.lora.init_lora_weights,
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "targets": sorted(config.target_modules),
            "trained_tokens": config.trainable_token_indices,
            "modules": {name: asdict(counts) for name, counts in modules.items()},
            "trainable_parameters": sum(parameter.numel() for parameter in trained),
        },
        "attention": attention_of(model.config),
        "fused": asdict(trainer.fused) if trainer.fused else None,
        "gradient_checkpointing": trainer.job.schedule.gradient_checkpointing,
    }


def end_facts(run: RunDir, trainer: LoraTrainer, before: float | None, after: float | None) -> dict[str, Any]:
    """What is known after the last step.

    Args:
        run: The run, with its metrics.
        trainer: The trainer that has trained.
        before: Evaluation loss before the first step, nats/token.
        after: The same after the last.
    """
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    return {
        "steps": trainer.state.global_step,
        "losses": {
            "train_first": losses[0] if losses else None,
            "train_last": losses[-1] if losses else None,
            "eval_before": before,
            "eval_after": after,
        },
        "best": trainer.evaluations.facts()["best"],
        "tokens": {**run.facts["tokens"], **vars(trainer.steps.counts)},
        "tokens_per_second": trainer.metrics.tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(),
    }
