"""Qwen3: dense text models with normalized query and key heads."""

from qwen_tune.families.family import Family

QWEN3 = Family(
    model_type="qwen3",
    title="dense Qwen3",
    modeling="transformers.models.qwen3.modeling_qwen3",
    prefix="Qwen3",
    head_dim=128,
)
