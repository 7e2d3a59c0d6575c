"""A run's recipe as others may read it: what differs from the defaults, without this machine's folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qwen_tune.errors import RecipeError
from qwen_tune.publishing.parts import PublishedBase
from qwen_tune.recipe.files import load_recipe
from qwen_tune.recipe.schema import Recipe, SourceSpec
from qwen_tune.recipe.yaml_reader import dump_yaml
from qwen_tune.rows.files import names_hub_data_set
from qwen_tune.runs.directory import RunDir

# Whose accounts and whose disks: nobody else's business, and no part of what was trained.
PRIVATE_SECTIONS = ("run", "tracking", "hub")


def read_recipe(run: RunDir) -> Recipe | None:
    """The recipe that a run was made with; None where it cannot be read any more."""
    try:
        return load_recipe(run.recipe)
    except RecipeError:
        return None


def data_sets(recipe: Recipe) -> list[str]:
    """The Hub data sets among a recipe's sources, each once."""
    return list(dict.fromkeys(source.path for source in _sources(recipe) if names_hub_data_set(source.path)))


def public_recipe(recipe: Recipe, base: PublishedBase) -> str:
    """The recipe as YAML, which anyone who has the rows can train with."""
    mapping = recipe.model_dump(exclude_defaults=True)
    for section in PRIVATE_SECTIONS:
        mapping.pop(section, None)
    mapping["model"] |= {"base": base.id} | ({"revision": base.revision} if base.revision else {})
    train = mapping.get("train", {})
    train.pop("resume", None)
    for source in _written_sources(mapping["data"]):
        source["path"] = _file_name(source["path"])
        if "tools" in source:
            source["tools"] = _file_name(source["tools"])
    return dump_yaml({key: value for key, value in mapping.items() if value != {}})


def _sources(recipe: Recipe) -> list[SourceSpec]:
    held_out = recipe.data.eval if isinstance(recipe.data.eval, list) else []
    return [*recipe.data.train, *held_out]


def _written_sources(data: dict[str, Any]) -> list[dict[str, Any]]:
    held_out = data.get("eval")
    return [*data["train"], *(held_out if isinstance(held_out, list) else [])]


def _file_name(path: str) -> str:
    """A Hub data set as it is; of anything else the last part: a URL may carry a signature."""
    if names_hub_data_set(path):
        return path
    return re.sub(r"[?#].*", "", Path(path).name) if "://" in path else Path(path).name
