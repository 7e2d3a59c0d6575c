"""The run directory: written by a run, read by later commands; docs/run-directory.md describes its files.

A live run holds a lock on `.lock`, which the system releases when the process ends in any way.
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from qwen_tune.disk import is_full, is_temporary, parse_json, write_atomically
from qwen_tune.distributed.world import is_main_process
from qwen_tune.errors import Problem, QwenTuneError, RunError, first_line
from qwen_tune.recipe.files import to_yaml
from qwen_tune.recipe.schema import Recipe
from qwen_tune.runs.checkpoints import list_checkpoints, read_manifest, step_of
from qwen_tune.runs.drift import allowed_drift, changed_keys, changes_end, require_allowed
from qwen_tune.runs.resume import Plan, choose_checkpoint

OWN_FILES = ("recipe.yaml", "run.json", "metrics.jsonl", "answers.jsonl", "merge.json", "report.html", ".lock")
OWN_FOLDERS = ("adapter", "merged", "checkpoints", "export", "logs")

ANOTHER = "set another run directory with run.dir="

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


class RunDir:
    """One run's directory. Facts are added with `record`, which writes them to run.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"  # resolved
        self.run_json = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.answers = path / "answers.jsonl"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"  # output of the processes after the first, and trackers' local files
        self.adapter = path / "adapter"
        self.merged = path / "merged"
        self.facts: dict[str, Any] = {}
        self._lock: IO[bytes] | None = None

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run.

        Raises:
            RunError: The directory does not exist or does not contain a run.
        """
        run = cls(path)
        if not path.is_dir():
            raise RunError(Problem(str(path), "the directory does not exist; expected a run, an adapter or a model"))
        run.facts = run._read_facts()
        return run

    def check(self, recipe_yaml: str, *, overwrite: bool, resume: str) -> Plan:
        """Decides whether a recipe may run here and where it starts, without changing the directory.

        Args:
            recipe_yaml: The resolved recipe.
            overwrite: Whether an existing run may be replaced.
            resume: The recipe's `train.resume`.

        Raises:
            RunError: Another process uses the directory, files would be lost, it contains a different run, or it
                cannot be written.
        """
        if is_main_process():  # the others write nothing here, and their trial folders would be in the way of clearing
            self._require_writable()
        if self._is_locked():
            what = "the run directory is in use by a process that is still running"
            raise RunError(Problem(str(self.path), what, f"wait for it, or {ANOTHER}"))
        return self._plan(recipe_yaml, overwrite=overwrite, resume=resume)

    def _require_writable(self) -> None:
        """Makes and removes a folder where the run would be: permissions alone do not decide."""
        try:
            existing = next(path for path in (self.path, *self.path.resolve().parents) if path.exists())
            if not existing.is_dir():
                raise RunError(Problem(str(self.path), f"{existing} is not a directory", ANOTHER))
            tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=existing).cleanup()
        except OSError as error:
            what = f"the run directory cannot be written ({error.strerror or first_line(error)})"
            raise RunError(Problem(str(self.path), what, ANOTHER)) from None

    def _plan(self, recipe_yaml: str, *, overwrite: bool, resume: str) -> Plan:
        unused = self._is_unused()
        if (unused or overwrite) and resume not in ("auto", "never"):
            what = "there is no run here to resume" if unused else "--overwrite would delete the run that it belongs to"
            raise RunError(Problem("train.resume", f"got {resume}, but {what}", "write train.resume=auto"))
        if unused or overwrite:
            return Plan()
        state = self.recorded_facts().get("state")
        if resume == "never":
            raise self._refusal(state, "; train.resume is never")
        started_with = self.recipe.read_text(encoding="utf-8") if self.recipe.exists() else None
        is_done = state == FINISHED and resume == "auto"
        if is_done and started_with is not None and not changes_end(started_with, recipe_yaml):
            if drift := changed_keys(started_with, recipe_yaml):
                raise self._refusal(state, f" of another recipe ({'; '.join(map(str, drift))})")
            return Plan(nothing_to_do=True)
        checkpoint, notes = choose_checkpoint(self.checkpoints, resume)
        if checkpoint is None and state != FINISHED and not self.adapter.exists() and resume == "auto" and not notes:
            # Before its first checkpoint nothing is lost, and whatever restarts jobs need not know.
            return Plan(starts_over=True)
        if checkpoint is None:
            raise self._refusal(state, "; ".join(["", "it has no checkpoint to resume from", *notes]))
        # The checkpoint's own recipe counts: recipe.yaml may be that of a start which saved no checkpoint.
        written_under = read_manifest(checkpoint).get("recipe") or started_with or ""
        drift, allowed = changed_keys(written_under, recipe_yaml), allowed_drift(recipe_yaml)
        require_allowed(drift, allowed)
        return Plan(checkpoint=checkpoint, notes=tuple(notes), drift=tuple(drift), allowed=tuple(allowed))

    def _is_unused(self) -> bool:
        """Whether the directory is empty, except for what a killed save left.

        Raises:
            RunError: There are files that do not belong to a run.
        """
        entries = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        entries = {name for name in entries if name != ".lock" and not is_temporary(name)}
        is_run = self.run_json.exists() or self.recipe.exists()
        if foreign := sorted(entries - {*OWN_FILES, *OWN_FOLDERS} if is_run else entries):
            what = f"the directory contains files that do not belong to a run ({', '.join(foreign[:3])})"
            raise RunError(Problem(str(self.path), what, ANOTHER))
        return not entries

    def _refusal(self, state: Any, reason: str) -> RunError:
        kinds = {FINISHED: "a finished", FAILED: "a failed", INTERRUPTED: "an interrupted"}
        kind = kinds.get(str(state), "an unfinished")
        fix = f"keep it and {ANOTHER}, or replace it with --overwrite"
        return RunError(Problem(str(self.path), f"the run directory contains {kind} run{reason}", fix))

    def begin(
        self, recipe_yaml: str, plan: Plan | None = None, *, overwrite: bool = False, resume: str = "auto"
    ) -> None:
        """Locks the directory, deletes what the plan does not keep, and writes recipe.yaml and run.json.

        Raises:
            RunError: Another process locked or changed it since the plan was made.
        """
        plan = plan or Plan()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"the run directory cannot be made ({error.strerror})"
            raise RunError(Problem(str(self.path), what, ANOTHER)) from None
        with ExitStack() as undo:
            lock = undo.enter_context((self.path / ".lock").open("ab"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(Problem(str(self.path), "another process uses the run directory", ANOTHER)) from None
            if self._plan(recipe_yaml, overwrite=overwrite, resume=resume) != plan:
                raise RunError(Problem(str(self.path), "another process has changed it in the meantime", "start again"))
            undo.pop_all()
        self._lock = lock
        try:
            if plan.checkpoint is None:
                self._clear()
            else:
                self.facts = self._read_facts()
                self._rewind_to(plan.checkpoint)
            write_atomically(self.recipe, recipe_yaml, private=True)
            self.record({"state": RUNNING, "exit": None})
        except OSError as error:
            self._unlock()
            if not is_full(error):
                raise
            what = f"the disk is full ({error.strerror})"
            raise RunError(Problem(str(self.path), what, "free some room and run the same command again")) from error

    def _clear(self) -> None:
        for entry in list(self.path.iterdir()):
            if entry.name in OWN_FOLDERS or (is_temporary(entry.name) and entry.is_dir()):
                shutil.rmtree(entry)
            elif entry.name != ".lock":
                entry.unlink()

    def _rewind_to(self, checkpoint: Path) -> None:
        """Deletes what came after a checkpoint: later checkpoints, and the lines of later steps."""
        step = step_of(checkpoint)
        for later in list_checkpoints(self.checkpoints):
            if step_of(later) > step:
                shutil.rmtree(later)
        # The lock is ours, so these are of killed saves.
        for left in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
            if left.is_dir():
                shutil.rmtree(left)
        for path in (self.metrics, self.answers):
            if path.exists():
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                write_atomically(path, "".join(line for line in lines if _step_of_line(line) <= step))

    def record(self, facts: Mapping[str, Any]) -> None:
        """Adds facts to run.json."""
        self.facts.update(facts)
        write_atomically(self.run_json, json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n", private=True)

    @contextmanager
    def recording(
        self, recipe_yaml: str, plan: Plan | None = None, *, overwrite: bool = False, resume: str = "auto"
    ) -> Iterator[None]:
        """Holds the directory for the length of a run, and records how the run ended; see `begin`."""
        self.begin(recipe_yaml, plan, overwrite=overwrite, resume=resume)
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
            try:
                self.record({"state": state, "exit": code})
            except OSError as error:
                # On a full disk the record stays as it was, as after a kill; the run has reported its own error.
                if not is_full(error):
                    raise
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def recorded_facts(self) -> dict[str, Any]:
        """The contents of run.json; empty if there is none."""
        return self._read_facts() if self.run_json.exists() else {}

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
            facts = parse_json(self.run_json.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(Problem(str(self.run_json), f"the record of the run cannot be read ({error})")) from None
        if not isinstance(facts, dict):
            raise RunError(Problem(str(self.run_json), "the record of the run is not an object"))
        return facts


def open_run(recipe: Recipe, *, overwrite: bool) -> tuple[RunDir, Plan]:
    """The run directory of a recipe, and what the recipe does there; see `RunDir.check`."""
    run = RunDir(recipe.run_dir)
    # Another machine's processes may not see the directory; those that do have to come to the same plan.
    if not (is_main_process() or run.run_json.exists()):
        return run, Plan()
    return run, run.check(to_yaml(recipe), overwrite=overwrite, resume=recipe.train.resume)


def _step_of_line(line: str) -> float:
    """The step of a line of metrics; infinite for a line that a crash has cut off or zeroed."""
    try:
        return float(parse_json(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
