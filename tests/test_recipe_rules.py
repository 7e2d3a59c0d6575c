"""The rules over several keys, unsupported values, and the list of trainer arguments."""

from __future__ import annotations

import dataclasses
import re
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_texts import mapping, recipe, with_value

from qwen_tune.errors import RecipeError
from qwen_tune.recipe.errors import known_sections, load_trainer_args
from qwen_tune.recipe.files import load_recipe
from qwen_tune.recipe.rules import NOT_YET, Finding, findings
from qwen_tune.recipe.schema import Recipe, TrainSpec


def rules(**sections: Any) -> list[Finding]:
    return [finding for finding in findings(recipe(**sections)) if not finding.what.startswith("not yet")]


# One refused value for each key that is or was unsupported: only those still in NOT_YET are tried.
WAITING: dict[str, Any] = {
    "model.quantization": "nf4",
    "train.save_total_limit": 2,
    "tracking.project": "mine",
    "data.train[].path": "s3://bucket/rows.jsonl",
    "data.train[].format": "query_response",
    "data.train[].weight": 0.5,
    "data.train[].rows": 100,
    "data.eval[].path": "hf://datasets/a/b.jsonl",
    "data.eval[].format": "text",
    "data.eval[].weight": 2.0,
    "data.eval[].rows": 10,
    "data.special_tokens_in_text": "neutralize",
    "data.deduplicate": True,
    "data.streaming": True,
    "lora.target_modules": "all-linear+embeddings",
    "lora.use_rslora": True,
    "lora.use_dora": True,
    "lora.init_lora_weights": "eva",
    "lora.bias": "all",
    "lora.rank_pattern": {"q_proj": 8},
    "lora.alpha_pattern": {"q_proj": 8},
    "lora.exclude_modules": ["lm_head"],
    "lora.modules_to_save": ["lm_head"],
    "lora.trainable_token_indices": [1],
    "lora.target_parameters": ["experts.gate_up_proj"],
    "train.eval_steps": 10,
    "train.save_steps": 10,
    "train.load_best_model_at_end": True,
    "train.max_hours": 1.5,
    "train.resume": "runs/job/checkpoints/step-3",
    "tracking.report_to": ["wandb"],
    "export.formats": ["ollama"],
    "hub.push": ["export"],
}


def with_waiting(key: str, value: Any) -> tuple[dict[str, Any], str]:
    part, brackets, name = key.partition("[].")
    if not brackets:
        whole = with_value(key, value)
        if key.startswith("hub."):
            whole["hub"]["repo_id"] = "me/job"
        return whole, key
    whole = mapping()
    whole["data"][part.removeprefix("data.")] = [{"path": "other.jsonl"}, {"path": "rows.jsonl", name: value}]
    return whole, f"{part}[1].{name}"


@pytest.mark.parametrize("key", [key for key in WAITING if key in {entry.key for entry in NOT_YET}])
def test_unsupported_values_are_refused(key: str, tmp_path: Path) -> None:
    whole, path = with_waiting(key, WAITING[key])
    parsed = Recipe.model_validate(whole)
    waiting = [finding for finding in findings(parsed) if finding.what.startswith("not yet: ")]
    assert len(waiting) == 1
    assert waiting[0].fix
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(whole), encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    assert [problem.what for problem in error.value.problems] == [f"{path}: {waiting[0].what}"]


def test_every_unsupported_key_has_an_example() -> None:
    assert {entry.key for entry in NOT_YET} <= set(WAITING)


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("model", {"base": "a/b", "attention": "sdpa"}),
        ("lora", {"target_modules": "attention"}),
        ("lora", {"target_modules": ["q_proj", "v_proj"]}),
        ("lora", {"rank_pattern": {}, "modules_to_save": [], "init_lora_weights": True}),
        ("train", {"resume": "never", "gradient_checkpointing": "full"}),
        ("tracking", {"report_to": []}),
        ("export", {"merge": True}),
    ],
)
def test_supported_values_are_accepted(section: str, value: Any) -> None:
    assert findings(recipe(**{section: value})) == []


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"model": {"base": "./tiny"}, "hub": {"repo_id": "me/job"}}, ("hub", "base_id")),
        ({"hub": {"repo_id": "me/job", "push": ["merged"]}}, ("hub", "push")),
        ({"hub": {"repo_id": "me/job", "repo_ids": {"merged": "me/full"}}}, ("hub", "repo_ids", "merged")),
    ],
)
def test_impossible_pushes_are_refused_before_training(sections: dict[str, Any], path: tuple[str, ...]) -> None:
    (finding,) = rules(**sections)
    assert finding.path == path
    assert finding.fix


def test_possible_pushes_are_accepted() -> None:
    hub = {"repo_id": "me/job", "push": ["adapter", "merged"], "repo_ids": {"merged": "me/full"}, "base_id": "a/b"}
    assert findings(recipe(model={"base": "./tiny"}, export={"merge": True}, hub=hub)) == []


