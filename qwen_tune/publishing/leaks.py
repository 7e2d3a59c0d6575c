"""What must not leave this machine in a text: tokens, and the paths of its folders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qwen_tune.disk import parse_json
from qwen_tune.errors import Problem, first_line
from qwen_tune.recipe.secret_values import is_secret_key, is_secret_value

VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")
"""Files of words, where `/content` and `~/` are words too."""

_TEXTS = ("*.json", "*.txt", "*.jinja", "*.md", "*.yaml", "LICENSE*", "NOTICE*")
_LEGAL = ("LICENSE*", "NOTICE*")

_FOLDERS = (
    "home|[Uu]sers|root|mnt|media|tmp|var|opt|srv|data|scratch|work|workspace|content|kaggle|Volumes|fsx|gpfs|nfs|lustre"
    "|raid|cluster|projects?|dbfs|teamspace|storage|notebooks"
)
_IN_TEXT = re.compile(
    rf"""(?<![\w.:/~\\-])
    (?: (?:file://)? /(?:{_FOLDERS})/ [^\s"'`<>)]* | ~/ [^\s"'`<>)]+ | [A-Za-z]:[\\/]+ [^\s"'`<>)]+ )""",
    re.VERBOSE,
)
"""Paths in running text: in folders that machines have, as `/think` and `and/or` are none."""

_WHOLE = re.compile(r"file://\S+|~[/\\]\S.*|[A-Za-z]:[\\/].*|\\\\\S+|(?:/[^/\n]+){2,}/?|\.\.[/\\].*")
"""A value that is nothing but a path."""


def is_path(value: str) -> bool:
    """Whether a value is a path outside the working directory: absolute, of the home folder, or further up."""
    return _WHOLE.fullmatch(value) is not None


def look_through(
    name: str, file: Path | str, secrets: Iterable[str], known: Iterable[str] = (), *, where: str, guess: bool = True
) -> list[Problem]:
    """What a file must not hold.

    Args:
        name: Its name, which says what kind of text it is.
        file: Where it lies, or its text.
        secrets: Texts that must not be in it: the token.
        known: Folders of this machine.
        where: Its name in messages.
        guess: Whether everything that looks like a path of some machine is one.
    """
    base = name.rsplit("/", 1)[-1]
    if not any(fnmatchcase(base, pattern) for pattern in _TEXTS):
        return []
    try:
        text = file if isinstance(file, str) else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return [Problem(where, f"it cannot be read as text ({first_line(error)})", "make it anew")]
    is_vocabulary = base in VOCABULARY
    values = list(_values(text)) if base.endswith(".json") and not is_vocabulary else []
    problems = []
    # Not shown: whoever reads the message may be a log.
    if (
        any(secret in text for secret in secrets if secret)
        or (not is_vocabulary and is_secret_value(text))
        or any(value and (is_secret_key(key) or is_secret_value(value, key)) for key, value in values)
    ):
        problems.append(Problem(where, "it holds something that looks like a token or a password", "take it out"))
    if is_vocabulary:
        return problems
    paths = [path for path in known if path.count("/") > 1 and re.search(rf"{re.escape(path)}(?![\w.-])", text)]
    if guess and not any(fnmatchcase(base, pattern) for pattern in _LEGAL):
        paths += [value for _, value in values if is_path(value)]
        paths += [found[0] for found in _IN_TEXT.finditer(text)]
    if paths:
        shown = paths[0] if len(paths[0]) < 80 else f"{paths[0][:80]}…"
        problems.append(
            Problem(where, f"it holds a path of this machine ({shown})", "take it out, or write a public name")
        )
    return problems


def _values(text: str) -> Iterator[tuple[str, str]]:
    """Every text in a JSON document, with the key that it stands under."""
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
