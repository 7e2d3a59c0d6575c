"""Qwen2 and Qwen2.5: dense text models with biases on q, k and v."""

from qwen_tune.families.family import Family

QWEN2 = Family(
    model_type="qwen2",
    title="dense Qwen2.5",
    modeling="transformers.models.qwen2.modeling_qwen2",
    prefix="Qwen2",
    qkv_bias=True,
    output_bias=False,
    head_norms=False,
)
