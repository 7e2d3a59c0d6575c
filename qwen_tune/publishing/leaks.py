"""What must not leave this machine in a text: tokens, and the paths of its folders."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from qwen_tune.errors import Problem, first_line
from qwen_tune.recipe.secret_values import is_secret_value

VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")
_TEXTS = ("*.json", "*.txt", "*.jinja", "*.md", "*.yaml", "LICENSE*", "NOTICE*")
_LEGAL = ("LICENSE*", "NOTICE*")

_FOLDERS = "home|Users|root|mnt|media|tmp|var|opt|srv|data|scratch|work|workspace|content|kaggle|Volumes|fsx|gpfs|nfs"
LOCAL_PATH = re.compile(
    rf"""(?<![\w.:/~\\-]) (?: /(?:{_FOLDERS})/ [^\s"'`<>)]* | ~/ [^\s"'`<>)]+ | [A-Za-z]:\\+ [^\s"'`<>)]+ )""",
    re.VERBOSE,
)


def look_through(
    name: str, file: Path | str, secrets: Iterable[str], known: Iterable[str], *, where: str
) -> list[Problem]:
    """What a text must not hold: tokens, and paths of this machine."""
    base = name.rsplit("/", 1)[-1]
    if not any(fnmatchcase(base, pattern) for pattern in _TEXTS):
        return []
    try:
        text = file if isinstance(file, str) else file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return [Problem(where, f"it cannot be read as text ({first_line(error)})", "make it anew")]
    is_vocabulary = base in VOCABULARY
    problems = []
    # Not shown: whoever reads the message may be a log.
    if any(secret in text for secret in secrets if secret) or (not is_vocabulary and is_secret_value(text)):
        problems.append(Problem(where, "it holds something that looks like a token or a password", "take it out"))
    paths = [path for path in known if len(path) > 5 and path in text]
    if not is_vocabulary and not any(fnmatchcase(base, pattern) for pattern in _LEGAL):
        paths += [found[0] for found in LOCAL_PATH.finditer(text)]
    if paths:
        shown = paths[0] if len(paths[0]) < 80 else f"{paths[0][:80]}…"
        problems.append(
            Problem(where, f"it holds a path of this machine ({shown})", "take it out, or write a public name")
        )
    return problems
