"""Trains an adapter from one recipe.

accelerate launch qwen_tune/train.py recipes/coder-lora.yaml train.learning_rate=1e-4

`qwen-tune train` and `python -m qwen_tune train` come through `train` below as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where our modules would answer to any name that is imported.
    # Its parent takes that place, so that `qwen_tune` is a package and nothing else is shadowed.
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [str(_folder.parent), *(entry for entry in sys.path if Path(entry).resolve() != _folder)]

from qwen_tune.distributed.launch import resume_command, start_processes
from qwen_tune.distributed.world import prepare_process
from qwen_tune.errors import Interrupted
from qwen_tune.machine import import_without_gc
from qwen_tune.recipe.files import load_recipe
from qwen_tune.runs.directory import open_run
from qwen_tune.tracking.tracking import warn_of_trackers
from qwen_tune.training.outcome import finish, warn_of_push


def train(
    recipe_path: str | Path, overrides: Sequence[str] = (), *, overwrite: bool = False, dry_run: bool = False
) -> None:
    """Runs a recipe: examples become packs, the adapter is trained on them, and the run directory is filled.

    Args:
        recipe_path: The recipe's YAML file.
        overrides: `key.path=value`, merged into the recipe before it is validated.
        overwrite: Replace the run that is in the run directory.
        dry_run: Stop before weights are loaded, with nothing written.

    Raises:
        QwenTuneError: What the user has to change. Nothing has been written then, but for a `TrainingError` (the
            run directory tells of it) and a `MergeError` (the adapter is saved).
        Interrupted: The run was asked to stop; it is saved, and the same recipe resumes it.
        SystemExit: The run took several processes, and these have ended; the code is theirs.
    """
    recipe = load_recipe(recipe_path, overrides)
    if not dry_run:
        start_processes(recipe, recipe_path, overrides, overwrite=overwrite)
    warn_of_trackers(recipe.tracking)
    run, plan = open_run(recipe, overwrite=overwrite)
    if plan.nothing_to_do:
        finish(recipe, run, plan, dry_run=dry_run)
        return
    if not dry_run:
        warn_of_push(recipe)

    # Each import stands where its weight is first needed: a fault in the recipe shows at once, one in the examples
    # after seconds, and only a job that can start waits for TRL.
    prepare_process()
    from qwen_tune.training.job import prepare_job
    from qwen_tune.training.summary import show_job

    job = prepare_job(recipe, overrides, run, plan)
    show_job(job)
    if dry_run:
        return

    import_without_gc("trl.trainer.sft_trainer")
    from qwen_tune.training.fit import fit

    try:
        fit(job, overwrite=overwrite)
    except Interrupted as error:
        raise Interrupted(error.step, resume_command(recipe_path, overrides, recipe)) from None
    finish(recipe, run, plan)


if __name__ == "__main__":
    import runpy

    sys.argv[:1] = ["qwen-tune", "train"]
    runpy.run_module("qwen_tune", run_name="__main__")
