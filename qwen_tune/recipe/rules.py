"""Rules over several keys, values that are not supported yet, and the names that `train.allow_drift` accepts."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_tune.disk import path_fault
from qwen_tune.recipe.errors import known_sections, load_trainer_args, to_shown
from qwen_tune.recipe.schema import Recipe, SourceSpec
from qwen_tune.recipe.tree import KeyPath, to_path

FACTS = {
    "base.weights_fingerprint": "the base's weights",
    "base.config_sha256": "the base's config.json",
    "dtype": "the base's number type",
    "tokenizer_sha256": "the tokenizer",
    "template_sha256": "the chat template",
    "data_fingerprint": "the examples (their token ids and labels)",
    "world_size": "the number of processes",
    **{
        f"versions.{name}": f"the version of {name}"
        for name in ("qwen-tune", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    },
}
"""Keys of run.json that must not change during a run, and what each describes."""


def drift_names() -> set[str]:
    """The names that `train.allow_drift` accepts: keys and sections of the recipe, facts and their sections."""
    sections = known_sections().items()
    keys = {f"{section}.{name}".lstrip(".") for section, known in sections for name in known.model_fields}
    return {key.replace("[]", "") for key in keys} | {*FACTS, "versions", "base"}


def is_drift_name(name: str) -> bool:
    """Whether `train.allow_drift` accepts a name; `data.train[1].path` counts as `data.train.path`."""
    plain = re.sub(r"\[\d+\]", "", name)
    return plain in drift_names() or plain.startswith("train.trainer_args.")


_SCHEDULER_NEEDS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Schedulers and their required settings, one of each tuple."""


@dataclass(frozen=True)
class NotYet:
    """A value that the schema knows but this version does not support."""

    key: str
    is_refused: Callable[[Any], bool]  # of a validated value
    fix: str


# Whoever adds support for one of these deletes its line; the schema stays as it is.
NOT_YET: tuple[NotYet, ...] = (
    NotYet("lora.target_modules", lambda value: value == "all-linear+embeddings", "write all-linear"),
    NotYet("lora.init_lora_weights", lambda value: value in ("eva", "corda"), "write true, pissa or olora"),
    NotYet("lora.target_parameters", bool, "leave it out, or write null"),
    NotYet("export.formats", bool, "leave it out, or write []"),
    NotYet("hub.push", lambda value: "export" in value, "write adapter, merged or both"),
)


@dataclass(frozen=True)
class Finding:
    """A fault of a recipe that passed the schema."""

    path: KeyPath
    what: str
    fix: str
    sources: tuple[KeyPath, ...] = ()
    """Further keys that it depends on."""


def findings(recipe: Recipe) -> list[Finding]:
    """All faults of a recipe, unsupported values first."""
    unsupported = list(_not_yet(recipe))
    refused = {finding.path for finding in unsupported}
    rules: tuple[Callable[[Recipe], Iterator[Finding]], ...] = (
        _paths,
        _sources,
        _adapter,
        _batch,
        _compiler,
        _steps,
        _allowed_drift,
        _trainer_args,
        _hub,
    )
    found = [finding for rule in rules for finding in rule(recipe)]
    return unsupported + [finding for finding in found if refused.isdisjoint((finding.path, *finding.sources))]


def _finding(key: str, what: str, fix: str, *sources: str) -> Finding:
    return Finding(to_path(key), what, fix, tuple(map(to_path, sources)))


def _not_yet(recipe: Recipe) -> Iterator[Finding]:
    for entry in NOT_YET:
        name, key = entry.key.split(".")
        section = getattr(recipe, name)
        if section is not None and entry.is_refused(value := getattr(section, key)):
            what = f"not yet: got {to_shown(value)}, which is planned but not supported yet"
            yield _finding(entry.key, what, entry.fix)


def _paths(recipe: Recipe) -> Iterator[Finding]:
    model = recipe.model
    paths = {"model.base": model.base, "model.chat_template": model.chat_template, "run.dir": recipe.run.dir}
    for part, sources in _source_lists(recipe).items():
        for index, source in enumerate(sources):
            paths |= {f"data.{part}[{index}].path": source.path, f"data.{part}[{index}].tools": source.tools}
    for key, text in paths.items():
        if text is not None and "://" not in text and (fault := path_fault(text)):
            what = f"got {to_shown(text)}, which is not a usable path ({fault})"
            yield _finding(key, what, "write the path of a file or folder")
    if "://" in model.base:
        fix = "write the Hub id alone, such as Qwen/Qwen3-0.6B, or the path of a folder"
        yield _finding("model.base", "got a URL; must be a Hub id or a folder", fix)


