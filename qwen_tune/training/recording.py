"""A run's processes: one writes and prints, the others keep a log each; all leave together."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune.console import report
from qwen_tune.disk import make_private_folder
from qwen_tune.distributed.engine import gather_objects, leave_group
from qwen_tune.distributed.world import is_main_process, rank
from qwen_tune.errors import Interrupted, Problem, QwenTuneError, RunError
from qwen_tune.recipe.files import to_yaml
from qwen_tune.runs.resume import Plan

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qwen_tune.training.job import Job


@contextmanager
def recording(job: Job, facts: Mapping[str, Any], accelerator: Accelerator, *, overwrite: bool) -> Iterator[None]:
    """Holds the run directory for the length of a run; see `RunDir.recording`.

    The first process takes the directory and records the facts, then all continue. What the others print goes to
    `logs/rank-N.log`.

    Raises:
        RunError: Another run took the directory in the meantime.
    """
    run, recipe = job.run, job.recipe
    _require_one_plan(job.plan, accelerator)
    with _leaving_together():
        if is_main_process():
            with run.recording(to_yaml(recipe), job.plan, overwrite=overwrite, resume=recipe.train.resume):
                run.record(facts)
                accelerator.wait_for_everyone()
                yield
            return
        accelerator.wait_for_everyone()
        try:
            with _output_to(run.logs / f"rank-{rank()}.log"):
                try:
                    yield
                except BaseException:
                    traceback.print_exc()
                    raise
        except QwenTuneError as error:
            if not getattr(error, "met_by_all", False):
                report(f"process {rank()}: {error}")  # the others have not met it
            raise


@contextmanager
def _leaving_together() -> Iterator[None]:
    """Takes the process group down when a run ends as all processes know it does.

    A process that ends with its group still up is aborted now and then by the group's own threads. After a failure the
    others may be waiting in it, and it is left to the system.
    """
    all_know = False
    try:
        yield
        all_know = True
    except Interrupted:
        all_know = True
        raise
    finally:
        if all_know:
            leave_group()


def _require_one_plan(plan: Plan, accelerator: Accelerator) -> None:
    """Makes sure that all processes resume from the same checkpoint.

    Raises:
        RunError: They see different run directories.
    """
    plans = gather_objects(accelerator, str(plan.checkpoint))
    if len(set(plans)) > 1:
        what = "the processes see different checkpoints there; expected one disk that all machines share"
        raise RunError(Problem("run.dir", what, "put the run directory on such a disk"))


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Sends standard output and standard error to a file, those of native libraries too."""
    make_private_folder(path.parent)
    before = [os.dup(1), os.dup(2)]
    with path.open("ab") as file:
        try:
            _point_at(file.fileno(), file.fileno())
            yield
        finally:
            _point_at(*before)
            for descriptor in before:
                os.close(descriptor)


def _point_at(output: int, errors: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(output, 1)
    os.dup2(errors, 2)
