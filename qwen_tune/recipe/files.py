"""Recipe files: reading, `extends`, overrides, validation, and writing the resolved recipe.

`load_recipe` is the one way from a path to a `Recipe`. It collects every fault on the way and raises once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
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
from qwen_tune.recipe.tree import Faults, KeyPath, Located, Place, to_text
from qwen_tune.recipe.yaml_reader import MAX_DEPTH, SECRET_FIX, check_scalar, dump_yaml, parse_yaml

MAX_BYTES = 1_000_000
SUFFIXES = (".yaml", ".yml")
MAX_FILES = 20
"""Recipe and what it extends, one file after the other."""

_COMMAND_LINE_RANK = 1_000_000

_STAND_INS: dict[KeyPath, Any] = {
    ("name",): "name",
    ("model",): {"base": "base"},
    ("model", "base"): "base",
    ("data",): {"train": [{"path": "rows"}]},
    ("data", "train"): [{"path": "rows"}],
    ("hub", "repo_id"): "owner/name",
    ("data", "eval", "fraction"): 0.5,
}
"""What takes the place of a broken required key while the rest of the recipe is looked at."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and overrides of single keys.

    Args:
        path: the recipe file.
        overrides: `key.path=value` each, the value in YAML; merged in before anything is validated.

    Returns:
        The recipe with every default filled in. Its paths are relative to the working directory.

    Raises:
        RecipeError: with everything that is wrong, in the order of the files and their lines.
    """
    faults = Faults()
    shown = str(Path(path))
    tree = _load_tree(Path(path), shown, faults, ())
    changes = [_parse_override(text, index, faults) for index, text in enumerate(overrides)]
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
    """Return every key of a recipe, defaults included, as plain dicts, lists and scalars."""
    mapping = recipe.model_dump()
    if recipe.train.max_steps is not None:
        # The two exclude each other, and the one in force is set.
        del mapping["train"]["num_train_epochs"]
    return mapping


def to_yaml(recipe: Recipe) -> str:
    """Write the resolved recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return dump_yaml(resolved_mapping(recipe))


def _load_tree(path: Path, shown: str, faults: Faults, chain: tuple[tuple[Path, str], ...]) -> Located | None:
    """Read a file and, below it, what it extends; none where the recipe cannot be told from what is left."""
    place = Place(shown, 1, len(chain))
    text = _read_text(path, place, faults)
    if text is None:
        return None
    known_faults = len(faults.found)
    tree = parse_yaml(text, place, faults)
    if tree is None or tree.value is None:
        if len(faults.found) == known_faults:
            fix = "write at least model.base and data.train; `qwen-tune new` writes a recipe"
            faults.add(place, (), "an empty file; must be a recipe", fix)
        return None
    if not isinstance(tree.value, dict):
        faults.add(tree.place, (), f"got {to_shown(tree.plain(), True)}; must be a mapping", "write `key: value` lines")
        return None
    extends = tree.value.get("extends")
    tree = Located({key: item for key, item in tree.value.items() if key != "extends"}, place)
    if extends is None or extends.value is None:
        return tree
    if not isinstance(extends.value, str) or not extends.value.strip():
        what = f"got {to_shown(extends.plain(), True)}; must be the name of one file"
        faults.add(extends.place, ("extends",), what, "name one file; that file may extend another")
        return None
    try:
        chain = (*chain, (path.resolve(), shown))
        parent = path.parent / Path(extends.value).expanduser()
        known_paths = [known for known, _ in chain]
        is_cycle, is_file = parent.resolve() in known_paths, parent.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        # A NUL, a name that is too long, a loop of links, a user that does not exist.
        what = f"got {to_shown(extends.value)}, which is no usable path ({to_shown(first_line(error))})"
        faults.add(extends.place, ("extends",), what, "name a recipe file")
        return None
    names = [*(name for _, name in chain), str(parent)]
    if is_cycle:
        what = f"a cycle: {' → '.join(names)}"
        faults.add(extends.place, ("extends",), what, "take one `extends` out")
        return None
    if len(chain) >= MAX_FILES:
        what = f"a chain of more than {MAX_FILES} files"
        faults.add(extends.place, ("extends",), what, "put the keys of several files into one")
        return None
    if not is_file:
        what = f"got {extends.value}; {parent} does not exist or is no file"
        faults.add(extends.place, ("extends",), what, _nearest_recipe(parent))
        return None
    base = _load_tree(parent, str(parent), faults, chain)
    return None if base is None else base.merged(tree)


