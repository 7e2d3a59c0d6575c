"""Microbatch and checkpointing for the device that a run has found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_tune.machine import available_memory_bytes, uses_gpu, world_size
from qwen_tune.model.base import BaseCheckpoint
from qwen_tune.model.dtypes import Dtype
from qwen_tune.planner.choice import Choice, choose
from qwen_tune.planner.job import Attention, read_job
from qwen_tune.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch


def fit(recipe: Recipe, base: BaseCheckpoint, dtype: torch.dtype) -> Choice:
    """The fastest plan that the GPU's memory allows; on a CPU nothing is computed again.

    Raises:
        ModelError: A name in the recipe means no module of the model, or it asks for an attention that is not here.
    """
    from qwen_tune.model.attention import choose_attention

    names: dict[str, Dtype] = {
        "torch.bfloat16": "bfloat16",
        "torch.float16": "float16",
        "torch.float32": "float32",
    }
    chosen = choose_attention(recipe.model, dtype, base.shape.head_size)
    attention: Attention = "eager" if chosen == "eager" else "sdpa" if chosen == "sdpa" else "varlen"
    job = read_job(
        recipe, base.shape, dtype=names[str(dtype)], attention=attention, processes=world_size(), on_gpu=uses_gpu()
    )
    return choose(job, recipe.train, available_memory_bytes() if uses_gpu() else None)
