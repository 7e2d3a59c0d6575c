"""Directories that others will load: nothing is lost where they go, and nothing half-made stands under their name."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qwen_tune.disk import NO_ROOM, flush, temporary_beside
from qwen_tune.errors import MergeError, NoRoomError, Problem, first_line

FREE_SPACE = "free some space and run the command again: it resumes after the last whole file"
SPARE_BYTES = 64 << 20  # for all that is not a weight


def check_room(part: Path, needed: int) -> None:
    """Raises NoRoomError if so many more bytes do not fit on the disk."""
    free = shutil.disk_usage(part).free
    if needed and free < needed + SPARE_BYTES:
        what = f"{needed / 1e9:.2f} GB are to be written, {free / 1e9:.2f} GB are free"
        raise NoRoomError(Problem(str(part.parent), what, "free some space, or give an --output on another disk"))


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A directory in which something is made; it replaces the target at the end of the block, flushed to the disk."""
    part = temporary_beside(target)
    try:
        yield part
        for path in (*part.iterdir(), part):
            flush(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    part.replace(target)
    flush(target.parent)


@contextmanager
def resumable_directory(target: Path, progress: str, check_free: Callable[[], None]) -> Iterator[Path]:
    """The directory in which a model is made, held for this process.

    It is renamed to the target's name at the end of the block. Where that is not reached, it is kept if weights in it
    are whole, for the next try.

    Args:
        target: Where the model goes.
        progress: The file in which the writer notes what is whole.
        check_free: Raises where something is at the target that may not be replaced.

    Raises:
        MergeError: Another process is at it, or nothing can be written there.
        NoRoomError: The disk is full.
    """
    part = target.with_name(f".{target.name}.merging")
    try:
        part.mkdir(parents=True, exist_ok=True)
        holder = os.open(part, os.O_RDONLY)
    except OSError as error:
        what = f"the model cannot be written there: {first_line(error)}"
        raise MergeError(Problem(str(target), what, "give another --output")) from error
    try:
        try:
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MergeError(Problem(str(target), "another merge is writing it", "wait for it")) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield part
            for file in part.iterdir():
                flush(file)
        except NoRoomError:
            raise
        except MergeError:
            shutil.rmtree(part)  # nothing in it can be used
            raise
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise NoRoomError(Problem(str(part.parent), "there is no room for the model", FREE_SPACE)) from error
        else:
            check_free()  # it may have taken hours, and what is whole stays if it is not
            _put_in_place(part, target)
            (target / progress).unlink(missing_ok=True)
        finally:
            _tidy(part, progress)
    finally:
        os.close(holder)


def _tidy(part: Path, progress: str) -> None:
    if not part.exists():
        return
    for file in part.glob("*.part"):
        file.unlink()
    if not any(part.glob("*.safetensors")) or not (part / progress).exists():
        shutil.rmtree(part)


def _put_in_place(part: Path, target: Path) -> None:
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.replace(old)
    try:
        part.replace(target)
    except OSError:
        if old.exists():
            old.replace(target)
        raise
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)
