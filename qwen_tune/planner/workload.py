"""A recipe on a model and a kind of device, reduced to what memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_tune.families.attention import VARLEN, Kernel, kernel_of
from qwen_tune.families.shape import Shape
from qwen_tune.fused import rules
from qwen_tune.hardware import Dtype
from qwen_tune.machine import repeats_key_heads
from qwen_tune.planner.adapter import Adapter, read_adapter
from qwen_tune.recipe.schema import Recipe

SUPERVISED_SHARE = 1.0  # of tokens: the most; how many are supervised is known once examples are prepared


@dataclass(frozen=True)
class Workload:
    """What is counted.

    Attributes:
        shape: The model.
        adapter: What is trained on it.
        dtype: The type of the base, and of all products.
        quantization: How the decoder layers' matrices are held.
        attention: How attention is computed; `varlen` stands for every kernel that takes the samples' boundaries.
        packing: Whether a sequence is a pack of samples.
        sequence_tokens: The longest sequence in tokens.
        fused: Of each decoder layer, whether its halves train in their fused form: attention, MLP.
        dropout: Whether the adapters have some.
        dora: Whether they are DoRA.
        optim: The optimizer's name.
        processes: Processes of the run, each with the whole model.
        on_gpu: Or on a CPU, whose kernels keep other things.
        repeats_key_heads: Whether the kernel of packs gets keys and values once for every query head.
        supervised_share: Share of tokens with a label.
    """

    shape: Shape
    adapter: Adapter
    dtype: Dtype
    quantization: Literal["none", "int8", "nf4"]
    attention: Kernel
    packing: bool
    sequence_tokens: int
    fused: tuple[tuple[bool, bool], ...]
    dropout: bool
    dora: bool
    optim: str
    processes: int = 1
    on_gpu: bool = True
    repeats_key_heads: bool = False
    supervised_share: float = SUPERVISED_SHARE

    @property
    def width(self) -> int:
        """Bytes of an activation's number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def is_fused(self) -> bool:
        """Whether any half of a layer is fused."""
        return any(any(halves) for halves in self.fused)

    @property
    def fuses_every_mlp(self) -> bool:
        """Whether the MLP halves of all layers are fused."""
        return all(mlp for _, mlp in self.fused)

    def is_masked(self, sequences: int) -> bool:
        """Whether attention over some packs, joined into one, needs a mask that separates samples."""
        return self.attention != "varlen" and (self.packing or sequences > 1)


def read_workload(
    recipe: Recipe, shape: Shape, *, dtype: Dtype, attention: str, processes: int = 1, on_gpu: bool = True
) -> Workload:
    """What a recipe is to the planner.

    Args:
        recipe: The recipe.
        shape: Its base.
        dtype: What `model.dtype` comes to on the device.
        attention: What `model.attention` comes to there; see `families.attention`.
        processes: Processes of the run.
        on_gpu: Whether the device is one.

    Raises:
        ModelError: A name in the recipe means no module of the model.
    """
    adapter = read_adapter(shape, recipe.lora)
    return Workload(
        shape=shape,
        adapter=adapter,
        dtype=dtype,
        quantization=recipe.model.quantization,
        attention=kernel_of(attention),
        packing=recipe.data.packing,
        sequence_tokens=recipe.data.max_length_tokens,
        fused=_fused(recipe, shape, adapter),
        dropout=recipe.lora.lora_dropout > 0,
        dora=recipe.lora.use_dora,
        optim=recipe.train.optim,
        processes=processes,
        on_gpu=on_gpu,
        repeats_key_heads=attention == VARLEN and repeats_key_heads(),  # FlashAttention's own packages group heads
    )


def _fused(recipe: Recipe, shape: Shape, adapter: Adapter) -> tuple[tuple[bool, bool], ...]:
    """Which halves of layers train in their fused form: by the rules that `fused.reading` has for a model's modules."""
    lora, kind = recipe.lora, rules.LINEAR_KINDS[recipe.model.quantization]

    def fault(layer: int, norm: str, part: str) -> str | None:
        names = [name for name in shape.layer(layer) if name.startswith(part)]
        of_layer = f"model.layers.{layer}."
        whole = [name.removeprefix(of_layer) for name in adapter.whole if name.startswith(of_layer)]
        adapted = [name for name in names if name in adapter.ranks[layer]]
        biased = [name for name in (names if lora.bias == "all" else adapted) if shape.matrices[name].bias]
        is_trained = any(name.startswith(part) for name in whole) or (lora.bias != "none" and bool(biased))
        return (
            (None if names else rules.unknown_layer(part))
            or rules.norm_fault(is_trained=any(name.startswith(norm) for name in whole))
            or rules.linear_fault(kind, is_trained=is_trained)
            or (rules.activation_fault(shape.activation) if part == "mlp." else None)
            or (
                rules.adapter_fault(is_variant=lora.use_dora, has_bias=False, has_dropout=lora.lora_dropout > 0)
                if adapted
                else None
            )
        )

    if recipe.model.kernels != "auto":
        return ((False, False),) * shape.layers
    return tuple(
        (
            fault(layer, "input_layernorm", "self_attn.") is None,
            fault(layer, "post_attention_layernorm", "mlp.") is None,
        )
        for layer in range(shape.layers)
    )
