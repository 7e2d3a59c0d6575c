"""Files: durable writes, hashes, and paths that a user wrote."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwen_tune.errors import ModelError, Problem, first_line

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""`errno` of an OSError for a file that does not fit."""


def is_full(error: BaseException) -> bool:
    """Whether an error means that a disk is full; safetensors gives only the system's message, without an errno."""
    if isinstance(error, OSError):
        return error.errno in NO_ROOM
    return any(f"(os error {number})" in str(error) for number in NO_ROOM)


def parse_json(text: str | bytes) -> Any:
    """Parses JSON from an untrusted source.

    Raises:
        ValueError: It is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Mapping[str, Any]:
    """The JSON object of a file.

    Raises:
        ModelError: It cannot be read, or holds something else.
    """
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(Problem(str(path), f"cannot be read as JSON ({first_line(error)})")) from None
    if not isinstance(value, dict):
        raise ModelError(Problem(str(path), "expected a JSON object"))
    return value


def make_private_folder(path: Path) -> None:
    """Makes a folder that only its owner may read, and the folders above it, unless it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)


def flush(path: Path) -> None:
    """Flushes a file, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def temporary_beside(path: Path) -> Path:
    """The path in the same directory at which something is made before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def write_atomically(path: Path, text: str, *, private: bool = False) -> None:
    """Replaces a file so that a reader, or a crash, finds either the old text or the new one.

    With `private`, only its owner may read it.
    """
    temporary = temporary_beside(path)
    temporary.unlink(missing_ok=True)  # a killed process with the same id may have left one with another mode
    mode = 0o600 if private else 0o666  # less the umask
    with open(temporary, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush(path.parent)


TEXT_LIMIT_BYTES = 16 << 20
"""Largest file that a user may name to be read whole: a template, a list of tools."""


class UnreadableError(Exception):
    """A file that cannot be read as text; the message says why."""


def path_fault(text: str) -> str | None:
    """Why no file can ever be at a path; None if one could be, whether it exists or not."""
    try:
        Path(text).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:  # too long, a loop of links
        return (error.strerror or str(error)).lower()
    except ValueError:
        return "it contains a character that no path can contain"
    except RuntimeError:
        return "there is no such user, or no home folder"
    return None


def read_text_file(text: str) -> str:
    r"""The text of a file that a user named, with every line ending as `\n`.

    Raises:
        UnreadableError: It does not exist, is not a regular file (reading a pipe may wait for ever, and a device may
            have no end), is larger than `TEXT_LIMIT_BYTES`, or is not UTF-8.
    """
    if fault := path_fault(text):
        raise UnreadableError(fault)
    path = Path(text).expanduser()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableError("it is not a regular file")
        with path.open("rb") as file:
            content = file.read(TEXT_LIMIT_BYTES + 1)
        if len(content) > TEXT_LIMIT_BYTES:
            raise UnreadableError(f"it is larger than {TEXT_LIMIT_BYTES >> 20} MiB")
        return io.TextIOWrapper(io.BytesIO(content), "utf-8").read()
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(first_line(error)) from None


def key_of(ingredients: Mapping[str, Any]) -> str:
    """A name for what is made from some ingredients: equal ones have equal names."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()
