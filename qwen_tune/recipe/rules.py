"""What a run has to be the same in beside its recipe; `train.allow_drift` knows these names."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_tune.disk import path_fault
from qwen_tune.recipe.errors import known_sections, load_trainer_args, to_shown
from qwen_tune.recipe.schema import Recipe, SourceSpec
from qwen_tune.recipe.tree import KeyPath

FACTS = {
    "base.weights_fingerprint": "the base's weights",
    "base.config_sha256": "the base's config.json",
    "dtype": "the type that the base is held in",
    "tokenizer_sha256": "the tokenizer",
    "template_sha256": "the chat template",
    "data_fingerprint": "the rows (their token ids and labels)",
    "world_size": "the number of processes",
    **{
        f"versions.{name}": f"the version of {name}"
        for name in ("qwen-tune", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    },
}
"""Keys of run.json, and what each is."""


def drift_names() -> set[str]:
    """Every name that may stand in `train.allow_drift`: keys of the recipe, facts, and what holds one of them."""
    keys = {
        f"{section}.{name}".lstrip(".") for section, known in known_sections().items() for name in known.model_fields
    }
    names = {re.sub(r"\[\]", "", key) for key in keys} | set(FACTS)
    return names | {"versions", "base"}


def is_drift_name(name: str) -> bool:
    """Whether a name may stand there: `data.train[1].path` is as good as `data.train.path`."""
    plain = re.sub(r"\[\d+\]", "", name)
    return plain in drift_names() or plain.startswith("train.trainer_args.")


_SCHEDULER_NEEDS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
"""Settings without which Transformers makes no such scheduler: one of each row."""


@dataclass(frozen=True)
class NotYet:
    """A value that the schema knows and this version cannot act on."""

    key: str
    """Key path; `[]` stands for every item of a list."""

    is_refused: Callable[[Any], bool]
    """Whether a value of that key, already validated, has to wait."""

    fix: str
    """What to write instead."""


def _other_than(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value not in allowed


_LATER = "leave it out, or write {}"

# Work that adds one of these deletes its line; the schema stays as it is.
NOT_YET: tuple[NotYet, ...] = (
    NotYet("lora.target_modules", lambda value: value == "all-linear+embeddings", "write all-linear"),
    NotYet("lora.init_lora_weights", lambda value: value in ("eva", "corda"), "write true, pissa or olora"),
    NotYet("lora.target_parameters", bool, _LATER.format("null")),
    NotYet("export.formats", bool, _LATER.format("[]")),
    NotYet("hub.push", lambda value: "export" in value, "write adapter, merged or both"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that a recipe may not say."""

    path: KeyPath
    what: str
    fix: str
    sources: tuple[KeyPath, ...] = ()
    """Further keys that it was concluded from."""


def findings(recipe: Recipe) -> list[Finding]:
    """Return everything that this recipe may not say, values that have to wait first."""
    waiting = list(_not_yet(recipe))
    refused = {finding.path for finding in waiting}
    rules: tuple[Callable[[Recipe], Iterator[Finding]], ...] = (
        _paths,
        _model,
        _sources,
        _adapter,
        _batch,
        _compiler,
        _steps,
        _allowed_drift,
        _trainer_args,
        _hub,
    )
    concluded = [finding for rule in rules for finding in rule(recipe)]
    return waiting + [finding for finding in concluded if refused.isdisjoint((finding.path, *finding.sources))]


def _not_yet(recipe: Recipe) -> Iterator[Finding]:
    for entry in NOT_YET:
        for path, value in _values(recipe, entry.key.split("."), ()):
            if entry.is_refused(value):
                what = f"not yet: got {to_shown(value)}, which is planned, but cannot be used so far"
                yield Finding(path, what, entry.fix)


