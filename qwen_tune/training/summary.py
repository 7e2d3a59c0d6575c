"""What a run says before its first step and after its last."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.padding import Padding

from qwen_tune.console import make_console, print_pairs, shown_path
from qwen_tune.distributed.world import is_main_process, world_size
from qwen_tune.families.serving import unsupported_by_vllm
from qwen_tune.hardware import GIB
from qwen_tune.machine import device_name
from qwen_tune.planner.choice import Choice
from qwen_tune.preview.audit import Audit, audit
from qwen_tune.preview.terminal import Spelling, coloured, findings
from qwen_tune.recipe.schema import Recipe
from qwen_tune.runs.checkpoints import step_of
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.drift import Drift
from qwen_tune.runs.resume import Plan

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from rich.console import Console

    from qwen_tune.fused.install import Fused
    from qwen_tune.model.adapter import TrainedModules
    from qwen_tune.training.job import Job

SOURCES_SHOWN = 8
LONGEST_RUN = 160  # characters of a sample between two control tokens


def show_job(job: Job) -> None:
    """Base, data, batch and machine, each on a line; then what was dropped, what looks odd, and one sample."""
    if not is_main_process():
        return
    recipe, run, plan, schedule = job.recipe, job.run, job.plan, job.schedule
    found = audit(job.data, recipe.data)
    facts = found.facts
    rows, samples, tokens = facts["rows"], facts["samples"], facts["tokens"]
    unit, one = ("packs", "pack") if recipe.data.packing else ("samples", "sample")
    tokens_per_step = job.data.train.tokens * min(recipe.train.global_batch_size, schedule.packs) // schedule.packs
    lines = {
        "base": f"{job.base.id}  ({job.base.model_type}, {_precision(recipe, job.dtype)})",
        "data": f"{rows['read']:,} examples: {rows['trained']:,} train, {rows['evaluation']:,} evaluate"
        + (f", {rows['not_sampled']:,} not drawn" if rows["not_sampled"] else "")
        + (f", {sum(rows['dropped'].values()):,} dropped" if rows["dropped"] else ""),
        "tokens": f"{tokens['prepared']:,} in {samples['train'] + samples['evaluation']:,} samples, "
        f"{tokens['supervised'] / tokens['prepared']:.0%} supervised",
        "sources": _in_sources(found),
        "adapter": f"{_kind(recipe)} r={recipe.lora.r}, alpha={recipe.lora.lora_alpha} on {_targets(recipe)}",
        "batch": f"{recipe.train.global_batch_size} {unit if recipe.train.global_batch_size > 1 else one} a step"
        f" = {world_size()} {'processes' if world_size() > 1 else 'process'} x "
        f"{schedule.per_device_train_batch_size} x {schedule.gradient_accumulation_steps} accumulated, "
        f"about {tokens_per_step:,} tokens",
        "steps": f"{schedule.max_steps:,} ({schedule.steps_per_epoch:,} an epoch of {schedule.packs:,} {unit})",
        "memory": _predicted(job.batch_plan),
        "machine": device_name() + (f", DDP over {world_size()} processes" if world_size() > 1 else ", one process"),
        "run": shown_path(run.path)
        + (f", resuming from {plan.checkpoint.name}" if plan.checkpoint else "")
        + (", started over: it ended before its first checkpoint" if plan.starts_over else ""),
    }
    console = _console()
    console.print(recipe.name, style="bold", markup=False, highlight=False)
    if job.pretrained_only:
        lines["base"] += ", a base checkpoint: its ChatML tokens are trained as well"
    print_pairs(console, lines.items())
    print_pairs(console, findings(found), style="yellow")
    for note in plan.notes:
        console.print(f"  [yellow]warning[/] skipped checkpoint {escape(note)}", highlight=False)
    _show_sample(console, job)
    _show_drift(run, plan, job.facts)


def _show_drift(run: RunDir, plan: Plan, facts: Mapping[str, Any]) -> None:
    """What differs from what the run was started with."""
    if plan.checkpoint is None:
        return
    recorded = run.recorded_facts()
    before = {name: recorded.get(name) for name in ("device", "threads")}
    if any(value is not None and value != facts[name] for name, value in before.items()):
        was = f"{before['device']}, {before['threads']} threads a process"
        what = "results agree with those of a run never stopped to rounding, not to the last bit"
        _console().print(f"  [yellow]note[/] started on {escape(was)}: {what}", highlight=False)
    step = step_of(plan.checkpoint)
    changes = [Drift(entry["field"], entry["was"], entry["now"]) for entry in facts["drift"] if entry["step"] == step]
    for change in changes:
        _console().print(f"  [yellow]allowed[/] {escape(str(change))}", highlight=False)


def show_adapter(model: PeftModel, fused: Fused | None) -> None:
    """Lists the trained modules, what of them is fused, and what of the adapter cannot be served."""
    from qwen_tune.model.adapter import trained_modules

    console = _console()
    modules = trained_modules(model)
    parts = ", ".join(
        f"{name} {counts.modules} x {counts.parameters // counts.modules:,}" for name, counts in modules.items()
    )
    total = sum(counts.parameters for counts in modules.values())
    print_pairs(console, [("trained", f"{total:,} parameters: {parts}")])
    print_pairs(console, [("kernels", str(fused) if fused else "off")])
    for warning in _serving_warnings(model.peft_config["default"], modules):
        console.print(f"  [yellow]warning[/] {escape(warning)}", highlight=False)


def _serving_warnings(config: LoraConfig, trained: Mapping[str, TrainedModules]) -> list[str]:
    warnings = []
    if parts := unsupported_by_vllm(config.to_dict()):
        warnings.append(f"vLLM does not load {' or '.join(parts)}: serve the merged model")
    if config.modules_to_save:
        size = sum(trained[name].parameters for name in config.modules_to_save if name in trained)
        gib = size * 4 / GIB
        warnings.append(f"modules_to_save adds {size:,} parameters ({gib:.1f} GiB) to the adapter's file")
    if config.use_dora:
        warnings.append("Transformers 5.23 leaves DoRA's magnitudes out when it loads an adapter; PEFT does not")
    return warnings


def show_end(run: RunDir) -> None:
    """Losses, speed, memory, and the commands that come next."""
    console = _console()
    losses = run.facts["losses"]
    lines = {}
    if losses["train_first"] is not None:
        lines["loss"] = f"{losses['train_first']:.3f} -> {losses['train_last']:.3f} (training)"
    if losses["eval_before"] is not None:
        lines["held out"] = f"{losses['eval_before']:.3f} -> {losses['eval_after']:.3f}"
    lines["speed"] = f"{run.facts['tokens_per_second']:,.0f} tokens/s"
    lines["memory"] = f"{run.facts['peak_memory_bytes'] / GIB:.1f} GiB at most"
    lines["adapter"] = shown_path(run.adapter)
    if run.merged.exists():
        lines["merged"] = shown_path(run.merged)
    print_pairs(console, lines.items())
    # Commands are never broken into lines: they are there to be copied.
    place = shlex.quote(shown_path(run.path))
    console.print(f'  next: qwen-tune chat {place} "Hello"', highlight=False, markup=False, soft_wrap=True)
    if not run.merged.exists():
        console.print(f"        qwen-tune merge {place}", highlight=False, markup=False, soft_wrap=True)


def _console() -> Console:
    return make_console(quiet=not is_main_process())


def _precision(recipe: Recipe, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return name if recipe.model.quantization == "none" else f"{recipe.model.quantization}, computed in {name}"


def _in_sources(found: Audit) -> str:
    """The format of each source, and the share of its tokens that is supervised."""
    lines = [
        f"{source.name}: {source.examples:,} x {source.format}, {source.supervised / max(source.tokens, 1):.0%} of "
        f"{source.tokens:,} tokens are supervised"
        for source in found.sources[:SOURCES_SHOWN]
    ]
    more = len(found.sources) - SOURCES_SHOWN
    return "\n".join([*lines, *([f"and {more} more"] if more > 0 else ())])


def _show_sample(console: Console, job: Job) -> None:
    """The first sample as it will train, shortened."""
    example = job.data.train.samples[0]
    pieces = Spelling(job.tokenizer).pieces(example.input_ids, example.labels)
    print_pairs(console, [("sample", f"{example.source}, {len(example.input_ids):,} tokens")])
    console.print(Padding(coloured(pieces, console, longest_run=LONGEST_RUN), (0, 0, 0, 4), expand=False))


def _predicted(choice: Choice) -> str:
    """The estimated peak memory, and what is recomputed."""
    text = f"{choice.memory.peak / GIB:.1f} GiB at most, as counted"
    if choice.available_bytes is not None:
        text += f", of {choice.available_bytes / GIB:.1f} GiB that are free" + ("" if choice.fits else ": TOO LITTLE")
    again = {"none": "nothing", "selective": "the MLP halves of layers", "full": "whole layers"}
    return f"{text}; {again[choice.checkpointing]} computed again"


def _targets(recipe: Recipe) -> str:
    targets = recipe.lora.target_modules
    return targets if isinstance(targets, str) else ", ".join(targets)


def _kind(recipe: Recipe) -> str:
    lora = recipe.lora
    name = "DoRA" if lora.use_dora else "rsLoRA" if lora.use_rslora else "LoRA"
    if lora.use_dora and lora.use_rslora:
        name = "DoRA (scaled as rsLoRA)"
    start = "" if lora.init_lora_weights is True else f", started by {lora.init_lora_weights}"
    return ("Q" if recipe.model.quantization != "none" else "") + name + start
