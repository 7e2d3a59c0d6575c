"""One data file: its bytes, unpacked where they are compressed, and the name under which it is spoken of."""

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
"""Longest line, or value of a list, that is read: a bound on memory, and far above any conversation."""

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\x03\x04": "zip",
}
_READABLE = ("gzip", "zstd")
_CHUNK_BYTES = 1 << 18


class Row(NamedTuple):
    """Column names and values, and where they stand (`file:line`)."""

    source: str
    columns: Mapping[str, Any]


class UnpackError(Exception):
    """A compressed file that ends too early or is damaged."""


@dataclass(frozen=True)
class SourceFile:
    """A local file to read, and its name in messages (the address, where it came from a URL)."""

    path: Path
    name: str

    @cached_property
    def compression(self) -> str | None:
        """How the content, whatever the name says, is compressed.

        Raises:
            OSError: The file cannot be read.
        """
        with self.path.open("rb") as file:
            head = file.read(8)
        return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)

    @property
    def is_readable(self) -> bool:
        """Whether the content is plain, or compressed in a way that is unpacked here."""
        return self.compression is None or self.compression in _READABLE

    def open(self) -> BinaryIO:
        """The unpacked bytes from the start, buffered.

        Raises:
            OSError: The file cannot be read.
            UnpackError: On reading, where the compressed bytes are cut off or damaged.
        """
        if self.compression == "gzip":
            import gzip

            return io.BufferedReader(_Unpacked(gzip.open(self.path), "gzip"), _CHUNK_BYTES)
        if self.compression == "zstd":
            import pyarrow

            stream = pyarrow.input_stream(str(self.path), compression="zstd", buffer_size=_CHUNK_BYTES)
            return io.BufferedReader(_Unpacked(stream, "zstd"), _CHUNK_BYTES)
        return self.path.open("rb", buffering=_CHUNK_BYTES)


class _Unpacked(io.RawIOBase):
    """Gives every failure of a decompressor one type: each library has several of its own."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream = stream
        self._name = name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            # One read of what is there: a longer one would lose what came before the damage.
            data = self._stream.read1(len(buffer)) if self._name == "gzip" else self._stream.read(len(buffer))
        except EOFError:
            raise UnpackError("the gzip data end too early") from None
        except (OSError, ValueError, zlib.error) as error:
            raise UnpackError(f"the {self._name} data are damaged or cut off ({error})") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def data_suffix(name: str) -> str:
    """What kind of data file a name speaks of: the suffix in lower case, of `rows.jsonl.gz` the one before `.gz`."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSION_SUFFIXES else path.suffix
