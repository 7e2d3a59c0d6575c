import pytest
from planned import made_recipe, workload

from qwen_tune.errors import RecipeError
from qwen_tune.planner.choice import choose
from qwen_tune.training.batch_plan import Schedule, plan_schedule


def schedule_of(rows: int, *, packing: bool = True, processes: int = 1, **train) -> Schedule:
    """The schedule of a train section on a CPU."""
    recipe = made_recipe(data={"packing": packing}, train=train)
    return plan_schedule(
        recipe.train, choose(workload(recipe, processes=processes, on_gpu=False), recipe.train, None), packs=rows
    )


def test_accumulation_follows_from_the_global_batch():
    schedule = schedule_of(20, global_batch_size=8, num_train_epochs=3.0)
    assert (schedule.per_device_train_batch_size, schedule.gradient_accumulation_steps) == (1, 8)
    assert (schedule.steps_per_epoch, schedule.max_steps) == (3, 9)
    assert schedule.gradient_checkpointing == "none"


def test_without_packing_several_samples_share_a_forward():
    schedule = schedule_of(20, packing=False, global_batch_size=6)
    assert (schedule.per_device_train_batch_size, schedule.gradient_accumulation_steps) == (3, 2)


def test_max_steps_wins_over_epochs():
    assert schedule_of(100, global_batch_size=4, max_steps=7).max_steps == 7


def test_a_short_run_has_no_warm_up_and_none_is_all_warm_up():
    assert schedule_of(100, max_steps=2).warmup_steps == 0
    assert schedule_of(100, max_steps=200).warmup_steps == 6
    assert schedule_of(100, max_steps=9, warmup_steps=4).warmup_steps == 4
    with pytest.raises(RecipeError, match="5 steps of warm-up in a run of 5"):
        schedule_of(100, max_steps=5, warmup_steps=5)


def test_a_batch_that_does_not_divide_names_those_that_do(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError) as caught:
        schedule_of(100, processes=3, global_batch_size=8)
    assert "8 does not divide by 3 process(es) x 1" in str(caught.value)
    assert "set it to 6 or 9" in str(caught.value)


def test_a_batch_that_the_recipe_names_is_taken():
    schedule = schedule_of(20, global_batch_size=8, per_device_train_batch_size=4, gradient_checkpointing="full")
    assert (schedule.per_device_train_batch_size, schedule.gradient_checkpointing) == (4, "full")
