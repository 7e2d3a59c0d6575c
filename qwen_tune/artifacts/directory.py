"""The directory that a merged model goes to: nothing is lost there, and nothing half-made stands under its name."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qwen_tune.artifacts.adapter_dir import AdapterDir
from qwen_tune.disk import NO_ROOM, flush, temporary_beside
from qwen_tune.errors import MergeError, NoRoomError, Problem, first_line

PROGRESS = "merging.json"
SPARE_BYTES = 64 << 20  # for all that is no weight


def choose_target(path: Path, adapter: AdapterDir, output: Path | None) -> Path:
    """Where a model goes: `merged` in the run directory, or beside a bare adapter, unless somebody says otherwise.

    Raises:
        MergeError: The adapter is a checkpoint, which has no place of its own.
    """
    if output is not None:
        return output.resolve()  # what a link names is written, not the link
    if adapter.path.parent.name == "checkpoints":
        raise MergeError(Problem(str(path), "a checkpoint is no place for a model", "say where it goes with --output"))
    if adapter.run:
        return adapter.run / "merged"
    place = (path if path.exists() else Path(path.name)).resolve()  # what came from the Hub goes here
    return place.with_name(f"{place.name}-merged")


def check_place(target: Path, adapters: Sequence[AdapterDir]) -> None:
    """Makes sure that the output is a place where a directory can come to stand.

    Raises:
        MergeError: It lies in or around the base or the adapter, or is a disk of its own.
    """
    places = [("base", adapters[0].base.path.resolve()), *(("adapter", adapter.path.resolve()) for adapter in adapters)]
    for name, path in places:
        if target == path or target in path.parents or path in target.parents:
            what = f"the output would lie in or around the {name}"
            raise MergeError(Problem(str(target), what, "give another --output"))
    if os.path.ismount(target):
        what = "a disk is mounted there, and the finished model is renamed into its place"
        raise MergeError(Problem(str(target), what, f"give a directory in it: --output {target / 'model'}"))


def check_free(target: Path, overwrite: bool) -> None:
    """Makes sure that nobody loses what is at the output's place.

    Raises:
        MergeError: Something is there that may not be replaced.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / "merge.json").exists():
        raise MergeError(
            Problem(str(target), "something is there that is no merged model of ours", "give another --output")
        )
    if not overwrite:
        raise MergeError(
            Problem(str(target), "the output is there already", "give another --output, or replace it with --overwrite")
        )


def check_room(part: Path, needed: int) -> None:
    """Raises NoRoomError where so many bytes more do not fit on the disk."""
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
def partial_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """The directory in which a model is made, held for this process.

    It is renamed to the target's name at the end of the block. Where that is not reached, it is kept if weights in it
    are whole, for the next try.

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
            fix = "free some space and run the command again: it resumes after the last whole file"
            raise NoRoomError(Problem(str(part.parent), "there is no room for the model", fix)) from error
        else:
            check_free(target, overwrite)  # again: it may have taken hours, and what is whole stays if it is not
            _put_in_place(part, target)
        finally:
            _tidy(part)
    finally:
        os.close(holder)


def _tidy(part: Path) -> None:
    if not part.exists():
        return
    for file in part.glob("*.part"):
        file.unlink()
    if not any(part.glob("*.safetensors")) or not (part / PROGRESS).exists():
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
    (target / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)
