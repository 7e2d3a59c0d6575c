"""Records of JSON files: one object per line, or a list of objects.

Not read by `datasets`, whose reader reports neither file nor line, adds nulls where records differ in their keys, and
crashes on a file that holds only `null`. At most one line, or one value of the list, is in memory at a time.
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
LINES_FIX = "write one JSON object per line"

_CHUNK_BYTES = 1 << 20
_ERROR_MARGIN = 16
"""Characters: a JSON token that is not a string can be cut off at most this far from the end of the window."""


def read_jsonl(file: SourceFile) -> Iterator[Record | Problem]:
    """Reads a file with one object per line; after a line that is wrong the next ones are still read."""
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
                    # A .json file may hold a list; an object over several lines is valid in neither kind of file.
                    fix = "name it .json" if b"[" in line else "write each object on one line"
                    yield Problem(source, f"the line is not JSON: {error}; expected one object per line", fix)
                    return
                truncated = not line.endswith(b"\n") and number > 1
                fix = "complete or remove the last line, which is cut off" if truncated else LINES_FIX
                yield Problem(source, f"the line is not JSON: {error}", fix)
                continue
            if type(value) is dict:
                yield Record(source, value)
            elif isinstance(value, list) and number == 1:
                yield Problem(source, "the file holds a JSON list; expected one object per line", "name it .json")
                return
            else:
                yield Problem(source, f"the example is {kind(value)}; expected an object", LINES_FIX)


def read_json(file: SourceFile) -> Iterator[Record | Problem]:
    """Reads a file that holds a list of objects, or one object per line."""
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
        what = "the file holds several objects, each over several lines; expected a list of examples"
        yield Problem(f"{file.name}:{line}", what, "write one list, [{…}, {…}]")
        return
    found = "one object" if isinstance(value, dict) else kind(value)
    yield Problem(f"{file.name}:1", f"the file holds {found}; expected a list of examples", _where_records_are(value))


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
                    what = f"found text after the list: {text.ahead()!r}"
                    yield Problem(f"{file.name}:{text.line}", what, "write one list per file")
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
                yield Problem(f"{file.name}:{text.line}", what, "complete the file, which may be cut off")
                return
        except _TextError as error:
            yield Problem(f"{file.name}:{error.line}", f"the example is not JSON: {error}", "complete or remove it")
            return


class _TextError(Exception):
    """Why the text cannot be read, and on which line."""

    def __init__(self, what: str, line: int) -> None:
        super().__init__(what)
        self.line = line


class _Text:
    """A text read through a window: values are parsed at a position, and the text before it is dropped."""

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
        """Parses the value at the position and moves past it.

        Raises:
            _TextError: It is not valid JSON, or is larger than VALUE_LIMIT_BYTES.
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
        """Drops what was parsed and doubles the window, so that a long value is parsed only a few times."""
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


def _where_records_are(value: Any) -> str:
    """The fix for a file whose object holds the examples in another way."""
    columns = value if isinstance(value, dict) else {}
    lists = {key: items for key, items in columns.items() if isinstance(items, list) and items}
    if len(lists) > 1 and len(lists) == len(columns) and len({len(items) for items in lists.values()}) == 1:
        return f'"{next(iter(columns))[:40]}" holds a column: write one object per example instead of columns'
    for key, items in lists.items():
        if all(isinstance(item, dict) for item in items) and key not in ("messages", "conversations", "conversation"):
            return f'the examples seem to be under the key "{key[:40]}": write only that list'
    if columns and all(isinstance(items, dict) and "0" in items for items in columns.values()):
        return f'"{next(iter(columns))[:40]}" holds a column: write one object per example (orient="records" in pandas)'
    return "write [{…}, {…}], or one object per line in a .jsonl file"
