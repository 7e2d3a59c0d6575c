"""A thousand recipes with something wrong in them: each is read as it says, or refused with a place and a fix."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT

from qwen_tune.errors import RecipeError
from qwen_tune.recipe.files import load_recipe, resolved_mapping
from qwen_tune.recipe.schema import Recipe

MUTATIONS = 1000
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3.5,
        1e400,
        float("nan"),
        10**30,
        "",
        " ",
        "auto",
        "2e-4",
        "off",
        "no",
        "012",
        "12:30",
    ),
    *([], {}, [None], [[]], {"a": 1}, {"": None}, "../x", "/etc/passwd", "\x00", "🙂" * 50, "x" * 5000, "true", "null"),
]


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key path of a mapping."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in items for found in [(*path, key), *places(value, (*path, key))]]


def mutate(tree: dict[str, Any], chance: random.Random) -> None:
    """One thing changed, removed, added, misspelt or put elsewhere."""
    path = chance.choice(places(tree))
    around = tree
    for part in path[:-1]:
        around = around[part]
    kind = chance.choice(["value", "value", "value", "remove", "add", "misspell", "wrap"])
    key = path[-1]
    if kind == "value":
        around[key] = copy.deepcopy(chance.choice(VALUES))
    elif kind == "remove":
        del around[key]
    elif kind == "wrap":
        around[key] = chance.choice([[around[key]], {"value": around[key]}, str(around[key])])
    elif isinstance(around, list):
        around.insert(key, copy.deepcopy(chance.choice(VALUES)))
    elif kind == "add":
        around[chance.choice(["lr", "epochs", "name", "base", "rows", "trust_remote_code", "", "🙂"])] = copy.deepcopy(
            chance.choice(VALUES)
        )
    else:
        letters = list(str(key))
        letters.insert(chance.randrange(len(letters) + 1), chance.choice("aesx_-"))
        around["".join(letters)] = around.pop(key)


def test_a_thousand_recipes_are_read_as_they_say_or_refused_with_a_fix(tmp_path: Path) -> None:
    chance = random.Random(7)
    recipes = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    wholes = [tree for tree in recipes if "extends" not in tree and {"model", "data"} <= tree.keys()]
    assert len(wholes) > 5
    accepted = 0
    for number in range(MUTATIONS):
        tree = copy.deepcopy(chance.choice(wholes))
        for _ in range(chance.choice([1, 1, 2, 4])):
            if places(tree):
                mutate(tree, chance)
        file = tmp_path / f"recipe-{number}.yaml"
        file.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")
        recipe = read(file)
        if isinstance(recipe, RecipeError):
            assert recipe.problems
            for problem in recipe.problems:
                assert problem.where.startswith(str(file)), (tree, problem)
                assert problem.fix or "; must be " in problem.what, (tree, problem)
            continue
        accepted += 1
        # What was accepted means what it says: written out and read again it is the same.
        assert Recipe.model_validate(resolved_mapping(recipe)) == recipe, tree
        said = {path for path in places(tree) if path[0] in Recipe.model_fields}
        for path in said:
            assert_says(recipe, tree, path)
    assert 50 < accepted < MUTATIONS - 300


def read(file: Path) -> Recipe | RecipeError:
    try:
        return load_recipe(file)
    except RecipeError as error:
        return error


def assert_says(recipe: Recipe, tree: dict[str, Any], path: tuple[Any, ...]) -> None:
    """A value that was written is the recipe's, but for `null`, which stands for the default."""
    written: Any = tree
    known: Any = recipe
    for part in path:
        written = written[part]
        known = getattr(known, part) if isinstance(part, str) and hasattr(known, part) else known[part]
        if written is None:
            return
    if isinstance(written, (str, int, float, bool)):
        assert known == written or (isinstance(written, str) and float(written) == known), (path, written, known)
