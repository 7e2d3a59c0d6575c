"""An architecture as data: what planner, kernels, loading, training and merging have to know of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

EMBEDDING, HEAD = "embed_tokens", "lm_head"
"""The two ends of a model: modules with a row for each token."""

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
DENSE_GROUPS = {"all-linear": ATTENTION_MODULES + MLP_MODULES, "attention": ATTENTION_MODULES, "mlp": MLP_MODULES}

ONLY_IF_NAMED = re.compile(r"(^|\.)(gate|router|shared_expert_gate|visual|vision_tower|audio_tower)(\.|$)")
"""Routers of experts, and towers of models that see and hear: they get an adapter only if the recipe names them."""

EXPERT_PARTS: Mapping[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The parameters that hold all experts of a layer, in the order in which PEFT wraps them (the first is the innermost),
each with the tensors of one expert in checkpoints that keep experts apart."""

QUANTIZED = re.compile(r"(?!.*\.experts\.)(?:(?!\.layers\.\d).)*\.layers\.\d+\..*_proj\.weight")
"""The tensors of a checkpoint that bitsandbytes quantizes: linear layers of decoder layers. Experts are parameters of
three dimensions, which it leaves as they are, and so is the output matrix."""

PACKING_ATTENTIONS = ("eager", "sdpa", "varlen", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True)
class Experts:
    """A mixture of experts, by the keys of config.json; `default_` stands for keys that are missing."""

    count_key: str
    default_count: int
    chosen_key: str
    default_chosen: int
    width_key: str
    default_width: int


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: Its name in config.json.
        title: The models, for people.
        modeling: The module of Transformers that has its layers.
        prefix: What the names of its classes begin with.
        head_dim: Channels of a head where config.json does not say; None for hidden size over heads.
        kv_heads: Key heads where config.json does not say.
        qkv_bias: Whether q, k and v have a bias; None for what `attention_bias` says.
        output_bias: The same of the attention's output.
        head_norms: Whether query and key heads are normalized.
        groups: The modules that a group of `lora.target_modules` stands for.
        experts: Its experts, if it has any. They and their router stay frozen.
        packing: The attentions with which every token of a pack was shown to have the loss that it has alone
            (tests/test_attention.py).
    """

    model_type: str
    title: str
    modeling: str
    prefix: str
    head_dim: int | None = None
    kv_heads: int = 32
    qkv_bias: bool | None = None
    output_bias: bool | None = None
    head_norms: bool = True
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: DENSE_GROUPS, hash=False)
    experts: Experts | None = None
    packing: tuple[str, ...] = PACKING_ATTENTIONS
