"""Models as data: true shapes of Qwen2.5, and the floating-point operations that training an adapter on them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

RANK = 16
ALPHA = 32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Wider than Qwen's 0.02: attention and adapters must move the loss, or a wrong one would not show in it.
INITIALIZER_RANGE = 0.04


@dataclass(frozen=True)
class Shape:
    """A dense Qwen2 model, in the numbers of its config.json."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool

    @property
    def key_value_size(self) -> int:
        """Channels of all keys, or of all values."""
        return self.hidden_size // self.num_attention_heads * self.num_key_value_heads

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers."""
        hidden, inner, narrow = self.hidden_size, self.intermediate_size, self.key_value_size
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, narrow),
            "v_proj": (hidden, narrow),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def config(self) -> dict[str, Any]:
        """What Qwen2Config takes."""
        sizes = {key: value for key, value in vars(self).items() if key != "name"}
        return {**sizes, "max_position_embeddings": 32768, "initializer_range": INITIALIZER_RANGE}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("0.5b", 896, 4864, 24, 14, 2, 151936, True),
        Shape("1.5b", 1536, 8960, 28, 12, 2, 151936, True),
        Shape("7b", 3584, 18944, 28, 28, 4, 152064, False),
        # For a CPU: a quarter of 0.5b's width and of its layers, with its share of operations in the head.
        Shape("0.5b-small", 224, 1216, 6, 14, 2, 9496, True),
    )
}


def flops(
    shape: Shape, lengths: Sequence[int], supervised_tokens: int, rank: int = RANK, *, causal: bool = True
) -> dict[str, int]:
    """The fewest floating-point operations of forward and backward over samples, by what they are spent on.

    The base is frozen: a weight takes 2 operations a token forward and 2 for the gradient of its input, none for its
    own. Adapters take 2 more. The output matrix is needed at labelled tokens alone. Attention's backward, which
    computes the scores again, takes 2.5 times its forward. Below the first layer nothing is trained, so that the
    gradient of the input of its query, key and value projections is not needed. Norms, activations, the optimizer and
    whatever is computed twice to save memory count nothing.

    Args:
        shape: The model.
        lengths: Tokens of each sample; each attends to itself alone.
        supervised_tokens: Tokens of all samples that are supervised.
        rank: Of the adapters, on all seven linear layers.
        causal: Whether attention leaves out what is masked; else it counts whole squares, as torch's counter does.
    """
    tokens = sum(lengths)
    sizes = shape.linear_sizes()
    layer = sum(inputs * outputs for inputs, outputs in sizes.values())
    adapter = sum(rank * (inputs + outputs) for inputs, outputs in sizes.values())
    first = [sizes[name] for name in ("q_proj", "k_proj", "v_proj")]
    unneeded = sum(inputs * outputs for inputs, outputs in first)
    unneeded_adapter = sum(rank * inputs for inputs, _ in first)
    squares = sum(length * length for length in lengths)
    attention = 4 * squares * shape.hidden_size * shape.num_hidden_layers // (2 if causal else 1)
    return {
        "body": tokens * (4 * layer * shape.num_hidden_layers - 2 * unneeded),
        "head": 4 * supervised_tokens * shape.hidden_size * shape.vocab_size,
        "adapters": tokens * (6 * adapter * shape.num_hidden_layers - 2 * unneeded_adapter),
        "attention": attention * 7 // 2,
    }


def flops_per_token(shape: Shape, lengths: Sequence[int], supervised_tokens: int) -> float:
    """The fewest operations a token; see `flops`."""
    return sum(flops(shape, lengths, supervised_tokens).values()) / sum(lengths)
