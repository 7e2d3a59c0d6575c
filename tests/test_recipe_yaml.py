"""The YAML of recipes: scalars, numbers, invalid YAML, and text that survives being written."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_texts import MINIMAL, load, problems_of, write

from qwen_tune.recipe.files import load_recipe, to_yaml
from qwen_tune.recipe.yaml_reader import dump_yaml, parse_scalar

pytestmark = pytest.mark.usefixtures("own_folder")


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
def test_scalars_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
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
    "tab": ("model:\n\tbase: x\n", "job.yaml:2: ", "a tab; YAML needs spaces"),
    "open quote": (MINIMAL + "name: 'abc\nfoo: 1\n", "job.yaml:6: ", "a quote that is never closed"),
    "open bracket": ("data: 1\nmodel: {base: x\nlora: 3\n", "job.yaml:2: ", "a bracket that is never closed"),
    "two documents": (MINIMAL + "---\nname: x\n", "job.yaml:6: ", "a second document"),
    "two colons": (MINIMAL + "name: a: b\n", "job.yaml:6: ", "a second `: `"),
    "indentation": ("model:\n  base: x\n data: 3\n", "job.yaml:3: ", "does not match the lines around it"),
    "tag": (MINIMAL + "name: !!python/object/apply:os.system [ls]\n", "job.yaml:6: ", "a tag"),
    "own tag": (MINIMAL + "name: !env X\n", "job.yaml:6: ", "a tag"),
    "unknown alias": (MINIMAL + "name: *x\n", "job.yaml:6: ", "an alias"),
    "at sign": (MINIMAL + "name: @x\n", "job.yaml:6: ", "a character that plain text cannot start with"),
    "unknown escape": (MINIMAL + 'name: "\\q"\n', "job.yaml:6: ", "an unknown escape"),
    "no such character": (MINIMAL + 'name: "\\UFFFFFFFF"\n', "job.yaml:6: ", "does not exist"),
    "control character": (MINIMAL + "name: a\x00b\n", "job.yaml:6: ", "the control character U+0000"),
    "NUL": (MINIMAL + 'name: "a\\0"\n', "job.yaml:6: ", "NUL"),
    "surrogate": (MINIMAL + 'name: "\\ud800"\n', "job.yaml:6: ", "surrogate"),
    "merge key": (MINIMAL + "<<: {name: x}\n", "job.yaml:6: ", "`<<` does not merge anything"),
    "number as a key": (MINIMAL + "12: x\n", "job.yaml:6: ", "the key `12` is not text"),
    "true as a key": (MINIMAL + "true: x\n", "job.yaml:6: ", "the key `true` is not text"),
    "list as a key": (MINIMAL + "? [a]\n: x\n", "job.yaml:6: ", "a key that is a list"),
    "key twice": (MINIMAL + "name: a\nname: b\n", "job.yaml:7: ", "name: given twice, on line 6 and on line 7"),
    "long number": (MINIMAL + f"train: {{seed: {'9' * 5000}}}\n", "job.yaml:6: ", "a number of 5000 digits"),
    "UTF-16": (MINIMAL.encode("utf-16"), "job.yaml:1: ", "must be UTF-8"),
    "UTF-16 without a mark": (MINIMAL.encode("utf-16-le"), "job.yaml:1: ", "must be UTF-8"),
    "Latin-1": (MINIMAL.encode() + "name: é\n".encode("latin-1"), "job.yaml:6: ", "the byte 0xe9 is not UTF-8"),
    "deep": ("a: " + "[" * 100_000, "job.yaml:1: ", "levels of nesting"),
    "deep block": ("\n".join(" " * depth + "a:" for depth in range(100)), "job.yaml:30: ", "levels of nesting"),
    "many": ("a: [" + "1," * 100_000 + "]\n", "job.yaml:1: ", "more than 5,000 values"),
    "large": ("a: " + "x" * 2_000_000, "job.yaml: ", "more than 1,000,000 bytes"),
    "bomb": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{to}: &{to} [{', '.join(['*' + of] * 9)}]\n" for of, to in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "job.yaml:",
        "expand to too many values",
    ),
    "alias of itself": ("a: &a [*a]\n", "job.yaml:1: ", "to themselves"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_reported_once(case: str) -> None:
    text, where, what = BROKEN[case]
    started = time.perf_counter()
    (problem,) = problems_of(text)
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


@pytest.mark.parametrize("rate", ["2e-4", "1e-5", "1e-10", "0.1", "1", "3.0000000000000001e-7"])
def test_numbers_survive_both_versions_of_yaml(rate: str) -> None:
    recipe = load(MINIMAL + f"train: {{learning_rate: {rate}}}\n")
    written = to_yaml(recipe)
    assert yaml.safe_load(written)["train"]["learning_rate"] == float(rate)
    assert isinstance(yaml.safe_load(written)["train"]["learning_rate"], float)
    assert load(written).train.learning_rate == float(rate)


@pytest.mark.parametrize("text", ["2e-4", "1e5", "0o17", "0x10", "012", "12:30", "no", "true", "null", "~", ".inf", "<<", "=", "a: b", "2024-01-01", "1_000", " a ", "#x", "a\n b\n", "é ✓ 🙂", "\x85", "\u2028x", "\x07"])  # noqa: E501  # fmt: skip
def test_text_stays_text(text: str) -> None:
    written = dump_yaml({"a": text, text: [text]})
    assert yaml.safe_load(written) == {"a": text, text: [text]}
    recipe = load_recipe(write(MINIMAL), ["data.system=" + json.dumps("." + text)])
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"system": "." + text})})
    assert load(to_yaml(recipe)).data.system == "." + text
