"""Where a merged model goes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from qwen_tune.artifacts.adapter_dir import AdapterDir
from qwen_tune.errors import MergeError, Problem


def choose_target(path: Path, adapter: AdapterDir, output: Path | None) -> Path:
    """Where a model goes: `merged` in the run directory, or beside a bare adapter, unless somebody says otherwise.

    Raises:
        MergeError: The adapter is a checkpoint, which has no place of its own.
    """
    if output is not None:
        return output.resolve()  # what a link names is written, not the link
    if adapter.path.parent.name == "checkpoints":
        raise MergeError(Problem(str(path), "a checkpoint cannot hold a merged model", "give --output"))
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
            Problem(str(target), "it holds something that qwen-tune did not merge", "give another --output")
        )
    if not overwrite:
        raise MergeError(
            Problem(str(target), "the output is there already", "give another --output, or replace it with --overwrite")
        )
