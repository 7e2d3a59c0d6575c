"""Recipe files: reading, `extends`, overrides, validation, and writing the resolved recipe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qwen_tune.errors import RecipeError, first_line
from qwen_tune.recipe.errors import schema_faults, to_shown
from qwen_tune.recipe.rules import findings
from qwen_tune.recipe.schema import NAME_PATTERN, Recipe, to_name
from qwen_tune.recipe.secret_values import is_secret_key, is_secret_value
from qwen_tune.recipe.tree import Faults, KeyPath, Located, Place, UnusableRecipeError, to_path, to_text
from qwen_tune.recipe.yaml_reader import MAX_DEPTH, SECRET_FIX, check_scalar, dump_yaml, parse_yaml

MAX_BYTES = 1_000_000
SUFFIXES = (".yaml", ".yml")
MAX_FILES = 20
"""Longest chain of a recipe and the files it extends."""

_COMMAND_LINE_RANK = 1_000_000

_PLACEHOLDERS: dict[KeyPath, Any] = {
    ("name",): "name",
    ("model",): {"base": "base"},
    ("model", "base"): "base",
    ("data",): {"train": [{"path": "rows"}]},
    ("data", "train"): [{"path": "rows"}],
    ("hub", "repo_id"): "owner/name",
    ("data", "eval", "fraction"): 0.5,
}
"""Values for broken required keys, so that the rest of the recipe can be validated."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, the files it extends, and overrides of single keys.

    Args:
        path: The recipe file.
        overrides: `key.path=value` each, with a YAML value; merged in before validation.

    Returns:
        The recipe with all defaults. Its paths are relative to the working directory.

    Raises:
        RecipeError: With all faults, in the order of the files and their lines.
    """
    faults = Faults()
    shown = str(Path(path))
    changes = [_parse_override(text, index, faults) for index, text in enumerate(overrides)]
    tree: Located | None = None
    with suppress(UnusableRecipeError):
        tree = _load_tree(Path(path), shown, faults, ())
    if tree is None:
        raise RecipeError(faults.problems())
    for key_path, value in filter(None, changes):
        tree = _changed(tree, key_path, value, (), faults)
    tree = _with_the_later_length(tree)
    recipe = _validated(_named(tree, Path(path).stem, Place(shown, 1), faults), faults)
    if recipe is None or faults.found:
        raise RecipeError(faults.problems())
    return recipe


def resolved_mapping(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe, with defaults, as plain dicts, lists and scalars."""
    mapping = recipe.model_dump()
    if recipe.train.max_steps is not None:
        # The two exclude each other.
        del mapping["train"]["num_train_epochs"]
    return mapping


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML, from which `load_recipe` reads an equal recipe."""
    return dump_yaml(resolved_mapping(recipe))


def _load_tree(path: Path, shown: str, faults: Faults, chain: tuple[tuple[Path, str], ...]) -> Located:
    """Reads a file and the files it extends.

    Raises:
        UnusableRecipeError: After a fault that leaves too little to validate.
    """
    place = Place(shown, 1, len(chain))
    text = _read_text(path, place, faults)
    known_faults = len(faults.found)
    tree = parse_yaml(text, place, faults)
    if tree is None or tree.value is None:
        if len(faults.found) > known_faults:
            raise UnusableRecipeError
        fix = "write at least model.base and data.train; `qwen-tune new` creates a recipe"
        faults.stop(place, (), "an empty file; must be a recipe", fix)
    if not isinstance(tree.value, dict):
        what = f"got {to_shown(tree.plain(), True)}; must be a mapping"
        faults.stop(tree.place, (), what, "write `key: value` lines")
    extends = tree.value.get("extends")
    tree = Located({key: item for key, item in tree.value.items() if key != "extends"}, place)
    if extends is None or extends.value is None:
        return tree
    at, key = extends.place, ("extends",)
    if not isinstance(extends.value, str) or not extends.value.strip():
        what = f"got {to_shown(extends.plain(), True)}; must be the name of one file"
        faults.stop(at, key, what, "name one file; that file may extend another")
    try:
        chain = (*chain, (path.resolve(), shown))
        parent = path.parent / Path(extends.value).expanduser()
        is_cycle, is_file = parent.resolve() in [known for known, _ in chain], parent.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        # A NUL, a name that is too long, a loop of links, an unknown user.
        what = f"got {to_shown(extends.value)}, which is not a usable path ({to_shown(first_line(error))})"
        faults.stop(at, key, what, "name a recipe file")
    if is_cycle:
        names = [*(name for _, name in chain), str(parent)]
        faults.stop(at, key, f"a cycle: {' → '.join(names)}", "remove one `extends`")
    if len(chain) >= MAX_FILES:
        faults.stop(at, key, f"a chain of more than {MAX_FILES} files", "merge some of the files")
    if not is_file:
        what = f"got {extends.value}; {parent} does not exist or is not a file"
        faults.stop(at, key, what, _nearest_recipe(parent))
    return _load_tree(parent, str(parent), faults, chain).merged(tree)


def _read_text(path: Path, place: Place, faults: Faults) -> str:
    where = replace(place, line=None)
    try:
        if path.is_dir():
            faults.stop(where, (), "is a folder; must be a recipe file", _nearest_recipe(path / "recipe.yaml"))
        if path.exists() and not path.is_file():
            # A pipe can be read only once, but all processes of a run, and a resumed run, read the recipe.
            faults.stop(where, (), "is a pipe or a device; must be a regular file", "write the recipe to a file")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        faults.stop(where, (), "does not exist", _nearest_recipe(path))
    except (OSError, ValueError, RuntimeError) as error:
        # ValueError: a path with a NUL. RuntimeError: a loop of links.
        what = (getattr(error, "strerror", None) or "is not a path").lower()
        faults.stop(where, (), f"cannot be read: {what}", "name a recipe file that can be read")
    if len(content) > MAX_BYTES:
        what = f"more than {MAX_BYTES:,} bytes; a recipe is a short file"
        faults.stop(where, (), what, "put examples into data files")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
        faults.stop(place, (), "is UTF-16 or UTF-32; must be UTF-8", "save the file as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"the byte 0x{content[error.start]:02x} is not UTF-8"
        faults.stop(replace(place, line=line), (), what, "save the file as UTF-8")


def _nearest_recipe(path: Path) -> str:
    try:
        beside = [file for file in path.parent.iterdir() if file.suffix in SUFFIXES and file.is_file()]
        shipped = [file for file in Path("recipes").rglob("*") if file.suffix in SUFFIXES and file.is_file()]
    except (OSError, ValueError):
        return "name an existing recipe file"
    by_name = {file.stem: file for file in [*shipped, *beside]}
    near = difflib.get_close_matches(path.stem, by_name, n=1, cutoff=0.5)
    if near:
        return f"did you mean {by_name[near[0]]}?"
    names = ", ".join(sorted({str(file) for file in [*beside, *shipped]})[:5])
    return f"name one of {names}" if names else "name an existing recipe file; `qwen-tune new` creates one"


def _parse_override(text: str, index: int, faults: Faults) -> tuple[KeyPath, Located] | None:
    """Reads `a.b.c=value`; None after a fault."""
    key, equals, written = text.partition("=")
    key_path = to_path(key.strip())
    written = written.strip()
    is_collection = written.startswith(("[", "{"))
    # The text inside brackets may contain a secret and is not parsed yet, so it is not quoted.
    quoted = "…" if is_collection or is_secret_value(written, key) else to_shown(written) if written else ""
    place = Place(f"command line: {key.strip()}={quoted}", None, _COMMAND_LINE_RANK + index, key_path)
    usage = "write key.path=value, such as train.learning_rate=1e-4"
    if not equals:
        # A lone word may be anything, even a token.
        place = replace(place, source="command line")
        faults.add(place, (), f"override {index + 1} has no `=`", usage)
        return None
    if "" in key_path or not key.isprintable() or len(key_path) > MAX_DEPTH:
        faults.add(replace(place, source="command line"), (), f"override {index + 1} does not name a key", usage)
        return None
    if key_path[0] == "extends":
        faults.add(place, key_path, "`extends` cannot be overridden", "change it in the file")
        return None
    if any(is_secret_key(str(part)) or is_secret_value(str(part)) for part in key_path):
        faults.secrets.add(written)
        place = replace(place, source=f"command line: {key.strip()}=…")
        what = "a recipe must not contain secrets (the value is not shown)"
        faults.add(place, key_path, what, SECRET_FIX, hides_others=True)
        return None
    if is_collection or written.startswith(('"', "'")):
        tree = parse_yaml(written, place, faults, key_path)
    else:
        tree = Located(check_scalar(written, True, key_path, place, faults), place)
    return None if tree is None else (key_path, tree)


def _changed(tree: Located, rest: KeyPath, value: Located, walked: KeyPath, faults: Faults) -> Located:
    """The tree with a value merged in at a key path."""
    if not rest:
        return tree.merged(value)
    part, walked_on = rest[0], (*walked, rest[0])
    if isinstance(tree.value, list):
        count = len(tree.value)
        if not isinstance(part, int) or part >= count:
            what = f"{to_text(walked)} is a list of {count} and has no item `{part}`"
            fix = f"write a number from 0 to {count - 1}" if count else f"write {to_text(walked)}=[…]"
            faults.add(value.place, value.place.override or (), what, fix)
            return tree
        changed = _changed(tree.value[part], rest[1:], value, walked_on, faults)
        return Located([changed if index == part else item for index, item in enumerate(tree.value)], tree.place)
    is_open = isinstance(tree.value, dict) or (tree.value is None and not isinstance(part, int))
    if not is_open:
        what = f"{to_text(walked)} is {to_shown(tree.value, True)}, so it has no `{part}` in it"
        faults.add(value.place, value.place.override or (), what, f"write {to_text(walked)}=… with its whole value")
        return tree
    items = dict(tree.value) if isinstance(tree.value, dict) else {}
    items[str(part)] = _changed(items.get(str(part), Located(None, value.place)), rest[1:], value, walked_on, faults)
    return Located(items, value.place if tree.value is None else tree.place)


def _with_the_later_length(tree: Located) -> Located:
    """Lets the later of `num_train_epochs` and `max_steps` win if they come from different layers.

    A recipe with epochs and `train.max_steps=10` on the command line ask for a short run: this is not a contradiction.
    Both in one file, or both on the command line, are one.
    """
    lengths = {key: tree.find(("train", key)) for key in ("num_train_epochs", "max_steps")}
    given = {key: found for key, found in lengths.items() if found is not None and found.value is not None}
    train = tree.find(("train",))
    if len(given) < 2 or train is None or not isinstance(train.value, dict) or not isinstance(tree.value, dict):
        return tree
    # A file's rank is its distance from the recipe: the farther, the earlier its layer.
    age = {key: -1 if found.place.rank >= _COMMAND_LINE_RANK else found.place.rank for key, found in given.items()}
    if len(set(age.values())) == 1:
        return tree
    earlier = max(age, key=lambda key: age[key])
    kept = Located({key: item for key, item in train.value.items() if key != earlier}, train.place)
    return Located({**tree.value, "train": kept}, tree.place)


def _named(tree: Located, stem: str, place: Place, faults: Faults) -> Located:
    """Names a recipe after its file if it has no name."""
    known = tree.find(("name",))
    if not isinstance(tree.value, dict) or (known is not None and known.value is not None):
        return tree
    if not re.fullmatch(NAME_PATTERN, stem):
        what = f"is missing, and the file's stem, {to_shown(stem)}, is not a valid name"
        name = to_name(stem) or "my-recipe"
        faults.add(place, ("name",), what, f"add `name: {name}`")
        stem = name
    others = {key: item for key, item in tree.value.items() if key != "name"}
    return Located({"name": Located(stem, place), **others}, place)


def _validated(tree: Located, faults: Faults) -> Recipe | None:
    """Validates against the schema, then against the rules over several keys.

    If the schema refuses keys, the rules see their defaults, and findings that depend on such a key are left out.
    """
    plain = tree.plain()
    broken: list[KeyPath] = []
    recipe = None
    while recipe is None:
        try:
            recipe = Recipe.model_validate(plain)
        except ValidationError as error:
            refused = schema_faults(error, tree)
            if broken:
                # These faults follow from the placeholders.
                return None
            faults.found += refused
            broken += [fault.path for fault in refused]
            for path in broken:
                _repair(plain, path)
    for finding in findings(recipe):
        paths = (finding.path, *finding.sources)
        if any(path[: len(other)] == other[: len(path)] for path in paths for other in broken):
            continue
        written = next((path for path in paths if tree.find(path)), finding.path)
        faults.add(tree.nearest(written).place, finding.path, finding.what, finding.fix)
    return recipe


def _repair(plain: dict[str, Any], path: KeyPath) -> None:
    """Replaces a broken value with a placeholder if it is required; deletes any other."""
    is_source = path[:2] in (("data", "train"), ("data", "eval"))
    while isinstance(path[-1], int) and not (is_source and len(path) == 3):
        path = path[:-1]
    around: Any = plain
    for part in path[:-1]:
        try:
            around = around[part]
        except (KeyError, IndexError):
            return  # deleted with a value around it
    if is_source and len(path) == 3 and isinstance(path[-1], int):
        around[path[-1]] = {"path": to_text(path)}
    elif is_source and path[-1] == "path":
        around["path"] = to_text(path[:-1])
    elif path in _PLACEHOLDERS:
        around[path[-1]] = deepcopy(_PLACEHOLDERS[path])
    else:
        around.pop(path[-1], None)