def _read_text(path: Path, place: Place, faults: Faults) -> str | None:
    where = replace(place, line=None)
    try:
        if path.is_dir():
            faults.add(where, (), "is a folder; must be a recipe file", _nearest_recipe(path / "recipe.yaml"))
            return None
        if path.exists() and not path.is_file():
            # What a pipe holds can be read once; processes of a run, and the run that resumes, each read the recipe.
            faults.add(where, (), "is a pipe or a device; must be a regular file", "write the recipe to a file")
            return None
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        faults.add(where, (), "does not exist", _nearest_recipe(path))
        return None
    except (OSError, ValueError, RuntimeError) as error:
        # ValueError: a path with a NUL. RuntimeError: a loop of links.
        what = (getattr(error, "strerror", None) or "is no path").lower()
        faults.add(where, (), f"cannot be read: {what}", "name a recipe file that can be read")
        return None
    if len(content) > MAX_BYTES:
        faults.add(where, (), f"more than {MAX_BYTES:,} bytes; a recipe is a short file", "put rows into data files")
        return None
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:4]:
        faults.add(place, (), "is UTF-16 or UTF-32; must be UTF-8", "save the file as UTF-8")
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        what = f"the byte 0x{content[error.start]:02x} is not UTF-8"
        faults.add(replace(place, line=line), (), what, "save the file as UTF-8")
        return None


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
    return f"name one of {names}" if names else "name an existing recipe file; `qwen-tune new` writes one"


def _parse_override(text: str, index: int, faults: Faults) -> tuple[KeyPath, Located] | None:
    """Read `a.b.c=value`; none where it cannot be read, which is then a fault."""
    key, equals, written = text.partition("=")
    parts = re.sub(r"\[([0-9]+)\]", r".\1", key.strip()).split(".")
    key_path = tuple(int(part) if re.fullmatch(r"[0-9]{1,6}", part) else part for part in parts)
    written = written.strip()
    is_collection = written.startswith(("[", "{"))
    # What is inside brackets may hold a secret and is not parsed yet: it is not quoted.
    quoted = "…" if is_collection or is_secret_value(written, key) else to_shown(written) if written else ""
    place = Place(f"command line: {key.strip()}={quoted}", None, _COMMAND_LINE_RANK + index, key_path)
    usage = "write key.path=value, such as train.learning_rate=1e-4"
    if not equals:
        # A lone word may be anything, a token too.
        place = replace(place, source="command line")
        faults.add(place, (), f"override {index + 1} has no `=`", usage)
        return None
    if not all(parts) or not key.isprintable() or len(parts) > MAX_DEPTH:
        faults.add(replace(place, source="command line"), (), f"override {index + 1} names no key", usage)
        return None
    if key_path[0] == "extends":
        faults.add(place, key_path, "the file alone says what it extends", "change it there")
        return None
    if any(is_secret_key(str(part)) or is_secret_value(str(part)) for part in key_path):
        faults.secrets.add(written)
        place = replace(place, source=f"command line: {key.strip()}=…")
        faults.add(place, key_path, "a recipe holds no secrets (the value is not shown)", SECRET_FIX, hides_others=True)
        return None
    if is_collection or written.startswith(('"', "'")):
        tree = parse_yaml(written, place, faults, key_path)
    else:
        tree = Located(check_scalar(written, True, key_path, place, faults), place)
    return None if tree is None else (key_path, tree)


