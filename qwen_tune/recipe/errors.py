"""Turns pydantic's errors into faults with a place, what was found, what is expected, and a fix.

The fix is the nearest known key, the section that a key belongs to, or our name for another toolkit's key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from qwen_tune.recipe.schema import NAME_PATTERN, PISSA_PATTERN, REPO_ID_PATTERN, TEXT_PATTERN, Recipe, Section
from qwen_tune.recipe.tree import Fault, KeyPath, Located, to_text
from qwen_tune.recipe.yaml_reader import parse_scalar

_ELSEWHERE: dict[str, str] = {
    "lora.r": "rank lora_rank lora_r",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target lora_target_modules lora_target_linear target_module",
    "lora.modules_to_save": "lora_modules_to_save additional_target",
    "model.base": "base_model base_model_name_or_path model_name model_name_or_path model_id model_path "
    "pretrained_model_name_or_path",
    "model.dtype": "torch_dtype bnb_4bit_compute_dtype precision",
    "model.quantization": "load_in_4bit load_in_8bit quantization_bit quantization_method quantize qlora",
    "model.attention": "attn_implementation flash_attn flash_attention sdp_attention",
    "model.chat_template": "template",
    "data.train": "dataset datasets dataset_name dataset_path train_file train_data",
    "data.eval": "eval_dataset eval_data val_size val_set_size validation test_datasets",
    "data.max_length_tokens": "max_seq_length max_seq_len cutoff_len sequence_len seq_len seq_length sequence_length "
    "max_length max_tokens model_max_length block_size context_length",
    "data.packing": "sample_packing pack neat_packing padding_free",
    "data.loss_on": "train_on_inputs train_on_prompt mask_history roles_to_train",
    "data.system": "system_prompt default_system",
    "data.thinking": "enable_thinking reasoning",
    "train.num_train_epochs": "epochs num_epochs n_epochs epoch",
    "train.max_steps": "steps num_steps max_train_steps iters",
    "train.learning_rate": "lr learning_rate_multiplier",
    "train.lr_scheduler_type": "scheduler lr_scheduler lr_schedule",
    "train.warmup_steps": "warmup_ratio warmup num_warmup_steps lr_warmup_steps",
    "train.global_batch_size": "batch_size train_batch_size total_batch_size gradient_accumulation_steps "
    "gradient_accumulation grad_accum accumulation_steps",
    "train.per_device_train_batch_size": "micro_batch_size per_device_batch_size device_batch_size",
    "train.num_processes": "world_size nproc_per_node num_gpus",
    "train.max_grad_norm": "gradient_clipping clip_grad_norm max_norm",
    "train.optim": "optimizer",
    "train.neftune_noise_alpha": "neftune_alpha",
    "train.gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing",
    "train.resume": "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir",
    "run.dir": "output_dir run_dir out_dir",
    "tracking.report_to": "use_wandb wandb",
    "tracking.project": "wandb_project",
    "hub.repo_id": "hub_model_id",
    "hub": "push_to_hub",
}
_OURS = {word: key for key, words in _ELSEWHERE.items() for word in words.split()}
"""Another toolkit's key, then ours."""

_HINTS = {
    "load_in_4bit": ": nf4",
    "qlora": ": nf4",
    "load_in_8bit": ": int8",
    "warmup_ratio": "; a number below 1 is a fraction of all steps",
    **{key: "; the accumulation is derived from it" for key in _OURS if "accum" in key},
}
"""What to add to the fix for a key of another toolkit."""

_NO_KEY = {
    "trust_remote_code": "delete it; it cannot be turned on, so that a checkpoint cannot run its own code",
    "finetuning_type": "delete it; every recipe trains an adapter, model.quantization: nf4 makes it QLoRA",
    "adapter": "delete it; every recipe trains an adapter, model.quantization: nf4 makes it QLoRA",
    "task_type": "delete it; every recipe trains a causal language model",
    "stage": "delete it; every recipe is supervised fine-tuning",
    "deepspeed": "delete it; set it in the configuration file of `accelerate launch`",
    "fsdp": "delete it; set it in the configuration file of `accelerate launch`",
    "device_map": "delete it; each process takes one device",
    "extends": "move it to the top level of the file",
}

_WORDS: dict[str, str] = {
    "auto": "auto",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
    "4bit": "nf4",
    "int4": "nf4",
    "qlora": "nf4",
    "bnb": "nf4",
    "8bit": "int8",
    "fa2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "flash": "flash_attention_2",
    "all": "all-linear",
    "skip": "drop",
    "adamw": "adamw_torch_fused",
    "adamw_bnb_8bit": "adamw_8bit",
    "chatml": "messages",
    "openai": "messages",
    "on": "auto",
    "true": "full",
    "false": "none off",
    "no": "none off",
}
"""A value known from other tools, then ours; the first that is allowed for the key is proposed."""