def _values(section: Any, keys: list[str], path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Yield every value that a key path with `[]` stands for, and where it is."""
    if not keys:
        yield path, section
        return
    if section is None:
        return
    name = keys[0].removesuffix("[]")
    value = getattr(section, name)
    if keys[0] == name:
        yield from _values(value, keys[1:], (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _values(item, keys[1:], (*path, name, index))


def _paths(recipe: Recipe) -> Iterator[Finding]:
    found: list[tuple[KeyPath, str | None]] = [
        (("model", "base"), recipe.model.base),
        (("model", "chat_template"), recipe.model.chat_template),
        (("run", "dir"), recipe.run.dir),
    ]
    for name, sources in _source_lists(recipe).items():
        for index, source in enumerate(sources):
            found += [(("data", name, index, key), getattr(source, key)) for key in ("path", "tools")]
    for path, text in found:
        if text is not None and "://" not in text and (fault := path_fault(text)):
            what = f"got {to_shown(text)}, which is no usable path ({fault})"
            yield Finding(path, what, "write the path of a file or a folder")


def _model(recipe: Recipe) -> Iterator[Finding]:
    base = recipe.model.base
    if "://" in base:
        fix = "write the Hub id alone, such as Qwen/Qwen3-0.6B, or the path of a folder"
        yield Finding(("model", "base"), "got a URL; must be a Hub id or a folder", fix)


def _hub(recipe: Recipe) -> Iterator[Finding]:
    if recipe.hub is None:
        return
    base = recipe.model.base
    if recipe.hub.base_id is None and (base.startswith((".", "/", "~")) or Path(base).is_dir()):
        what = f"is missing, and model.base is a folder, {to_shown(base)}, which nobody else has"
        yield Finding(("hub", "base_id"), what, "add `base_id: owner/name`, the base's Hub id", (("model", "base"),))
    if "merged" in recipe.hub.push and not recipe.export.merge:
        what = "got merged, and export.merge is false, so that there will be no merged model"
        yield Finding(("hub", "push"), what, "write `export: {merge: true}`", (("export", "merge"),))
    for part in recipe.hub.repo_ids:
        if part not in recipe.hub.push:
            what = f"got a repository for {part}, which hub.push does not name"
            yield Finding(("hub", "repo_ids", part), what, f"add {part} to hub.push", (("hub", "push"),))


def _source_lists(recipe: Recipe) -> dict[str, list[SourceSpec]]:
    lists = {"train": recipe.data.train}
    if isinstance(recipe.data.eval, list):
        lists["eval"] = recipe.data.eval
    return lists


def _sources(recipe: Recipe) -> Iterator[Finding]:
    lists = _source_lists(recipe)
    for part, sources in lists.items():
        for index, source in enumerate(sources):
            path: KeyPath = ("data", part, index)
            if source.rows is not None and source.weight != 1.0:
                what = f"got {source.rows} beside weight: {source.weight}; each says how much of the source is drawn"
                yield Finding((*path, "rows"), what, "keep one of them", ((*path, "weight"),))
        if recipe.data.streaming and part == "train" and all(source.rows is None for source in sources):
            what = "got true, but no source says how many rows to take, so that all would be read all the same"
            fix = "add `rows: 100000` to the large source, or write false"
            yield Finding(("data", "streaming"), what, fix, (("data", "train"),))
        names = Counter(source.name for source in sources)
        for index, source in enumerate(sources):
            first = next(number for number, other in enumerate(sources) if other.name == source.name)
            if names[source.name] > 1 and first != index:
                what = f"got {source.name}, the name of data.{part}[{first}] too; names must differ"
                at: KeyPath = ("data", part, index)
                named: KeyPath = (*at, "name" if "name" in source.model_fields_set else "path")
                yield Finding(named, what, f"give the source a `name`, such as {source.name}-{index + 1}", (at,))


def _adapter(recipe: Recipe) -> Iterator[Finding]:
    lora, start = recipe.lora, recipe.lora.init_lora_weights
    path: KeyPath = ("lora", "init_lora_weights")
    if start == "loftq":
        what = "got loftq, which trains on a base that it changes first; what it saves fits no base that can be loaded"
        yield Finding(path, what, "write pissa, or true with model.quantization: nf4")
    elif isinstance(start, str) and start.startswith(("pissa", "olora")):
        excluded: tuple[tuple[KeyPath, bool, str], ...] = (
            (("model", "quantization"), recipe.model.quantization != "none", "needs the base's own weights"),
            (("lora", "use_dora"), lora.use_dora, "cannot be saved as plain DoRA"),
            (
                ("lora", "use_rslora"),
                lora.use_rslora and bool(lora.rank_pattern or lora.alpha_pattern),
                "cannot be saved as plain LoRA with patterns and rsLoRA",
            ),
        )
        for other, is_set, why in excluded:
            if is_set:
                yield Finding(path, f"got {start} beside {'.'.join(map(str, other))}; it {why}", "keep one", (other,))
    elif start is False:
        what = "got false, with which the adapter starts at random and changes the base's answers before it has trained"
        yield Finding(path, what, "write true")
    if lora.use_dora and recipe.model.quantization == "int8":
        what = "got true beside model.quantization: int8, whose layers DoRA cannot read"
        yield Finding(
            ("lora", "use_dora"), what, "write quantization: nf4, or use_dora: false", (("model", "quantization"),)
        )
    if start == "orthogonal" and lora.r % 2:
        yield Finding(path, f"got orthogonal with r: {lora.r}; it needs an even rank", f"write r: {lora.r + 1}")


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
        sources: tuple[KeyPath, ...] = (("train", "per_device_train_batch_size"), ("train", "num_processes"))
        yield Finding(("train", "global_batch_size"), what, fix, sources)


def _compiler(recipe: Recipe) -> Iterator[Finding]:
    path: KeyPath = ("train", "torch_compile")
    if recipe.train.torch_compile and not recipe.data.packing:
        what = "got true beside data.packing: false; each length of a row would be compiled anew"
        yield Finding(path, what, "write packing: true, or torch_compile: false", (("data", "packing"),))
    if recipe.train.torch_compile and recipe.model.kernels == "off":
        what = "got true beside model.kernels: off; what is compiled are the layers that it turns off"
        yield Finding(path, what, "write kernels: auto, or torch_compile: false", (("model", "kernels"),))


def _steps(recipe: Recipe) -> Iterator[Finding]:
    train = recipe.train
    if train.max_steps is not None and "num_train_epochs" in train.model_fields_set:
        what = f"got {train.max_steps} beside num_train_epochs: {train.num_train_epochs:g}; each says how long to train"
        fix = "keep one of them; num_train_epochs: null takes the other back"
        yield Finding(("train", "max_steps"), what, fix, (("train", "num_train_epochs"),))
    if train.warmup_steps >= 1 and train.warmup_steps != int(train.warmup_steps):
        what = f"got {train.warmup_steps}; must be a whole number of steps, or a share below 1"
        yield Finding(("train", "warmup_steps"), what, f"write {round(train.warmup_steps)}")
    if train.eval_steps is not None and recipe.data.eval is None:
        what = f"got {train.eval_steps}, but there is nothing to evaluate on"
        fix = "add `eval: {fraction: 0.02}` to data, or leave eval_steps out"
        yield Finding(("train", "eval_steps"), what, fix, (("data", "eval"),))
    if train.eval_prompts and recipe.data.eval is None:
        what = "got prompts, but there is no evaluation at which they would be answered"
        yield Finding(("train", "eval_prompts"), what, "add `eval: {fraction: 0.02}` to data", (("data", "eval"),))
    if train.early_stopping_patience is not None and train.eval_steps is None:
        what = f"got {train.early_stopping_patience}, but nothing is evaluated while training"
        yield Finding(("train", "early_stopping_patience"), what, "set eval_steps", (("train", "eval_steps"),))
    if train.load_best_model_at_end:
        path: KeyPath = ("train", "load_best_model_at_end")
        steps: tuple[KeyPath, ...] = (("train", "eval_steps"), ("train", "save_steps"))
        missing = [name for name in ("eval_steps", "save_steps") if getattr(train, name) is None]
        if missing:
            what = f"got true, which needs train.{' and train.'.join(missing)}"
            yield Finding(path, what, f"set {' and '.join(missing)}, or write false", steps)
        elif train.eval_steps and train.save_steps and train.save_steps % train.eval_steps:
            what = (
                f"got true, but save_steps: {train.save_steps} is no multiple of eval_steps: {train.eval_steps}, so "
                "that checkpoints have no evaluation"
            )
            yield Finding(path, what, f"write save_steps: {train.eval_steps}", steps)
    needs = _SCHEDULER_NEEDS.get(train.lr_scheduler_type)
    settings = train.trainer_args.get("lr_scheduler_kwargs")
    if needs and not (isinstance(settings, dict) and any(name in settings for name in needs)):
        what = f"got {train.lr_scheduler_type}, which needs {' or '.join(needs)}"
        fix = f"add `trainer_args: {{lr_scheduler_kwargs: {{{needs[-1]}: …}}}}`, or write cosine"
        at: KeyPath = ("train", "trainer_args")
        yield Finding(("train", "lr_scheduler_type"), what, fix, (at, (*at, "lr_scheduler_kwargs")))


def _allowed_drift(recipe: Recipe) -> Iterator[Finding]:
    for index, name in enumerate(recipe.train.allow_drift):
        if not is_drift_name(name):
            near = difflib.get_close_matches(name, sorted(drift_names()), n=1)
            fix = f"write {near[0]}" if near else "write a key of the recipe, or a fact such as versions.torch"
            yield Finding(("train", "allow_drift", index), f"got {to_shown(name)}, which nothing is called", fix)


_KINDS: dict[str, tuple[type, ...]] = {
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "text": (str,),
    "mapping": (dict,),
}
_KIND_NAMES = {"number": "a number", "integer": "a whole number", "boolean": "true or false", "text": "text"}


def _trainer_args(recipe: Recipe) -> Iterator[Finding]:
    if not recipe.train.trainer_args:
        return
    lists = load_trainer_args()
    for name, value in recipe.train.trainer_args.items():
        path: KeyPath = ("train", "trainer_args", name)
        if name in lists.owned:
            yield Finding(path, "is set by the toolkit itself", lists.owner(name))
        elif name not in lists.allowed:
            near = difflib.get_close_matches(name, lists.allowed, n=1)
            fix = f"write {near[0]}" if near else f"delete it; accepted are {', '.join(lists.allowed)}"
            yield Finding(path, "unknown key", fix)
        elif value is not None and not _is_kind(value, lists.allowed[name]):
            kind = lists.allowed[name]
            example = f"{name}: {{…: …}}" if kind == "mapping" else f"{name}: {_KIND_NAMES[kind]}"
            what = f"got {to_shown(value, with_kind=True)}; must be {_KIND_NAMES.get(kind, 'a mapping')}"
            yield Finding(path, what, f"write `{example}`")


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, bool) or kind == "boolean":
        return isinstance(value, bool) and kind == "boolean"
    return isinstance(value, _KINDS[kind]) and not (isinstance(value, float) and not math.isfinite(value))
