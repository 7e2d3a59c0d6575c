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

from qwen_tune.console import say, shown_path
from qwen_tune.distributed.launch import launch, processes_to_start, resume_command
from qwen_tune.distributed.process import prepare_process
from qwen_tune.distributed.world import check_world, is_main_process
from qwen_tune.errors import Interrupted
from qwen_tune.machine import import_without_gc
from qwen_tune.recipe.files import load_recipe, to_yaml
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.resume import Plan, check_resume
from qwen_tune.tracking.tracking import check_trackers, tracked


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
        Interrupted: The run was asked to stop; it is saved, and the same recipe resumes from there.
        SystemExit: The run took several processes, and these have ended; the code is theirs.
    """
    recipe = load_recipe(recipe_path, overrides)
    if not dry_run:
        if (processes := processes_to_start(recipe.train)) > 1:
            again = ["train", str(recipe_path), *overrides, *(["--overwrite"] if overwrite else [])]
            sys.exit(launch(again, processes, recipe.run_dir / "logs"))
        check_world(recipe.train.num_processes)
    for warning in check_trackers(recipe.tracking) if is_main_process() else ():
        say(f"warning: {warning}")
    run, text = RunDir(recipe.run_dir), to_yaml(recipe)
    # Another machine's processes may not see the directory; those that do have to come to the same plan.
    sees_run = is_main_process() or run.run_json.exists()
    plan = run.check(text, overwrite=overwrite, resume=recipe.train.resume) if sees_run else Plan()
    if plan.nothing_to_do:
        say(f"{shown_path(run.path)}: this recipe has finished here; nothing to do")
        if recipe.export.merge and is_main_process() and not (dry_run or run.merged.exists()):
            prepare_process()
            from qwen_tune.merging.merge import merge

            merge(run.path)
        if recipe.hub and is_main_process():
            from qwen_tune.publishing.push import push_commands

            for command in push_commands(run.path, recipe.hub):
                say(f"to push it: {command}")
        return
    if recipe.hub and is_main_process() and not dry_run:
        from qwen_tune.publishing.push import check_push

        for warning in check_push(recipe):
            say(f"warning: {warning}")

    # Each import stands where its weight is first needed: a fault in the recipe shows at once, one in the rows after
    # seconds, and only a job that can start waits for TRL.
    prepare_process()
    from qwen_tune.chatml.template import ChatTemplate
    from qwen_tune.data.packing import pack, pack_by_source
    from qwen_tune.data.preparation import prepare_data
    from qwen_tune.model.base import resolve_base
    from qwen_tune.model.loading import check_dtype, load_base_model, own_device, training_dtype
    from qwen_tune.model.quantization import check_quantization, quantization_config
    from qwen_tune.model.tokenizer import is_pretrained_only, load_tokenizer, trained_tokens
    from qwen_tune.training import record, summary
    from qwen_tune.training.batch_plan import choose_batch_plan, plan_schedule

    check_dtype(recipe.model)
    base = resolve_base(recipe.model, max_length_tokens=recipe.data.max_length_tokens)
    dtype = training_dtype(recipe.model, base)
    check_quantization(recipe.model, base)
    tokenizer = load_tokenizer(recipe.model, base)
    untuned = is_pretrained_only(base, tokenizer)
    data = prepare_data(recipe.data, ChatTemplate(tokenizer), seed=recipe.train.seed)
    packs = pack(data.train.examples, recipe.data)
    choice = choose_batch_plan(recipe, base, dtype)
    schedule = plan_schedule(recipe.train, choice, rows=len(packs))
    facts = record.start_facts(recipe, overrides, base, tokenizer, data, schedule, choice, dtype, untuned=untuned)
    facts |= check_resume(plan, run, facts, schedule.max_steps)
    summary.show_start(recipe, run, plan, base, tokenizer, data, schedule, choice, dtype, untuned=untuned)
    summary.show_drift(run, plan, facts)
    if dry_run:
        return

    import_without_gc("trl.trainer.sft_trainer")
    from qwen_tune.artifacts.adapter_writer import AdapterWriter, save_adapter
    from qwen_tune.model.adapter import lora_config
    from qwen_tune.training.batch_plan import explain_out_of_memory
    from qwen_tune.training.recording import recording
    from qwen_tune.training.trainer import build_trainer

    quantization = quantization_config(recipe.model, dtype)
    model = load_base_model(recipe.model, base, dtype=dtype, device=own_device(), quantization=quantization)
    adapter = lora_config(model, recipe.lora, trained_tokens(base.config, tokenizer) if untuned else None)
    writer = AdapterWriter(tokenizer, base, recipe)
    held_out = pack_by_source(data.evaluation.examples, recipe.data)
    trainer = build_trainer(model, tokenizer, recipe, run, schedule, packs, held_out, adapter, writer)
    summary.show_adapter(trainer.model, trainer.fused)
    facts |= record.model_facts(trainer)
    kept = recording(run, text, plan, facts, trainer.accelerator, overwrite=overwrite, resume=recipe.train.resume)
    with (
        kept,
        explain_out_of_memory(recipe, choice),
        tracked(recipe, run.path, facts, plan) as trainer.metrics.trackers,
    ):
        before = trainer.loss_before(plan)
        try:
            trainer.train(plan.checkpoint)
        except Interrupted as error:
            raise Interrupted(error.step, resume_command(recipe_path, overrides, recipe)) from None
        trainer.load_best()
        after = trainer.evaluation_loss()
        if is_main_process():
            save_adapter(trainer.model, writer, run)
            run.record(record.end_facts(run, trainer, before, after))
    if not is_main_process():
        return
    if recipe.export.merge:
        from qwen_tune.merging.merge import merge_run

        del model, trainer  # the merge loads the base anew, and there may not be room for two
        gc.collect()
        merge_run(run)
    summary.show_end(run)
    if recipe.hub:
        from qwen_tune.publishing.push import push_after_training

        push_after_training(run.path, recipe.hub)


if __name__ == "__main__":
    import runpy

    sys.argv[:1] = ["qwen-tune", "train"]
    runpy.run_module("qwen_tune", run_name="__main__")
