"""The run directory: what a run wrote, and what the commands after it read.

run.json and metrics.jsonl have the layout that docs/run-directory.md describes. A run that is alive holds a lock on
`.lock`; the system takes it off when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from qwen_tune.errors import Problem, QwenTuneError, RunError

OWN_FILES = ("recipe.yaml", "run.json", "metrics.jsonl", "merge.json", "report.html", ".lock")
OWN_FOLDERS = ("adapter", "merged", "checkpoints", "export", "logs")

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


class RunDir:
    """One run's directory. Facts go in through `record`, which is kept in run.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = {}
        self._lock: IO[bytes] | None = None

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def run_json(self) -> Path:
        """The record of the run."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """A JSON line for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained adapter with tokenizer, template and card."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """The full model."""
        return self.path / "merged"

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """A run that is there.

        Raises:
            RunError: The directory holds no run.
        """
        run = cls(path)
        if not path.is_dir():
            raise RunError(Problem(str(path), "the directory is not there; expected a run, an adapter or a model"))
        run.facts = run._read_facts()
        return run

    def check(self, recipe_yaml: str, *, overwrite: bool, resume: str) -> bool:
        """Looks whether a recipe may run here, changing nothing.

        Args:
            recipe_yaml: The resolved recipe.
            overwrite: Whether a run that is there may be replaced.
            resume: The recipe's `train.resume`.

        Returns:
            False when this very recipe has finished here, so that nothing is left to do; else True.

        Raises:
            RunError: Another process is at work here, files would be lost, or nothing can be written here.
        """
        existing = next(path for path in (self.path, *self.path.resolve().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            what = "is no directory" if not existing.is_dir() else "cannot be written to"
            raise RunError(Problem(str(self.path), f"{existing} {what}", "set another run directory with run.dir="))
        if self._is_locked():
            raise RunError(
                Problem(
                    str(self.path),
                    "the run directory is in use by a process that is still running",
                    "wait for it, or set another one with run.dir=",
                )
            )
        return self._may_run(recipe_yaml, overwrite=overwrite, resume=resume)

    def _may_run(self, recipe_yaml: str, *, overwrite: bool, resume: str) -> bool:
        entries = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        entries = {name for name in entries if name != ".lock" and not _is_temporary(name)}
        if not entries:
            return True
        is_run = self.run_json.exists() or self.recipe.exists()
        if foreign := sorted(entries - {*OWN_FILES, *OWN_FOLDERS} if is_run else entries):
            raise RunError(
                Problem(
                    str(self.path),
                    f"the directory holds files that are no run's ({', '.join(foreign[:3])})",
                    "set another one with run.dir=",
                )
            )
        if overwrite:
            return True
        state = self._read_facts().get("state") if self.run_json.exists() else None
        same = self.recipe.exists() and self.recipe.read_text(encoding="utf-8") == recipe_yaml
        if state == FINISHED and same and resume == "auto":
            return False
        what = {
            FINISHED: "the run directory holds a finished run" + ("" if same else " of another recipe"),
            FAILED: "the run directory holds a run that failed",
            INTERRUPTED: "the run directory holds a run that was interrupted; it has no checkpoint to go on from",
        }.get(str(state), "the run directory holds an unfinished run; it has no checkpoint to go on from")
        raise RunError(
            Problem(str(self.path), what, "keep it and set another one with run.dir=, or replace it with --overwrite")
        )

    def begin(self, recipe_yaml: str, *, overwrite: bool = False, resume: str = "auto") -> None:
        """Takes the directory: locks it, clears what an earlier run left, and writes recipe.yaml and run.json.

        Raises:
            RunError: Another process took it, or finished here, in the meantime.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / ".lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._may_run(recipe_yaml, overwrite=overwrite, resume=resume):
                raise RunError(Problem(str(self.path), "another process has finished this recipe in the meantime"))
        except BaseException as error:
            lock.close()
            if isinstance(error, BlockingIOError):
                raise RunError(
                    Problem(str(self.path), "another process took the run directory", "set another one with run.dir=")
                ) from None
            raise
        self._lock = lock
        for entry in list(self.path.iterdir()):
            if entry.name in OWN_FOLDERS or (_is_temporary(entry.name) and entry.is_dir()):
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()
        write_atomically(self.recipe, recipe_yaml)
        self.record({"state": RUNNING, "exit": None})

    def record(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to run.json."""
        self.facts.update(facts)
        write_atomically(self.run_json, json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n")

    @contextmanager
    def recording(self, recipe_yaml: str, *, overwrite: bool = False, resume: str = "auto") -> Iterator[None]:
        """Holds the directory for the length of a run, and records how it ended however it ends; see `begin`."""
        self.begin(recipe_yaml, overwrite=overwrite, resume=resume)
        state, code = FAILED, 1
        try:
            yield
            state, code = FINISHED, 0
        except KeyboardInterrupt:
            state, code = INTERRUPTED, 130
            raise
        except QwenTuneError:
            code = 2
            raise
        finally:
            self.end(state, code)

    def end(self, state: str, exit_code: int) -> None:
        """Records how the run ended and lets the directory go."""
        self.record({"state": state, "exit": exit_code})
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _is_locked(self) -> bool:
        lock = self.path / ".lock"
        if not lock.exists():
            return False
        with lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def _read_facts(self) -> dict[str, Any]:
        try:
            facts = json.loads(self.run_json.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(Problem(str(self.run_json), f"the record of the run cannot be read ({error})")) from None
        if not isinstance(facts, dict):
            raise RunError(Problem(str(self.run_json), "the record of the run is not an object"))
        return facts


def temporary_beside(path: Path) -> Path:
    """A name in the same directory under which something is made before it is renamed into place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a crash, finds either the old text or the new one."""
    temporary = temporary_beside(path)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
