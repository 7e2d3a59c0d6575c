"""Checkpoint directories: written atomically, verified by a manifest, listed, and rotated.

A checkpoint is made under a temporary name, its files are flushed to the disk, the manifest with the sha256 of each is
written last, and only then is it renamed to `step-N`. A run never resumes from one whose manifest does not match.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen_tune.disk import flush, parse_json, sha256
from qwen_tune.errors import first_line

MANIFEST = "manifest.json"
OWN_HASH = "manifest_sha256"
"""sha256 of all other keys, so that a flipped bit in the manifest is detected as well."""
STEP_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(folder: Path, step: int, facts: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Makes `folder/step-N`, whole or not at all.

    `write` writes the checkpoint's files into a directory; `facts` are further keys of the manifest.
    """
    target = folder / f"step-{step}"
    temporary = folder / f".step-{step}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        contents = {"step": step, **facts, "files": _flushed(temporary)}
        manifest = temporary / MANIFEST
        manifest.touch(mode=0o600)  # as recipe.yaml, which it contains
        manifest.write_text(json.dumps({**contents, OWN_HASH: _hash_of(contents)}, indent=2) + "\n", encoding="utf-8")
        flush(manifest)
        flush(temporary)
    except BaseException:
        # On a full disk, the rest of it would take room that everything else needs.
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():  # of the same step, from before a resume
        shutil.rmtree(target)
    temporary.rename(target)
    flush(folder)
    return target


def _flushed(directory: Path) -> dict[str, dict[str, Any]]:
    """Flushes every file to the disk; returns size and sha256 of each."""
    paths = sorted(directory.iterdir())
    # One thread waits for the disk while the other computes hashes.
    with ThreadPoolExecutor(1) as disk:
        flushed = [disk.submit(flush, path) for path in paths]
        entries = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
        for each in flushed:
            each.result()
    return entries


def list_checkpoints(folder: Path) -> list[Path]:
    """The directories named `step-N`, oldest first, whole or not."""
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [path for path in entries if STEP_NAME.fullmatch(path.name) and not path.is_symlink()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step in a checkpoint's name."""
    match = STEP_NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Reads and checks the manifest.

    Raises:
        ValueError: It is missing, invalid, or not as it was written.
    """
    path = checkpoint / MANIFEST
    if not path.exists():
        raise ValueError(f"it has no {MANIFEST}")
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({first_line(error)})") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"its {MANIFEST} is not valid")
    if manifest.pop(OWN_HASH, None) != _hash_of(manifest) or manifest.get("step") != step_of(checkpoint):
        raise ValueError(f"its {MANIFEST} has been changed")
    return manifest


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used; None if every file matches the manifest."""
    try:
        manifest = read_manifest(checkpoint)
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            if Path(name).name != name or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                return f"{name} has been changed"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return first_line(error)
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and the faults of newer ones."""
    skipped: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name}: {fault}")
    return None, skipped


def rotate(folder: Path, *, keep: int, best_step: int | None) -> None:
    """Deletes checkpoints, except for the newest `keep` and the best one."""
    for checkpoint in list_checkpoints(folder)[:-keep]:
        if step_of(checkpoint) != best_step:
            shutil.rmtree(checkpoint)