def test_base_is_not_a_url() -> None:
    (finding,) = rules(model={"base": "https://huggingface.co/Qwen/Qwen3-0.6B"})
    assert finding.path == ("model", "base")


@pytest.mark.parametrize(
    ("train", "remainder", "fix"),
    [
        ({"global_batch_size": 10, "per_device_train_batch_size": 4}, "remainder of 2", "write 8 or 12"),
        (
            {"global_batch_size": 16, "per_device_train_batch_size": 2, "num_processes": 3},
            "remainder of 4",
            "write 12 or 18",
        ),
        ({"global_batch_size": 3, "per_device_train_batch_size": 4}, "remainder of 3", "write 4"),
        ({"global_batch_size": 16, "num_processes": 5}, "remainder of 1", "write 15 or 20"),
    ],
)
def test_batch_leaves_no_remainder(train: dict[str, Any], remainder: str, fix: str) -> None:
    (finding,) = rules(train=train)
    assert finding.path == ("train", "global_batch_size")
    assert remainder in finding.what
    assert finding.fix == fix
    assert not rules(train={**train, "global_batch_size": int(fix.split()[-1])})


def test_compiled_layers_need_packs_and_fused_layers():
    compiled = {"torch_compile": True}
    assert not rules(train=compiled)
    [unpacked] = rules(train=compiled, data={"train": [{"path": "rows.jsonl"}], "packing": False})
    [off] = rules(train=compiled, model={"base": "Qwen/Qwen3-0.6B", "kernels": "off"})
    assert unpacked.path == off.path == ("train", "torch_compile")
    assert "every length of an example" in unpacked.what
    assert "turns off the layers to compile" in off.what


def test_epochs_and_steps_exclude_each_other() -> None:
    assert not rules(train={"max_steps": 10})
    assert not rules(train={"max_steps": 10, "num_train_epochs": None})
    (finding,) = rules(train={"max_steps": 10, "num_train_epochs": 3})
    assert finding.path == ("train", "max_steps")


def test_warmup_is_a_fraction_or_a_whole_number() -> None:
    assert not rules(train={"warmup_steps": 10.0})
    (finding,) = rules(train={"warmup_steps": 1.5})
    assert finding.path == ("train", "warmup_steps")


def test_source_names_differ() -> None:
    sources = [{"path": "a/rows.jsonl"}, {"path": "b/rows.jsonl"}, {"path": "c.jsonl", "name": "rows"}]
    first, second = rules(data={"train": sources})
    assert first.path == ("data", "train", 1, "path")
    assert second.path == ("data", "train", 2, "name")
    assert not rules(data={"train": sources[:1], "eval": sources[1:2]})


def test_schedulers_get_what_they_need() -> None:
    (finding,) = rules(train={"lr_scheduler_type": "cosine_with_min_lr"})
    assert "min_lr" in finding.fix
    arguments = {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    assert not rules(train={"lr_scheduler_type": "cosine_with_min_lr", "trainer_args": arguments})


def rules_without_waiting(monkeypatch: pytest.MonkeyPatch, **sections: Any) -> list[Finding]:
    """The rules as they will be once every value is supported."""
    monkeypatch.setattr("qwen_tune.recipe.rules.NOT_YET", ())
    return findings(recipe(**sections))


def test_weight_and_rows_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"path": "a.jsonl", "rows": 10}
    assert not rules_without_waiting(monkeypatch, data={"train": [source]})
    (finding,) = rules_without_waiting(monkeypatch, data={"train": [{**source, "weight": 0.5}]})
    assert finding.path == ("data", "train", 0, "rows")


def test_evaluation_needs_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"train": [{"path": "a.jsonl"}], "eval": {"fraction": 0.1}}
    assert not rules_without_waiting(monkeypatch, data=data, train={"eval_steps": 10})
    (finding,) = rules_without_waiting(monkeypatch, train={"eval_steps": 10})
    assert finding.path == ("train", "eval_steps")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ({}, "needs train.eval_steps and train.save_steps"),
        ({"eval_steps": 10}, "needs train.save_steps"),
        ({"eval_steps": 10, "save_steps": 15}, "not a multiple"),
        ({"eval_steps": 10, "save_steps": 20}, ""),
    ],
)
def test_best_model_needs_steps(steps: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"train": [{"path": "a.jsonl"}], "eval": {"fraction": 0.1}}
    found = rules_without_waiting(monkeypatch, data=data, train={"load_best_model_at_end": True, **steps})
    assert len(found) == bool(said)
    assert all(said in finding.what for finding in found)