_PATTERNS = {
    NAME_PATTERN: "letters, digits, `-`, `_` and `.`, starting with a letter or digit",
    REPO_ID_PATTERN: "owner/name",
    PISSA_PATTERN: "pissa_niter_N",
    TEXT_PATTERN: "text that is not blank",
}
_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "union_tag_not_found": "a mapping such as {fraction: 0.02}, or a list of sources",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


@dataclass(frozen=True)
class TrainerArgs:
    """The lists in trainer_args.yaml."""

    allowed: dict[str, str]
    """Accepted fields of `SFTConfig`, then the kind of value."""

    owned: dict[str, str]
    """Fields of `SFTConfig` that we set, then the recipe key for it, or why there is none."""

    def owner(self, name: str) -> str:
        """The fix for a field that we set."""
        owner = self.owned[name]
        return f"leave it out: {owner}" if " " in owner else f"write {owner}"


@cache
def load_trainer_args() -> TrainerArgs:
    lists = yaml.safe_load(Path(__file__).with_name("trainer_args.yaml").read_text(encoding="utf-8"))
    return TrainerArgs(**lists)


def to_shown(value: Any, with_kind: bool = False) -> str:
    """A value for a message, as YAML would write it, without the contents of lists and mappings."""
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    if isinstance(value, dict):
        return "a mapping"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value if len(value) <= 60 else f"{value[:57]}…"
        plain = text.strip() == text and text and text.isprintable() and (not with_kind or not _is_other(text))
        kind = " (text)" if with_kind else ""
        return f"{text}{kind}" if plain else f'"{text.encode("unicode_escape").decode()}"{kind}'
    text = repr(value)
    kind = f" ({'a whole number' if isinstance(value, int) else 'a number'})" if with_kind else ""
    return f"{text if len(text) <= 60 else 'a very long number'}{kind}"


def _is_other(text: str) -> bool:
    try:
        return not isinstance(parse_scalar(text), str)
    except ValueError:
        return True


@cache
def known_sections() -> dict[str, type[Section]]:
    """Every section of the recipe by its key path; `[]` stands for an item of a list."""

    def sections(annotation: Any, path: str) -> Iterator[tuple[str, type[Section]]]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield path, annotation
        item = "[]" if getattr(annotation, "__origin__", None) is list else ""
        for argument in get_args(annotation):
            yield from sections(argument, path + item)

    found: dict[str, type[Section]] = {}
    waiting: list[tuple[str, type[Section]]] = [("", Recipe)]
    while waiting:
        path, section = waiting.pop(0)
        found[path] = section
        for name, field in section.model_fields.items():
            waiting += sections(field.annotation, f"{path}.{name}".lstrip("."))
    return found


def schema_faults(error: ValidationError, tree: Located) -> list[Fault]:
    """One fault for each value that the schema refuses, at the value's place."""
    grouped: dict[KeyPath, list[dict[str, Any]]] = {}
    for item in error.errors(include_url=False):
        if item["type"] != "default_factory_not_called":
            grouped.setdefault(_path(item["loc"], item["type"], tree), []).append(dict(item))
    # Among the alternatives of a union, the one that got furthest into the value is the intended one.
    paths = [path for path in grouped if not any(other[: len(path)] == path and other != path for other in grouped)]
    return [_fault(path, grouped[path], tree) for path in paths]


def _path(loc: tuple[int | str, ...], kind: str, tree: Located) -> KeyPath:
    """Pydantic's location without its names for the alternatives of a union."""
    path: list[str | int] = []
    node = tree
    for index, part in enumerate(loc):
        if isinstance(part, str) == isinstance(node.value, dict) and (inner := node.child(part)):
            node = inner
        elif kind != "missing" or index < len(loc) - 1:
            continue
        path.append(part)
    return tuple(path)


def _fault(path: KeyPath, errors: list[dict[str, Any]], tree: Located) -> Fault:
    place = tree.nearest(path).place
    kinds = {item["type"] for item in errors}
    if "missing" in kinds:
        return Fault(place, path, "is missing, but required", _missing_fix(path))
    if "extra_forbidden" in kinds:
        return Fault(place, path, "unknown key", _known_key_fix(path))
    value = tree.nearest(path).plain()
    is_wrong_kind = any(kind.endswith("_type") or kind == "union_tag_not_found" for kind in kinds)
    expected = list(dict.fromkeys(_expected(item) for item in errors))
    if "a number" in expected and "a whole number" in expected:
        expected.remove("a whole number")
    what = f"got {to_shown(value, is_wrong_kind)}; must be {', or '.join(expected)}"
    choices = [word for item in errors if item["type"] == "literal_error" for word in _choices(item)]
    return Fault(place, path, what, _value_fix(path, value, kinds, choices))