def _changed(tree: Located, rest: KeyPath, value: Located, walked: KeyPath, faults: Faults) -> Located:
    """Return the tree with a value merged in at a key path."""
    if not rest:
        return tree.merged(value)
    part, walked_on = rest[0], (*walked, rest[0])
    if isinstance(tree.value, list):
        count = len(tree.value)
        if not isinstance(part, int) or part >= count:
            what = f"{to_text(walked)} is a list of {count}, and has no item `{part}`"
            fix = f"write a number from 0 to {count - 1}" if count else f"write {to_text(walked)}=[…]"
            faults.add(value.place, value.place.override or (), what, fix)
            return tree
        changed = _changed(tree.value[part], rest[1:], value, walked_on, faults)
        return Located([changed if index == part else item for index, item in enumerate(tree.value)], tree.place)
    is_open = isinstance(tree.value, dict) or (tree.value is None and not isinstance(part, int))
    if not is_open:
        what = f"{to_text(walked)} is {to_shown(tree.value, True)}, and has no `{part}` in it"
        faults.add(value.place, value.place.override or (), what, f"write {to_text(walked)}=… with all of its value")
        return tree
    items = dict(tree.value) if isinstance(tree.value, dict) else {}
    items[str(part)] = _changed(items.get(str(part), Located(None, value.place)), rest[1:], value, walked_on, faults)
    return Located(items, value.place if tree.value is None else tree.place)


def _with_the_later_length(tree: Located) -> Located:
    """Let the later of `num_train_epochs` and `max_steps` win where they come from different layers.

    A recipe says epochs, and `train.max_steps=10` on the command line asks for a short run of it: that is no
    contradiction. Both in one file, or both on the command line, are.
    """
    lengths = {key: tree.find(("train", key)) for key in ("num_train_epochs", "max_steps")}
    given = {key: found for key, found in lengths.items() if found is not None and found.value is not None}
    train = tree.find(("train",))
    if len(given) < 2 or train is None or not isinstance(train.value, dict) or not isinstance(tree.value, dict):
        return tree
    # A file's rank is its distance from the recipe: the farther, the earlier it was laid down.
    age = {key: -1 if found.place.rank >= _COMMAND_LINE_RANK else found.place.rank for key, found in given.items()}
    earlier = max(age, key=lambda key: age[key])
    if len(set(age.values())) == 1:
        return tree
    kept = Located({key: item for key, item in train.value.items() if key != earlier}, train.place)
    return Located({**tree.value, "train": kept}, tree.place)


def _named(tree: Located, stem: str, place: Place, faults: Faults) -> Located:
    """Name a recipe without a name after its file."""
    known = tree.find(("name",))
    if not isinstance(tree.value, dict) or (known is not None and known.value is not None):
        return tree
    if not re.fullmatch(NAME_PATTERN, stem):
        what = f"is missing, and the file's stem, {to_shown(stem)}, can be no name"
        name = to_name(stem) or "my-recipe"
        faults.add(place, ("name",), what, f"add `name: {name}`")
        stem = name
    return Located(
        {"name": Located(stem, place), **{key: tree.value[key] for key in tree.value if key != "name"}}, place
    )


def _validated(tree: Located, faults: Faults) -> Recipe | None:
    """Validate against the schema, then against the rules over several keys.

    Where the schema refuses keys, the rules look at the recipe with those keys at their defaults, and what they
    conclude from such a key is left out.
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
                # What is left follows from the stand-ins.
                return None
            faults.found += refused
            broken += [fault.path for fault in refused]
            for path in broken:
                _mend(plain, path)
    for finding in findings(recipe):
        paths = (finding.path, *finding.sources)
        if any(path[: len(other)] == other[: len(path)] for path in paths for other in broken):
            continue
        written = next((path for path in paths if tree.find(path)), finding.path)
        faults.add(tree.nearest(written).place, finding.path, finding.what, finding.fix)
    return recipe


def _mend(plain: dict[str, Any], path: KeyPath) -> None:
    """Put a stand-in in the place of a broken value that is required; take away any other."""
    is_source = path[:2] in (("data", "train"), ("data", "eval"))
    while isinstance(path[-1], int) and not (is_source and len(path) == 3):
        path = path[:-1]
    around: Any = plain
    for part in path[:-1]:
        try:
            around = around[part]
        except (KeyError, IndexError):
            return  # Went with a value around it.
    if is_source and len(path) == 3 and isinstance(path[-1], int):
        around[path[-1]] = {"path": to_text(path)}
    elif is_source and path[-1] == "path":
        around["path"] = to_text(path[:-1])
    elif path in _STAND_INS:
        around[path[-1]] = deepcopy(_STAND_INS[path])
    else:
        around.pop(path[-1], None)
