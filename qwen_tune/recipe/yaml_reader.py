"""YAML for recipes: YAML 1.2's scalars, a place for every value, and no surprises.

`parse_yaml` turns text into a tree of `Located` values. Faults are collected, so that all are reported at once; only
invalid YAML stops at its first fault. Anchors and aliases work; tags, merge keys, several documents, duplicate keys and
keys that are not text are faults. Depth and number of values are limited, so that nested aliases cannot fill memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from qwen_tune.recipe.secret_values import is_secret_key, is_secret_value
from qwen_tune.recipe.tree import Fault, Faults, KeyPath, Located, Place

MAX_DEPTH = 30
MAX_VALUES = 5_000
MAX_DIGITS = 100

_WORDS = {
    **dict.fromkeys(("null", "Null", "NULL", "~", "")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9]+\Z")
_OCTAL = re.compile(r"0o[0-7]+\Z")
_HEX = re.compile(r"0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_INFINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")

SECRET_FIX = (
    "delete it here; tokens come from the environment (HF_TOKEN, WANDB_API_KEY) or from `hf auth login` and "
    "`wandb login`. If this was shared, revoke it"
)


def parse_scalar(text: str) -> str | int | float | bool | None:
    """The value of a plain scalar in YAML 1.2.

    Raises:
        ValueError: A number of more than `MAX_DIGITS` characters.
    """
    if text in _WORDS:
        return _WORDS[text]
    for pattern, base in ((_INT, 10), (_OCTAL, 8), (_HEX, 16)):
        if pattern.match(text):
            if len(text) > MAX_DIGITS:
                raise ValueError(f"a number of {len(text)} digits")
            return int(text, base) if base == 10 else int(text[2:], base)
    if _FLOAT.match(text) or _INFINITE.match(text):
        return float(text.replace(".", "", 1) if _INFINITE.match(text) else text)
    return text


class _Loader(yaml.SafeLoader):
    """Composes nodes only: `parse_scalar` interprets them instead of PyYAML."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tag", problem_mark=event.start_mark)
        self._depth += 1
        self._values += 1
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem="depth", problem_mark=event.start_mark)
        if self._values > MAX_VALUES:
            raise yaml.MarkedYAMLError(problem="values", problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


# A pattern of PyYAML's message, then ours and the fix. PyYAML's may quote the text and is not shown.
_SYNTAX: tuple[tuple[str, str, str], ...] = (
    (r"^tag$", "a tag (`!…`), which a recipe cannot have", "put text that starts with ! in quotes, or delete the tag"),
    (r"^depth$", f"more than {MAX_DEPTH} levels of nesting", "write it flatter"),
    (r"^values$", f"more than {MAX_VALUES:,} values; a recipe is a short file", "put rows into data files"),
    (r"character '\\t'", "a tab; YAML needs spaces", "indent with spaces"),
    (r"expected a single document", "a second document begins here", "keep one, without `---` between"),
    (r"undefined alias", "an alias (`*…`) of an undefined anchor", "put text that starts with * in quotes"),
    (r"duplicate anchor", "an anchor (`&…`) that is already defined", "give it another name"),
    (r"quoted scalar.*(end of stream|document separator)", "a quote that is never closed", "close it"),
    (
        r"mapping values are not allowed",
        "a second `: ` in a line, or wrong indentation",
        "put the text in quotes, or end the line before with `:`",
    ),
    (r"flow (sequence|mapping)", "a bracket that is never closed, or a missing comma", "close it, or add the comma"),
    (r"could not find expected ':'", "a line without `: `", "write `key: value`"),
    (r"cannot start any token", "a character that plain text cannot start with", "put the text in quotes"),
    (
        r"block (mapping|sequence|collection|entry)",
        "a line that does not match the lines around it",
        "align the indentation",
    ),
    (r"escape", "an unknown escape after a backslash", "double the backslash, or use single quotes"),
)


def _syntax_fault(error: yaml.YAMLError, text: str, place: Place) -> Fault:
    line: int | None = 1
    what, fix = "not valid YAML", "fix the line; a YAML checker in the editor shows the error"
    if isinstance(error, yaml.MarkedYAMLError):
        message = f"{error.context or ''} {error.problem or ''}".strip()
        # Something left open is detected at the end of the file; its beginning is more useful.
        is_open = "end of stream" in message or "flow" in message or "quoted scalar" in message
        mark = (error.context_mark if is_open else None) or error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        for pattern, meaning, advice in _SYNTAX:
            if re.search(pattern, message):
                what, fix = f"{what}: {meaning}", advice
                break
    elif isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        what, fix = f"{what}: the control character U+{ord(text[error.position]):04X}", "delete it"
    return Fault(_on_line(place, line), (), what, fix)


def _on_line(place: Place, line: int | None) -> Place:
    return place if place.line is None else Place(place.source, line, place.rank, place.override)


def parse_yaml(text: str, place: Place, faults: Faults, path: KeyPath = ()) -> Located | None:
    """Parses one YAML document, the value at `path`; if `place` has a line, every value gets its own.

    Returns:
        The tree; None if the text is not valid YAML (a fault) or is empty.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(text)  # refuses control characters
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        faults.found.append(_syntax_fault(error, text, place))
        return None
    except (ValueError, OverflowError):
        # PyYAML passes `"\UFFFFFFFF"` to chr() unchecked.
        line = _on_line(place, loader.line + 1) if loader else place
        faults.add(line, (), "not valid YAML: an escape for a character that does not exist", "correct the escape")
        return None
    finally:
        if loader:
            loader.dispose()
    if node is None:
        return None
    builder = _Builder(place, faults)
    tree = builder.build(node, path)
    return None if builder.is_endless else tree


class _Builder:
    """Turns composed nodes into `Located` values, and adds faults for what a recipe cannot contain."""

    def __init__(self, place: Place, faults: Faults) -> None:
        self._place = place
        self._faults = faults
        self._around: list[int] = []
        self._values = 0
        self.is_endless = False

    def build(self, node: yaml.Node, path: KeyPath, place: Place | None = None, secret: bool = False) -> Located:
        place = place or _on_line(self._place, node.start_mark.line + 1)
        self._values += 1
        if not self.is_endless and (self._values > MAX_VALUES or id(node) in self._around):
            self.is_endless = True
            what = "aliases (`*…`) that expand to too many values, or to themselves"
            self._faults.add(place, path[:1], what, "write the values out")
        if self.is_endless:
            return Located(None, place)
        if isinstance(node, yaml.ScalarNode):
            return Located(check_scalar(node.value, node.style is None, path, place, self._faults, secret), place)
        self._around.append(id(node))
        value: dict[str, Located] | list[Located]
        if isinstance(node, yaml.MappingNode):
            value = self._mapping(node, path, secret)
        else:
            value = [self.build(item, (*path, index), secret=secret) for index, item in enumerate(node.value)]
        self._around.pop()
        return Located(value, place)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, secret: bool) -> dict[str, Located]:
        items: dict[str, Located] = {}
        for key_node, value_node in node.value:
            place = _on_line(self._place, key_node.start_mark.line + 1)
            key = self._key(key_node, path, place)
            if key is None:
                self.build(value_node, path, place, secret)
                continue
            if is_secret_value(key):
                self._faults.secrets.add(key)
            is_secret = secret or is_secret_key(key) or is_secret_value(key)
            if is_secret and not secret:
                what = f"`{key}` is not a recipe key: a recipe must not contain secrets (its value is not shown)"
                self._faults.add(place, (*path, key), what, SECRET_FIX, hides_others=True)
            item = self.build(value_node, (*path, key), place, is_secret)
            if key in items:
                lines = f", on line {items[key].place.line} and on line {place.line}"
                what = f"given twice{lines if place.line is not None else ''}"
                self._faults.add(place, (*path, key), what, "keep one of them")
            else:
                items[key] = item
        return items

    def _key(self, node: yaml.Node, path: KeyPath, place: Place) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._faults.add(place, path, "a key that is a list or a mapping; keys must be text", "write `key: value`")
            return None
        if node.style is None and node.value == "<<":
            what = "`<<` does not merge anything: it is not part of YAML 1.2"
            fix = "put the shared keys into a file and name it with `extends: base.yaml`"
            self._faults.add(place, path, what, fix)
            return None
        text = _paired(node.value)
        if _UNUSABLE.search(text):
            self._faults.add(place, path, "a key with an invalid character (NUL or half a surrogate)")
            return None
        try:
            key = parse_scalar(text) if node.style is None else text
        except ValueError:
            key = 0
        if not isinstance(key, str):
            what = f"the key `{text[:MAX_DIGITS]}` is not text"
            self._faults.add(place, path, what, "put it in quotes if it is intended")
            return None
        return key


def _paired(text: str) -> str:
    r"""Joins surrogate pairs, as JSON escapes some characters (`\ud83d\ude42`); PyYAML leaves them apart."""
    if not _UNUSABLE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def check_scalar(
    text: str, is_plain: bool, path: KeyPath, place: Place, faults: Faults, is_secret: bool = False
) -> str | int | float | bool | None:
    """The value of a scalar without its quotes; adds faults for what a recipe cannot contain.

    Args:
        text: The scalar.
        is_plain: Whether it had no quotes, so that `true` is a boolean.
        path: Its key path.
        place: Where it is written.
        faults: Collects faults.
        is_secret: Whether it is below a key that is refused as a secret.
    """
    text = _paired(text)
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    if is_secret:
        faults.secrets.add(text)
    elif is_secret_value(text, key):
        faults.secrets.add(text)
        what = "contains what looks like a secret (it is not shown)"
        faults.add(place, path, what, SECRET_FIX, hides_others=True)
    elif _UNUSABLE.search(text):
        what = "contains an invalid character (NUL or half a surrogate)"
        faults.add(place, path, what, "delete it", hides_others=True)
    try:
        return parse_scalar(text) if is_plain else text
    except ValueError as error:
        faults.add(place, path, f"got {error}", "put it in quotes if it is text", hides_others=True)
        return None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else, and never writes anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML reads plain U+0085 and U+2028 as line ends; escapes prevent that.
        style = None if text.replace("\n", "").isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _tag, _pattern in (("int", _INT), ("int", _OCTAL), ("int", _HEX), ("float", _FLOAT), ("float", _INFINITE)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)


def dump_yaml(value: Mapping[str, Any]) -> str:
    """Writes YAML with the same meaning in versions 1.1 and 1.2."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
