"""A model as sizes, read from config.json: which matrices it has, and how many parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwen_tune.errors import ModelError, Problem
from qwen_tune.families.family import EMBEDDING, HEAD, Family
from qwen_tune.families.known import family_of


@dataclass(frozen=True)
class Linear:
    """A linear layer: its matrix has shape (outputs, inputs)."""

    inputs: int
    outputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a layer: how many, how many of them a token goes through, their intermediate size, and the
    numbers of the layers that have them.
    """

    count: int
    chosen: int
    intermediate: int
    layers: frozenset[int]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. `head_dim` are the channels of one head, `intermediate` is of dense MLPs."""

    family: Family
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    activation: str
    experts: ExpertShape | None = None

    @property
    def query(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    @cached_property
    def matrices(self) -> Mapping[str, Linear]:
        """The linear layers that a decoder layer may have, by their names in it."""
        h, f, q, k = self.hidden, self.intermediate, self.query, self.key
        return {
            "self_attn.q_proj": Linear(h, q, self.qkv_bias),
            "self_attn.k_proj": Linear(h, k, self.qkv_bias),
            "self_attn.v_proj": Linear(h, k, self.qkv_bias),
            "self_attn.o_proj": Linear(q, h, self.output_bias),
            "mlp.gate_proj": Linear(h, f, False),
            "mlp.up_proj": Linear(h, f, False),
            "mlp.down_proj": Linear(f, h, False),
        }

    def layer(self, number: int) -> Mapping[str, Linear]:
        """The linear layers of one decoder layer; of one with experts the attention's alone."""
        return self._attention if self.has_experts(number) else self.matrices

    def has_experts(self, number: int) -> bool:
        """Whether a layer has experts in the place of an MLP."""
        return self.experts is not None and number in self.experts.layers

    @cached_property
    def _attention(self) -> Mapping[str, Linear]:
        return {name: linear for name, linear in self.matrices.items() if name.startswith("self_attn.")}

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """Every linear layer by its full name, without the output layer."""
        return {
            f"model.layers.{number}.{name}": linear
            for number in range(self.layers)
            for name, linear in self.layer(number).items()
        }

    @cached_property
    def body(self) -> int:
        """Parameters of all matrices of the decoder layers, experts not among them."""
        return sum(linear.parameters for linear in self.linears.values())

    @property
    def gate_and_up(self) -> int:
        """Parameters of gate and up projections of dense MLPs."""
        dense = self.layers - (len(self.experts.layers) if self.experts else 0)
        return dense * 2 * self.hidden * self.intermediate

    @property
    def active_experts(self) -> int:
        """Parameters of experts and routers that a token goes through."""
        if self.experts is None:
            return 0
        of_layer = 3 * self.hidden * self.experts.intermediate * self.experts.chosen + self.hidden * self.experts.count
        return len(self.experts.layers) * of_layer

    @property
    def head(self) -> int:
        """Parameters of the output matrix; one that is tied is the embeddings."""
        return self.vocabulary * self.hidden

    @cached_property
    def modules(self) -> Mapping[str, int]:
        """Parameters of every module that has its own, by its full name."""
        sizes = {f"model.{EMBEDDING}": self.head, "model.norm": self.hidden, HEAD: self.head}
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            sizes |= {f"{layer}.input_layernorm": self.hidden, f"{layer}.post_attention_layernorm": self.hidden}
            if self.family.head_norms:
                sizes |= {f"{layer}.self_attn.{name}": self.head_dim for name in ("q_norm", "k_norm")}
            if self.experts and self.has_experts(number):
                sizes[f"{layer}.mlp.experts"] = self.experts.count * 3 * self.hidden * self.experts.intermediate
                sizes[f"{layer}.mlp.gate"] = self.experts.count * self.hidden
        linears = {name: x.parameters + x.outputs * x.bias for name, x in self.linears.items()}
        return {**sizes, **linears}

    @property
    def parameters(self) -> int:
        """Of the whole model; a tied matrix counts once."""
        return sum(self.modules.values()) - (self.head if self.tied else 0)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config.json says that the output matrix is the embeddings."""
    return bool(config.get("tie_word_embeddings", False))


def stored_quantization(config: Mapping[str, Any]) -> str | None:
    """How the weights beside a config.json are quantized; None for not at all."""
    stored = config.get("quantization_config")
    return str(stored.get("quant_method", "unknown") if isinstance(stored, Mapping) else stored) if stored else None


def read_shape(config: Mapping[str, Any], where: str) -> Shape:
    """The sizes that a config.json states, with Transformers' defaults for its architecture.

    Args:
        config: config.json.
        where: What to call it in a message.

    Raises:
        ModelError: The architecture is not known, or a size is missing or not a positive whole number.
    """

    def size(key: str, default: int | None = None) -> int:
        value = default if config.get(key) is None else config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = f"{key} is {config.get(key)!r}; expected a positive whole number"
            raise ModelError(Problem(f"{where}/config.json", what, "download the checkpoint again"))
        return value

    def bias(known: bool | None) -> bool:
        return bool(config.get("attention_bias", False)) if known is None else known

    family = family_of(config, where)
    hidden, heads, layers = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
    experts = None
    if keys := family.experts:
        dense, step = config.get("mlp_only_layers") or [], size("decoder_sparse_step", 1)
        experts = ExpertShape(
            count=size(keys.count_key, keys.default_count),
            chosen=size(keys.chosen_key, keys.default_chosen),
            intermediate=size(keys.width_key, keys.default_width),
            layers=frozenset(n for n in range(layers) if n not in dense and (n + 1) % step == 0),
        )
    return Shape(
        family=family,
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=layers,
        heads=heads,
        # Where the key is null there are as many as heads.
        kv_heads=size("num_key_value_heads", heads if "num_key_value_heads" in config else family.kv_heads),
        head_dim=size("head_dim", family.head_dim or hidden // heads),
        vocabulary=size("vocab_size"),
        tied=is_tied(config),
        qkv_bias=bias(family.qkv_bias),
        output_bias=bias(family.output_bias),
        activation=str(config.get("hidden_act", "silu")),
        experts=experts,
    )
