"""A recipe on a model and a kind of device, reduced to what memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwen_tune.planner.adapter import Adapter, read_adapter
from qwen_tune.planner.shape import Shape
from qwen_tune.recipe.schema import Recipe

Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["eager", "sdpa", "varlen"]

LABELLED_SHARE = 1.0  # of tokens: the most; what rows really label is known once they are prepared


@dataclass(frozen=True)
class Job:
    """What is counted.

    Attributes:
        shape: The model.
        adapter: What is trained on it.
        dtype: The type of the base, and of all products.
        quantization: How the decoder layers' matrices are held.
        attention: How attention is computed; `varlen` stands for every kernel that takes the samples' boundaries.
        packing: Whether a row of the data is a pack of samples.
        row_tokens: The longest row in tokens.
        fused: Whether decoder layers train in their fused form, by halves: attention, MLP.
        dropout: Whether the adapters have some.
        dora: Whether they are DoRA.
        optim: The optimizer's name.
        processes: Processes of the run, each with the whole model.
        on_gpu: Or on a CPU, whose kernels keep other things.
        labelled_share: Share of tokens with a label.
    """

    shape: Shape
    adapter: Adapter
    dtype: Dtype
    quantization: Literal["none", "int8", "nf4"]
    attention: Attention
    packing: bool
    row_tokens: int
    fused: tuple[bool, bool]
    dropout: bool
    dora: bool
    optim: str
    processes: int = 1
    on_gpu: bool = True
    labelled_share: float = LABELLED_SHARE

    @property
    def width(self) -> int:
        """Bytes of a number that is computed with."""
        return 4 if self.dtype == "float32" else 2

    @property
    def is_fused(self) -> bool:
        """Whether any half of a layer is."""
        return any(self.fused)

    def is_masked(self, rows: int) -> bool:
        """Whether attention over some rows, joined into one, needs a matrix that keeps samples apart."""
        return self.attention != "varlen" and (self.packing or rows > 1)


def read_job(recipe: Recipe, shape: Shape, *, dtype: Dtype, processes: int = 1, on_gpu: bool = True) -> Job:
    """What a recipe is to the planner.

    Args:
        recipe: The recipe.
        shape: Its base.
        dtype: What `model.dtype` comes to on the device.
        processes: Processes of the run.
        on_gpu: Whether the device is one.

    Raises:
        ModelError: A name in the recipe means no module of the model.
    """
    adapter = read_adapter(shape, recipe.lora)
    return Job(
        shape=shape,
        adapter=adapter,
        dtype=dtype,
        quantization=recipe.model.quantization,
        attention=_attention(recipe, dtype, on_gpu=on_gpu),
        packing=recipe.data.packing,
        row_tokens=recipe.data.max_length_tokens,
        fused=_fused(recipe, shape),
        dropout=recipe.lora.lora_dropout > 0,
        dora=recipe.lora.use_dora,
        optim=recipe.train.optim,
        processes=processes,
        on_gpu=on_gpu,
    )


def _attention(recipe: Recipe, dtype: Dtype, *, on_gpu: bool) -> Attention:
    """What `model.attention` comes to: `model.attention.choose_attention`, told from what GPUs with bfloat16 have."""
    name = recipe.model.attention
    if name == "auto":
        return "varlen" if on_gpu and dtype == "bfloat16" else "sdpa"
    return name if name in ("eager", "sdpa") else "varlen"


def _fused(recipe: Recipe, shape: Shape) -> tuple[bool, bool]:
    """Whether the halves of a layer are fused: what `fused.reading` and `fused.install` find, told from the recipe."""
    lora = recipe.lora
    plain = (
        recipe.model.kernels == "auto"
        and recipe.model.quantization != "int8"
        and lora.lora_dropout == 0
        and not lora.use_dora
        and lora.bias == "none"
        and not any("norm" in name or "layers" in name for name in lora.modules_to_save or ())
    )
    return plain, plain and shape.activation == "silu"
