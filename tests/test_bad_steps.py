"""Steps whose loss or gradient is not finite, or far above guessing: what a run says of them, and what it does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import TINY
from resuming import facts, leave_unfinished, losses, run, weights
from safetensors.torch import load_file, save_file

from qwen_tune.errors import TrainingError
from qwen_tune.training.bad_steps import MOST_IN_A_ROW, StepWatch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

WORD = "¤"  # stands in no example of the data
RUN = (
    "train.max_steps=9",
    "train.save_total_limit=9",
    "train.save_steps=2",
    "train.eval_steps=null",
    "data.eval=null",
    "data.packing=false",
    "train.per_device_train_batch_size=1",
)


def base_that_breaks_at(folder: Path, value: float) -> None:
    """The tiny model with one token whose embedding is ruined; the output matrix is whole."""
    from transformers import AutoTokenizer

    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(TINY / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tokens = AutoTokenizer.from_pretrained(TINY)(WORD)["input_ids"]
    tensors["model.embed_tokens.weight"][tokens] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


@pytest.fixture
def breaking(workspace):
    """A workspace in which one example, of line 20, breaks the model."""
    base_that_breaks_at(workspace / "breaking", math.nan)
    lines = (workspace / "rows.jsonl").read_text().splitlines(keepends=True)
    row = json.loads(lines[19])
    row["messages"][0]["content"] += WORD
    lines[19] = json.dumps(row) + "\n"
    (workspace / "rows.jsonl").write_text("".join(lines[:30]))
    return workspace


def where_it_breaks(folder: Path, monkeypatch, *overrides: str) -> int:
    with pytest.raises(TrainingError) as caught:
        run(folder, monkeypatch, "model.base=./breaking", *RUN, *overrides)
    assert "the loss and the gradient norm are not finite; its examples are rows.jsonl:20. Fix: " in str(caught.value)
    assert "train.on_bad_step=skip" in str(caught.value)
    record = facts(folder / "run")
    assert (record["state"], record["exit"]) == ("failed", 2)
    [bad] = record["bad_steps"]
    assert (bad["loss"], bad["grad_norm"], bad["rows"]) == (None, None, ["rows.jsonl:20"])
    assert str(caught.value).startswith(f"step {bad['step']}: ")
    return bad["step"]


def test_a_run_stops_there_names_the_example_and_resumes_without_the_step(breaking, monkeypatch, capsys):
    # Logged seldom: what happened is detected later, and reported for the step that it happened in.
    step = where_it_breaks(breaking, monkeypatch, "train.logging_steps=50", "train.save_steps=1")
    kept = facts(breaking / "run")["checkpoints"][-1]
    assert kept == f"step-{step - 1}"
    until = ("model.base=./breaking", *RUN, "train.save_steps=1")
    resumed = run(breaking, monkeypatch, *until, "train.on_bad_step=skip")
    assert f"warning: step {step} is skipped" in " ".join(capsys.readouterr().out.split())
    assert losses(resumed)[step - 1] == (step, None, None, None)
    assert [entry["step"] for entry in facts(resumed)["bad_steps"]] == [step]
    adapters = {
        n: load_file(resumed / f"checkpoints/step-{n}/adapter_model.safetensors") for n in range(step, step + 3)
    }
    assert all(tensor.isfinite().all() for tensor in adapters[step + 2].values())
    assert any(not torch.equal(adapters[step][name], adapters[step + 2][name]) for name in adapters[step])
    # The same from the beginning, and after a kill after the step.
    whole = run(breaking, monkeypatch, *until, "train.on_bad_step=skip", "run.dir=whole")
    assert weights(whole) == weights(resumed)
    leave_unfinished(whole, "step-9")
    assert weights(run(breaking, monkeypatch, *until, "train.on_bad_step=skip", "run.dir=whole")) == weights(resumed)
    assert [entry["step"] for entry in facts(whole)["bad_steps"]] == [step]


def test_a_step_that_is_left_out_changes_nothing(breaking, monkeypatch):
    step = where_it_breaks(breaking, monkeypatch, "train.save_steps=null")
    settings = ("model.base=./breaking", *RUN, "train.save_steps=1")
    path = run(breaking, monkeypatch, *settings, "train.on_bad_step=skip", "run.dir=skips", "train.weight_decay=0.1")
    before, after = (path / "checkpoints" / f"step-{n}" for n in (step - 1, step))
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (before / name).read_bytes() == (after / name).read_bytes()


def test_a_ruined_model_is_never_saved(breaking, monkeypatch):
    """Not by an evaluation that ends the run early, either, long before anything is logged."""
    early = ("data.eval=[{path: clean.jsonl}]", "train.eval_steps=1", "train.max_steps=20")
    lines = (breaking / "rows.jsonl").read_text().splitlines(keepends=True)
    (breaking / "clean.jsonl").write_text("".join(lines[:5]))
    settings = ("model.base=./breaking", *RUN, "train.logging_steps=100", "train.save_steps=100", *early)
    with pytest.raises(TrainingError, match=r"step \d+: the loss and the gradient norm are not finite"):
        run(breaking, monkeypatch, *settings)
    assert not (breaking / "run" / "checkpoints").exists()
    assert "NaN" not in (breaking / "run" / "run.json").read_text()


def test_fixed_examples_leave_no_bad_step(breaking, monkeypatch):
    step = where_it_breaks(breaking, monkeypatch, "train.save_steps=1")
    rows = (breaking / "rows.jsonl").read_text().replace(json.dumps(WORD)[1:-1], "")
    (breaking / "rows.jsonl").write_text(rows)
    settings = ("model.base=./breaking", *RUN, "train.save_steps=1", "train.allow_drift=[data_fingerprint]")
    record = facts(run(breaking, monkeypatch, *settings))
    assert (record["bad_steps"], record["drift"][0]["step"]) == ([], step - 1)


def watch(shares: list[list[float]], norms: list[float], **settings) -> tuple[StepWatch, list]:
    """A watch of one process that has seen steps of some micro-batches."""
    settings = {"skips": False, "judges_gradients": True, **settings}
    rows = lambda step, batches: [f"{step}:{batches}"]  # noqa: E731
    seen = StepWatch(1000, gather=lambda numbers: numbers, places_of=rows, **settings)
    for batches, norm in zip(shares, norms, strict=True):
        for share in batches:
            seen.add(torch.tensor(share))
        seen.end_step(torch.tensor(norm))
    return seen, seen.judge(len(shares))


def test_what_is_bad():
    guessing = math.log(1000)
    seen, bad = watch([[1.0, 1.5], [guessing, guessing - 0.1], [guessing, guessing + 0.1]], [1.0, 2.0, 3.0])
    assert [entry.step for entry in bad] == [3]
    assert str(bad[0]) == "the loss is 13.92, more than twice that of guessing; its examples are 3:None"
    assert seen.mean_loss() == pytest.approx((2.4 + 2 * guessing) / 2)
    assert math.isnan(seen.mean_loss())
    _, bad = watch([[1.0, 1.0, math.inf]], [1.0])
    assert str(bad[0]) == "the loss is not finite; its examples are 1:[2]"
    _, bad = watch([[1.0]], [math.nan])
    assert str(bad[0]) == "the gradient norm is not finite; its examples are 1:None"
    _, bad = watch([[1.0]], [math.inf], judges_gradients=False)
    assert not bad


def test_micro_batches_are_numbered_through_all_processes():
    # Two processes with two micro-batches each; the second of the second is bad.
    both = torch.tensor([[1.0, 1.0, 3.0], [1.0, math.nan, 3.0]])
    seen = StepWatch(
        1000, skips=False, judges_gradients=True, gather=lambda _: both, places_of=lambda _, batches: [str(batches)]
    )
    for share in (1.0, 1.0):
        seen.add(torch.tensor(share))
    seen.end_step(torch.tensor(3.0))
    assert seen.judge(7)[0].rows == ["[3]"]


def test_too_many_in_a_row_end_a_run_that_skips():
    steps = MOST_IN_A_ROW
    seen, bad = watch([[math.nan]] * steps, [1.0] * steps, skips=True)
    with pytest.raises(TrainingError, match=f"step {steps}: {steps} bad steps in a row"):
        seen.require_good(bad)
    seen, bad = watch([[math.nan]] * (steps - 1), [1.0] * (steps - 1), skips=True)
    seen.require_good(bad)
