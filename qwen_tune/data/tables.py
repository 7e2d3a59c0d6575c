"""Records of tables: CSV, Parquet, and Arrow as `datasets` writes it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from qwen_tune.data.json_files import BYTE_ORDER_MARK
from qwen_tune.data.source_file import VALUE_LIMIT_BYTES, Record, SourceFile, data_suffix
from qwen_tune.errors import Problem, first_line

_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20  # of each column
_QUOTES = "put texts with quotes, commas or line breaks in double quotes, and double the quotes in them"


def read_csv(file: SourceFile) -> Iterator[Record | Problem]:
    """Reads a table in text with a header; values are separated by tabs in `.tsv`, by commas in `.csv`."""
    csv.field_size_limit(VALUE_LIMIT_BYTES)
    name = file.name
    with file.open() as stream:
        delimiter = "\t" if data_suffix(file.path.name) == ".tsv" else ","
        reader = csv.reader(_lines(stream), delimiter=delimiter, strict=True)
        line = 1
        try:
            header = next((values for values in reader if values), None)
            if header is None:
                return
            if repeated := {column for column in header if header.count(column) > 1}:
                yield Problem(f"{name}:1", f"the header names {', '.join(sorted(repeated))[:80]} twice", "rename one")
                return
            any_record, line = False, reader.line_num + 1
            for values in reader:
                source, line = f"{name}:{line}", reader.line_num + 1
                any_record = True
                if not values:
                    continue
                if len(values) != len(header):
                    what = f"the line has {len(values)} values; expected {len(header)}, one per column of the header"
                    yield Problem(source, what, _QUOTES)
                else:
                    yield Record(source, dict(zip(header, values)))  # noqa: B905
            if not any_record:
                yield Problem(f"{name}:1", "the file has a header but no examples", "add examples")
        except csv.Error as error:
            yield Problem(f"{name}:{line}", f"the line is not CSV: {error}", _QUOTES)
        except UnicodeDecodeError as error:
            what = f"byte {error.start + 1} of the line is not UTF-8"
            yield Problem(f"{name}:{reader.line_num + 1}", what, "save the file as UTF-8")


def _lines(stream: BinaryIO) -> Iterator[str]:
    """Lines with their ends, which quoted texts may contain; decoded one by one, for errors with line numbers."""
    first = True
    while line := stream.readline(VALUE_LIMIT_BYTES):
        if len(line) >= VALUE_LIMIT_BYTES:
            raise csv.Error(f"the line is longer than {VALUE_LIMIT_BYTES >> 20} MiB")
        yield (line.removeprefix(BYTE_ORDER_MARK) if first else line).decode("utf-8")
        first = False


def read_parquet(file: SourceFile) -> Iterator[Record | Problem]:
    """Reads a Parquet file, a batch at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Otherwise a whole row group is read at once, which in many files is the whole file.
        with (
            _unpacked(file) as path,
            pyarrow.parquet.ParquetFile(path, memory_map=False, buffer_size=_BUFFER_BYTES, pre_buffer=False) as table,
        ):
            yield from _table_records(table.iter_batches(batch_size=_BATCH_ROWS), file.name)
    except _table_errors() as error:
        yield Problem(file.name, f"the file is not Parquet: {first_line(error)}", "check that the file is complete")


def read_arrow(file: SourceFile) -> Iterator[Record | Problem]:
    """Reads an Arrow file, or an Arrow stream, which `datasets` writes under the same name."""
    import pyarrow

    try:
        # Mapped, since a batch may be the whole file: the kernel can drop its pages.
        with _unpacked(file) as path, pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                table = pyarrow.ipc.open_file(source)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
                yield from _table_records(batches, file.name)
            else:
                yield from _table_records(pyarrow.ipc.open_stream(source), file.name)
    except _table_errors() as error:
        yield Problem(file.name, f"the file is not Arrow: {first_line(error)}", "check that the file is complete")


def without_nulls(columns: Mapping[str, Any]) -> dict[str, Any]:
    """A table row without the nulls that Arrow adds where structs in a column differ in their keys."""
    return {name: _without_nulls(value) for name, value in columns.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _table_records(batches: Iterable[Any], name: str) -> Iterator[Record | Problem]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # wrong lengths in a damaged file can crash the process
        repeated = [column for column in batch.schema.names if batch.schema.names.count(column) > 1]
        if repeated:
            yield Problem(name, f"two columns are named {repeated[0][:40]}", "rename one")
            return
        for start in range(0, batch.num_rows, _BATCH_ROWS):
            for columns in batch.slice(start, _BATCH_ROWS).to_pylist():
                number += 1
                yield Record(f"{name}:{number}", without_nulls(columns))


def _table_errors() -> tuple[type[Exception], ...]:
    """Exceptions of damaged tables, and of values that Python cannot represent (a date in the year 0)."""
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError, ArithmeticError)


@contextmanager
def _unpacked(file: SourceFile) -> Iterator[Path]:
    """The file's path, or that of a decompressed copy: tables are read from their end, which needs a seekable file."""
    if file.compression is None:
        yield file.path
        return
    import shutil
    import tempfile

    # Without a name where possible, so that a process that is killed leaves nothing.
    nameless = sys.platform == "linux"
    with tempfile.TemporaryFile() if nameless else tempfile.NamedTemporaryFile() as copy:
        with file.open() as stream:
            shutil.copyfileobj(stream, copy, 1 << 20)
        copy.flush()
        yield Path(f"/proc/self/fd/{copy.fileno()}" if nameless else copy.name)
