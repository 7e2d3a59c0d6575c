"""Trains an adapter from one recipe.

accelerate launch qwen_tune/train.py recipes/coder-lora.yaml train.learning_rate=1e-4

`qwen-tune train` and `python -m qwen_tune train` come through `train` below as well.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where our modules would answer to any name that is imported.
    # Its parent takes that place, so that `qwen_tune` is a package and nothing else is shadowed.
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [str(_folder.parent), *(entry for entry in sys.path if Path(entry).resolve() != _folder)]

from qwen_tune.machine import check_world, prepare_process
from qwen_tune.recipe_file import load_recipe, to_yaml
from qwen_tune.run_dir import RunDir


def train(
    recipe_path: str | Path, overrides: Sequence[str] = (), *, overwrite: bool = False, dry_run: bool = False
) -> None:
    """Runs a recipe: rows become samples, the adapter is trained on them, and the run directory is filled.

    Args:
        recipe_path: The recipe's YAML file.
        overrides: `key.path=value`, merged into the recipe before it is validated.
        overwrite: Replace the run that is in the run directory.
        dry_run: Stop before weights are loaded, with nothing written.

    Raises:
        QwenTuneError: What the user has to change. Nothing has been written then, but for a `TrainingError` (the
            run directory tells of it) and a `MergeError` (the adapter is saved).
    """
    recipe = load_recipe(recipe_path, overrides)
    check_world(recipe.train.num_processes)
    run = RunDir(recipe.run_dir)
    if not run.check(to_yaml(recipe), overwrite=overwrite or dry_run, resume=recipe.train.resume):
        print(f"{run.path}: this recipe has finished here; nothing to do")
        return

    # Each import stands where its weight is first needed: a fault in the recipe shows at once, one in the rows after
    # seconds, and only a job that can start waits for TRL.
    prepare_process()
    from qwen_tune import record, summary
    from qwen_tune.base import load_tokenizer, resolve_base
    from qwen_tune.chatml import ChatTemplate
    from qwen_tune.model import load_base_model, training_dtype
    from qwen_tune.packing import pack
    from qwen_tune.preparation import prepare_data
    from qwen_tune.schedule import plan_schedule

    dtype = training_dtype(recipe.model)
    base = resolve_base(recipe.model, max_length_tokens=recipe.data.max_length_tokens)
    tokenizer = load_tokenizer(recipe.model, base)
    data = prepare_data(recipe.data, ChatTemplate(tokenizer), seed=recipe.train.seed)
    packs = pack(data.train.examples, recipe.data)
    schedule = plan_schedule(recipe.train, packing=recipe.data.packing, rows=len(packs))
    summary.show_start(recipe, run, base, data, schedule, dtype)
    if dry_run:
        return

    from qwen_tune.adapter import save_adapter
    from qwen_tune.trainer import build_trainer

    model = load_base_model(recipe.model, base, dtype=dtype)
    trainer = build_trainer(model, tokenizer, recipe, run, schedule, packs, pack(data.evaluation.examples, recipe.data))
    with run.recording(to_yaml(recipe), overwrite=overwrite, resume=recipe.train.resume):
        run.record(record.start_facts(recipe, overrides, base, tokenizer, data, schedule, trainer))
        before = trainer.evaluation_loss()
        trainer.train()
        after = trainer.evaluation_loss()
        save_adapter(trainer.model, tokenizer, base, recipe, run)
        run.record(record.end_facts(run.facts, trainer, before, after))
    if recipe.export.merge:
        from qwen_tune.merge import merge_run

        del model, trainer  # the merge loads the base anew, and there may not be room for two
        gc.collect()
        merge_run(run)
    summary.show_end(run)


if __name__ == "__main__":
    import runpy

    sys.argv[:1] = ["qwen-tune", "train"]
    runpy.run_module("qwen_tune", run_name="__main__")
