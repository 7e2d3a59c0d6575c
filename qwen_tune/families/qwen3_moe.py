"""Qwen3's mixtures of experts (30B-A3B, 235B-A22B, Coder): adapters on the attention; router and experts are frozen."""

from qwen_tune.families.family import ATTENTION_MODULES, Experts, Family

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    title="Qwen3 MoE",
    modeling="transformers.models.qwen3_moe.modeling_qwen3_moe",
    prefix="Qwen3Moe",
    kv_heads=4,
    groups={"all-linear": ATTENTION_MODULES, "attention": ATTENTION_MODULES},
    experts=Experts(
        count_key="num_experts",
        default_count=128,
        chosen_key="num_experts_per_tok",
        default_chosen=8,
        width_key="moe_intermediate_size",
        default_width=768,
    ),
)
