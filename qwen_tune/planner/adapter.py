"""What a recipe trains on a model, as shapes of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from qwen_tune.errors import ModelError, Problem
from qwen_tune.families.family import EMBEDDING, HEAD
from qwen_tune.families.shape import Shape
from qwen_tune.model.targets import rank_of, wanted_modules
from qwen_tune.recipe.schema import LoraSpec


@dataclass(frozen=True)
class Adapter:
    """What is trained.

    Attributes:
        ranks: Of each layer's linear layers that have an adapter, by their names in the layer.
        lora: Shapes of the adapters' matrices.
        others: Shapes of all else: DoRA's magnitudes, biases, whole modules, token rows.
        whole: The modules that are trained as a whole, by their full names.
        trains_embeddings: Whether the input of the first layer gets a gradient.
        trains_head: Whether the output matrix is trained as a whole.
    """

    ranks: tuple[Mapping[str, int], ...]
    lora: tuple[tuple[int, int], ...]
    others: tuple[tuple[int, ...], ...]
    whole: frozenset[str]
    trains_embeddings: bool
    trains_head: bool

    @property
    def tensors(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all trained tensors."""
        return self.lora + self.others

    @cached_property
    def lora_parameters(self) -> int:
        return sum(prod(shape) for shape in self.lora)

    @cached_property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.tensors)


def read_adapter(shape: Shape, lora: LoraSpec) -> Adapter:
    """What a recipe's adapter is on a model.

    The two token rows of a base checkpoint, which are trained where the recipe says nothing of them, are not counted:
    that it is one only its tokenizer tells, and they are some kilobytes.

    Raises:
        ModelError: A name in the recipe means no module of the model.
    """
    wanted = wanted_modules(list(shape.linears), lora, shape.family)
    ranks = [
        {
            name: rank_of(f"model.layers.{number}.{name}", lora)
            for name in shape.layer(number)
            if f"model.layers.{number}.{name}" in wanted
        }
        for number in range(shape.layers)
    ]
    matrices: list[tuple[int, int]] = []
    others: list[tuple[int, ...]] = []
    for number, of_layer in enumerate(ranks):
        for name, linear in shape.layer(number).items():
            rank = of_layer.get(name)
            if rank is not None:
                matrices += [(rank, linear.inputs), (linear.outputs, rank)]
                others += [(linear.outputs,)] if lora.use_dora else []
            if linear.bias and (lora.bias == "all" or (lora.bias == "lora_only" and rank is not None)):
                others.append((linear.outputs,))
    whole = frozenset(name for wanted_name in lora.modules_to_save or () for name in _parts(shape, wanted_name))
    others += [(shape.modules[name],) for name in sorted(whole)]
    tokens = lora.trainable_token_indices or ()
    rows = sum(map(len, tokens.values())) if isinstance(tokens, Mapping) else len(tokens)
    others += [(rows, shape.hidden)] if rows else []
    return Adapter(
        ranks=tuple(ranks),
        lora=tuple(matrices),
        others=tuple(others),
        whole=whole,
        trains_embeddings=bool(rows) or f"model.{EMBEDDING}" in whole,
        trains_head=HEAD in whole,
    )


def _parts(shape: Shape, name: str) -> list[str]:
    """The modules with parameters that a name in `modules_to_save` means: those that end in it, or all that they hold.

    PEFT looks for no dot before it, so that `norm` means `input_layernorm` and `q_norm` as well.
    """
    found = []
    for full in shape.modules:
        words = full.split(".")
        holders = (".".join(words[:count]) for count in range(1, len(words) + 1))
        if any(holder.endswith(name) for holder in holders):
            found.append(full)
    if not found:
        raise ModelError(Problem("lora.modules_to_save", f"{name} matches no module of the model", "correct it"))
    return found
