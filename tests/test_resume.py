"""Going on gives what never stopping gives, to the bit."""

from __future__ import annotations

import json
import shutil
from typing import ClassVar

import numpy as np
import pytest
from accelerate import skip_first_batches
from conftest import make_workspace
from resuming import copy_of, facts, leave_unfinished, losses, rates, run, weights
from torch.utils.data import DataLoader

from qwen_tune.data.packing import Packs
from qwen_tune.errors import Interrupted, RunError
from qwen_tune.recipe.schema import Recipe
from qwen_tune.training.batches import PackCollator, SeededOrder, pack_dataset

pytest_plugins = ("resume_fixtures",)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize("at", ["step-3", "step-6"])
def test_going_on_gives_the_same_bits_as_never_stopping(uninterrupted, tmp_path, monkeypatch, at):
    folder = copy_of(uninterrupted, tmp_path, at=at)
    resumed = run(folder, monkeypatch)
    assert weights(resumed) == weights(uninterrupted)
    assert losses(resumed) == losses(uninterrupted)
    old, new = (json.loads((path / "run.json").read_text()) for path in (uninterrupted, resumed))
    for key in ("losses", "tokens", "steps", "state", "best"):
        assert new[key] == old[key]


def test_a_chosen_checkpoint_takes_the_run_back_to_it(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    resumed = run(folder, monkeypatch, "train.resume=run/checkpoints/step-3")
    assert weights(resumed) == weights(uninterrupted)
    assert losses(resumed) == losses(uninterrupted)


def test_a_run_whose_time_is_up_saves_and_resumes(uninterrupted, workspace, monkeypatch):
    # A limit of a moment is over after every step.
    for step in (1, 2):
        with pytest.raises(Interrupted, match=f"interrupted after step {step}, which is saved"):
            run(workspace, monkeypatch, "train.max_hours=1e-9")
        assert json.loads((workspace / "run" / "run.json").read_text())["state"] == "interrupted"
    run(workspace, monkeypatch)
    assert weights(workspace / "run") == weights(uninterrupted)


def test_a_finished_run_has_nothing_to_do_until_it_is_made_longer(uninterrupted, tmp_path, monkeypatch, capsys):
    folder = make_workspace(tmp_path)
    shutil.copytree(uninterrupted, folder / "run")
    run(folder, monkeypatch, "train.logging_steps=5")
    assert "nothing to do" in capsys.readouterr().out
    longer = run(folder, monkeypatch, "train.max_steps=12")
    assert "resuming from step-9" in capsys.readouterr().out
    assert json.loads((longer / "run.json").read_text())["steps"] == 12
    assert losses(longer)[: len(losses(uninterrupted))] == losses(uninterrupted)
    with pytest.raises(RunError, match="the recipe asks for 4 steps, but the run has already done 12"):
        run(folder, monkeypatch, "train.max_steps=4")


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit", "adafactor"])
def test_other_optimizers_resume_as_well(workspace, monkeypatch, optim):
    settings = (f"train.optim={optim}", "train.learning_rate=1e-3", "train.max_steps=4", "train.save_steps=2")
    run(workspace, monkeypatch, *settings, "run.dir=whole", "train.eval_steps=null")
    stopped = workspace / "run"
    shutil.copytree(workspace / "whole", stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-4")
    record = stopped / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "running"}))
    resumed = run(workspace, monkeypatch, *settings, "train.eval_steps=null")
    assert weights(resumed) == weights(workspace / "whole")


def test_a_merged_model_never_belongs_to_an_earlier_adapter(workspace, monkeypatch):
    merge_too = ("train.max_steps=3", "train.save_steps=3", "train.eval_steps=null", "export.merge=true")
    path = run(workspace, monkeypatch, *merge_too)
    assert (path / "merged").exists()
    run(workspace, monkeypatch, *merge_too[1:3], "train.max_steps=6")
    assert not (path / "merged").exists()
    run(workspace, monkeypatch, *merge_too[1:], "train.max_steps=6")  # nothing to train, and a model to merge
    assert (path / "merged" / "merge.json").exists()


WAYS = {
    "nf4": ("model.quantization=nf4",),
    "one sample an example, with noise": ("data.packing=false", "train.neftune_noise_alpha=5"),
    "streaming": ("data.streaming=true", "data.train=[{path: rows.jsonl, rows: 60}]"),
}


