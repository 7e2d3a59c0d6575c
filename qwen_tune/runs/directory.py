"""The run directory: what a run wrote, and what the commands after it read.

run.json and metrics.jsonl have the layout that docs/run-directory.md describes. A run that is alive holds a lock on
`.lock`; the system takes it off when the process ends, however it ends.
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
from qwen_tune.runs.drift import allowed_drift, extends_run, recipe_drift, refuse
from qwen_tune.runs.resume import Plan, choose_checkpoint

OWN_FILES = ("recipe.yaml", "run.json", "metrics.jsonl", "answers.jsonl", "merge.json", "report.html", ".lock")
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
    def answers(self) -> Path:
        """A JSON line for each answer to one of the recipe's prompts."""
        return self.path / "answers.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The checkpoints' folder; each is a directory `step-N`."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """What processes beside the first said, and trackers' local files."""
        return self.path / "logs"

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

    def check(self, recipe_yaml: str, *, overwrite: bool, resume: str) -> Plan:
        """Looks whether and from where a recipe may run here; what is there stays as it is.

        Args:
            recipe_yaml: The resolved recipe.
            overwrite: Whether a run that is there may be replaced.
            resume: The recipe's `train.resume`.

        Raises:
            RunError: Another process is at work here, files would be lost, the run that is there is another one's, or
                nothing can be written here.
        """
        if is_main_process():  # the others write nothing here, and their folders would meet with its clearing up
            self._try_to_write()
        if self._is_locked():
            raise RunError(
                Problem(
                    str(self.path),
                    "the run directory is in use by a process that is still running",
                    "wait for it, or set another one with run.dir=",
                )
            )
        return self._plan(recipe_yaml, overwrite=overwrite, resume=resume)

    def _try_to_write(self) -> None:
        """Makes a folder where the run would begin, and takes it away: permissions alone do not tell."""
        fix = "set another run directory with run.dir="
        try:
            existing = next(path for path in (self.path, *self.path.resolve().parents) if path.exists())
            if not existing.is_dir():
                raise RunError(Problem(str(self.path), f"{existing} is no directory", fix))
            tempfile.TemporaryDirectory(prefix=".", suffix=".tmp", dir=existing).cleanup()
        except OSError as error:
            what = f"nothing can be written there ({error.strerror or first_line(error)})"
            raise RunError(Problem(str(self.path), what, fix)) from None

    def _plan(self, recipe_yaml: str, *, overwrite: bool, resume: str) -> Plan:
        unused = self._is_unused()
        if (unused or overwrite) and resume not in ("auto", "never"):
            what = "there is no run here to resume with" if unused else "--overwrite would delete the run it belongs to"
            raise RunError(Problem("train.resume", f"got {resume}, and {what}", "write train.resume=auto"))
        if unused or overwrite:
            return Plan()
        state = self.recorded_facts().get("state")
        if resume == "never":
            raise self._refusal(state, "train.resume is never")
        begun_with = self.recipe.read_text(encoding="utf-8") if self.recipe.exists() else None
        is_done = state == FINISHED and resume == "auto" and begun_with is not None
        if is_done and not extends_run(begun_with or "", recipe_yaml):
            if drift := recipe_drift(begun_with or "", recipe_yaml):
                raise self._refusal(state, f"of another recipe ({'; '.join(map(str, drift))})")
            return Plan(nothing_to_do=True)
        checkpoint, notes = choose_checkpoint(self.checkpoints, resume)
        if checkpoint is None and state != FINISHED and not self.adapter.exists() and resume == "auto" and not notes:
            # Before its first checkpoint: nothing is lost, and whatever starts jobs again need not know.
            return Plan(begins_anew=True)
        if checkpoint is None:
            raise self._refusal(state, "; ".join(["it has no checkpoint to resume from", *notes]))
        # Compared with what the checkpoint was written under: recipe.yaml may be that of a start that came to nothing.
        written_under = read_manifest(checkpoint).get("recipe") or begun_with or ""
        drift, allowed = recipe_drift(written_under, recipe_yaml), allowed_drift(recipe_yaml)
        refuse(drift, allowed)
        return Plan(checkpoint=checkpoint, notes=tuple(notes), drift=tuple(drift), allowed=tuple(allowed))

    def _is_unused(self) -> bool:
        """Whether nothing is here, or nothing but what a killed save left.

        Raises:
            RunError: There are files that are no run's.
        """
        entries = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        entries = {name for name in entries if name != ".lock" and not is_temporary(name)}
        is_run = self.run_json.exists() or self.recipe.exists()
        if foreign := sorted(entries - {*OWN_FILES, *OWN_FOLDERS} if is_run else entries):
            raise RunError(
                Problem(
                    str(self.path),
                    f"the directory holds files that are no run's ({', '.join(foreign[:3])})",
                    "set another one with run.dir=",
                )
            )
        return not entries

    def _refusal(self, state: Any, reason: str) -> RunError:
        what = {
            FINISHED: "the run directory holds a finished run",
            FAILED: "the run directory holds a run that failed",
            INTERRUPTED: "the run directory holds a run that was interrupted",
        }.get(str(state), "the run directory holds an unfinished run")
        glue = " " if reason.startswith("of ") else "; "
        fix = "keep it and set another one with run.dir=, or replace it with --overwrite"
        return RunError(Problem(str(self.path), f"{what}{glue}{reason}", fix))

    def begin(
        self, recipe_yaml: str, plan: Plan | None = None, *, overwrite: bool = False, resume: str = "auto"
    ) -> None:
        """Takes the directory: locks it, clears what the plan does not keep, and writes recipe.yaml and run.json.

        Raises:
            RunError: Another process took it, or changed it, since the plan was made.
        """
        plan = plan or Plan()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            what = f"the run directory cannot be made ({error.strerror})"
            raise RunError(Problem(str(self.path), what, "set another one with run.dir=")) from None
        with ExitStack() as undo:
            lock = undo.enter_context((self.path / ".lock").open("ab"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    Problem(str(self.path), "another process took the run directory", "set another one with run.dir=")
                ) from None
            if self._plan(recipe_yaml, overwrite=overwrite, resume=resume) != plan:
                raise RunError(Problem(str(self.path), "another process has used it in the meantime", "start again"))
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
            self._let_go()
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
        """Takes away what was done after a checkpoint: later checkpoints, and the lines of later steps."""
        step = step_of(checkpoint)
        for later in list_checkpoints(self.checkpoints):
            if step_of(later) > step:
                shutil.rmtree(later)
        for left in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):  # of killed saves; the lock is ours
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
        """Holds the directory for the length of a run, and records how it ended however it ends; see `begin`."""
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
            self.end(state, code)

    def end(self, state: str, exit_code: int) -> None:
        """Records how the run ended and lets the directory go.

        On a full disk the record stays as it was, as after a kill: what the run ended of is reported before that.
        """
        try:
            self.record({"state": state, "exit": exit_code})
        except OSError as error:
            if not is_full(error):
                raise
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def recorded_facts(self) -> dict[str, Any]:
        """run.json as it is; empty where there is none."""
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
    """The step of a line of metrics; that of one which a crash has cut off or zeroed is after every other."""
    try:
        return float(parse_json(line)["step"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf
