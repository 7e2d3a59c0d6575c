"""Recipe files: YAML 1.2, places, extends, overrides, secrets, and what is told about each fault."""

# ruff: noqa: E501 - a table of messages is read line by line

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qwen_tune.errors import RecipeError
from qwen_tune.recipe import Recipe
from qwen_tune.recipe_errors import known_sections
from qwen_tune.recipe_file import load_recipe, resolved_mapping, to_yaml
from qwen_tune.recipe_secrets import Secrets, is_secret_key, is_secret_value
from qwen_tune.recipe_yaml import dump_yaml, parse_scalar

MINIMAL = """\
model:
  base: Qwen/Qwen3-0.6B
data:
  train:
    - path: data/rows.jsonl
"""
FULL = """\
name: coder-lora
run: {dir: out/coder}
model:
  base: Qwen/Qwen2.5-Coder-7B-Instruct
  revision: main
  dtype: bfloat16
data:
  train:
    - path: data/coder.jsonl
      columns: {messages: chat}
    - {path: data/chat.jsonl, name: chat, format: sharegpt}
  eval: {fraction: 0.02}
  max_length_tokens: 2048
  thinking: off
lora:
  r: 8
  target_modules: [q_proj, v_proj]
train:
  learning_rate: 2e-4
  max_steps: 10
  warmup_steps: 5
  trainer_args: {adam_beta2: 0.95, lr_scheduler_kwargs: {num_cycles: 0.5}}
export: {merge: true}
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(text: str, name: str = "job.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def load(text: str, *overrides: str) -> Recipe:
    return load_recipe(write(text), overrides)


def told(text: str | bytes, *overrides: str) -> list[str]:
    """What is said about a recipe, a line a problem."""
    if isinstance(text, bytes):
        Path("job.yaml").write_bytes(text)
    else:
        write(text)
    return told_of("job.yaml", *overrides)


def told_of(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert error.value.__cause__ is None
    assert error.value.__context__ is None
    return [str(problem) for problem in error.value.problems]


def test_a_recipe_loads() -> None:
    recipe = load(FULL)
    assert recipe.name == "coder-lora"
    assert recipe.run_dir == Path("out/coder")
    assert [source.name for source in recipe.data.train] == ["coder", "chat"]
    assert recipe.data.train[0].columns == {"messages": "chat"}
    assert recipe.data.thinking == "off"
    assert recipe.train.learning_rate == 2e-4
    assert recipe.train.trainer_args == {"adam_beta2": 0.95, "lr_scheduler_kwargs": {"num_cycles": 0.5}}


def test_the_file_names_the_recipe() -> None:
    assert load_recipe(write(MINIMAL, "recipes/coder.v2.yaml")).run_dir == Path("runs/coder.v2")
    assert load("name: null\n" + MINIMAL).name == "job"
    (problem,) = told_of(write(MINIMAL, "my recipe.yaml"))
    assert problem.startswith("my recipe.yaml:1: name: is missing")
    assert problem.endswith("Fix: add `name: my-recipe`")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("no", "no"),
        ("off", "off"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("null", None),
        ("Null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("1.5e+3", 1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("+3", 3),
        ("012", 12),
        ("0x10", 16),
        ("0o17", 15),
        ("0b11", "0b11"),
        ("-0x10", "-0x10"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("190:20:30", "190:20:30"),
        ("2024-01-01", "2024-01-01"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("=", "="),
        ("٣", "٣"),
        ("-.inf", float("-inf")),
    ],
)
def test_words_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
    parsed = parse_scalar(text)
    assert parsed == value
    assert type(parsed) is type(value)
    if value is not None and text not in ("=",):
        assert load(f"{MINIMAL}train: {{trainer_args: {{lr_scheduler_kwargs: {{x: {text}}}}}}}\n").train.trainer_args[
            "lr_scheduler_kwargs"
        ] == {"x": value}


def test_words_in_a_recipe() -> None:
    recipe = load(MINIMAL + "  thinking: off\ntrain: {learning_rate: 1E-5, seed: 012}\n")
    assert recipe.data.thinking == "off"
    assert recipe.train.learning_rate == 1e-5
    assert recipe.train.seed == 12
    assert load(MINIMAL + "  system: 'true'\n").data.system == "true"


def test_anchors_work() -> None:
    recipe = load("model: {base: &base Qwen/x, chat_template: *base}\ndata: {train: [{path: a.jsonl}]}\n")
    assert recipe.model.chat_template == "Qwen/x"


BROKEN: dict[str, tuple[str | bytes, str, str]] = {
    "empty": ("", "job.yaml:1: ", "an empty file"),
    "null": ("null\n", "job.yaml:1: ", "an empty file"),
    "comment": ("# nothing\n", "job.yaml:1: ", "an empty file"),
    "list": ("- a\n- b\n", "job.yaml:1: ", "got a list of 2; must be a mapping"),
    "text": ("hello\n", "job.yaml:1: ", "got hello (text); must be a mapping"),
    "tab": ("model:\n\tbase: x\n", "job.yaml:2: ", "a tab; YAML wants spaces"),
    "open quote": (MINIMAL + "name: 'abc\nfoo: 1\n", "job.yaml:6: ", "a quote that is never closed"),
    "open bracket": ("data: 1\nmodel: {base: x\nlora: 3\n", "job.yaml:2: ", "a bracket that is never closed"),
    "two documents": (MINIMAL + "---\nname: x\n", "job.yaml:6: ", "a second document"),
    "two colons": (MINIMAL + "name: a: b\n", "job.yaml:6: ", "a second `: `"),
    "indentation": ("model:\n  base: x\n data: 3\n", "job.yaml:3: ", "does not fit"),
    "tag": (MINIMAL + "name: !!python/object/apply:os.system [ls]\n", "job.yaml:6: ", "a tag"),
    "own tag": (MINIMAL + "name: !env X\n", "job.yaml:6: ", "a tag"),
    "unknown alias": (MINIMAL + "name: *x\n", "job.yaml:6: ", "an alias"),
    "at sign": (MINIMAL + "name: @x\n", "job.yaml:6: ", "a character that no plain text starts with"),
    "unknown escape": (MINIMAL + 'name: "\\q"\n', "job.yaml:6: ", "an unknown escape"),
    "no such character": (MINIMAL + 'name: "\\UFFFFFFFF"\n', "job.yaml:6: ", "does not exist"),
    "control character": (MINIMAL + "name: a\x00b\n", "job.yaml:6: ", "the control character U+0000"),
    "NUL": (MINIMAL + 'name: "a\\0"\n', "job.yaml:6: ", "NUL"),
    "surrogate": (MINIMAL + 'name: "\\ud800"\n', "job.yaml:6: ", "surrogate"),
    "merge key": (MINIMAL + "<<: {name: x}\n", "job.yaml:6: ", "`<<` merges nothing"),
    "number as a key": (MINIMAL + "12: x\n", "job.yaml:6: ", "the key `12` is no text"),
    "true as a key": (MINIMAL + "true: x\n", "job.yaml:6: ", "the key `true` is no text"),
    "list as a key": (MINIMAL + "? [a]\n: x\n", "job.yaml:6: ", "a key that is a list"),
    "key twice": (MINIMAL + "name: a\nname: b\n", "job.yaml:7: ", "name: given twice, on line 6 and on line 7"),
    "long number": (MINIMAL + f"train: {{seed: {'9' * 5000}}}\n", "job.yaml:6: ", "a number of 5000 digits"),
    "UTF-16": (MINIMAL.encode("utf-16"), "job.yaml:1: ", "must be UTF-8"),
    "UTF-16 without a mark": (MINIMAL.encode("utf-16-le"), "job.yaml:1: ", "must be UTF-8"),
    "Latin-1": (MINIMAL.encode() + "name: é\n".encode("latin-1"), "job.yaml:6: ", "the byte 0xe9 is not UTF-8"),
    "deep": ("a: " + "[" * 100_000, "job.yaml:1: ", "inside each other"),
    "deep block": ("\n".join(" " * depth + "a:" for depth in range(100)), "job.yaml:30: ", "inside each other"),
    "many": ("a: [" + "1," * 100_000 + "]\n", "job.yaml:1: ", "more than 5,000 values"),
    "large": ("a: " + "x" * 2_000_000, "job.yaml: ", "more than 1,000,000 bytes"),
    "bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{to}: &{to} [{', '.join(['*' + of] * 9)}]\n" for of, to in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "job.yaml:",
        "unfold to too many values",
    ),
    "alias of itself": ("a: &a [*a]\n", "job.yaml:1: ", "to themselves"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_told_once(case: str) -> None:
    text, where, what = BROKEN[case]
    started = time.perf_counter()
    (problem,) = told(text)
    assert time.perf_counter() - started < 2
    assert problem.startswith(where)
    assert what in problem
    assert " Fix: " in problem


@pytest.mark.parametrize(
    "text", ["\ufeff" + MINIMAL, MINIMAL.replace("\n", "\r\n"), "%YAML 1.2\n---\n" + MINIMAL + "...\n"]
)
def test_harmless_files_load(text: str) -> None:
    Path("job.yaml").write_bytes(text.encode())
    assert load_recipe("job.yaml").model.base == "Qwen/Qwen3-0.6B"


def test_missing_files_suggest_the_nearest() -> None:
    write(MINIMAL, "recipes/qwen3/coder-lora.yaml")
    write(MINIMAL, "recipes/chat-lora.yaml")
    assert told_of("recipes/qwen3/coder-lra.yaml") == [
        "recipes/qwen3/coder-lra.yaml: does not exist. Fix: did you mean recipes/qwen3/coder-lora.yaml?"
    ]
    assert told_of("chat-lora")[0].endswith("did you mean recipes/chat-lora.yaml?")
    assert "name one of recipes/chat-lora.yaml" in told_of("xyz.yaml")[0]
    assert told_of("recipes")[0].startswith("recipes: is a folder; must be a recipe file. Fix: ")
    assert told_of("recipes/chat-lora.yaml/x.yaml")[0].startswith("recipes/chat-lora.yaml/x.yaml: cannot be read")
    assert "cannot be read" in told_of("\0")[0]
    assert "cannot be read" in told_of("x" * 5000)[0]


WRONG: list[tuple[str, str]] = [
    # One line of a section each, then what is told behind `job.yaml:N: `.
    ("lora: {r: 0}", "lora.r: got 0; must be at least 1. Fix: leave it out for the default, 16"),
    ('lora: {r: "16"}', 'lora.r: got "16" (text); must be a whole number. Fix: write 16, without quotes'),
    ("lora: {r: 1_6}", "lora.r: got 1_6 (text); must be a whole number. Fix: write 16, without quotes"),
    ("lora: {r: 16.0}", "lora.r: got 16.0 (a number); must be a whole number. Fix: write 16"),
    ("lora: {r: 1.5}", "lora.r: got 1.5 (a number); must be a whole number. Fix: leave it out for the default, 16"),
    ("lora: {r: true}", "lora.r: got true; must be a whole number. Fix: leave it out for the default, 16"),
    ("lora: {use_dora: no}", "lora.use_dora: got no (text); must be true or false. Fix: write false"),
    ("lora: {use_dora: On}", "lora.use_dora: got On (text); must be true or false. Fix: write true"),
    (
        "lora: {target_modules: q_proj}",
        "lora.target_modules: got q_proj (text); must be one of all-linear, attention, mlp, all-linear+embeddings, "
        "or a list. Fix: write [q_proj]",
    ),
    ("lora: {target_modules: [q_proj, 1]}", 'lora.target_modules[1]: got 1 (a whole number); must be text. Fix: put it in quotes: "1"'),
    ("lora: 16", "lora: got 16 (a whole number); must be a mapping. Fix: write its keys below it, indented: r, lora_alpha"),
    ("train: {learning_rate: -1}", "train.learning_rate: got -1; must be greater than 0. Fix: leave it out for the default, 0.0002"),
    ("train: {learning_rate: 2e4}", "train.learning_rate: got 20000.0; must be at most 1."),
    ("train: {learning_rate: .nan}", "train.learning_rate: got nan; must be a finite number."),
    ("train: {learning_rate: 12:30}", "train.learning_rate: got 12:30 (text); must be a number. Fix: write a number"),
    ("train: {global_batch_size: 0}", "train.global_batch_size: got 0; must be at least 1."),
    ("train: {per_device_train_batch_size: 0}", "train.per_device_train_batch_size: got 0; must be auto, or at least 1."),
    ("train: {gradient_checkpointing: true}", "train.gradient_checkpointing: got true; must be one of auto, none, selective, full. Fix: write full"),
    ("train: {optim: adamw_tuch}", "train.optim: got adamw_tuch; must be one of adamw_torch, "),
    ("train: {max_steps: 5, num_train_epochs: 1}", "train.max_steps: got 5 beside num_train_epochs: 1;"),
    ("tracking: {report_to: wandb}", "tracking.report_to: got wandb (text); must be a list. Fix: write [wandb]"),
    ("tracking: {project: 2024}", 'tracking.project: got 2024 (a whole number); must be text. Fix: put it in quotes: "2024"'),
    ("export: {formats: [gguf-q8]}", "export.formats[0]: got gguf-q8; must be one of gguf-f16, "),
    ("hub: {private: true}", "hub.repo_id: is missing; a recipe needs it. Fix: add `repo_id: owner/name`"),
    ("hub: {repo_id: me}", "hub.repo_id: got me; must be owner/name"),
    ("name: a b", 'name: got a b; must be letters, digits, `-`, `_` and `.`, beginning with a letter or digit'),
    # Keys.
    ("lora: {rank: 8}", "lora.rank: unknown key. Fix: write lora.r"),
    ("lora: {lora_alhpa: 8}", "lora.lora_alhpa: unknown key. Fix: did you mean lora_alpha?"),
    ("lora: {Lora-Alpha: 8}", "lora.Lora-Alpha: unknown key. Fix: write lora_alpha"),
    ("lora: {lora_alhpa: null}", "lora.lora_alhpa: unknown key. Fix: did you mean lora_alpha?"),
    ("learning_rate: 1e-4", "learning_rate: unknown key. Fix: it belongs to train.learning_rate"),
    ("lr: 1e-4", "lr: unknown key. Fix: write train.learning_rate"),
    ("epochs: 3", "epochs: unknown key. Fix: write train.num_train_epochs"),
    ("batch_size: 3", "batch_size: unknown key. Fix: write train.global_batch_size"),
    ("train: {gradient_accumulation_steps: 3}", "train.gradient_accumulation_steps: unknown key. Fix: write train.global_batch_size, from which the accumulation is derived"),
    ("cutoff_len: 3", "cutoff_len: unknown key. Fix: write data.max_length_tokens"),
    ("sequence_len: 3", "sequence_len: unknown key. Fix: write data.max_length_tokens"),
    ("max_seq_length: 3", "max_seq_length: unknown key. Fix: write data.max_length_tokens"),
    ("load_in_4bit: true", "load_in_4bit: unknown key. Fix: write model.quantization: nf4"),
    ("train: {warmup_ratio: 0.1}", "train.warmup_ratio: unknown key. Fix: write train.warmup_steps, where a number below 1 is a share of all steps"),
    ("trust_remote_code: true", "trust_remote_code: unknown key. Fix: delete it; no key turns it on"),
    ("finetuning_type: lora", "finetuning_type: unknown key. Fix: delete it; every recipe trains an adapter"),
    ("template: qwen", "template: unknown key. Fix: write model.chat_template"),
    ("train: {adam_beta1: 0.9}", "train.adam_beta1: unknown key. Fix: it belongs to train.trainer_args.adam_beta1"),
    ("train: {save_strategy: steps}", "train.save_strategy: unknown key. Fix: write train.save_steps"),
    ("lora: {extends: base.yaml}", "lora.extends: unknown key. Fix: move it to the top level of the file"),
    ("zzzzz: 1", "zzzzz: unknown key. Fix: delete it; the keys of a recipe are name, run, model, data"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "what"), WRONG)
def test_wrong_values_and_keys(line: str, what: str) -> None:
    (problem,) = told(f"{MINIMAL}# a comment\n{line}\n")
    assert problem.startswith(f"job.yaml:7: {what}")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("{train: rows.jsonl}", "data.train: got rows.jsonl (text); must be a list. Fix: write [{path: rows.jsonl}]"),
        ("{train: {path: rows.jsonl}}", "data.train: got a mapping; must be a list. Fix: put `- ` before each item"),
        ("{train: []}", "data.train: got an empty list; must be a list of at least 1"),
        ("{train: [rows.jsonl]}", "data.train[0]: got rows.jsonl (text); must be a mapping. Fix: write {path: rows.jsonl}"),
        ("{train: [null]}", "data.train[0]: got null; must be a mapping"),
        ("{train: [{name: x}]}", "data.train[0].path: is missing; a recipe needs it. Fix: add `path: data/rows.jsonl`"),
        ("{train: [{path: a.jsonl, wieght: 2}]}", "data.train[0].wieght: unknown key. Fix: did you mean weight?"),
        ("{train: [{path: a}, {path: a}]}", "data.train[1].path: got a, the name of data.train[0] too"),
        ("{train: [{path: a}], eval: 0.1}", "data.eval: got 0.1 (a number); must be a mapping such as {fraction: 0.02}"),
        ("{train: [{path: a}], eval: {fraction: 2}}", "data.eval.fraction: got 2; must be less than 1"),
        ("{train: [{path: a}], eval: {fracton: 0.1}}", "data.eval.fraction: is missing"),
        ("{train: [{path: a}], eval: [{pth: b}]}", "data.eval[0].path: is missing"),
        ("{}", "data.train: is missing; a recipe needs it. Fix: add `train: [{path: data/rows.jsonl}]`"),
    ],
)  # fmt: skip
def test_wrong_data(data: str, what: str) -> None:
    first = told(f"model: {{base: x}}\n\ndata: {data}\n")[0]
    assert first.startswith(f"job.yaml:3: {what}")


def test_required_sections() -> None:
    problems = told("lora: {r: 8}\n")
    assert [problem.split(". Fix")[0] for problem in problems] == [
        "job.yaml:1: model: is missing; a recipe needs it",
        "job.yaml:1: data: is missing; a recipe needs it",
    ]
    assert told("model: {dtype: auto}\n" + MINIMAL[MINIMAL.index("data") :])[0].startswith(
        "job.yaml:1: model.base: is missing"
    )


def test_every_fault_is_told_in_the_order_of_the_file() -> None:
    write("lora: {r: 0}\nlearnin_rate: 3\nmodel: {quantization: nf4}\n", "base.yaml")
    problems = told(
        """\
