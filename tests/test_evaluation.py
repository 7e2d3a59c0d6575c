"""Evaluation while a run trains: what it stops, what it prints, and what it adds up to."""

from __future__ import annotations

import json
import shutil

import pytest
from resuming import run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def test_an_early_stop_is_not_forgotten(workspace, monkeypatch):
    settings = ("train.learning_rate=0.5", "train.warmup_steps=0", "train.early_stopping_patience=2")
    steps = ("train.max_steps=20", "train.eval_steps=1", "train.save_steps=1", "train.logging_steps=10")
    path = run(workspace, monkeypatch, *settings, *steps)
    facts = json.loads((path / "run.json").read_text())
    assert facts["steps"] < 20
    # Killed between its last checkpoint and its adapter.
    shutil.rmtree(path / "adapter")
    (path / "run.json").write_text(json.dumps({**facts, "state": "running"}))
    again = json.loads((run(workspace, monkeypatch, *settings, *steps) / "run.json").read_text())
    assert (again["steps"], again["best"]) == (facts["steps"], facts["best"])
    assert (path / "adapter").exists()


def test_evaluation_without_gain_ends_the_run(workspace, monkeypatch, capsys):
    path = run(
        workspace,
        monkeypatch,
        "train.max_steps=40",
        "train.eval_steps=1",
        "train.learning_rate=0.5",
        "train.early_stopping_patience=2",
        'train.eval_prompts=["Who keeps the lighthouse?"]',
    )
    facts = json.loads((path / "run.json").read_text())
    assert facts["state"] == "finished"
    assert facts["steps"] < 40
    assert "stopping early: 2 evaluations without a lower loss" in capsys.readouterr().out
    answers = [json.loads(line) for line in (path / "answers.jsonl").read_text().splitlines()]
    assert [answer["step"] for answer in answers] == list(range(facts["steps"] + 1))
    assert answers[0]["prompt"] == "Who keeps the lighthouse?"


def test_losses_of_each_source_add_up_to_the_whole(workspace, monkeypatch):
    lines = (workspace / "rows.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("one", lines[:20]), ("two", lines[20:25])):
        (workspace / f"{name}.jsonl").write_text("".join(part))
    path = run(workspace, monkeypatch, "data.eval=[{path: one.jsonl}, {path: two.jsonl}]", "train.max_steps=1")
    line = json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
    assert set(line) == {"step", "epoch", "eval_loss", "eval_one_loss", "eval_two_loss"}
    low, high = sorted((line["eval_one_loss"], line["eval_two_loss"]))
    assert low < line["eval_loss"] < high
