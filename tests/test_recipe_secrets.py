"""Secrets: refused wherever they stand, and never shown."""

from __future__ import annotations

import json

import pytest
from recipe_texts import MINIMAL, problems_of, write

from qwen_tune.recipe.errors import known_sections
from qwen_tune.recipe.secret_values import Secrets, is_secret_key, is_secret_value

pytestmark = pytest.mark.usefixtures("own_folder")


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
    problems = problems_of(line.format(quoted=json.dumps(canary)) + "\nmodel: {base: x}\n")
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
    problems = problems_of(MINIMAL, *overrides)
    without(canary, problems)
    assert sum("looks like a secret" in problem for problem in problems) >= 4


SECRET_KEYS = [
    "hf_token", "HF_TOKEN", "token", "api_key", "wandb_api_key", "WANDB_API_KEY", "hub_token", "hub-token", "hubToken",
    "password", "secret", "client_secret", "use_auth_token", "access_key_id", "aws_secret_access_key", "openai_api_key",
]  # fmt: skip


@pytest.mark.parametrize("key", SECRET_KEYS)
@pytest.mark.parametrize("section", ["{}", "hub: {{repo_id: a/b, {}}}", "train: {{trainer_args: {{{}}}}}"])
def test_secret_keys_are_refused(key: str, section: str) -> None:
    problems = problems_of(MINIMAL + section.format(f"{key}: canary-pass-word") + "\n")
    assert any("a recipe must not contain secrets" in problem and "hf auth login" in problem for problem in problems)
    assert all("unknown key" not in problem for problem in problems)
    without("canary-pass-word", problems)
    (problem,) = problems_of(MINIMAL, f"train.{key}=canary-pass-word")
    assert problem.startswith(f"command line: train.{key}=…: a recipe must not contain secrets")


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
    problems = problems_of(
        MINIMAL.replace("model", "modle") + line + "\n", "data={password: canary-pass-word, train: canary-pass-word}"
    )
    assert "canary" not in "".join(problems)
    assert "0123456789abcdef0123" not in "".join(problems)


def test_secrets_of_a_base_that_is_overridden() -> None:
    write(MINIMAL + "hub: {token: canary-pass-word}\n", "base.yaml")
    (problem,) = problems_of("extends: base.yaml\nhub: null\n")
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
def test_ordinary_keys_are_not_secrets(key: str) -> None:
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
def test_ordinary_values_are_not_secrets(value: str) -> None:
    assert not is_secret_value(value, "revision")


def test_short_secrets_hide_whole_words_only() -> None:
    secrets = Secrets()
    secrets.add("70")
    secrets.add(True)
    assert secrets.redact("got 70; 4706 true") == "got …; 4706 true"
