"""Rows of data files, each with its file and line.

JSON is read by line here rather than by `datasets`, whose reader names neither file nor line, invents nulls where rows
differ in shape, and dies on a file that holds only `null`.
"""

from __future__ import annotations

import csv
import difflib
import glob
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_tune.conversation import kind
from qwen_tune.errors import DataError, Problem
from qwen_tune.strict_json import DECODER, check_text, decode

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
GLOB_CHARACTERS = "*?["
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Row:
    """Column names and values, and where they stand (`file:line`)."""

    source: str
    columns: Mapping[str, Any]


def names_hub_data_set(path: str) -> bool:
    """Whether a recipe's path names nothing local and has the form of a Hub data set, `owner/name`."""
    local = Path(path).expanduser()
    if "://" in path or local.exists() or any(character in path for character in GLOB_CHARACTERS):
        return False
    looks_local = path.startswith((".", "/", "~")) or local.suffix in READERS
    return not looks_local and len(Path(path).parts) == 2


def find_files(path: str) -> list[Path] | None:
    """The data files that a recipe's path means: a file, a folder's files, or a glob's.

    Returns:
        The files in order of their names; None when the path names a Hub data set.

    Raises:
        DataError: The path names a local thing that is not there or holds no data.
    """
    if names_hub_data_set(path):
        return None
    local = Path(path).expanduser()
    if local.is_dir():
        files = sorted(file for file in local.rglob("*") if file.suffix in READERS and file.is_file())
        if not files:
            raise DataError(Problem(path, f"the folder holds no data files ({', '.join(READERS)})"))
        return files
    if local.exists():
        return [_known_suffix(local)]
    if any(character in path for character in GLOB_CHARACTERS):
        files = sorted(Path(name) for name in glob.glob(str(local), recursive=True) if Path(name).is_file())
        if not files:
            raise DataError(Problem(path, "no file matches this pattern"))
        return [_known_suffix(file) for file in files]
    raise DataError(Problem(path, "the data file is not there", _nearest(local)))


def read_rows(path: Path, name: str | None = None) -> Iterator[Row | Problem]:
    """The rows of one file, and a problem for each row that cannot be read; a problem that ends the file comes last.

    Args:
        path: The file.
        name: What it is called where a row or a problem says where it stands; its path when None.
    """
    for item in _read_file(path):
        if name is None:
            yield item
        elif isinstance(item, Row):
            yield replace(item, source=name + item.source.removeprefix(str(path)))
        else:
            yield replace(item, where=name + item.where.removeprefix(str(path)))


def _read_file(path: Path) -> Iterator[Row | Problem]:
    with path.open("rb") as file:
        head = file.read(4)
    for magic, name in COMPRESSED.items():
        if head.startswith(magic) and path.suffix != ".parquet":
            yield Problem(str(path), f"not yet: the file is {name}-compressed", "unpack it")
            return
    if head.startswith(UTF16_MARKS):
        yield Problem(f"{path}:1", "the file is UTF-16; expected UTF-8", "save it as UTF-8")
        return
    empty = True
    for row in READERS[path.suffix](path):
        empty = False
        yield row
    if empty:
        yield Problem(f"{path}:1", "the file is empty; expected at least one row")


