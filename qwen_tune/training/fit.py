"""A job from its weights to its adapter."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from qwen_tune.artifacts.adapter_writer import AdapterWriter, save_adapter
from qwen_tune.compat import attention_of
from qwen_tune.distributed.engine import adapter_tensors
from qwen_tune.distributed.world import is_main_process
from qwen_tune.machine import peak_memory_bytes
from qwen_tune.model.adapter import lora_config, trained_modules
from qwen_tune.model.loading import load_base_model, own_device
from qwen_tune.model.quantization import quantization_config, quantization_facts
from qwen_tune.model.tokenizer import trained_tokens
from qwen_tune.runs.directory import RunDir
from qwen_tune.tracking.tracking import tracked
from qwen_tune.training.batch_plan import explain_out_of_memory
from qwen_tune.training.job import Job
from qwen_tune.training.recording import recording
from qwen_tune.training.summary import show_adapter
from qwen_tune.training.trainer import LoraTrainer, build_trainer


def fit(job: Job, *, overwrite: bool = False) -> None:
    """Trains the adapter of a job and saves it in the run directory, with the record of the run.

    Args:
        job: The job.
        overwrite: Whether a run in the run directory may be replaced.

    Raises:
        Interrupted: The run was asked to stop; its last step is saved.
        QwenTuneError: What the user has to change.
    """
    trainer = load_trainer(job)
    show_adapter(trainer.model, trainer.fused)
    facts = {**job.facts, **_model_facts(trainer)}
    with (
        recording(job, facts, trainer.accelerator, overwrite=overwrite),
        explain_out_of_memory(job.recipe, job.batch_plan),
        tracked(job.recipe, job.run.path, facts, job.plan) as trainer.metrics.trackers,
    ):
        before = _loss_before(trainer, job)
        trainer.train(job.plan.checkpoint)
        trainer.load_best()
        after = trainer.held_out_loss()
        tensors = adapter_tensors(trainer.model)
        if is_main_process():
            save_adapter(job.run, trainer.writer, trainer.model.peft_config["default"], tensors)
            job.run.record(_end_facts(job.run, trainer, before, after))


def load_trainer(job: Job) -> LoraTrainer:
    """Loads the weights, puts the adapter on them and makes the trainer.

    Raises:
        ModelError: The weights cannot be loaded, or the adapter does not suit them.
        RecipeError: The trainer refuses what the recipe says.
    """
    recipe = job.recipe
    quantization = quantization_config(recipe.model, job.dtype)
    model = load_base_model(recipe.model, job.base, dtype=job.dtype, device=own_device(), quantization=quantization)
    tokens = trained_tokens(job.base.config, job.tokenizer) if job.pretrained_only else None
    adapter = lora_config(model, recipe.lora, tokens)
    return build_trainer(job, model, adapter, AdapterWriter(job.tokenizer, job.base, recipe))


def _loss_before(trainer: LoraTrainer, job: Job) -> float | None:
    """The held-out loss before the first step, which a run that is resumed has recorded."""
    if job.plan.checkpoint is not None:
        recorded: float | None = job.run.facts.get("losses", {}).get("eval_before")
        return recorded
    before = trainer.held_out_loss()
    if is_main_process():
        job.run.record({"losses": {"eval_before": before}})
    return before


def _model_facts(trainer: LoraTrainer) -> dict[str, Any]:
    """What run.json says of the model and its adapter."""
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


def _end_facts(run: RunDir, trainer: LoraTrainer, before: float | None, after: float | None) -> dict[str, Any]:
    """What run.json says of a finished run; `before` and `after` are held-out losses in nats/token."""
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
