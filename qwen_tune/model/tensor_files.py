"""Safetensors files by their headers: where each tensor lies, and headers for files of our own."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_tune.disk import parse_json
from qwen_tune.errors import ModelError, Problem

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}
"""Bytes of one entry, by safetensors' names of types."""

FINGERPRINT_KEY = "base_weights_fingerprint"
"""Where the metadata of an adapter's file say which weights it was trained on."""

_LONGEST_HEADER = 100_000_000  # bytes, safetensors' own limit
_LENGTH = struct.Struct("<Q")
_COMPARED_BYTES = 1 << 22


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor's bytes lie: `length` bytes from `start` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along the first dimension."""
        return self.length // self.shape[0] if self.shape and self.shape[0] else self.length


def read_spans(file: Path) -> dict[str, TensorSpan]:
    """Every tensor of a file, in the order of their bytes: 8 bytes of length, a JSON header, then the bytes.

    Raises:
        ModelError: It is not a safetensors file, or is cut off.
    """
    entries, begin, size = _read_header(file)
    try:
        spans = [(name, _span(file, entry, begin)) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(Problem(str(file), f"not a safetensors file ({error})", "download it again")) from None
    spans.sort(key=lambda entry: (entry[1].start, entry[1].length))
    end = begin
    for name, span in spans:
        if span.start != end:
            what = f"the bytes of {name[:80]} do not follow those before it"
            raise ModelError(Problem(str(file), what, "download it again"))
        end = span.start + span.length
    if end != size:
        what = f"the file has {size:,} bytes; its header speaks of {end:,}: it is cut off or damaged"
        raise ModelError(Problem(str(file), what, "download it again"))
    return dict(spans)


def read_metadata(file: Path) -> Mapping[str, str]:
    """What a file says of itself.

    Raises:
        ModelError: See `read_spans`.
    """
    metadata = _read_header(file)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def read_bytes(span: TensorSpan, start: int, size: int) -> bytearray:
    """Some bytes of a tensor, from `start` of its own on.

    Raises:
        OSError: The file ends before its header says.
    """
    data = bytearray(size)
    read_into(span, start, memoryview(data))
    return data


def read_into(span: TensorSpan, start: int, buffer: memoryview) -> None:
    """Fills a buffer with a tensor's bytes, and those after it in the file if it is larger; see `read_bytes`."""
    with span.file.open("rb", buffering=0) as file:
        file.seek(span.start + start)
        while buffer and (count := file.readinto(buffer)):
            buffer = buffer[count:]
    if buffer:
        raise OSError(f"{span.file} ends before its header says")


def same_bytes(one: TensorSpan, other: TensorSpan) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.length
        while left:
            size = min(left, _COMPARED_BYTES)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def is_transposed(one: TensorSpan, other: TensorSpan) -> bool:
    """Whether a matrix is the transpose of another."""
    import numpy as np

    if one.dtype != other.dtype or one.shape != other.shape[::-1]:
        return False
    kind = f"u{ITEM_BYTES[one.dtype]}"
    first, second = (np.frombuffer(read_bytes(span, 0, span.length), kind).reshape(span.shape) for span in (one, other))
    return bool(np.array_equal(first, second.T))


def header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds tensors (name, type, shape) in this order, its length included."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        if dtype not in ITEM_BYTES:
            raise ModelError(Problem(name, f"it is stored as {dtype}, which is not known", "give another base"))
        start, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors' bytes begin at a multiple of 8
    return _LENGTH.pack(len(text)) + text


def set_metadata(file: Path, metadata: Mapping[str, str]) -> None:
    """Writes a file anew with other metadata, in their order.

    The library's own writer puts them in another order each time, and files of the same content would differ.
    """
    begin = _read_header(file)[1]
    head = header(((name, span.dtype, span.shape) for name, span in read_spans(file).items()), metadata)
    part = file.with_name(f"{file.name}.part")
    with file.open("rb") as source, part.open("wb") as target:
        target.write(head)
        source.seek(begin)
        shutil.copyfileobj(source, target)
    part.replace(file)


def _read_header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The entries of the header, where the tensors' bytes begin, and the size of the file."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            if length > min(size - _LENGTH.size, _LONGEST_HEADER):
                raise ValueError("the header is longer than the file")
            entries = parse_json(stream.read(length))
        if not isinstance(entries, dict):
            raise ValueError("the header is not a JSON object")
    except (OSError, struct.error, ValueError) as error:
        raise ModelError(Problem(str(file), f"not a safetensors file ({error})", "download it again")) from None
    return entries, _LENGTH.size + length, size


def _span(file: Path, entry: Mapping[str, Any], begin: int) -> TensorSpan:
    start, end = entry["data_offsets"]
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (start, end, *shape)):
        raise ValueError("a shape or position is not a whole number")
    if dtype in ITEM_BYTES and end - start != ITEM_BYTES[dtype] * math.prod(shape):
        raise ValueError("a tensor's bytes do not fit its shape")
    return TensorSpan(file, dtype, shape, begin + start, end - start)
