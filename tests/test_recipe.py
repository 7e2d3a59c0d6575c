"""The schema: defaults, types and bounds of every key."""

from __future__ import annotations

import dataclasses
import types
import typing
import warnings
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from recipe_texts import recipe, with_value

from qwen_tune.recipe.errors import known_sections
from qwen_tune.recipe.rules import findings
from qwen_tune.recipe.schema import Recipe, Section, SourceSpec, default_source_name

SECTIONS = known_sections()


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
    unit = {"max_length_tokens": "tokens", "fraction": "Fraction", "max_hours": "Hours", "rows": "Examples"}.get(
        name, "teps"
    )
    field = next(model.model_fields[name] for model in SECTIONS.values() if name in model.model_fields)
    assert unit in (field.description or "")


def test_null_means_the_default() -> None:
    """A field that took None beside another default could not be distinguished from an unset one."""
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


def test_lora_words_are_those_of_peft() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert set(SECTIONS["lora"].model_fields) <= fields
