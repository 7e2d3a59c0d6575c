"""The schema, the rules over several keys, and the list of trainer arguments."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from qwen_tune.errors import RecipeError
from qwen_tune.recipe import NOT_YET, Recipe, Section, SourceSpec, TrainSpec, default_source_name
from qwen_tune.recipe_errors import known_sections, load_trainer_args
from qwen_tune.recipe_file import load_recipe, resolved_mapping
from qwen_tune.recipe_rules import Finding, findings

SECTIONS = known_sections()


def mapping(**sections: Any) -> dict[str, Any]:
    """A minimal recipe with sections laid over it."""
    return {
        "name": "job",
        "model": {"base": "Qwen/Qwen3-0.6B"},
        "data": {"train": [{"path": "data/rows.jsonl"}]},
        **sections,
    }


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(mapping(**sections))


def rules(**sections: Any) -> list[Finding]:
    return [finding for finding in findings(recipe(**sections)) if not finding.what.startswith("not yet")]


def test_defaults_are_those_of_the_design() -> None:
    minimal = recipe()
    assert minimal.run_dir == Path("runs/job")
    assert (minimal.model.dtype, minimal.model.quantization, minimal.model.attention) == ("auto", "none", "auto")
    assert (minimal.model.kernels, minimal.model.revision, minimal.model.chat_template) == ("auto", None, None)
    source = minimal.data.train[0]
    assert (source.name, source.format, source.columns, source.weight, source.rows) == ("rows", "auto", {}, 1.0, None)
    data = minimal.data
    assert (data.eval, data.max_length_tokens, data.overlong, data.packing) == (None, 4096, "drop", True)
    assert (data.loss_on, data.thinking, data.special_tokens_in_text) == ("assistant", "auto", "reject")
    assert (data.system, data.deduplicate, data.streaming) == (None, False, False)
    lora = minimal.lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (16, 32, 0.0, "all-linear")
    train = minimal.train
    assert (train.num_train_epochs, train.max_steps, train.learning_rate) == (3.0, None, 2e-4)
    assert (train.lr_scheduler_type, train.warmup_steps, train.global_batch_size) == ("cosine", 0.03, 16)
    assert (train.per_device_train_batch_size, train.num_processes, train.optim) == ("auto", None, "adamw_torch_fused")
    assert (train.logging_steps, train.eval_steps, train.save_steps, train.save_total_limit) == (1, None, None, 3)
    assert (train.gradient_checkpointing, train.seed, train.resume, train.trainer_args) == ("auto", 42, "auto", {})
    assert (minimal.tracking.report_to, minimal.export.merge, minimal.export.formats, minimal.hub) == (
        [],
        False,
        [],
        None,
    )
    assert findings(minimal) == []


def test_run_dir_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert recipe(run={"dir": "out/here"}).run_dir == Path("out/here")
    assert recipe(run={"dir": "~/here"}).run_dir == Path("/home/someone/here")


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section, model in SECTIONS.items() for name in model.model_fields]
)
def test_every_field_explains_itself(section: str, name: str) -> None:
    description = SECTIONS[section].model_fields[name].description
    assert description
    assert description[0].isupper() or description.startswith("`")
    assert description.endswith(".")


@pytest.mark.parametrize("name", ["max_length_tokens", "fraction", "max_hours", "eval_steps", "rows", "warmup_steps"])
def test_quantities_name_their_unit(name: str) -> None:
    unit = {"max_length_tokens": "tokens", "fraction": "Share", "max_hours": "Hours", "rows": "Rows"}.get(name, "teps")
    field = next(model.model_fields[name] for model in SECTIONS.values() if name in model.model_fields)
    assert unit in (field.description or "")


def test_null_means_the_default() -> None:
    """A field that took None beside another default could not be told from one that was unset."""
    for model in SECTIONS.values():
        for name, field in model.model_fields.items():
            takes_none = type(None) in typing.get_args(field.annotation) or field.annotation is types.NoneType
            assert not takes_none or field.default is None, f"{model.__name__}.{name}"
    assert recipe(lora=None, train={"learning_rate": None, "trainer_args": {"tf32": None}}) == recipe()
    with pytest.raises(ValidationError):
        recipe(train={"lerning_rate": None})


def test_sections_are_known_by_their_path() -> None:
    assert {"", "data.train[]", "data.eval[]", "data.eval", "hub", "train"} <= set(SECTIONS)
    assert SECTIONS["data.eval[]"] is SourceSpec


@pytest.mark.parametrize("model", SECTIONS.values(), ids=SECTIONS)
def test_sections_are_frozen_and_closed(model: type[Section]) -> None:
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"] is True
    assert model.model_config["strict"] is True


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/coder.jsonl", "coder"),
        ("data/coder.jsonl.gz", "coder"),
        ("data/part-*.jsonl", "part"),
        ("data/code/*.jsonl", "code"),
        ("data/code/", "code"),
        ("org/set", "set"),
        ("s3://bucket/rows.parquet", "rows"),
        ("数据/代码.jsonl", "代码"),
        ("my rows (2).jsonl", "my-rows-2"),
        ("rows¼².jsonl", "rows"),
        ("a‿b\u0301.jsonl", "a-b"),
        ("-a--b-", "a-b"),
        ("x" * 200, "x" * 100),
        ("*", "data"),
        ("..", "data"),
        ("hf://", "data"),
    ],
)
def test_sources_are_named_after_their_file(path: str, name: str) -> None:
    assert default_source_name(path) == name
    assert SourceSpec(path=path).name == name


GOOD: list[tuple[str, Any]] = [
    ("lora.r", 1),
    ("lora.lora_dropout", 0),
    ("lora.lora_dropout", 0.99),
    ("lora.target_modules", ["q_proj"]),
    ("lora.init_lora_weights", "pissa_niter_16"),
    ("lora.trainable_token_indices", {"embed_tokens": [1, 2]}),
    ("train.learning_rate", 1),
    ("train.num_train_epochs", 0.5),
    ("train.warmup_steps", 0),
    ("train.warmup_steps", 100),
    ("train.per_device_train_batch_size", 4),
    ("train.seed", 0),
    ("data.max_length_tokens", 8),
    ("data.eval", {"fraction": 0.02}),
    ("data.eval", [{"path": "held-out.jsonl"}]),
    ("name", "Qwen2.5_coder-lora"),
]
BAD: list[tuple[str, Any]] = [
    ("name", ""),
    ("name", "../up"),
    ("name", ".hidden"),
    ("name", "a b"),
    ("name", "a" * 101),
    ("name", "a\n"),
    ("name", 3),
    ("model.base", ""),
    ("model.base", "  "),
    ("model.dtype", "bf16"),
    ("model.quantization", True),
    ("lora.r", 0),
    ("lora.r", True),
    ("lora.r", "16"),
    ("lora.r", 16.0),
    ("lora.lora_alpha", 0),
    ("lora.lora_dropout", 1),
    ("lora.lora_dropout", -0.1),
    ("lora.target_modules", "q_proj"),
    ("lora.target_modules", []),
    ("lora.target_modules", [""]),
    ("lora.use_dora", 1),
    ("lora.init_lora_weights", "pissa_niter_0"),
    ("train.learning_rate", 0),
    ("train.learning_rate", -1),
    ("train.learning_rate", 2),
    ("train.learning_rate", True),
    ("train.learning_rate", "2e-4"),
    ("train.learning_rate", float("nan")),
    ("train.num_train_epochs", 0),
    ("train.num_train_epochs", float("inf")),
    ("train.max_steps", 0),
    ("train.global_batch_size", 0),
    ("train.global_batch_size", "auto"),
    ("train.per_device_train_batch_size", 0),
    ("train.per_device_train_batch_size", "all"),
    ("train.seed", -1),
    ("train.seed", 2**32),
    ("train.warmup_steps", -1),
    ("train.optim", "galore_adamw"),
    ("train.save_total_limit", 0),
    ("data.max_length_tokens", 7),
    ("data.train", []),
    ("data.train", "rows.jsonl"),
    ("data.train", [{"path": "a", "weight": 0}]),
    ("data.train", [{"path": "a", "rows": 0}]),
    ("data.eval", []),
    ("data.eval", {"fraction": 1}),
    ("data.eval", {"fraction": 0}),
    ("data.eval", 0.02),
    ("tracking.report_to", "wandb"),
    ("hub", {"repo_id": "no-owner"}),
]


def with_value(key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    whole = mapping()
    (whole.setdefault(section, {}) if section else whole)[name] = value
    return whole


@pytest.mark.parametrize(("key", "value"), GOOD)
def test_good_values(key: str, value: Any) -> None:
    parsed: Any = Recipe.model_validate(with_value(key, value))
    for part in key.split("."):
        parsed = getattr(parsed, part)
    if not isinstance(value, (dict, list)):
        assert parsed == value


@pytest.mark.parametrize(("key", "value"), BAD)
def test_bad_values(key: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate(with_value(key, value))


# One refused value for each line of the table, by its key.
WAITING: dict[str, Any] = {
    "model.quantization": "nf4",
    "train.save_total_limit": 2,
    "tracking.project": "mine",
    "model.attention": "varlen",
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
    "lora.init_lora_weights": "pissa",
    "lora.bias": "all",
    "lora.rank_pattern": {"q_proj": 8},
    "lora.alpha_pattern": {"q_proj": 8},
    "lora.exclude_modules": ["lm_head"],
    "lora.modules_to_save": ["lm_head"],
    "lora.trainable_token_indices": [1],
    "lora.target_parameters": ["experts.gate_up_proj"],
    "train.gradient_checkpointing": "selective",
    "train.neftune_noise_alpha": 5.0,
    "train.eval_steps": 10,
    "train.save_steps": 10,
    "train.load_best_model_at_end": True,
    "train.max_hours": 1.5,
    "train.resume": "runs/job/checkpoints/step-3",
    "tracking.report_to": ["wandb"],
    "export.formats": ["ollama"],
    "hub": {"repo_id": "me/job"},
}


def with_waiting(key: str, value: Any) -> tuple[dict[str, Any], str]:
    part, brackets, name = key.partition("[].")
    if not brackets:
        return with_value(key, value), key
    whole = mapping()
    whole["data"][part.removeprefix("data.")] = [{"path": "other.jsonl"}, {"path": "rows.jsonl", name: value}]
    return whole, f"{part}[1].{name}"


@pytest.mark.parametrize("key", [entry.key for entry in NOT_YET])
def test_what_has_to_wait_is_refused(key: str, tmp_path: Path) -> None:
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


def test_waiting_is_tested_in_full() -> None:
    assert {entry.key for entry in NOT_YET} == set(WAITING)


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
def test_what_works_already_is_accepted(section: str, value: Any) -> None:
    assert findings(recipe(**{section: value})) == []


def test_base_is_no_url() -> None:
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


def test_epochs_and_steps_exclude_each_other() -> None:
    assert not rules(train={"max_steps": 10})
    assert not rules(train={"max_steps": 10, "num_train_epochs": None})
    (finding,) = rules(train={"max_steps": 10, "num_train_epochs": 3})
    assert finding.path == ("train", "max_steps")


def test_warmup_is_a_share_or_whole() -> None:
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
    """The rules as they will be once nothing has to wait."""
    monkeypatch.setattr("qwen_tune.recipe_rules.NOT_YET", ())
    return findings(recipe(**sections))


def test_weight_and_rows_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"path": "a.jsonl", "rows": 10}
    assert not rules_without_waiting(monkeypatch, data={"train": [source]})
    (finding,) = rules_without_waiting(monkeypatch, data={"train": [{**source, "weight": 0.5}]})
    assert finding.path == ("data", "train", 0, "rows")


def test_evaluation_needs_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"train": [{"path": "a.jsonl"}], "eval": {"fraction": 0.1}}
    assert not rules_without_waiting(monkeypatch, data=data, train={"eval_steps": 10})
    (finding,) = rules_without_waiting(monkeypatch, train={"eval_steps": 10})
    assert finding.path == ("train", "eval_steps")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ({}, "needs train.eval_steps and train.save_steps"),
        ({"eval_steps": 10}, "needs train.save_steps"),
        ({"eval_steps": 10, "save_steps": 15}, "no multiple"),
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
    ("trust_remote_code", True, "leave it out: no key turns it on"),
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
    keys = {f"{section}.{name}".lstrip(".") for section, model in SECTIONS.items() for name in model.model_fields}
    owners = {owner for owner in load_trainer_args().owned.values() if " " not in owner}
    assert owners <= keys
    assert not set(load_trainer_args().allowed) & set(TrainSpec.model_fields)


def test_lists_agree_with_sft_config() -> None:
    """The names and kinds of trainer_args.yaml, and our choices, against the installed TRL and Transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.trainer_utils import SchedulerType
        from transformers.training_args import OptimizerNames
        from trl import SFTConfig

        hints = typing.get_type_hints(SFTConfig)
    lists = load_trainer_args()
    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    assert not set(lists.allowed) & set(lists.owned)
    assert set(lists.allowed) <= fields
    assert set(lists.owned) <= fields
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


def test_lora_words_are_those_of_peft() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert set(SECTIONS["lora"].model_fields) <= fields


def test_resolved_mapping_holds_every_key() -> None:
    resolved = resolved_mapping(recipe(hub={"repo_id": "me/job"}, data={"train": [{"path": "a"}], "eval": None}))
    for section, model in SECTIONS.items():
        if "[]" in section or section == "data.eval":
            continue
        value = resolved
        for part in filter(None, section.split(".")):
            value = value[part]
        assert set(value) == set(model.model_fields)
    assert "num_train_epochs" not in resolved_mapping(recipe(train={"max_steps": 3}))["train"]
