"""A run's recipe as others may read it: what differs from the defaults, without this machine's folders."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from qwen_tune.errors import RecipeError
from qwen_tune.publishing.leaks import is_path
from qwen_tune.publishing.parts import PublishedBase
from qwen_tune.recipe.files import load_recipe
from qwen_tune.recipe.schema import Recipe
from qwen_tune.recipe.yaml_reader import dump_yaml
from qwen_tune.runs.directory import RunDir

# Whose accounts and whose disks: nobody else's business, and no part of what was trained.
PRIVATE_KEYS = ("run", "tracking", "hub", "train.resume", "train.allow_drift", "train.eval_prompts")


def read_recipe(run: RunDir) -> Recipe | None:
    """The recipe that a run was made with; None where this version cannot read it."""
    try:
        return load_recipe(run.recipe)
    except RecipeError:
        return None


def public_recipe(recipe: Recipe, base: PublishedBase, data_sets: Collection[str] = ()) -> str:
    """The recipe as YAML, which anyone who has the rows can train with.

    Args:
        recipe: The run's.
        base: What the base is called elsewhere.
        data_sets: The sources that are Hub data sets; every other one is reported by its file's name.
    """
    mapping = recipe.model_dump(exclude_defaults=True)
    for key in PRIVATE_KEYS:
        section, _, name = key.rpartition(".")
        (mapping.get(section, {}) if section else mapping).pop(name, None)
    mapping["model"] |= {"base": base.id} | ({"revision": base.revision} if base.revision else {})
    if "chat_template" in mapping["model"]:
        mapping["model"]["chat_template"] = "chat_template.jinja"  # which is sent beside it
    for source in _sources(mapping["data"]):
        for key in ("path", "tools"):
            if key in source and source[key] not in data_sets:
                source[key] = _file_name(source[key])
    return dump_yaml({key: _without_paths(value) for key, value in mapping.items() if value != {}})


def _sources(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    held_out = data.get("eval")
    yield from data["train"]
    yield from held_out if isinstance(held_out, list) else []


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _file_name(value) if isinstance(value, str) and is_path(value) else value


def _file_name(path: str) -> str:
    """The last part of a path; of a URL without what it is asked with, which may be a signature."""
    if "://" in path:
        path = urlsplit(path).path
    name = PureWindowsPath(path).name if re.match(r"[A-Za-z]:[\\/]|\\\\", path) else PurePosixPath(path).name
    return name or "rows"
