"""Rows of JSON files: an object a line, or a list of objects.

Read here rather than by `datasets`, whose reader names neither file nor line, invents nulls where examples differ in
shape, and dies on a file that holds only `null`. Neither reader holds more than a line, or a value of the list, at a
time.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from qwen_tune.data.source_file import VALUE_LIMIT_BYTES, Record, SourceFile
from qwen_tune.data.values import decode, decode_at, kind
from qwen_tune.errors import Problem

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LINES_FIX = "one JSON object a line"

_CHUNK_BYTES = 1 << 20
_ERROR_MARGIN = 16
"""Characters: no JSON token but a string can be cut off further from the end of what is read."""


def read_jsonl(file: SourceFile) -> Iterator[Record | Problem]:
    """The examples of a file with an object a line; a line that is wrong does not hide those after it."""
    name = file.name
    with file.open() as stream:
        number = file.lines.first_line - 1 if file.lines else 0
        while line := stream.readline(VALUE_LIMIT_BYTES):
            number += 1
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            source = f"{name}:{number}"
            if len(line) >= VALUE_LIMIT_BYTES and not line.endswith(b"\n"):
                yield Problem(source, f"the line is longer than {VALUE_LIMIT_BYTES >> 20} MiB", LINES_FIX)
                _skip_line(stream)
                continue
            try:
                value = decode(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Problem(source, f"byte {error.start + 1} of the line is not UTF-8", "save the file as UTF-8")
                continue
            except ValueError as error:
                if line.isspace() or not line:
                    continue
                if number == 1 and line.strip() in (b"{", b"["):
                    # A list is what .json files hold; an object spread over lines is an example in neither kind of
                    # file.
                    fix = "name it .json" if b"[" in line else "write each object in one line"
                    yield Problem(source, f"the line is not JSON: {error}; expected an object a line", fix)
                    return
                truncated = not line.endswith(b"\n") and number > 1
                fix = "the last line is cut off: complete or remove it" if truncated else LINES_FIX
                yield Problem(source, f"the line is not JSON: {error}", fix)
                continue
            if type(value) is dict:
                yield Record(source, value)
            elif isinstance(value, list) and number == 1:
                yield Problem(source, "the file holds a JSON list; expected one object a line", "name it .json")
                return
            else:
                yield Problem(source, f"the example is {kind(value)}; expected an object", LINES_FIX)


def read_json(file: SourceFile) -> Iterator[Record | Problem]:
    """The examples of a file that holds a list; also of one that holds an object a line."""
    with file.open() as stream:
        try:
            text = _Text(stream)
            first = text.skip_space()
            if first == "[":
                text.position += 1
                yield from _read_list(file, text)
                return
            if not first:
                return
            line = text.line
            value = text.value()
            is_spread = text.line > line
            is_followed = isinstance(value, dict) and text.skip_space() == "{"
        except _TextError as error:
            yield Problem(f"{file.name}:{error.line}", f"the file is not JSON: {error}", "complete or fix it")
            return
    if is_followed and not is_spread:
        yield from read_jsonl(file)
        return
    if is_followed:
        what = "the file holds objects spread over lines, one after another; expected a list of examples"
        yield Problem(f"{file.name}:{line}", what, "write one list, [{…}, {…}]")
        return
    found = "one object" if isinstance(value, dict) else kind(value)
    yield Problem(f"{file.name}:1", f"the file holds {found}; expected a list of examples", _where_rows_are(value))


def _read_list(file: SourceFile, text: _Text) -> Iterator[Record | Problem]:
    """The objects of a list whose bracket has been read."""
    expects_value = False
    while True:
        try:
            character = text.skip_space()
            source = f"{file.name}:{text.line}"
            if character == "]" and not expects_value:
                text.position += 1
                if text.skip_space():
                    what = f"there is more after the list: {text.ahead()!r}"
                    yield Problem(f"{file.name}:{text.line}", what, "one list a file")
                return
            value = text.value()
            if type(value) is dict:
                yield Record(source, value)
            else:
                yield Problem(source, f"the example is {kind(value)}; expected an object", "write [{…}, {…}]")
            character = text.skip_space()
            expects_value = character == ","
            if expects_value:
                text.position += 1
            elif character != "]":
                what = "expected a comma or the end of the list"
                yield Problem(f"{file.name}:{text.line}", what, "is the file cut off?")
                return
        except _TextError as error:
            yield Problem(f"{file.name}:{error.line}", f"the example is not JSON: {error}", "complete or remove it")
            return


class _TextError(Exception):
    """What makes the text unreadable, and its line."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.line = line


