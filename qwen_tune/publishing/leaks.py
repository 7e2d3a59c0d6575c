"""What must not be published, tokens and paths of this machine: found in texts, and removed from recipes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from qwen_tune.disk import parse_json
from qwen_tune.errors import Problem, first_line
from qwen_tune.publishing.parts import PublishedBase
from qwen_tune.recipe.schema import Recipe
from qwen_tune.recipe.secret_values import is_secret_key, is_secret_value
from qwen_tune.recipe.yaml_reader import dump_yaml

VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")
"""Files in which `/content` and `~/` are tokens, not paths."""

_TEXTS = ("*.json", "*.txt", "*.jinja", "*.md", "*.yaml", "LICENSE*", "NOTICE*")
_LEGAL = ("LICENSE*", "NOTICE*")

_PRIVATE_KEYS = ("run", "tracking", "hub", "train.resume", "train.allow_drift", "train.eval_prompts")
"""Keys for one user's accounts and disks; the result of the training does not depend on them."""

_FOLDERS = (
    "home|[Uu]sers|root|mnt|media|tmp|var|opt|srv|data|scratch|work|workspace|content|kaggle|Volumes|fsx|gpfs|nfs|lustre"
    "|raid|cluster|projects?|dbfs|teamspace|storage|notebooks"
)
_IN_TEXT = re.compile(
    rf"""(?<![\w.:/~\\-])
    (?: (?:file://)? /(?:{_FOLDERS})/ [^\s"'`<>)]* | ~/ [^\s"'`<>)]+ | [A-Za-z]:[\\/]+ [^\s"'`<>)]+ )""",
    re.VERBOSE,
)
"""Paths in running text. Only under well-known folders: `/think` and `and/or` are not paths."""

_WHOLE = re.compile(r"file://\S+|~[/\\]\S.*|[A-Za-z]:[\\/].*|\\\\\S+|(?:/[^/\n]+){2,}/?|\.\.[/\\].*")
"""A value that is a path as a whole."""


def is_path(value: str) -> bool:
    """Whether a value is a path outside the working directory: absolute, below the home folder, or with `..`."""
    return _WHOLE.fullmatch(value) is not None


def find_leaks(
    name: str,
    file: Path | str | bytes,
    secrets: Iterable[str],
    known: Iterable[str] = (),
    *,
    where: str,
    guess: bool = True,
) -> list[Problem]:
    """Finds secrets and local paths in a file; files that are not text have none.

    Args:
        name: Its name in the repository, which says what kind of text it is.
        file: Its path, or its content.
        secrets: Texts that must not be in it, such as the token.
        known: Folders of this machine.
        where: Its name in messages.
        guess: Whether everything that looks like a path is reported, and not only the known folders.
    """
    base = name.rsplit("/", 1)[-1]
    if not any(fnmatchcase(base, pattern) for pattern in _TEXTS):
        return []
    try:
        data = file.read_bytes() if isinstance(file, Path) else file
        text = data if isinstance(data, str) else data.decode()
    except (OSError, ValueError) as error:
        return [Problem(where, f"it cannot be read as text ({first_line(error)})", "replace it")]
    is_vocabulary = base in VOCABULARY
    values = list(_values(text)) if base.endswith(".json") and not is_vocabulary else []
    problems = []
    # The secret is not shown: the message may end up in a log.
    if (
        any(secret in text for secret in secrets if secret)
        or (not is_vocabulary and is_secret_value(text))
        or any(value and (is_secret_key(key) or is_secret_value(value, key)) for key, value in values)
    ):
        problems.append(Problem(where, "it holds something that looks like a token or a password", "remove it"))
    if is_vocabulary:
        return problems
    paths = [path for path in known if path.count("/") > 1 and re.search(rf"{re.escape(path)}(?![\w.-])", text)]
    if guess and not any(fnmatchcase(base, pattern) for pattern in _LEGAL):
        paths += [value for _, value in values if is_path(value)]
        paths += [found[0] for found in _IN_TEXT.finditer(text)]
    if paths:
        shown = paths[0] if len(paths[0]) < 80 else f"{paths[0][:80]}…"
        problems.append(
            Problem(where, f"it holds a path of this machine ({shown})", "remove it, or write a public name")
        )
    return problems


def _values(text: str) -> Iterator[tuple[str, str]]:
    """Yields every text in a JSON document with its key."""
    try:
        todo: list[tuple[str, Any]] = [("", parse_json(text))]
    except ValueError:
        return
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += [(str(name), item) for name, item in value.items()]
        elif isinstance(value, list):
            todo += [(key, item) for item in value]
        elif isinstance(value, str):
            yield key, value


def public_recipe(recipe: Recipe, base: PublishedBase, data_sets: Collection[str] = ()) -> str:
    """Returns the recipe as YAML with public names only; anyone who has the data can train with it.

    Args:
        recipe: The recipe of the run.
        base: The public name of the base.
        data_sets: The sources that are Hub data sets; of every other source only the file name is left.
    """
    mapping = recipe.model_dump(exclude_defaults=True)
    for key in _PRIVATE_KEYS:
        section, _, name = key.rpartition(".")
        (mapping.get(section, {}) if section else mapping).pop(name, None)
    mapping["model"] |= {"base": base.id} | ({"revision": base.revision} if base.revision else {})
    if "chat_template" in mapping["model"]:
        mapping["model"]["chat_template"] = "chat_template.jinja"  # in the same repository
    held_out = mapping["data"].get("eval")
    for source in [*mapping["data"]["train"], *(held_out if isinstance(held_out, list) else [])]:
        for key in ("path", "tools"):
            if key in source and source[key] not in data_sets:
                source[key] = _file_name(source[key])
    return dump_yaml({key: _without_paths(value) for key, value in mapping.items() if value != {}})


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _file_name(value) if isinstance(value, str) and is_path(value) else value


def _file_name(path: str) -> str:
    """Returns the last part of a path or a URL, without the URL's query, which may hold a signature."""
    if "://" in path:
        path = urlsplit(path).path
    name = PureWindowsPath(path).name if re.match(r"[A-Za-z]:[\\/]|\\\\", path) else PurePosixPath(path).name
    return name or "rows"