def _read_jsonl(path: Path) -> Iterator[Row | Problem]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if not line.strip():
                continue
            source = f"{path}:{number}"
            try:
                value = decode(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Problem(source, f"byte {error.start + 1} of the line is not UTF-8", "save the file as UTF-8")
                continue
            except ValueError as error:
                truncated = not line.endswith(b"\n") and number > 1
                yield Problem(
                    source,
                    f"the line is not JSON: {error}",
                    "the last line is cut off: complete or remove it" if truncated else "one JSON object a line",
                )
                continue
            if isinstance(value, dict):
                yield Row(source, value)
            elif isinstance(value, list) and number == 1:
                yield Problem(source, "the file holds a JSON list; expected one object a line", "name it .json")
                return
            else:
                yield Problem(source, f"the row is {kind(value)}; expected an object")


def _read_json(path: Path) -> Iterator[Row | Problem]:
    try:
        text = path.read_bytes().removeprefix(BYTE_ORDER_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        yield Problem(str(path), f"byte {error.start + 1} of the file is not UTF-8", "save the file as UTF-8")
        return
    start = _skip_space(text, 0)
    if start == len(text):
        return
    if text[start] == "[":
        yield from _read_json_list(path, text, start + 1)
        return
    first_line = text[start:].split("\n", 1)[0]
    try:
        lines = isinstance(decode(first_line), dict) and "\n" in text[start:].strip()
    except ValueError:
        lines = False
    if lines:
        yield from _read_jsonl(path)
        return
    found = "one object" if text[start] == "{" else "no list"
    yield Problem(
        f"{path}:{text.count(chr(10), 0, start) + 1}",
        f"the file holds {found}; expected a list of rows",
        "write [{…}, {…}], or one object a line in a .jsonl file",
    )


def _read_json_list(path: Path, text: str, position: int) -> Iterator[Row | Problem]:
    line, counted = 1, 0
    while True:
        position = _skip_space(text, position)
        line, counted = line + text.count("\n", counted, position), position
        source = f"{path}:{line}"
        if position < len(text) and text[position] == "]":
            if trailing := text[_skip_space(text, position + 1) :]:
                yield Problem(source, f"there is more behind the end of the list: {trailing[:20]!r}")
            return
        try:
            value, position = DECODER.raw_decode(text, position)
            check_text(value, text[counted:position])
        except RecursionError:
            yield Problem(source, "the row is nested too deeply")
            return
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            at = error.pos if isinstance(error, json.JSONDecodeError) else counted
            line += text.count("\n", counted, min(at, len(text)))
            yield Problem(f"{path}:{line}", f"the row is not JSON: {reason}", "complete or remove it")
            return
        if isinstance(value, dict):
            yield Row(source, value)
        else:
            yield Problem(source, f"the row is {kind(value)}; expected an object")
        position = _skip_space(text, position)
        if position < len(text) and text[position] == ",":
            position += 1
        elif position >= len(text) or text[position] != "]":
            line += text.count("\n", counted, position)
            yield Problem(f"{path}:{line}", "expected a comma or the end of the list", "is the file cut off?")
            return


def _read_csv(path: Path) -> Iterator[Row | Problem]:
    csv.field_size_limit(1 << 30)
    delimiter = "\t" if path.suffix == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, None)
            if header is None:
                return
            if repeated := {name for name in header if header.count(name) > 1}:
                yield Problem(f"{path}:1", f"the header names {', '.join(sorted(repeated))} twice")
                return
            any_row, line = False, reader.line_num + 1
            for values in reader:
                source, line = f"{path}:{line}", reader.line_num + 1
                any_row = True
                if not values:
                    continue
                if len(values) != len(header):
                    yield Problem(source, f"the row has {len(values)} values; the header has {len(header)} columns")
                else:
                    yield Row(source, dict(zip(header, values)))  # noqa: B905
            if not any_row:
                yield Problem(f"{path}:1", "the file holds a header and no rows")
    except csv.Error as error:
        yield Problem(f"{path}:{reader.line_num}", f"the row is not CSV: {error}")
    except UnicodeDecodeError as error:
        yield Problem(str(path), f"the file is not UTF-8 ({error.reason})", "save the file as UTF-8")


def _read_parquet(path: Path) -> Iterator[Row | Problem]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                number += 1
                yield Row(f"{path}:{number}", without_nulls(columns))
    except (pyarrow.ArrowException, OSError) as error:
        yield Problem(str(path), f"the file is not Parquet: {str(error).splitlines()[0]}")


def without_nulls(value: Any) -> Any:
    """A table's value without the nulls that Arrow invents where structs of one column differ in their keys."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


READERS: dict[str, Callable[[Path], Iterator[Row | Problem]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


_SPACE = " \t\r\n"


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position


def _known_suffix(path: Path) -> Path:
    if path.suffix in READERS:
        return path
    raise DataError(Problem(str(path), f"the file type is not known; expected {', '.join(READERS)}", "rename it"))


def _nearest(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path()
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    if near := difflib.get_close_matches(path.name, names, n=1):
        return f"did you mean {folder / near[0]}?"
    return "paths are relative to the directory in which the command runs"