@pytest.mark.parametrize("way", WAYS)
def test_other_bases_and_sources_resume_without_tokenizing_again(workspace, monkeypatch, way):
    monkeypatch.setenv("QWEN_TUNE_CACHE", str(workspace / "cache"))
    settings = (*WAYS[way], "train.max_steps=4", "train.save_steps=2", "train.eval_steps=2")
    whole = run(workspace, monkeypatch, *settings, "run.dir=whole")
    stopped = workspace / "run"
    shutil.copytree(whole, stopped)
    leave_unfinished(stopped, "step-4")
    stores = {path: path.stat().st_mtime_ns for path in (workspace / "cache").rglob("*.bin")}
    assert stores
    resumed = run(workspace, monkeypatch, *settings)
    assert weights(resumed) == weights(whole)
    assert losses(resumed) == losses(whole)
    assert {path: path.stat().st_mtime_ns for path in (workspace / "cache").rglob("*.bin")} == stores


class ReadPacks(Packs):
    """Packs that remember which of them were read."""

    read: ClassVar[list[int]] = []

    def pack(self, index: int):
        self.read.append(index)
        return {"input_ids": np.array([1, 2]), "labels": np.array([-100, 2]), "lengths": np.array([2])}


def test_trained_packs_are_skipped_without_being_read():
    packs = ReadPacks(None, np.arange(1000), np.ones(1000, np.int64))
    order = SeededOrder(1000, 0, seed=3)
    loader = DataLoader(
        pack_dataset(packs, multiple=1, pad_id=0), batch_size=1, sampler=order, collate_fn=PackCollator()
    )
    rest = skip_first_batches(loader, 990)
    assert len(list(rest)) == 10
    assert ReadPacks.read == list(order)[990:]


def test_more_epochs_resume_with_the_rates_of_the_longer_schedule(workspace, monkeypatch):
    rows = (workspace / "rows.jsonl").read_text().splitlines(keepends=True)[:60]
    (workspace / "rows.jsonl").write_text("".join(rows))
    epochs = ("train.max_steps=null", "train.save_steps=1", "train.eval_steps=null", "data.eval=null")
    path = run(workspace, monkeypatch, *epochs, "train.num_train_epochs=1", "train.logging_steps=1")
    steps = facts(path)["steps"]
    run(workspace, monkeypatch, *epochs, "train.num_train_epochs=2", "train.logging_steps=1")
    whole = run(workspace, monkeypatch, *epochs, "train.num_train_epochs=2", "train.logging_steps=1", "run.dir=whole")
    assert facts(path)["steps"] == 2 * steps
    assert rates(path)[steps:] == rates(whole)[steps:]
    assert rates(path)[steps - 1] < rates(whole)[steps - 1]


def test_the_frequency_of_evaluation_does_not_change_training(uninterrupted, workspace, monkeypatch):
    assert weights(run(workspace, monkeypatch, "train.eval_steps=2")) == weights(uninterrupted)


def test_a_finished_run_ends_with_its_best_checkpoint_on_request(workspace, monkeypatch):
    ruin = ("train.learning_rate=0.5", "train.warmup_steps=4", "train.max_grad_norm=0", "train.eval_steps=1")
    settings = (*ruin, "train.max_steps=7", "train.save_steps=1", "train.save_total_limit=7")
    path = run(workspace, monkeypatch, *settings)
    best = facts(path)["best"]["step"]
    assert best < 7
    run(workspace, monkeypatch, *settings, "train.load_best_model_at_end=true")
    assert weights(path) == (path / "checkpoints" / f"step-{best}" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("overrides", "file_says", "command"),
    [
        (["train.max_steps=9"], "", "qwen-tune train r.yaml train.max_steps=9"),
        (["train.resume=runs/x/checkpoints/step-3"], "", "qwen-tune train r.yaml train.resume=auto"),
        ([], "never", "qwen-tune train r.yaml train.resume=auto"),
        (["data.system=Be kind."], "", "qwen-tune train r.yaml 'data.system=Be kind.'"),
    ],
)
def test_the_command_that_resumes(overrides, file_says, command):
    from qwen_tune.distributed.launch import resume_command

    chosen = [text.removeprefix("train.resume=") for text in overrides if text.startswith("train.resume")]
    resume = chosen[0] if chosen else file_says or "auto"
    recipe = Recipe(name="x", model={"base": "x"}, data={"train": [{"path": "x"}]}, train={"resume": resume})
    assert resume_command("r.yaml", overrides, recipe) == command
