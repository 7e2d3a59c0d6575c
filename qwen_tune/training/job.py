"""A run that is ready to start: everything that can be known before weights are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qwen_tune.data.files import names_hub_data_set
from qwen_tune.data.inputs import Inputs, load_inputs
from qwen_tune.data.packing import Packs, pack, pack_by_source
from qwen_tune.data.preparation import PreparedData
from qwen_tune.distributed.world import world_size
from qwen_tune.machine import device_name, library_versions
from qwen_tune.model.base import BaseCheckpoint, resolve_base
from qwen_tune.model.loading import check_dtype, training_dtype
from qwen_tune.model.quantization import check_quantization
from qwen_tune.model.tokenizer import is_pretrained_only
from qwen_tune.planner.choice import Choice
from qwen_tune.recipe.files import to_yaml
from qwen_tune.recipe.schema import Recipe
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.drift import run_fingerprint
from qwen_tune.runs.resume import Plan, check_resume
from qwen_tune.training.batch_plan import Schedule, choose_batch_plan, plan_schedule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """What trains, on what, how, and where it goes.

    Attributes:
        recipe: The recipe.
        run: The run directory.
        plan: Whether the run starts or resumes.
        base: The base checkpoint.
        dtype: The type that the base is held and multiplied in.
        pretrained_only: Whether the base was never trained on conversations, so that its ChatML tokens are trained too.
        tokenizer: The base's tokenizer, with the recipe's template.
        data: All examples, with what became of each.
        packs: What trains.
        held_out: What is evaluated on, by the names of the sources.
        batch_plan: Microbatch and checkpointing for this device.
        schedule: Batch, steps and warm-up.
        facts: What run.json says of all that.
    """

    recipe: Recipe
    run: RunDir
    plan: Plan
    base: BaseCheckpoint
    dtype: torch.dtype
    pretrained_only: bool
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    packs: Packs
    held_out: Mapping[str, Packs]
    batch_plan: Choice
    schedule: Schedule
    facts: Mapping[str, Any]


def prepare_job(recipe: Recipe, overrides: Sequence[str], run: RunDir, plan: Plan) -> Job:
    """Works out a job.

    Args:
        recipe: The recipe.
        overrides: What the command line changed of it, for the record.
        run: The run directory.
        plan: What happens there.

    Raises:
        ModelError: This machine cannot train the base, or not as the recipe says.
        DataError: Examples that cannot be trained on.
        RecipeError: Batch and steps do not divide.
        RunError: The run in the directory was another one.
    """
    check_dtype(recipe.model)
    base = resolve_base(recipe.model, max_length_tokens=recipe.data.max_length_tokens)
    dtype = training_dtype(recipe.model, base)
    check_quantization(recipe.model, base)
    inputs = load_inputs(recipe, base)
    packs = pack(inputs.data.train.samples, recipe.data)
    batch_plan = choose_batch_plan(recipe, base, dtype)
    schedule = plan_schedule(recipe.train, batch_plan, packs=len(packs))
    pretrained_only = is_pretrained_only(base, inputs.tokenizer)
    facts = _start_facts(recipe, overrides, inputs, schedule, batch_plan, dtype, pretrained_only=pretrained_only)
    return Job(
        recipe=recipe,
        run=run,
        plan=plan,
        base=base,
        dtype=dtype,
        pretrained_only=pretrained_only,
        tokenizer=inputs.tokenizer,
        data=inputs.data,
        packs=packs,
        held_out=pack_by_source(inputs.data.evaluation.samples, recipe.data),
        batch_plan=batch_plan,
        schedule=schedule,
        facts={**facts, **check_resume(plan, run.recorded_facts(), facts, schedule.max_steps)},
    )


def _start_facts(
    recipe: Recipe,
    overrides: Sequence[str],
    inputs: Inputs,
    schedule: Schedule,
    batch_plan: Choice,
    dtype: torch.dtype,
    *,
    pretrained_only: bool,
) -> dict[str, Any]:
    """What is known before the weights are loaded, with the `fingerprint` of all that decides the result."""
    base, data, tokenizer = inputs.base, inputs.data, inputs.tokenizer
    template = tokenizer.chat_template
    assert isinstance(template, str)
    facts = {
        "overrides": list(overrides),
        "engine": "single" if world_size() == 1 else "ddp",
        "world_size": world_size(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": library_versions(),
        "base": {
            "id": base.id,
            "revision": base.revision,
            "local_path": str(base.path),
            "config_sha256": base.config_sha256(),
            "weights_fingerprint": base.weights_fingerprint(),
            "untuned": pretrained_only,
        },
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "data_fingerprint": data.fingerprint(),
        "data_sets": _data_sets(recipe),
        **data.facts,
        "schedule": schedule.facts(),
        "plan": batch_plan.facts(),
        "masking": {"loss_on": recipe.data.loss_on, "thinking": recipe.data.thinking},
    }
    return {**facts, "fingerprint": run_fingerprint(to_yaml(recipe), facts)}


def _data_sets(recipe: Recipe) -> list[str]:
    """The sources that are Hub data sets. Recorded now: later a folder of such a name may be gone."""
    held_out = recipe.data.eval if isinstance(recipe.data.eval, list) else []
    paths = [source.path for source in [*recipe.data.train, *held_out]]
    return sorted({path for path in paths if names_hub_data_set(path)})
