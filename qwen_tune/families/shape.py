"""A dense Qwen model as sizes, read from config.json: which matrices it has, and how many parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qwen_tune.errors import ModelError, Problem


@dataclass(frozen=True)
class Linear:
    """A linear layer: its matrix has shape (outputs, inputs)."""

    inputs: int
    outputs: int
    bias: bool

    @property
    def parameters(self) -> int:
        """Of the matrix alone."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. `head_size` are the channels of one head; `head_norms` is whether Qwen3's are there."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    head_norms: bool
    activation: str

    @property
    def query(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_size

    @property
    def key(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.kv_heads * self.head_size

    @cached_property
    def layer(self) -> Mapping[str, Linear]:
        """The linear layers of one decoder layer by their names in it."""
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

    @cached_property
    def linears(self) -> Mapping[str, Linear]:
        """Every linear layer by its whole name, without the output layer."""
        return {
            f"model.layers.{number}.{name}": linear
            for number in range(self.layers)
            for name, linear in self.layer.items()
        }

    @property
    def body(self) -> int:
        """Parameters of all matrices of the decoder layers."""
        return self.layers * sum(linear.parameters for linear in self.layer.values())

    @property
    def gate_and_up(self) -> int:
        """Those of them that the MLPs begin with."""
        return self.layers * 2 * self.hidden * self.intermediate

    @property
    def head(self) -> int:
        """Parameters of the output matrix; one that is tied is the embeddings."""
        return self.vocabulary * self.hidden

    @cached_property
    def modules(self) -> Mapping[str, int]:
        """Parameters of every module that has some of its own, by its whole name."""
        sizes = {"model.embed_tokens": self.head, "model.norm": self.hidden, "lm_head": self.head}
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            sizes |= {f"{layer}.input_layernorm": self.hidden, f"{layer}.post_attention_layernorm": self.hidden}
            if self.head_norms:
                sizes |= {f"{layer}.self_attn.{name}": self.head_size for name in ("q_norm", "k_norm")}
        linears = {name: x.parameters + x.outputs * x.bias for name, x in self.linears.items()}
        return {**sizes, **linears}

    @property
    def parameters(self) -> int:
        """All of the model's; a tied matrix counts once."""
        return sum(self.modules.values()) - (self.head if self.tied else 0)


def read_shape(config: Mapping[str, Any], where: str) -> Shape:
    """The sizes that a config.json states, with Transformers' defaults for qwen2 and qwen3.

    Args:
        config: config.json of a dense text model.
        where: What to call it in a message.

    Raises:
        ModelError: A size is missing or no positive whole number.
    """

    def size(key: str, default: int | None = None) -> int:
        value = default if config.get(key) is None else config[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = f"{key} is {config.get(key)!r}; expected a positive whole number"
            raise ModelError(Problem(f"{where}/config.json", what, "download the checkpoint again"))
        return value

    qwen3 = config.get("model_type") == "qwen3"
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    attention_bias = bool(config.get("attention_bias", False))
    return Shape(
        hidden=hidden,
        intermediate=size("intermediate_size"),
        layers=size("num_hidden_layers"),
        heads=heads,
        # Where the key is missing it is 32, where it is null as many as heads.
        kv_heads=size("num_key_value_heads", heads if "num_key_value_heads" in config else 32),
        head_size=size("head_dim", 128 if qwen3 else hidden // heads),
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias if qwen3 else True,
        output_bias=attention_bias if qwen3 else False,
        head_norms=qwen3,
        activation=str(config.get("hidden_act", "silu")),
    )
