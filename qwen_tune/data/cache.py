"""Prepared data on disk, found again by the hash of everything that it was made from.

Half an entry never stands under its name: it is made beside it, under a lock, and renamed when it is whole. Processes
that want the same entry wait for the one that makes it.
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
"""Entries that nothing has used for so long are removed when a new one is made."""


def cache_folder(name: str) -> Path:
    """A folder of ours in the user's cache (`XDG_CACHE_HOME`, else ~/.cache); QWEN_TUNE_CACHE names another place.

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
    """What `load` reads of an entry, which is made now where it is not there yet, or damaged.

    Args:
        key: See `key_of`.
        make: Fills an empty directory.
        load: Reads a directory that `make` has filled; a DataError of it says that the directory is damaged.

    Returns:
        What was loaded, and whether the entry was there before.

    Raises:
        DataError: The cache cannot be written.
    """
    folder = cache_folder("prepared")
    entry = folder / key
    if (found := _load(entry, load)) is not None:
        return found, True
    from filelock import FileLock

    try:
        make_private_folder(folder)  # examples are somebody's words
        with FileLock(folder / f"{key}.lock"):
            if (found := _load(entry, load)) is not None:
                return found, True
            _remove_unused(folder)
            shutil.rmtree(entry, ignore_errors=True)
            part = folder / f"{key}.part"
            # Whoever left one there is dead: the lock is ours.
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
        what = f"prepared data cannot be written there: {first_line(error)}"
        raise DataError(
            Problem(str(folder), what, "free some space, or set QWEN_TUNE_CACHE to another place")
        ) from error
    return load(entry), False


def _load(entry: Path, load: Callable[[Path], T]) -> T | None:
    try:
        os.utime(entry)  # what is used is not removed
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
            # What was killed while it made an entry leaves its part there.
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.suffix == ".lock":
                entry.unlink()
        except OSError:
            continue  # another process was faster
