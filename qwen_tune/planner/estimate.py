"""How long a token takes: operations that have to be done, at a share of what a GPU is rated for.

An estimate that nothing has been measured against here. Where it is far off: models below 1.5B, whose many small
kernels wait for their launches, and short sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_tune.errors import ModelError, Problem, QwenTuneError
from qwen_tune.families.attention import choose_attention
from qwen_tune.families.shape import Shape
from qwen_tune.hardware import GIB, GPUS, Dtype, Gpu, automatic_cpu_dtype
from qwen_tune.machine import cpu_bfloat16_units
from qwen_tune.model.base import BaseCheckpoint
from qwen_tune.planner.activations import INNER, Checkpointing
from qwen_tune.planner.choice import Choice, choose
from qwen_tune.planner.workload import Workload, read_workload
from qwen_tune.recipe.schema import Recipe

EFFICIENCY = 0.45
"""Of the rated operations. NeMo AutoModel publishes 14,110 tokens/s for LoRA on Qwen2.5-7B, one H100, 4,096 tokens:
31.4 GFLOP a token make 443 TFLOP/s, 45 % of 989."""

NF4_BYTES_MOVED = 2.5  # a weight: half a byte read, two written


def attention_flops(work: Workload, sequences: int) -> float:
    """Operations a token of all attentions' forwards.

    2 for each of QKᵀ and PV, channel and key: with a causal kernel half of the keys of the longest sample, with a mask
    every token of the joined sequences.
    """
    keys = (
        sequences * work.sequence_tokens
        if work.is_masked(sequences) or work.attention == "eager"
        else work.sequence_tokens / 2
    )
    return work.shape.layers * 4 * work.shape.query * keys


def flops(work: Workload, sequences: int, checkpointing: Checkpointing) -> float:
    """Operations a token, forward and backward.

    4 N_body + 4 N_head (share of supervised tokens) + 6 N_lora + 3.5 attention: the base is frozen, so that its
    products need two passes and not three; the attention's backward makes its scores anew. Checkpointing adds the
    forward of what is computed again: 2 N_body, 2 N_lora and an attention, or gate and up projection alone. Of experts
    N_body has those that a token goes through.
    """
    shape, attention = work.shape, attention_flops(work, sequences)
    body = shape.body + shape.active_experts
    total = 4 * body + 4 * shape.head * work.supervised_share + 6 * work.adapter.lora_parameters + 3.5 * attention
    if checkpointing == "full":
        total += 2 * body + 2 * work.adapter.lora_parameters + attention
    elif checkpointing == "selective":
        total += 2 * (shape.gate_and_up + _inner_adapters(work))
    return total


def _inner_adapters(work: Workload) -> int:
    """Parameters of the adapters on gate and up projections."""
    inner = [(name, linear) for name, linear in work.shape.matrices.items() if name in INNER]
    return sum(
        ranks.get(name, 0) * (linear.inputs + linear.outputs) for ranks in work.adapter.ranks for name, linear in inner
    )


def tokens_per_second(work: Workload, gpu: Gpu, sequences: int, checkpointing: Checkpointing) -> float:
    """Tokens per second of one process on a GPU."""
    rate = gpu.float32_tflops if work.dtype == "float32" else gpu.tflops
    seconds = flops(work, sequences, checkpointing) / (rate * 1e12 * EFFICIENCY)
    if work.quantization == "nf4":
        # Every matrix is unpacked in the forward, in the backward, and in a forward that is done again.
        again = {"none": 0, "selective": work.shape.gate_and_up, "full": work.shape.body}[checkpointing]
        moved = NF4_BYTES_MOVED * (2 * work.shape.body + again)
        seconds += moved / (gpu.bandwidth * 1e9) / (sequences * work.sequence_tokens)
    return 1 / seconds


PART_NAMES = {
    "weights": "weights of the base",
    "adapter": "adapter and its gradient",
    "optimizer": "states of the optimizer",
    "activations": "activations that layers keep",
    "ends": "activations after the layers",
    "recomputed": "a layer computed again",
    "work": "temporaries of a layer or the loss",
    "unpacked_weights": "unpacked weights",
    "runtime": "runtime and fragmentation",
}


@dataclass(frozen=True)
class Estimate:
    """A recipe on a device; `gpu` is None for a CPU, for which no speed is estimated."""

    gpu: Gpu | None
    choice: Choice
    tokens_per_second: float | None
    run_tokens: int | None

    @property
    def name(self) -> str:
        return self.gpu.name if self.gpu else "cpu"

    @property
    def hours(self) -> float | None:
        """Duration of the run, where its number of tokens is known."""
        if self.tokens_per_second is None or self.run_tokens is None:
            return None
        return self.run_tokens / self.tokens_per_second / 3600

    def facts(self) -> dict[str, Any]:
        """For `--json`; tokens per second are the sum over all processes."""
        return {
            "device": self.name,
            "memory_bytes": self.gpu.memory_bytes if self.gpu else None,
            **self.choice.facts(),
            "dtype": self.choice.work.dtype,
            "fused": all(all(halves) for halves in self.choice.work.fused),
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
        }


def estimate(recipe: Recipe, base: BaseCheckpoint, gpus: Sequence[Gpu] | None = None) -> list[Estimate]:
    """What the planner would choose on some GPUs; without any named, on all that are known and on a CPU.

    Raises:
        QwenTuneError: The recipe does not suit the model, or a GPU that was named.
    """
    shape, processes, asked = base.shape, recipe.train.num_processes or 1, recipe.model.attention
    found = []
    for gpu in GPUS if gpus is None else gpus:
        try:
            dtype = gpu.dtype(recipe.model.dtype)
            attention = _attention_on(gpu, asked, dtype, shape)
        except QwenTuneError:
            if gpus is None:
                continue
            raise
        work = read_workload(recipe, shape, dtype=dtype, attention=attention, processes=processes)
        choice = choose(work, recipe.train, gpu.memory_bytes)
        speed = processes * tokens_per_second(work, gpu, choice.sequences, choice.checkpointing)
        found.append(Estimate(gpu, choice, speed, _run_tokens(recipe)))
    on_cpu = "sdpa" if asked == "auto" else asked
    cpu_dtype = automatic_cpu_dtype(base.config) if recipe.model.dtype == "auto" else recipe.model.dtype
    if (
        gpus is None
        and on_cpu in ("eager", "sdpa")
        and (cpu_dtype == "float32" or (cpu_dtype == "bfloat16" and cpu_bfloat16_units()))
    ):
        work = read_workload(recipe, shape, dtype=cpu_dtype, attention=on_cpu, processes=processes, on_gpu=False)
        found.append(Estimate(None, choose(work, recipe.train, None), None, _run_tokens(recipe)))
    if not found:
        what = f"got {asked} in {recipe.model.dtype}, which no device that is known here computes"
        raise QwenTuneError(Problem("model.attention", what, "write attention: auto"))
    return found


def _attention_on(gpu: Gpu, asked: str, dtype: Dtype, shape: Shape) -> str:
    """What `model.attention` comes to on a GPU.

    Raises:
        QwenTuneError: The recipe asks for one that the GPU does not have.
    """
    try:
        return choose_attention(asked, dtype, shape, has_flash=gpu.has_bfloat16)  # Ampere brought both
    except ModelError:
        what = f"{gpu.name} does not compute {asked} with heads of {shape.head_dim} channels in {dtype}"
        raise QwenTuneError(Problem("model.attention", what, "write attention: auto")) from None


def _run_tokens(recipe: Recipe) -> int | None:
    """Tokens of the run, where the recipe tells: full packs for a number of steps. Else only the examples say."""
    if recipe.train.max_steps is None or not recipe.data.packing:
        return None
    return recipe.train.max_steps * recipe.train.global_batch_size * recipe.data.max_length_tokens


def lines(recipe: Recipe, base: BaseCheckpoint, estimates: Sequence[Estimate]) -> Iterator[str]:
    """The estimates as a table, then the parts of the first that fits."""
    shape, work = base.shape, estimates[0].choice.work
    sizes = f"{shape.parameters / 1e9:.2f} billion parameters, {_trained(work.adapter.parameters)} trained"
    yield f"{recipe.name}: {base.id}, {sizes}"
    yield ""
    known = estimates[0].run_tokens is not None
    titles = (
        "device",
        "fits",
        "peak GiB",
        "of GiB",
        "batch",
        "recomputed",
        "tokens/s",
        "hours" if known else "s/1M tokens",
    )
    yield _row(titles)
    for entry in estimates:
        speed = entry.tokens_per_second
        time = entry.hours if known else None if speed is None else 1e6 / speed
        yield _row(
            (
                entry.name,
                "-" if entry.gpu is None else "yes" if entry.choice.fits else "no",
                f"{entry.choice.memory.peak / GIB:.1f}",
                f"{entry.gpu.memory_gib:.1f}" if entry.gpu else "-",
                str(entry.choice.sequences),
                {"none": "nothing", "selective": "MLPs", "full": "layers"}[entry.choice.checkpointing],
                f"{speed:,.0f}" if speed and entry.choice.fits else "-",
                f"{time:,.{2 if known else 1}f}" if time and entry.choice.fits else "-",
            )
        )
    chosen = next((entry for entry in estimates if entry.choice.fits), estimates[-1])
    yield ""
    tokens = f"{chosen.choice.sequences} x {work.sequence_tokens:,} tokens per forward"
    yield f"on {chosen.name}, {tokens}, {chosen.choice.work.dtype}:"
    for part, size in chosen.choice.memory.parts().items():
        if size:
            yield f"  {PART_NAMES[part]:36}{size / GIB:8.2f} GiB"
    yield ""
    yield f"Counted from shapes, not measured (docs/planner.md); tokens/s at {EFFICIENCY:.0%} of the GPU's rated speed."


def _trained(parameters: int) -> str:
    return f"{parameters / 1e6:,.1f} million" if parameters >= 100_000 else f"{parameters:,}"


def _row(cells: Sequence[str]) -> str:
    widths = (16, -4, -9, -7, -5, -11, -10, -12)
    return " ".join(
        f"{cell:>{-width}}" if width < 0 else f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)
    ).rstrip()
