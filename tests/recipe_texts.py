"""Recipes for several test files, and what is reported about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_tune.errors import RecipeError
from qwen_tune.recipe.files import load_recipe
from qwen_tune.recipe.schema import Recipe

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


def mapping(**sections: Any) -> dict[str, Any]:
    """A minimal recipe, overridden by sections."""
    return {
        "name": "job",
        "model": {"base": "Qwen/Qwen3-0.6B"},
        "data": {"train": [{"path": "data/rows.jsonl"}]},
        **sections,
    }


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate(mapping(**sections))


def with_value(key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    whole = mapping()
    (whole.setdefault(section, {}) if section else whole)[name] = value
    return whole


def write(text: str, name: str = "job.yaml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def load(text: str, *overrides: str) -> Recipe:
    return load_recipe(write(text), overrides)


def problems_of(text: str | bytes, *overrides: str) -> list[str]:
    """The problems of a recipe, one line each."""
    if isinstance(text, bytes):
        Path("job.yaml").write_bytes(text)
    else:
        write(text)
    return problems_of_file("job.yaml", *overrides)


def problems_of_file(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert error.value.__cause__ is None
    assert error.value.__context__ is None
    return [str(problem) for problem in error.value.problems]