def _choices(item: dict[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", item["ctx"]["expected"])


def _expected(item: dict[str, Any]) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"{words} {context[name]:g}" if context[name] < 1e6 else f"{words} {context[name]}"
    if kind == "literal_error":
        choices = _choices(item)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if kind == "string_pattern_mismatch":
        return _PATTERNS[context["pattern"]]
    if kind == "string_too_long":
        return f"at most {context['max_length']} characters long"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    return _EXPECTED.get(kind) or str(item["msg"]).removeprefix("Input should be ")


def _missing_fix(path: KeyPath) -> str:
    examples = {
        "model": "add `model: {base: Qwen/Qwen3-0.6B}`, with the base that you want to train",
        "base": "add `base: Qwen/Qwen3-0.6B`, with the base that you want to train",
        "data": "add `data: {train: [{path: data/rows.jsonl}]}`",
        "train": "add `train: [{path: data/rows.jsonl}]`",
        "path": "add `path: data/rows.jsonl`",
        "fraction": "add `fraction: 0.02`",
        "repo_id": "add `repo_id: owner/name`",
    }
    return examples.get(str(path[-1]), f"add `{path[-1]}: …`")


def _section_key(path: KeyPath) -> str:
    return re.sub(r"\[\d+\]", "[]", to_text(path))


def _default_fix(path: KeyPath) -> str:
    """The fix that names a key's default, if it has one."""
    section = known_sections().get(_section_key(path[:-1]))
    field = section.model_fields.get(str(path[-1])) if section else None
    if field is None or field.is_required() or field.default_factory is not None:
        return ""
    default = field.default
    return "leave it out" if default is None else f"leave it out for the default, {to_shown(default)}"


def _known_key_fix(path: KeyPath) -> str:
    section = _section_key(path[:-1])
    key = re.sub(r"\W+", "_", str(path[-1]).strip()).lower()
    keys = {name: tuple(known.model_fields) for name, known in known_sections().items()}
    here = keys.get(section, ())
    if key in here:
        return f"write {key}"
    if ours := _OURS.get(key):
        return f"write {ours}" + _HINTS.get(key, "")
    if reason := _NO_KEY.get(key):
        return reason
    owners = [f"{other}.{key}".lstrip(".") for other, names in keys.items() if key in names]
    if owners:
        return f"it belongs to {' or '.join(owners)}"
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]}?"
    lists = load_trainer_args()
    if key in lists.allowed:
        return f"it belongs to train.trainer_args.{key}"
    if key in lists.owned:
        return lists.owner(key)
    everywhere = {f"{other}.{name}".lstrip("."): name for other, names in keys.items() for name in names}
    near = difflib.get_close_matches(key, everywhere.values(), n=1, cutoff=0.8)
    if near:
        return f"did you mean {next(full for full, name in everywhere.items() if name == near[0])}?"
    near = difflib.get_close_matches(key, here, n=1)
    place = section or "a recipe"
    return f"did you mean {near[0]}?" if near else f"delete it; the keys of {place} are {', '.join(here)}"


def _value_fix(path: KeyPath, value: Any, kinds: set[str], choices: list[str]) -> str:
    text = to_shown(value)
    word = (value.strip() if isinstance(value, str) else text).lower()
    if choices and isinstance(value, (str, bool)):
        known = next((ours for ours in _WORDS.get(word, "").split() if ours in choices), None)
        near = [known] if known else difflib.get_close_matches(word, choices, n=1)
        if near:
            return f"write {near[0]}"
    if "list_type" in kinds and not isinstance(value, dict):
        return f"write [{{path: {text}}}]" if path[-1] in ("train", "eval") else f"write [{text}]"
    if "list_type" in kinds:
        return "put `- ` before each item"
    if "model_type" in kinds and isinstance(value, str) and path[:1] == ("data",) and len(path) == 3:
        return f"write {{path: {text}}}"
    if "model_type" in kinds:
        return f"write its keys below it, indented: {', '.join(known_sections()[_section_key(path)].model_fields)}"
    if "bool_type" in kinds and word in ("yes", "on", "y", "1", "true", "no", "off", "n", "0", "false"):
        return f"write {'true' if word in ('yes', 'on', 'y', '1', 'true') else 'false'}"
    if kinds & {"int_type", "float_type"}:
        if isinstance(value, str):
            return _number_fix(word)
        if isinstance(value, float) and value.is_integer():
            return f"write {int(value)}"
    if kinds == {"string_type"} and isinstance(value, (bool, int, float)):
        return f'put it in quotes: "{text}"'
    return _default_fix(path)


def _number_fix(text: str) -> str:
    number = re.sub(r"[_\s]|,(?=\d{3}\b)", "", text)
    is_number = not isinstance(parse_scalar(number[:50]), (str, bool, type(None)))
    return f"write {number}, without quotes" if is_number else "write a number"
