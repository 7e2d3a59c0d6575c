"""Prepared data on disk, under the hash of everything that they were made from.

An entry is made in a directory beside it, under a lock, and renamed when it is complete. Processes that need the same
entry wait for the one that makes it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from qwen_tune.disk import flush, make_private_folder, path_fault
from qwen_tune.errors import DataError, Problem, first_line

T = TypeVar("T")

KEPT_SECONDS = 30 * 24 * 3600
"""Entries unused for this long are removed when a new one is made."""


def cache_folder(name: str) -> Path:
    """Our folder in the user's cache (`XDG_CACHE_HOME`, else ~/.cache), or in QWEN_TUNE_CACHE if that is set.

    Raises:
        DataError: The environment names no usable path.
    """
    variable = "QWEN_TUNE_CACHE" if os.environ.get("QWEN_TUNE_CACHE") else "XDG_CACHE_HOME"
    chosen = os.environ.get(variable) or "~/.cache"
    if fault := path_fault(chosen):
        what = f"got {chosen[:80]}, which is not a usable path ({fault})"
        raise DataError(Problem(variable, what, "set QWEN_TUNE_CACHE to a folder for prepared data"))
    folder = Path(chosen).expanduser()
    return folder / name if variable == "QWEN_TUNE_CACHE" else folder / "qwen-tune" / name


def cached(key: str, make: Callable[[Path], None], load: Callable[[Path], T]) -> tuple[T, bool]:
    """Loads an entry, after making it if it is missing or damaged.

    Args:
        key: See `key_of`.
        make: Fills an empty directory.
        load: Reads a directory that `make` has filled; raises DataError if the directory is damaged.

    Returns:
        What was loaded, and whether the entry existed before.

    Raises:
        DataError: The cache cannot be written.
    """
    folder = cache_folder("prepared")
    entry = folder / key
    if (found := _load(entry, load)) is not None:
        return found, True
    from filelock import FileLock

    try:
        make_private_folder(folder)  # examples may be confidential
        with FileLock(folder / f"{key}.lock"):
            if (found := _load(entry, load)) is not None:
                return found, True
            _remove_unused(folder)
            shutil.rmtree(entry, ignore_errors=True)
            part = folder / f"{key}.part"
            # The process that left one has ended: the lock is ours.
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                make(part)
                for file in (*part.iterdir(), part):
                    flush(file)
                part.replace(entry)
                flush(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        what = f"prepared data cannot be written here: {first_line(error)}"
        raise DataError(
            Problem(str(folder), what, "free some space, or set QWEN_TUNE_CACHE to another folder")
        ) from error
    return load(entry), False


def _load(entry: Path, load: Callable[[Path], T]) -> T | None:
    try:
        os.utime(entry)  # entries in use are not removed
    except OSError:
        if not entry.is_dir():
            return None
    try:
        return load(entry)
    except DataError:
        return None


def _remove_unused(folder: Path) -> None:
    before = time.time() - KEPT_SECONDS
    for entry in folder.iterdir():
        try:
            if entry.stat().st_mtime >= before:
                continue
            # A process that was killed while it made an entry leaves its part.
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.suffix == ".lock":
                entry.unlink()
        except OSError:
            continue  # another process was faster
