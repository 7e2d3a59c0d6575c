import pytest

from qwen_tune.errors import RecipeError
from qwen_tune.recipe.schema import TrainSpec
from qwen_tune.training.schedule import plan_schedule


def test_accumulation_follows_from_the_global_batch():
    schedule = plan_schedule(TrainSpec(global_batch_size=8, num_train_epochs=3), packing=True, rows=20)
    assert (schedule.per_device_train_batch_size, schedule.gradient_accumulation_steps) == (1, 8)
    assert (schedule.steps_per_epoch, schedule.max_steps) == (3, 9)


def test_without_packing_several_samples_share_a_forward():
    schedule = plan_schedule(TrainSpec(global_batch_size=6), packing=False, rows=20)
    assert (schedule.per_device_train_batch_size, schedule.gradient_accumulation_steps) == (3, 2)


def test_max_steps_wins_over_epochs():
    assert plan_schedule(TrainSpec(global_batch_size=4, max_steps=7), packing=True, rows=100).max_steps == 7


def test_a_short_run_has_no_warm_up_and_none_is_all_warm_up():
    assert plan_schedule(TrainSpec(max_steps=2), packing=True, rows=100).warmup_steps == 0
    assert plan_schedule(TrainSpec(max_steps=200), packing=True, rows=100).warmup_steps == 6
    assert plan_schedule(TrainSpec(max_steps=9, warmup_steps=4), packing=True, rows=100).warmup_steps == 4
    with pytest.raises(RecipeError, match="5 steps of warm-up in a run of 5"):
        plan_schedule(TrainSpec(max_steps=5, warmup_steps=5), packing=True, rows=100)


def test_a_batch_that_does_not_divide_names_those_that_do(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError) as caught:
        plan_schedule(TrainSpec(global_batch_size=8), packing=True, rows=100)
    assert "8 does not divide by 3 process(es) x 1" in str(caught.value)
    assert "set it to 6 or 9" in str(caught.value)
