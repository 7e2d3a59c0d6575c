"""TRL's configuration for a recipe, and whether the recipe's `trainer_args` suit it."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import torch
from transformers import Trainer
from trl import SFTConfig

from qwen_tune.errors import Problem, RecipeError, first_line
from qwen_tune.fused.install import Fused, fuse
from qwen_tune.machine import uses_gpu
from qwen_tune.recipe.schema import Recipe
from qwen_tune.training.batch_plan import Schedule

if TYPE_CHECKING:
    from peft import PeftModel


def sft_config(recipe: Recipe, schedule: Schedule, dtype: torch.dtype) -> SFTConfig:
    """TRL's configuration for a recipe. Everything that the toolkit does itself is switched off here.

    Raises:
        RecipeError: The recipe's `trainer_args` do not suit.
    """
    on_cpu = not uses_gpu()
    train = recipe.train
    settings = {
        # Never written to, but made; the run directory appears when the run begins.
        "output_dir": tempfile.gettempdir(),
        # Rows come tokenized, packed and collated by us.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": False,
        "padding_free": False,
        "max_length": None,
        "remove_unused_columns": False,
        # Files, logs and progress are ours; the trainer only says when.
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": train.logging_steps,
        "save_strategy": "steps" if train.save_steps else "no",
        "save_steps": train.save_steps or 500,
        "eval_strategy": "steps" if train.eval_steps else "no",
        "eval_steps": train.eval_steps,
        # This filter waits for the device at every micro-batch; `StepWatch` looks at losses.
        "logging_nan_inf_filter": False,
        "per_device_train_batch_size": schedule.per_device_train_batch_size,
        "per_device_eval_batch_size": schedule.per_device_train_batch_size,
        "gradient_accumulation_steps": schedule.gradient_accumulation_steps,
        "num_train_epochs": train.num_train_epochs,
        "max_steps": train.max_steps or -1,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": train.lr_scheduler_type,
        "warmup_steps": schedule.warmup_steps,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "optim": train.optim,
        "seed": train.seed,
        "gradient_checkpointing": schedule.gradient_checkpointing == "full",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": on_cpu,
        # From pinned memory a batch is copied while the GPU computes.
        "dataloader_pin_memory": not on_cpu,
        "accelerator_config": {"non_blocking": not on_cpu},
        # Every trained tensor takes part in every step: nothing to look for, and looking costs time.
        "ddp_find_unused_parameters": False,
    }
    try:
        return SFTConfig(**{**settings, **train.trainer_args})
    except (TypeError, ValueError, KeyError, ImportError) as error:
        if not train.trainer_args:
            raise
        raise _unsuitable_arguments(error) from error


def fuse_layers(model: PeftModel, recipe: Recipe, schedule: Schedule) -> Fused | None:
    """Lets decoder layers train in their fused form, unless the recipe has it off.

    Raises:
        RecipeError: The recipe wants MLPs computed again or layers compiled, and some of them are not fused.
    """
    again = schedule.gradient_checkpointing == "selective"
    whole = recipe.train.torch_compile
    fused = fuse(model, recompute_mlp=again, compile_layers=whole) if recipe.model.kernels == "auto" else None
    if again and (fused is None or fused.mlp < fused.layers):
        what = f"got selective, which computes the MLPs of fused layers again: {fused or 'model.kernels is off'}"
        raise RecipeError(Problem("train.gradient_checkpointing", what, "write full"))
    if whole and fused and fused.reasons:
        what = f"got true, which compiles fused layers: {fused}"
        raise RecipeError(Problem("train.torch_compile", what, "write false"))
    return fused


def try_trainer_args(trainer: Trainer, recipe: Recipe, schedule: Schedule) -> None:
    """Makes optimizer, scheduler and loader once before anything is written: the recipe may not suit them.

    Raises:
        RecipeError: They refuse their arguments.
    """
    try:
        trainer.get_train_dataloader()
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=schedule.max_steps)
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        if recipe.train.trainer_args:
            raise _unsuitable_arguments(error) from error
        what = f"the trainer refuses optimizer or learning rate: {first_line(error)}"
        raise RecipeError(Problem("train", what, "see train.optim, learning_rate and lr_scheduler_type")) from error
    trainer.optimizer = trainer.lr_scheduler = None


def _unsuitable_arguments(error: Exception) -> RecipeError:
    what = f"the trainer refuses them: {first_line(error)}"
    return RecipeError(Problem("train.trainer_args", what, "change or remove them"))
