"""The directory that a merged model goes to: nothing is lost there, and nothing half-made stands under its name."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qwen_tune.disk import flush
from qwen_tune.errors import MergeError, NoRoomError, Problem, first_line
from qwen_tune.merging.shards import PROGRESS
from qwen_tune.model.adapter_dir import AdapterDir

SPARE_BYTES = 64 << 20  # for all that is no weight
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def choose_target(path: Path, adapter: AdapterDir, output: Path | None) -> Path:
    """Where a model goes: `merged` in the run directory, or beside a bare adapter, unless somebody says otherwise.

    Raises:
        MergeError: The adapter is a checkpoint, which has no place of its own.
    """
    if output is not None:
        return output
    if adapter.path.parent.name == "checkpoints":
        raise MergeError(Problem(str(path), "a checkpoint is no place for a model", "say where it goes with --output"))
    if adapter.run:
        return adapter.run / "merged"
    place = path if path.exists() else Path(path.name)  # it came from the Hub: here
    return place.with_name(f"{place.resolve().name}-merged")


def check_target(target: Path, adapters: Sequence[AdapterDir], overwrite: bool) -> None:
    """Makes sure that writing the output, or replacing what is there, can cost nobody anything.

    Raises:
        MergeError: The output lies in or around the base or the adapter, or is there and may not be replaced.
    """
    resolved = target.resolve()
    places = [("base", adapters[0].base.path.resolve()), *(("adapter", adapter.path.resolve()) for adapter in adapters)]
    for name, path in places:
        if resolved == path or resolved in path.parents or path in resolved.parents:
            what = f"the output would lie in or around the {name}"
            raise MergeError(Problem(str(target), what, "give another --output"))
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
def partial_directory(target: Path) -> Iterator[Path]:
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
        except OSError:
            raise MergeError(Problem(str(target), "another merge is writing it", "wait for it")) from None
        try:
            yield part
            for file in part.iterdir():
                flush(file)
            (part / PROGRESS).unlink(missing_ok=True)
            _put_in_place(part, target)
        except NoRoomError:
            raise
        except MergeError:
            shutil.rmtree(part)  # nothing in it can be used
            raise
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            fix = "free some space and run the command again: it goes on behind the last whole file"
            raise NoRoomError(Problem(str(part.parent), "there is no room for the model", fix)) from error
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
    part.replace(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)