GOOD_ARGUMENTS: dict[str, Any] = {
    "adam_beta1": 0.9,
    "adam_epsilon": 1,
    "dataloader_num_workers": 2,
    "tf32": True,
    "optim_args": "a=1",
    "lr_scheduler_kwargs": {"num_cycles": 2},
}
BAD_ARGUMENTS: list[tuple[str, Any, str]] = [
    ("learning_rate", 1e-4, "write train.learning_rate"),
    ("gradient_accumulation_steps", 4, "write train.global_batch_size"),
    ("per_device_train_batch_size", 4, "write train.per_device_train_batch_size"),
    ("max_length", 1024, "write data.max_length_tokens"),
    ("output_dir", "out", "write run.dir"),
    ("bf16", True, "write model.dtype"),
    ("push_to_hub", True, "write hub"),
    ("trust_remote_code", True, "leave it out: it cannot be turned on"),
    ("eos_token", "<|im_end|>", "write model.chat_template"),
    ("adam_bta1", 0.9, "write adam_beta1"),
    ("xyz", 1, "delete it"),
    ("adam_beta1", "0.9", "`adam_beta1: a number`"),
    ("adam_beta1", True, "`adam_beta1: a number`"),
    ("adam_beta1", float("nan"), "`adam_beta1: a number`"),
    ("dataloader_num_workers", 1.5, "a whole number"),
    ("tf32", 1, "true or false"),
    ("lr_scheduler_kwargs", [1], "{…: …}"),
]


def test_trainer_args_accept_what_is_listed() -> None:
    assert findings(recipe(train={"trainer_args": GOOD_ARGUMENTS})) == []


@pytest.mark.parametrize(("name", "value", "fix"), BAD_ARGUMENTS)
def test_trainer_args_refuse_the_rest(name: str, value: Any, fix: str) -> None:
    (finding,) = rules(train={"trainer_args": {name: value}})
    assert finding.path == ("train", "trainer_args", name)
    assert fix in finding.fix


def test_owned_fields_name_keys_that_exist() -> None:
    sections = known_sections().items()
    keys = {f"{section}.{name}".lstrip(".") for section, model in sections for name in model.model_fields}
    owners = {owner for owner in load_trainer_args().owned.values() if " " not in owner}
    assert owners <= keys
    assert not set(load_trainer_args().allowed) & set(TrainSpec.model_fields)


def test_lists_agree_with_sft_config() -> None:
    """The names and kinds of trainer_args.yaml, and our choices, against the installed TRL and Transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from packaging.version import Version
        from transformers.trainer_utils import SchedulerType
        from transformers.training_args import OptimizerNames
        from trl import SFTConfig

        hints = typing.get_type_hints(SFTConfig)
    lists = load_trainer_args()
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    assert not set(lists.allowed) & set(lists.owned)
    assert set(lists.allowed) <= fields
    later = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    has_them = Version(transformers.__version__) >= Version("5.23")
    assert set(lists.owned) - fields == (set() if has_them else later)
    kinds = {"number": float, "integer": int, "boolean": bool, "text": str, "mapping": dict}
    for name, kind in lists.allowed.items():
        choices = typing.get_args(hints[name]) or (hints[name],)
        assert kinds[kind] in [typing.get_origin(choice) or choice for choice in choices], name
    # Everything that a key of ours passes on under the same name is refused in trainer_args.
    assert set(TrainSpec.model_fields) & fields <= set(lists.owned)
    dangerous = re.compile(r"^(save_|eval_|logging_|hub_|push_|bf16|fp16|fsdp|deepspeed|packing|padding|resume)")
    assert {name for name in fields if dangerous.match(name)} <= set(lists.owned)
    schedulers = typing.get_args(TrainSpec.model_fields["lr_scheduler_type"].annotation)
    optimizers = typing.get_args(TrainSpec.model_fields["optim"].annotation)
    assert set(schedulers) <= {member.value for member in SchedulerType}
    assert set(optimizers) <= {member.value for member in OptimizerNames}


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"lora": {"init_lora_weights": "loftq"}}, "got loftq, which changes the base before training"),
        (
            {"lora": {"init_lora_weights": "pissa"}, "model": {"base": "a/b", "quantization": "nf4"}},
            "got pissa beside model.quantization; it needs the base's own weights",
        ),
        ({"lora": {"init_lora_weights": "olora", "use_dora": True}}, "got olora beside lora.use_dora"),
        (
            {"lora": {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 4}}},
            "got pissa beside lora.use_rslora",
        ),
        ({"lora": {"init_lora_weights": False}}, "got false: the adapter would start at random"),
        ({"lora": {"init_lora_weights": "orthogonal", "r": 3}}, "got orthogonal with r: 3; it needs an even rank"),
        (
            {"lora": {"use_dora": True}, "model": {"base": "a/b", "quantization": "int8"}},
            "got true beside model.quantization: int8",
        ),
        ({"train": {"eval_prompts": ["Hi"]}}, "got prompts, but there is no evaluation"),
        ({"train": {"early_stopping_patience": 2}}, "got 2, but nothing is evaluated while training"),
    ],
)
def test_impossible_adapters_and_stops(sections: dict[str, Any], what: str) -> None:
    [finding] = rules(**sections)
    assert finding.what.startswith(what)
    assert finding.fix