class _Text:
    """A text through a window: values are parsed at a position, and what lies before it is forgotten."""

    def __init__(self, stream: BinaryIO) -> None:
        self.position = 0
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._window = ""
        self._is_whole = False
        self._line = 1
        self._counted = 0
        self._grow()
        self._window = self._window.removeprefix("\ufeff")

    @property
    def line(self) -> int:
        """The line of the position, from 1."""
        self._line += self._window.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def ahead(self) -> str:
        """The next characters, for messages."""
        return self._window[self.position : self.position + 20]

    def skip_space(self) -> str:
        """Moves to the next character that is not white space and returns it, or an empty string at the end."""
        while True:
            rest = self._window[self.position : self.position + 256]
            if blank := len(rest) - len(rest.lstrip(" \t\r\n")):
                self.position += blank
            elif rest:
                return rest[0]
            elif self._is_whole:
                return ""
            else:
                self._grow()

    def value(self) -> Any:
        """Parses the value at the position and moves after it.

        Raises:
            _TextError: There is none, or it is larger than what is read.
        """
        while True:
            try:
                value, end = decode_at(self._window, self.position)
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._window) - _ERROR_MARGIN
                if self._is_whole or not cut_off:
                    self.position = min(error.pos, len(self._window))
                    raise _TextError(error.msg, self.line) from None
            except ValueError as error:
                raise _TextError(str(error), self.line) from None
            else:
                if end < len(self._window) or self._is_whole:
                    self.position = end
                    return value
            if len(self._window) - self.position > VALUE_LIMIT_BYTES:
                raise _TextError(f"the value is longer than {VALUE_LIMIT_BYTES >> 20} MiB", self.line)
            self._grow()

    def _grow(self) -> None:
        """Forgets what was read and doubles what lies ahead, so that a long value is parsed few times."""
        line = self.line
        self._window = self._window[self.position :]
        self.position = self._counted = 0
        data = self._stream.read(max(_CHUNK_BYTES, len(self._window)))
        self._is_whole = not data
        try:
            self._window += self._decoder.decode(data, final=self._is_whole)
        except UnicodeDecodeError as error:
            line += self._window.count("\n") + error.object.count(b"\n", 0, error.start)
            raise _TextError("it is not UTF-8; save the file as UTF-8", line) from None


def _skip_line(stream: BinaryIO) -> None:
    while (line := stream.readline(_CHUNK_BYTES)) and not line.endswith(b"\n"):
        pass


def _where_rows_are(value: Any) -> str:
    """How to make a list of examples of an object that holds them in another way."""
    columns = value if isinstance(value, dict) else {}
    lists = {key: items for key, items in columns.items() if isinstance(items, list) and items}
    if len(lists) > 1 and len(lists) == len(columns) and len({len(items) for items in lists.values()}) == 1:
        return f'"{next(iter(columns))[:40]}" holds a column: write the file by examples, not by columns'
    for key, items in lists.items():
        if all(isinstance(item, dict) for item in items) and key not in ("messages", "conversations", "conversation"):
            return f'the examples seem to stand under the key "{key[:40]}": write that list alone'
    if columns and all(isinstance(items, dict) and "0" in items for items in columns.values()):
        return f'"{next(iter(columns))[:40]}" holds a column: write the file by examples (orient="records" in pandas)'
    return "write [{…}, {…}], or one object a line in a .jsonl file"
