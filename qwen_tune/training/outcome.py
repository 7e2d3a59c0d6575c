"""What becomes of a finished run: merged and pushed as the recipe says. Light until one of the two happens."""

from __future__ import annotations

import gc

from qwen_tune.console import print_once, shown_path
from qwen_tune.distributed.world import is_main_process, prepare_process
from qwen_tune.recipe.schema import Recipe
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.resume import Plan


def warn_of_push(recipe: Recipe) -> None:
    """Warns of what would keep the push after training from succeeding, as far as it can be seen now."""
    if recipe.hub and is_main_process():
        from qwen_tune.publishing.push import check_push

        for warning in check_push(recipe):
            print_once(f"warning: {warning}")


def finish(recipe: Recipe, run: RunDir, plan: Plan, *, dry_run: bool = False) -> None:
    """Merges the adapter and pushes it, where the recipe says so; only the first process does anything.

    Args:
        recipe: The recipe.
        run: Its run, finished.
        plan: With `nothing_to_do` the run had finished before: it is merged if that is missing, and the push is left
            to the user, with its command.
        dry_run: Write nothing.

    Raises:
        MergeError: The merge failed; the adapter is complete.
    """
    if not is_main_process():
        return
    if plan.nothing_to_do:
        print_once(f"{shown_path(run.path)}: this recipe has finished here; nothing to do")
    if recipe.export.merge and not (dry_run or run.merged.exists()):
        prepare_process()
        from qwen_tune.merging.merge import merge

        gc.collect()  # the merge loads the base anew, and there may not be room for two
        merge(run.path)
    if not plan.nothing_to_do:
        from qwen_tune.training.summary import show_end

        show_end(run)
    if recipe.hub and plan.nothing_to_do:
        from qwen_tune.publishing.push import push_commands

        for command in push_commands(run.path, recipe.hub):
            print_once(f"to push it: {command}")
    elif recipe.hub:
        from qwen_tune.publishing.push import push_after_training

        push_after_training(run.path, recipe.hub)
