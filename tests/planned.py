"""Recipes and models for the planner's tests: configurations as Qwen's checkpoints have them, without the rest."""

from __future__ import annotations

from typing import Any

from qwen_tune.errors import ModelError
from qwen_tune.families.attention import choose_attention
from qwen_tune.families.shape import read_shape
from qwen_tune.planner.workload import Workload, read_workload
from qwen_tune.recipe.schema import Recipe


def config(kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict:
    """The keys of a config.json that make a shape."""
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **({"head_dim": 128} if kind != "qwen2" else {}),
    }


QWEN25_7B = config("qwen2", 3584, 18944, 28, 28, 4, 152064)
CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-0.5B-Instruct": {**config("qwen2", 896, 4864, 24, 14, 2, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen2.5-1.5B-Instruct": {**config("qwen2", 1536, 8960, 28, 12, 2, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B": QWEN25_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN25_7B,
    "Qwen/Qwen2.5-Coder-7B-Instruct": QWEN25_7B,
    "Qwen/Qwen2.5-Math-7B-Instruct": QWEN25_7B,
    "Qwen/Qwen2.5-72B-Instruct": config("qwen2", 8192, 29568, 80, 64, 8, 152064),
    "Qwen/Qwen3-0.6B": {**config("qwen3", 1024, 3072, 28, 16, 8, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen3-4B": {**config("qwen3", 2560, 9728, 36, 32, 8, 151936), "tie_word_embeddings": True},
    "Qwen/Qwen3-8B": config("qwen3", 4096, 12288, 36, 32, 8, 151936),
    "Qwen/Qwen3-30B-A3B": {
        **config("qwen3_moe", 2048, 6144, 48, 32, 4, 151936),
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
}


def made_recipe(**sections: dict[str, Any]) -> Recipe:
    """A recipe of defaults but for some keys."""
    data = {"train": [{"path": "rows.jsonl"}], **sections.pop("data", {})}
    model = {"base": "Qwen/Qwen2.5-7B-Instruct", **sections.pop("model", {})}
    return Recipe.model_validate({"name": "made", "model": model, "data": data, **sections})


def workload(recipe: Recipe, *, processes: int = 1, on_gpu: bool = True, dtype: str | None = None) -> Workload:
    """What a recipe with one of the bases above is to the planner."""
    shape = read_shape(CONFIGS[recipe.model.base], recipe.model.base)
    own: Any = dtype or ("bfloat16" if on_gpu else "float32")
    try:
        attention = choose_attention(recipe.model.attention, own, shape, has_flash=on_gpu)
    except ModelError:
        attention = "sdpa"
    return read_workload(recipe, shape, dtype=own, attention=attention, processes=processes, on_gpu=on_gpu)
