"""One data file: its bytes, decompressed if necessary, and its name for messages."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

COMPRESSION_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd")
VALUE_LIMIT_BYTES = 64 << 20
"""Longest line, or value of a list, that is read: a limit on memory, far above the size of any conversation."""

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
_READABLE = ("gzip", "zstd")
_CHUNK_BYTES = 1 << 18


class Record(NamedTuple):
    """One parsed object or table row: its columns, and its place (`file:line`)."""

    source: str
    columns: Mapping[str, Any]


class UnpackError(Exception):
    """A compressed file is cut off or damaged."""


@dataclass(frozen=True)
class LineRange:
    """Whole lines of an uncompressed file: bytes [start, stop) and the number of the first line."""

    start: int
    stop: int
    first_line: int


@dataclass(frozen=True)
class SourceFile:
    """A local file and its name for messages (the address if it was fetched); `lines` is None for the whole file."""

    path: Path
    name: str
    lines: LineRange | None = None

    @cached_property
    def compression(self) -> str | None:
        """How the content is compressed, whatever the name says.

        Raises:
            OSError: The file cannot be read.
        """
        with self.path.open("rb") as file:
            head = file.read(8)
        return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)

    @property
    def is_readable(self) -> bool:
        """Whether the content is uncompressed, or can be decompressed here."""
        return self.compression is None or self.compression in _READABLE

    def open(self) -> BinaryIO:
        """Opens the decompressed bytes, or those of the range of lines, buffered.

        Raises:
            OSError: The file cannot be read.
            UnpackError: When reading, if the compressed bytes are cut off or damaged.
        """
        if self.lines:
            return io.BufferedReader(_Range(self.path, self.lines), _CHUNK_BYTES)
        if self.compression == "gzip":
            import gzip

            return io.BufferedReader(_Unpacked(gzip.open(self.path), "gzip"), _CHUNK_BYTES)
        if self.compression == "zstd":
            import pyarrow

            stream = pyarrow.input_stream(str(self.path), compression="zstd", buffer_size=_CHUNK_BYTES)
            return io.BufferedReader(_Unpacked(stream, "zstd"), _CHUNK_BYTES)
        return self.path.open("rb", buffering=_CHUNK_BYTES)


def split_lines(file: SourceFile, size: int) -> list[SourceFile]:
    """Divides a file into ranges of lines of at least `size` bytes each, except the last; reads it once, in pieces.

    Raises:
        OSError: The file cannot be read.
    """
    starts, lines = [(0, 1)], 1
    position, wanted = 0, size
    with file.path.open("rb", buffering=0) as stream:
        while piece := stream.read(_CHUNK_BYTES):
            while (end := piece.find(b"\n", max(wanted - position, 0)) + 1) and wanted < position + len(piece):
                starts.append((position + end, lines + piece.count(b"\n", 0, end)))
                wanted = position + end + size
            lines += piece.count(b"\n")
            position += len(piece)
    stops = [start for start, _ in starts[1:]] + [position]
    return [
        SourceFile(file.path, file.name, LineRange(start, stop, line))
        for (start, line), stop in zip(starts, stops, strict=True)
        if stop > start
    ]


class _Range(io.RawIOBase):
    def __init__(self, path: Path, lines: LineRange) -> None:
        self._file = path.open("rb", buffering=0)
        self._file.seek(lines.start)
        self._left = lines.stop - lines.start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Unpacked(io.RawIOBase):
    """Raises UnpackError for the many exceptions of the decompressors."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream = stream
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # A single read of what is available: a longer one would lose the bytes before the damage.
            data = self._stream.read1(len(buffer)) if self._name == "gzip" else self._stream.read(len(buffer))
        except EOFError:
            raise UnpackError("the gzip data are cut off") from None
        except (OSError, ValueError, zlib.error) as error:
            raise UnpackError(f"the {self._name} data are damaged or cut off ({error})") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def data_suffix(name: str) -> str:
    """The suffix of a file name in lower case, without a suffix of compression: `.jsonl` for `rows.jsonl.gz`."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSION_SUFFIXES else path.suffix
