"""`qwen-tune estimate`: what a recipe takes on one GPU after the other, and on a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_tune.errors import Problem, QwenTuneError
from qwen_tune.machine import cpu_bfloat16_units
from qwen_tune.model.base import BaseCheckpoint
from qwen_tune.model.dtypes import automatic_cpu_dtype
from qwen_tune.planner.choice import Choice, choose
from qwen_tune.planner.gpus import GIB, GPUS, Gpu
from qwen_tune.planner.job import attention_on, read_job
from qwen_tune.planner.speed import EFFICIENCY, tokens_per_second
from qwen_tune.recipe.schema import Recipe

PART_NAMES = {
    "weights": "weights of the base",
    "adapter": "adapter and its gradient",
    "optimizer": "states of the optimizer",
    "activations": "activations that layers keep",
    "ends": "activations behind the layers",
    "recomputed": "a layer computed again",
    "work": "temporaries of a layer or the loss",
    "unpacked_weights": "unpacked weights",
    "runtime": "runtime and fragmentation",
}


@dataclass(frozen=True)
class Estimate:
    """A recipe on a device; `gpu` is None for a CPU, of which no speed is told."""

    gpu: Gpu | None
    choice: Choice
    tokens_per_second: float | None
    run_tokens: int | None

    @property
    def name(self) -> str:
        """The device's."""
        return self.gpu.name if self.gpu else "cpu"

    @property
    def hours(self) -> float | None:
        """Of the whole run, where its tokens are known."""
        if self.tokens_per_second is None or self.run_tokens is None:
            return None
        return self.run_tokens / self.tokens_per_second / 3600

    def facts(self) -> dict[str, Any]:
        """For `--json`; tokens a second are those of all processes together."""
        return {
            "device": self.name,
            "memory_bytes": self.gpu.memory_bytes if self.gpu else None,
            **self.choice.facts(),
            "dtype": self.choice.job.dtype,
            "fused": all(all(halves) for halves in self.choice.job.fused),
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
        }


def estimate(recipe: Recipe, base: BaseCheckpoint, gpus: Sequence[Gpu] | None = None) -> list[Estimate]:
    """What the planner would choose on some GPUs; without any named, on all that are known and on a CPU.

    Raises:
        QwenTuneError: The recipe does not suit the model, or a GPU that was named.
    """
    shape, processes = base.shape, recipe.train.num_processes or 1
    found = []
    for gpu in GPUS if gpus is None else gpus:
        try:
            dtype = gpu.dtype(recipe.model.dtype)
            attention = gpu.attention(recipe.model.attention, dtype, shape.head_size)
        except QwenTuneError:
            if gpus is None:
                continue
            raise
        job = read_job(recipe, shape, dtype=dtype, attention=attention, processes=processes)
        choice = choose(job, recipe.train, gpu.memory_bytes)
        speed = processes * tokens_per_second(job, gpu, choice.rows, choice.checkpointing)
        found.append(Estimate(gpu, choice, speed, _run_tokens(recipe)))
    on_cpu = attention_on(recipe.model.attention, "float32", shape.head_size, flash=False)
    cpu_dtype = automatic_cpu_dtype(base.config) if recipe.model.dtype == "auto" else recipe.model.dtype
    if gpus is None and on_cpu and (cpu_dtype == "float32" or (cpu_dtype == "bfloat16" and cpu_bfloat16_units())):
        job = read_job(recipe, shape, dtype=cpu_dtype, attention=on_cpu, processes=processes, on_gpu=False)
        found.append(Estimate(None, choose(job, recipe.train, None), None, _run_tokens(recipe)))
    if not found:
        what = f"got {recipe.model.attention} in {recipe.model.dtype}, which no device that is known here computes"
        raise QwenTuneError(Problem("model.attention", what, "write attention: auto"))
    return found


def _run_tokens(recipe: Recipe) -> int | None:
    """Tokens of the run, where the recipe tells: full packs for a number of steps. Else it takes the rows to know."""
    if recipe.train.max_steps is None or not recipe.data.packing:
        return None
    return recipe.train.max_steps * recipe.train.global_batch_size * recipe.data.max_length_tokens


def lines(recipe: Recipe, base: BaseCheckpoint, estimates: Sequence[Estimate]) -> Iterator[str]:
    """The estimates as a table, and the parts of the smallest that fits."""
    shape, job = base.shape, estimates[0].choice.job
    sizes = f"{shape.parameters / 1e9:.2f} billion parameters, {_trained(job.adapter.parameters)} trained"
    yield f"{recipe.name}: {base.id}, {sizes}"
    yield ""
    known = estimates[0].run_tokens is not None
    titles = (
        "device",
        "fits",
        "peak GiB",
        "of GiB",
        "rows",
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
                str(entry.choice.rows),
                {"none": "nothing", "selective": "MLPs", "full": "layers"}[entry.choice.checkpointing],
                f"{speed:,.0f}" if speed and entry.choice.fits else "-",
                f"{time:,.{2 if known else 1}f}" if time and entry.choice.fits else "-",
            )
        )
    chosen = next((entry for entry in estimates if entry.choice.fits), estimates[-1])
    yield ""
    yield f"on {chosen.name}, {chosen.choice.rows} x {job.row_tokens:,} tokens a forward, {chosen.choice.job.dtype}:"
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