def _hub(recipe: Recipe) -> Iterator[Finding]:
    if recipe.hub is None:
        return
    base = recipe.model.base
    if recipe.hub.base_id is None and (base.startswith((".", "/", "~")) or Path(base).is_dir()):
        what = f"is missing, and model.base is a folder, {to_shown(base)}, which nobody else has"
        yield _finding("hub.base_id", what, "add `base_id: owner/name`, the base's Hub id", "model.base")
    if "merged" in recipe.hub.push and not recipe.export.merge:
        what = "got merged, but export.merge is false, so there will be no merged model"
        yield _finding("hub.push", what, "write `export: {merge: true}`", "export.merge")
    for part in recipe.hub.repo_ids:
        if part not in recipe.hub.push:
            what = f"got a repository for {part}, which hub.push does not include"
            yield _finding(f"hub.repo_ids.{part}", what, f"add {part} to hub.push", "hub.push")


def _source_lists(recipe: Recipe) -> dict[str, list[SourceSpec]]:
    lists = {"train": recipe.data.train}
    if isinstance(recipe.data.eval, list):
        lists["eval"] = recipe.data.eval
    return lists


def _sources(recipe: Recipe) -> Iterator[Finding]:
    if recipe.data.streaming and all(source.rows is None for source in recipe.data.train):
        what = "got true, but no source has `rows`, so all examples would be read anyway"
        fix = "add `rows: 100000` to the large source, or write false"
        yield _finding("data.streaming", what, fix, "data.train")
    for part, sources in _source_lists(recipe).items():
        first: dict[str, int] = {}
        for index, source in enumerate(sources):
            key = f"data.{part}[{index}]"
            if source.rows is not None and source.weight != 1.0:
                what = f"got {source.rows} beside weight: {source.weight}; both set how much of the source is drawn"
                yield _finding(f"{key}.rows", what, "keep one of them", f"{key}.weight")
            if first.setdefault(source.name, index) != index:
                what = f"got {source.name}, which data.{part}[{first[source.name]}] has too; names must differ"
                named = "name" if "name" in source.model_fields_set else "path"
                yield _finding(f"{key}.{named}", what, f"give it a `name`, such as {source.name}-{index + 1}", key)


def _adapter(recipe: Recipe) -> Iterator[Finding]:
    lora, start, quantization = recipe.lora, recipe.lora.init_lora_weights, recipe.model.quantization
    key = "lora.init_lora_weights"
    if start == "loftq":
        what = "got loftq, which changes the base before training; its adapter does not fit any base that can be loaded"
        yield _finding(key, what, "write pissa, or true with model.quantization: nf4")
    elif isinstance(start, str) and start.startswith(("pissa", "olora")):
        excluded: dict[str, tuple[Any, str]] = {
            "model.quantization": (quantization != "none", "needs the base's own weights"),
            "lora.use_dora": (lora.use_dora, "cannot be saved as plain DoRA"),
            "lora.use_rslora": (
                lora.use_rslora and (lora.rank_pattern or lora.alpha_pattern),
                "cannot be saved as plain LoRA with patterns and rsLoRA",
            ),
        }
        for other, (is_set, why) in excluded.items():
            if is_set:
                yield _finding(key, f"got {start} beside {other}; it {why}", "keep one", other)
    elif start is False:
        what = "got false: the adapter would start at random and change the base's answers before training"
        yield _finding(key, what, "write true")
    if lora.use_dora and quantization == "int8":
        what = "got true beside model.quantization: int8, whose layers DoRA cannot read"
        yield _finding("lora.use_dora", what, "write quantization: nf4, or use_dora: false", "model.quantization")
    if start == "orthogonal" and lora.r % 2:
        yield _finding(key, f"got orthogonal with r: {lora.r}; it needs an even rank", f"write r: {lora.r + 1}")


def _batch(recipe: Recipe) -> Iterator[Finding]:
    train = recipe.train
    per_device = 1 if train.per_device_train_batch_size == "auto" else train.per_device_train_batch_size
    processes = train.num_processes or 1
    unit, batch = per_device * processes, train.global_batch_size
    if batch % unit:
        below, above = batch // unit * unit, -(-batch // unit) * unit
        what = (
            f"got {batch}, which leaves a remainder of {batch % unit}; must be a multiple of "
            f"per_device_train_batch_size × num_processes = {per_device} × {processes} = {unit}"
        )
        fix = f"write {below} or {above}" if below else f"write {above}"
        sources = ("train.per_device_train_batch_size", "train.num_processes")
        yield _finding("train.global_batch_size", what, fix, *sources)


def _compiler(recipe: Recipe) -> Iterator[Finding]:
    if recipe.train.torch_compile and not recipe.data.packing:
        what = "got true beside data.packing: false; every length of an example would be compiled separately"
        yield _finding("train.torch_compile", what, "write packing: true, or torch_compile: false", "data.packing")
    if recipe.train.torch_compile and recipe.model.kernels == "off":
        what = "got true beside model.kernels: off, which turns off the layers to compile"
        yield _finding("train.torch_compile", what, "write kernels: auto, or torch_compile: false", "model.kernels")