extends: base.yaml
train:
  max_steps: 0
  lerning_rate: 1
  global_batch_size: 10
  per_device_train_batch_size: 4
  eval_steps: 5
  trainer_args: {output_dir: x}
  seed: 1
  seed: 2
data:
  train:
    - path: 3
    - path: a.jsonl
      format: alpca
model:
  base: Qwen/x
""",
        "train.weight_decay=-1",
        "nonsense",
    )
    starts = [problem.split(": ")[0] + " " + problem.split(": ")[1] for problem in problems]
    assert starts == [
        "job.yaml:3 train.max_steps",
        "job.yaml:4 train.lerning_rate",
        "job.yaml:5 train.global_batch_size",
        "job.yaml:7 train.eval_steps",
        "job.yaml:8 train.trainer_args.output_dir",
        "job.yaml:10 train.seed",
        "job.yaml:13 data.train[0].path",
        "job.yaml:15 data.train[1].format",
        "base.yaml:1 lora.r",
        "base.yaml:2 learnin_rate",
        "base.yaml:3 model.quantization",
        "command line train.weight_decay=-1",
        "command line override 2 has no `=`. Fix",
    ]


def test_rules_leave_broken_keys_out() -> None:
    """No conclusion from a value that is refused already."""
    assert len(told(MINIMAL + "train: {global_batch_size: 10, per_device_train_batch_size: four}\n")) == 1
    assert len(told(MINIMAL + "train: {max_steps: 0, num_train_epochs: 3}\n")) == 1


def test_a_rule_points_at_the_key_that_is_written() -> None:
    (problem,) = told(MINIMAL + "train:\n  seed: 1\n  per_device_train_batch_size: 3\n")
    assert problem.startswith("job.yaml:8: train.global_batch_size: got 16, which leaves a remainder of 1;")


# extends


def test_extends_merges_mappings_and_replaces_lists() -> None:
    write(FULL, "bases/base.yaml")
    write("extends: base.yaml\nlora: {r: 4}\ntrain: {max_steps: null}\n", "bases/middle.yaml")
    recipe = load("extends: bases/middle.yaml\nname: job\ndata:\n  train: [{path: x.jsonl}]\nlora: {lora_alpha: 8}\n")
    assert recipe.name == "job"
    assert [source.path for source in recipe.data.train] == ["x.jsonl"]
    assert recipe.data.max_length_tokens == 2048
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (4, 8, ["q_proj", "v_proj"])
    assert (recipe.train.max_steps, recipe.train.num_train_epochs) == (None, 3.0)
    assert "extends" not in resolved_mapping(recipe)


def test_extends_unsets_with_null() -> None:
    write(FULL, "base.yaml")
    recipe = load(
        "extends: base.yaml\nlora: null\ndata: {eval: null, train: [{path: a, columns: {x: null}}]}\nexport: ~\n"
    )
    assert recipe.lora.r == 16
    assert recipe.data.eval is None
    assert recipe.data.train[0].columns == {}
    assert recipe.export.merge is False


def test_extends_keeps_places() -> None:
    write(MINIMAL + "lora:\n  r: 0\n", "recipes/base.yaml")
    assert told_of(write("extends: base.yaml\n", "recipes/job.yaml"))[0].startswith(
        "recipes/base.yaml:7: lora.r: got 0"
    )
    (problem,) = told_of(write("extends: base.yaml\nlora:\n\n  r: -1\n", "recipes/job.yaml"))
    assert problem.startswith("recipes/job.yaml:4: lora.r: got -1")


def test_extends_of_another_folder() -> None:
    write(MINIMAL, "shared/base.yaml")
    assert (
        load_recipe(write("extends: ../shared/base.yaml\n", "recipes/job.yaml")).data.train[0].path == "data/rows.jsonl"
    )
    assert load_recipe(write(f"extends: {Path('shared/base.yaml').resolve()}\n", "recipes/job.yaml")).name == "job"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: 1\nextends: bse.yaml\n", "job.yaml:2: extends: got bse.yaml; bse.yaml does not exist or is no file. Fix: did you mean base.yaml?"),
        ("extends: [base.yaml]\n", "job.yaml:1: extends: got a list of 1; must be the name of one file"),
        ("extends: 3\n", "job.yaml:1: extends: got 3 (a whole number); must be the name of one file"),
        ("extends: ''\n", 'job.yaml:1: extends: got "" (text); must be the name of one file'),
        ("extends: .\n", "job.yaml:1: extends: got .; . does not exist or is no file"),
        ("extends: 'x\\0'\n", "job.yaml:1: extends: got x\\0;"),
        ("extends: job.yaml\n", "job.yaml:1: extends: a cycle: job.yaml → job.yaml"),
        ("name: x\nextends: base.yaml\n", "base.yaml:1: extends: a cycle: job.yaml → base.yaml → job.yaml"),
    ],
)  # fmt: skip
def test_extends_that_cannot_be_followed(text: str, what: str) -> None:
    write("extends: job.yaml\n", "base.yaml")
    (problem,) = told(text)
    assert problem.startswith(what)


def test_extends_null_is_none() -> None:
    assert load("extends: null\n" + MINIMAL).name == "job"


def test_extends_a_broken_file() -> None:
    write("model: [", "base.yaml")
    (problem,) = told("extends: base.yaml\n")
    assert problem.startswith("base.yaml:1: not valid YAML")


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("data.packing=false", "data.packing", False),
        ("data.thinking=off", "data.thinking", "off"),
        ("data.system=You are: kind, *very* kind # yes", "data.system", "You are: kind, *very* kind # yes"),
        ("data.system=- not a list", "data.system", "- not a list"),
        ("data.system=a=b", "data.system", "a=b"),
        ("data.system='12'", "data.system", "12"),
        ('data.system="a\\nb"', "data.system", "a\nb"),
        ("data.eval={fraction: 0.1}", "data.eval.fraction", 0.1),
        ("train.max_steps=", "train.max_steps", None),
        ("train.max_steps=null", "train.max_steps", None),
        ("lora.target_modules=[up_proj]", "lora.target_modules", ["up_proj"]),
        ("run.dir=/elsewhere", "run.dir", "/elsewhere"),
        ("model.base=./model", "model.base", "./model"),
        ("export={merge: false}", "export.merge", False),
        ("export=", "export.merge", False),
    ],
)
def test_overrides(override: str, key: str, value: Any) -> None:
    found: Any = load(FULL, override)
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_of_lists() -> None:
    recipe = load(FULL, "data.train.1.path=other.jsonl", "data.train[0].name=first")
    assert [(source.path, source.name) for source in recipe.data.train] == [
        ("data/coder.jsonl", "first"),
        ("other.jsonl", "chat"),
    ]
    assert load(FULL, "data.train=[{path: x}]").data.train[0].path == "x"
    assert load(FULL, "data.train=[{path: x}]", "data.train.0.path=y").data.train[0].path == "y"
    assert load("lora: {r: 4}\n", "model.base=x", "data.train=[{path: x}]").model.base == "x"
    assert load(MINIMAL, "data.train.0.columns.messages=chat").data.train[0].columns == {"messages": "chat"}


def test_later_overrides_win_and_mappings_merge() -> None:
    recipe = load(FULL, "lora.r=2", "lora.r=3", "train={seed: 7}")
    assert (recipe.lora.r, recipe.train.seed, recipe.train.max_steps) == (3, 7, 10)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("train.learning_rate=-1", "command line: train.learning_rate=-1: got -1; must be greater than 0."),
        ("train.lerning_rate=1", "command line: train.lerning_rate=1: unknown key. Fix: did you mean learning_rate?"),
        ("trian.seed=1", "command line: trian.seed=1: trian: unknown key. Fix: did you mean train?"),
        ("data.eval={fraction: 3}", "command line: data.eval=…: data.eval.fraction: got 3; must be less than 1"),
        ("model.quantization=nf4", "command line: model.quantization=nf4: not yet: got nf4"),
        ("nonsense", "command line: override 1 has no `=`"),
        ("=3", "command line: override 1 names no key"),
        ("a..b=3", "command line: override 1 names no key"),
        (".a=3", "command line: override 1 names no key"),
        ("a\n=3", "command line: override 1 names no key"),
        ("a." * 200 + "a=3", "command line: override 1 names no key"),
        ("lora.r.x=3", "command line: lora.r.x=3: lora.r is 8 (a whole number), and has no `x` in it"),
        ("data.train.2.path=x", "command line: data.train.2.path=x: data.train is a list of 2, and has no item `2`. Fix: write a number from 0 to 1"),
        ("data.train.x=3", "command line: data.train.x=3: data.train is a list of 2, and has no item `x`"),
        ("data.train.-1.path=x", "command line: data.train.-1.path=x: data.train is a list of 2"),
        ("hub.0=3", "command line: hub.0=3: hub is null, and has no `0` in it"),
        ("lora.target_modules=[a", "command line: lora.target_modules=…: not valid YAML: a bracket that is never closed"),
        ("data.system='a", "command line: data.system='a: not valid YAML: a quote that is never closed"),
        ("extends=x.yaml", "command line: extends=x.yaml: the file alone says what it extends"),
        (f"train.seed={'9' * 200}", "command line: train.seed="),
        ("data.system=\ud800", 'command line: data.system="\\ud800": holds a character that no text has'),
    ],
)  # fmt: skip
def test_wrong_overrides(override: str, what: str) -> None:
    (problem,) = told(FULL, override)
    assert problem.startswith(what)


# Secrets

CANARIES = [
    "hf_CanaryCanaryCanaryCanaryCanary01",
    "sk-proj-canary0123456789abcdef",
    "ghp_CanaryCanaryCanaryCanaryCanary0123",
    "github_pat_Canary0123456789_canary",
    "Bearer canary0123456789abcdef",
    "https://user:canarypassword@example.org/canary-rows.jsonl",
    "AKIACANARYCANARY0123",
]


def without(canary: str, problems: list[str]) -> None:
    text = "\n".join(problems)
    for part in [canary, *canary.split("/"), *canary.split()]:
        if len(part) > 8 and "example" not in part:
            assert part not in text
    assert canary[6:20] not in text


@pytest.mark.parametrize("canary", CANARIES)
@pytest.mark.parametrize(
    "line",
    [
        "data: {{system: {quoted}, train: [{{path: a}}]}}",
        "model: {{base: {quoted}, dtype: {quoted}, revision: 3}}",
        "lora: {{target_modules: [{quoted}], r: {quoted}}}",
        "lora: {{{quoted}: 3}}",
        "train: {{optim: {quoted}, trainer_args: {{optim_args: {quoted}, lr_scheduler_kwargs: {{x: [{quoted}]}}}}}}",
        "hub: {quoted}",
        "{quoted}: 3",
        "extends: {quoted}",
        "name: {quoted}\nname: {quoted}",
        "<<: {quoted}",
        "data: [{quoted}",
        "name: *{quoted}",
        "name: {{{quoted}: {{{quoted}: 1}}}}",
    ],
)
def test_secret_values_are_never_shown(canary: str, line: str) -> None:
    problems = told(line.format(quoted=json.dumps(canary)) + "\nmodel: {base: x}\n")
    without(canary, problems)


@pytest.mark.parametrize("canary", CANARIES)
def test_secret_values_in_overrides(canary: str) -> None:
    overrides = [
        f"data.system=tell {canary}",
        f"hub={canary}",
        f"a.{canary}=3",
        f"lora={{x: '{canary}'}}",
        canary,
        f"x={canary}",
    ]
    problems = told(MINIMAL, *overrides)
    without(canary, problems)
    assert sum("looks like a secret" in problem for problem in problems) >= 4


SECRET_KEYS = [
    "hf_token", "HF_TOKEN", "token", "api_key", "wandb_api_key", "WANDB_API_KEY", "hub_token", "hub-token", "hubToken",
    "password", "secret", "client_secret", "use_auth_token", "access_key_id", "aws_secret_access_key", "openai_api_key",
]  # fmt: skip


@pytest.mark.parametrize("key", SECRET_KEYS)
@pytest.mark.parametrize("section", ["{}", "hub: {{repo_id: a/b, {}}}", "train: {{trainer_args: {{{}}}}}"])
def test_secret_keys_are_refused(key: str, section: str) -> None:
    problems = told(MINIMAL + section.format(f"{key}: canary-pass-word") + "\n")
    assert any("a recipe holds no secrets" in problem and "hf auth login" in problem for problem in problems)
    assert all("unknown key" not in problem for problem in problems)
    without("canary-pass-word", problems)
    (problem,) = told(MINIMAL, f"train.{key}=canary-pass-word")
    assert problem.startswith(f"command line: train.{key}=…: a recipe holds no secrets")


@pytest.mark.parametrize(
    "line",
    [
        "hf_token: canary-pass-word",
        "hf_token: {a: [canary-pass-word, {b: canary-pass-word}]}",
        "model: {base: canary-pass-word, dtype: canary-pass-word, token: canary-pass-word}",
        "token: canary-pass-word\ntoken: canary-pass-word-2",
        "lora: {rank_pattern: {token: canary-pass-word}}",
        "lora: {trainable_token_indices: {token: [\n canary-pass-word]}}",
        "secret: |\n  canary-pass-word\n  canary-pass-word",
        "password: &p canary-pass-word\nname: *p",
        "train: {trainer_args: {lr_scheduler_kwargs: {api_key: canary-pass-word}}}",
        "hub: {wandb_key: 0123456789abcdef0123456789abcdef01234567}",
        "password: canary-pass-word\nmodel: [",
    ],
)
def test_what_secret_keys_hold_is_never_shown(line: str) -> None:
    problems = told(
        MINIMAL.replace("model", "modle") + line + "\n", "data={password: canary-pass-word, train: canary-pass-word}"
    )
    assert "canary" not in "".join(problems)
    assert "0123456789abcdef0123" not in "".join(problems)


def test_secrets_of_a_base_that_is_overridden() -> None:
    write(MINIMAL + "hub: {token: canary-pass-word}\n", "base.yaml")
    (problem,) = told("extends: base.yaml\nhub: null\n")
    assert problem.startswith("base.yaml:6: hub.token: ")


@pytest.mark.parametrize(
    "key",
    [
        "max_length_tokens",
        "special_tokens_in_text",
        "trainable_token_indices",
        "eos_token",
        "pad_token",
        "keys",
        "monkey",
    ],
)
def test_ordinary_keys_are_no_secrets(key: str) -> None:
    assert not is_secret_key(key)
    assert not any(is_secret_key(name) for section in known_sections().values() for name in section.model_fields)


@pytest.mark.parametrize(
    "value",
    [
        "data/hf_datasets_of_the_whole_team.jsonl",
        "task-2024-instructions-and-more-rows.jsonl",
        "0123456789abcdef0123456789abcdef01234567",
        "Bearer of news",
        "https://example.org/a@b:c",
        "You are Qwen, created by Alibaba Cloud.",
    ],
)
def test_ordinary_values_are_no_secrets(value: str) -> None:
    assert not is_secret_value(value, "revision")


def test_short_secrets_hide_whole_words_only() -> None:
    secrets = Secrets()
    secrets.add("70")
    secrets.add(True)
    assert secrets.redact("got 70; 4706 true") == "got …; 4706 true"


# Writing


def test_the_resolved_recipe_reads_back() -> None:
    for text in (MINIMAL, FULL):
        recipe = load(text)
        written = to_yaml(recipe)
        again = load_recipe(write(written, "runs/x/recipe.yaml"))
        assert again == recipe
        assert to_yaml(again) == written
    assert "learning_rate: 0.0002\n" in to_yaml(load(FULL))


@pytest.mark.parametrize("rate", ["2e-4", "1e-5", "1e-10", "0.1", "1", "3.0000000000000001e-7"])
def test_numbers_survive_both_versions_of_yaml(rate: str) -> None:
    recipe = load(MINIMAL + f"train: {{learning_rate: {rate}}}\n")
    written = to_yaml(recipe)
    assert yaml.safe_load(written)["train"]["learning_rate"] == float(rate)
    assert isinstance(yaml.safe_load(written)["train"]["learning_rate"], float)
    assert load(written).train.learning_rate == float(rate)


@pytest.mark.parametrize("text", ["2e-4", "1e5", "0o17", "0x10", "012", "12:30", "no", "true", "null", "~", ".inf", "<<", "=", "a: b", "2024-01-01", "1_000", " a ", "#x", "a\n b\n", "é ✓ 🙂", "\x85", "\u2028x", "\x07"])  # fmt: skip
def test_text_stays_text(text: str) -> None:
    written = dump_yaml({"a": text, text: [text]})
    assert yaml.safe_load(written) == {"a": text, text: [text]}
    recipe = load_recipe(write(MINIMAL), ["data.system=" + json.dumps("." + text)])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"system": "." + text})})
    assert load(to_yaml(recipe)).data.system == "." + text


# Random recipes

_KEYS = sorted({name for section in known_sections().values() for name in section.model_fields} | {"extends", "token"})
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**25), 10**25),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["auto", "none", "2e-4", "012", "job.yaml", "a/b", "hf_" + "a1" * 16, "s3://x/y", "messages"]),
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS) | st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
_SETTINGS = settings(
    max_examples=200,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
)


def loads_or_tells(overrides: list[str]) -> None:
    error = None
    try:
        recipe = load_recipe("job.yaml", overrides)
    except RecipeError as caught:
        error = caught
    if error:
        assert error.problems
        assert all(problem.what for problem in error.problems)
        assert "hf_a1a1" not in str(error)
    else:
        Path("again.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        assert load_recipe("again.yaml") == recipe


@_SETTINGS
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_mutated_recipes_load_or_tell(data: st.DataObject, seed: int) -> None:
    chance = random.Random(seed)
    mapping: Any = yaml.safe_load(FULL)
    for _ in range(chance.randint(1, 3)):
        node = mapping
        while isinstance(node, (dict, list)) and node:
            key = chance.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or not node[key] or chance.random() < 0.3:
                change = chance.random()
                if change < 0.2:
                    del node[key]
                elif change < 0.4 and isinstance(node, dict):
                    node[data.draw(st.sampled_from(_KEYS))] = data.draw(_VALUES)
                else:
                    node[key] = data.draw(_VALUES)
                break
            node = node[key]
    Path("job.yaml").write_text(dump_yaml(mapping), encoding="utf-8", errors="replace")
    loads_or_tells([])


@_SETTINGS
@given(position=st.integers(0, len(FULL)), cut=st.integers(0, 20), inserted=st.text(max_size=6))
@example(position=0, cut=0, inserted="? ")
@example(position=5, cut=0, inserted="&a ")
@example(position=211, cut=20, inserted="¼")
def test_mutated_text_loads_or_tells(position: int, cut: int, inserted: str) -> None:
    text = FULL[:position] + inserted + FULL[position + cut :]
    Path("job.yaml").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    loads_or_tells([])


@_SETTINGS
@given(
    path=st.lists(st.sampled_from([*_KEYS, "0", "1", "9", "[0]", ""]) | st.text(max_size=3), min_size=1, max_size=4),
    value=st.text(max_size=10)
    | _VALUES.map(lambda value: json.dumps(value))
    | st.sampled_from(["[", "{a", "'", "*a", "!x"]),
)
def test_random_overrides_load_or_tell(path: list[str], value: str) -> None:
    Path("job.yaml").write_text(FULL, encoding="utf-8")
    loads_or_tells([f"{'.'.join(path)}={value}"])


def test_loading_needs_nothing_heavy() -> None:
    write(FULL)
    program = (
        "import sys\n"
        "from qwen_tune.recipe_file import load_recipe\n"
        "load_recipe('job.yaml', ['train.trainer_args.adam_beta1=0.9'])\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'accelerate', 'numpy', 'wandb'} & set(sys.modules)\n"
        "print(sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_later_layer_says_how_long_to_train(tmp_path):
    (tmp_path / "base.yaml").write_text(MINIMAL + "train: {num_train_epochs: 3}\n")
    short = load_recipe(tmp_path / "base.yaml", ["train.max_steps=5"])
    assert short.train.max_steps == 5
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ntrain: {max_steps: 7}\n")
    assert load_recipe(tmp_path / "child.yaml").train.max_steps == 7
    again = load_recipe(tmp_path / "child.yaml", ["train.num_train_epochs=1"])
    assert (again.train.max_steps, again.train.num_train_epochs) == (None, 1)
    with pytest.raises(RecipeError, match="each says how long to train"):
        load_recipe(tmp_path / "base.yaml", ["train.max_steps=5", "train.num_train_epochs=1"])
