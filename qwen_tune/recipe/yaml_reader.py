"""YAML for recipes: the words of YAML 1.2, a place for every value, and nothing that surprises.

`parse_yaml` turns text into a tree of `Located` values. What is wrong is collected as faults, so that one reading tells
all of it; only text that is no YAML at all ends at its first fault. Anchors and aliases work; tags, merge keys, several
documents, keys given twice and keys that are no text are faults. Depth and number of values are limited, so that
aliases of aliases cannot fill the memory.
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

_NULL = re.compile(r"(?:null|Null|NULL|~|)\Z")
_TRUE = re.compile(r"(?:true|True|TRUE)\Z")
_FALSE = re.compile(r"(?:false|False|FALSE)\Z")
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
    """Return what a plain scalar means in YAML 1.2.

    Raises:
        ValueError: a number of more than `MAX_DIGITS` characters.
    """
    if _NULL.match(text):
        return None
    if _TRUE.match(text) or _FALSE.match(text):
        return bool(_TRUE.match(text))
    for pattern, base in ((_INT, 10), (_OCTAL, 8), (_HEX, 16)):
        if pattern.match(text):
            if len(text) > MAX_DIGITS:
                raise ValueError(f"a number of {len(text)} digits")
            return int(text, base) if base == 10 else int(text[2:], base)
    if _FLOAT.match(text) or _INFINITE.match(text):
        return float(text.replace(".", "", 1) if _INFINITE.match(text) else text)
    return text


class _Loader(yaml.SafeLoader):
    """Composes nodes only: their meaning is `parse_scalar`'s, not PyYAML's."""

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


# What PyYAML says, then what a user can do with. Its own words may quote the text and are not shown.
_SYNTAX: tuple[tuple[str, str, str], ...] = (
    (r"^tag$", "a tag (`!…`); a recipe has none", "put text that starts with ! in quotes, or delete the tag"),
    (r"^depth$", f"more than {MAX_DEPTH} values inside each other", "write it flatter"),
    (r"^values$", f"more than {MAX_VALUES:,} values; a recipe is a short file", "put rows into data files"),
    (r"character '\\t'", "a tab; YAML wants spaces", "indent with spaces"),
    (r"expected a single document", "a second document begins here", "keep one, without `---` between"),
    (r"undefined alias", "an alias (`*…`) of an anchor that does not exist", "put text that starts with * in quotes"),
    (r"duplicate anchor", "an anchor (`&…`) that exists already", "give it another name"),
    (r"quoted scalar.*(end of stream|document separator)", "a quote that is never closed", "close it"),
    (
        r"mapping values are not allowed",
        "a second `: ` in a line, or a wrong indentation",
        "put the text in quotes, or end the line before with `:`",
    ),
    (r"flow (sequence|mapping)", "a bracket that is never closed, or a missing comma", "close it, or add the comma"),
    (r"could not find expected ':'", "a line without `: `", "write `key: value`"),
    (r"cannot start any token", "a character that no plain text starts with", "put the text in quotes"),
    (r"block (mapping|sequence|collection|entry)", "a line that does not fit its neighbours", "align the indentation"),
    (r"escape", "an unknown escape after a backslash", "double the backslash, or use single quotes"),
)


def _syntax_fault(error: yaml.YAMLError, text: str, place: Place) -> Fault:
    line: int | None = 1
    what, fix = "not valid YAML", "fix the line; a YAML checker in the editor shows what is meant"
    if isinstance(error, yaml.MarkedYAMLError):
        said = f"{error.context or ''} {error.problem or ''}".strip()
        # Something left open is found at the end of the file; the user looks for its beginning.
        is_open = "end of stream" in said or "flow" in said or "quoted scalar" in said
        mark = (error.context_mark if is_open else None) or error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        for pattern, meaning, advice in _SYNTAX:
            if re.search(pattern, said):
                what, fix = f"{what}: {meaning}", advice
                break
    elif isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        what, fix = f"{what}: the control character U+{ord(text[error.position]):04X}", "delete it"
    return Fault(_on_line(place, line), (), what, fix)


def _on_line(place: Place, line: int | None) -> Place:
    return place if place.line is None else Place(place.source, line, place.rank, place.override)


def parse_yaml(text: str, place: Place, faults: Faults, path: KeyPath = ()) -> Located | None:
    """Parse one YAML document.

    Args:
        text: the document.
        place: its source; a line in it makes every value's place its own line.
        faults: takes what is wrong.
        path: the key path that the document is the value of.

    Returns:
        The tree; none where the text is no YAML (which is then a fault) or holds nothing.
    """
    try:
        # Its constructor reads already: control characters are refused there.
        loader = _Loader(text)
    except yaml.YAMLError as error:
        faults.found.append(_syntax_fault(error, text, place))
        return None
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        faults.found.append(_syntax_fault(error, text, place))
        return None
    except (ValueError, OverflowError):
        # PyYAML hands `"\UFFFFFFFF"` to chr() as it is.
        line = _on_line(place, loader.line + 1)
        faults.add(line, (), "not valid YAML: an escape for a character that does not exist", "correct the escape")
        return None
    finally:
        loader.dispose()
    if node is None:
        return None
    builder = _Builder(place, faults)
    tree = builder.build(node, path)
    return None if builder.is_endless else tree


class _Builder:
    """Turns composed nodes into `Located` values, and notes what a recipe may not hold."""

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
            what = "aliases (`*…`) that unfold to too many values, or to themselves"
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
                what = f"`{key}` is no recipe key: a recipe holds no secrets (its value is not shown)"
                self._faults.add(place, (*path, key), what, SECRET_FIX, hides_others=True)
            item = self.build(value_node, (*path, key), place, is_secret)
            if key in items:
                what = f"given twice, on line {items[key].place.line} and on line {place.line}"
                what = what if place.line is not None else "given twice"
                self._faults.add(place, (*path, key), what, "keep one of them")
            else:
                items[key] = item
        return items

    def _key(self, node: yaml.Node, path: KeyPath, place: Place) -> str | None:
        if not isinstance(node, yaml.ScalarNode):
            self._faults.add(place, path, "a key that is a list or a mapping; keys are text", "write `key: value`")
            return None
        if node.style is None and node.value == "<<":
            what = "`<<` merges nothing: it is no part of YAML 1.2"
            fix = "put the shared keys into a file and name it with `extends: base.yaml`"
            self._faults.add(place, path, what, fix)
            return None
        text = _paired(node.value)
        if _UNUSABLE.search(text):
            self._faults.add(place, path, "a key with a character that no text has (NUL or half a surrogate)")
            return None
        try:
            key = parse_scalar(text) if node.style is None else text
        except ValueError:
            key = 0
        if not isinstance(key, str):
            what = f"the key `{text[:MAX_DIGITS]}` is no text"
            self._faults.add(place, path, what, "put it in quotes if it is meant")
            return None
        return key


def _paired(text: str) -> str:
    r"""Join the halves of characters that JSON escapes in two, as in `\ud83d\ude42`; PyYAML leaves them apart."""
    if not _UNUSABLE.search(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def check_scalar(
    text: str, is_plain: bool, path: KeyPath, place: Place, faults: Faults, is_secret: bool = False
) -> str | int | float | bool | None:
    """Return what a scalar means, and note what a recipe may not hold.

    Args:
        text: the scalar without its quotes.
        is_plain: whether it had none, so that `true` is a boolean.
        path: its key path.
        place: where it was written.
        faults: takes what is wrong.
        is_secret: whether it lies below a key that is refused for being a secret's.
    """
    text = _paired(text)
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    if is_secret:
        faults.secrets.add(text)
    elif is_secret_value(text, key):
        faults.secrets.add(text)
        what = "holds what looks like a secret (it is not shown)"
        faults.add(place, path, what, SECRET_FIX, hides_others=True)
    elif _UNUSABLE.search(text):
        what = "holds a character that no text has (NUL or half a surrogate)"
        faults.add(place, path, what, "delete it", hides_others=True)
    try:
        return parse_scalar(text) if is_plain else text
    except ValueError as error:
        faults.add(place, path, f"got {error}", "put it in quotes if it is text", hides_others=True)
        return None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or 1.2 would read as something else, and repeats instead of using anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML reads its own plain U+0085 and U+2028 back as line ends; escaped they stay.
        style = None if text.replace("\n", "").isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _tag, _pattern in (("int", _INT), ("int", _OCTAL), ("int", _HEX), ("float", _FLOAT), ("float", _INFINITE)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)


def dump_yaml(value: Mapping[str, Any]) -> str:
    """Write a mapping as YAML that means the same to 1.1 and 1.2 readers."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