def _steps(recipe: Recipe) -> Iterator[Finding]:
    train = recipe.train
    if train.max_steps is not None and "num_train_epochs" in train.model_fields_set:
        what = f"got {train.max_steps} beside num_train_epochs: {train.num_train_epochs:g}; both set the length"
        fix = "keep one of them; num_train_epochs: null unsets the other"
        yield _finding("train.max_steps", what, fix, "train.num_train_epochs")
    if train.warmup_steps >= 1 and train.warmup_steps != int(train.warmup_steps):
        what = f"got {train.warmup_steps}; must be a whole number of steps, or a fraction below 1"
        yield _finding("train.warmup_steps", what, f"write {round(train.warmup_steps)}")
    if train.eval_steps is not None and recipe.data.eval is None:
        what = f"got {train.eval_steps}, but there is nothing to evaluate on"
        fix = "add `eval: {fraction: 0.02}` to data, or leave eval_steps out"
        yield _finding("train.eval_steps", what, fix, "data.eval")
    if train.eval_prompts and recipe.data.eval is None:
        what = "got prompts, but there is no evaluation to answer them at"
        yield _finding("train.eval_prompts", what, "add `eval: {fraction: 0.02}` to data", "data.eval")
    if train.early_stopping_patience is not None and train.eval_steps is None:
        what = f"got {train.early_stopping_patience}, but nothing is evaluated while training"
        yield _finding("train.early_stopping_patience", what, "set eval_steps", "train.eval_steps")
    if train.load_best_model_at_end:
        fix, what = "", ""
        missing = [name for name in ("eval_steps", "save_steps") if getattr(train, name) is None]
        if missing:
            what = f"got true, which needs train.{' and train.'.join(missing)}"
            fix = f"set {' and '.join(missing)}, or write false"
        elif train.eval_steps and train.save_steps and train.save_steps % train.eval_steps:
            what = (
                f"got true, but save_steps: {train.save_steps} is not a multiple of eval_steps: {train.eval_steps}, "
                "so some checkpoints would have no evaluation"
            )
            fix = f"write save_steps: {train.eval_steps}"
        if what:
            yield _finding("train.load_best_model_at_end", what, fix, "train.eval_steps", "train.save_steps")
    needs = _SCHEDULER_NEEDS.get(train.lr_scheduler_type)
    settings = train.trainer_args.get("lr_scheduler_kwargs")
    if needs and not (isinstance(settings, dict) and any(name in settings for name in needs)):
        what = f"got {train.lr_scheduler_type}, which needs {' or '.join(needs)}"
        fix = f"add `trainer_args: {{lr_scheduler_kwargs: {{{needs[-1]}: …}}}}`, or write cosine"
        sources = ("train.trainer_args", "train.trainer_args.lr_scheduler_kwargs")
        yield _finding("train.lr_scheduler_type", what, fix, *sources)


def _allowed_drift(recipe: Recipe) -> Iterator[Finding]:
    for index, name in enumerate(recipe.train.allow_drift):
        if not is_drift_name(name):
            near = difflib.get_close_matches(name, sorted(drift_names()), n=1)
            fix = f"write {near[0]}" if near else "write a key of the recipe, or a fact such as versions.torch"
            yield _finding(f"train.allow_drift[{index}]", f"got {to_shown(name)}, which is not a key or fact", fix)


_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "number": ("a number", (int, float)),
    "integer": ("a whole number", (int,)),
    "boolean": ("true or false", (bool,)),
    "text": ("text", (str,)),
    "mapping": ("a mapping", (dict,)),
}


def _trainer_args(recipe: Recipe) -> Iterator[Finding]:
    lists = load_trainer_args()
    for name, value in recipe.train.trainer_args.items():
        path: KeyPath = ("train", "trainer_args", name)
        if name in lists.owned:
            yield Finding(path, "is set by qwen-tune", lists.owner(name))
        elif name not in lists.allowed:
            near = difflib.get_close_matches(name, lists.allowed, n=1)
            fix = f"write {near[0]}" if near else f"delete it; accepted are {', '.join(lists.allowed)}"
            yield Finding(path, "unknown key", fix)
        elif value is not None and not _is_kind(value, lists.allowed[name]):
            kind = _KINDS[lists.allowed[name]][0]
            what = f"got {to_shown(value, with_kind=True)}; must be {kind}"
            yield Finding(path, what, f"write `{name}: {'{…: …}' if kind == 'a mapping' else kind}`")


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    return isinstance(value, _KINDS[kind][1]) and not (isinstance(value, float) and not math.isfinite(value))
