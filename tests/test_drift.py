"""Changes of recipe and facts between the parts of a run: refused, harmless, or allowed."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import ROOT, make_workspace
from resuming import copy_of, facts, leave_unfinished, rates, run, weights, written_under

from qwen_tune.errors import RecipeError, RunError
from qwen_tune.recipe.files import load_recipe
from qwen_tune.recipe.rules import FACTS, drift_names, is_drift_name
from qwen_tune.runs.directory import RunDir
from qwen_tune.runs.drift import changed_keys
from qwen_tune.train import train

pytest_plugins = ("resume_fixtures",)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.lora_alpha=64", "lora.lora_alpha: got 64; the run in this directory was started with 32"),
        ("train.seed=1", "train.seed: got 1; the run in this directory was started with 42"),
        (
            "train.learning_rate=1e-4",
            "train.learning_rate: got 0.0001; the run in this directory was started with 0.001",
        ),
        ("data.max_length_tokens=128", "data.max_length_tokens: got 128"),
        ("train.resume=never", "unfinished run; train.resume is never"),
        ("train.resume=nowhere", "nowhere does not exist; expected a checkpoint's directory"),
    ],
)
def test_a_different_run_is_not_resumed(uninterrupted, tmp_path, monkeypatch, override, message):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    before = sorted(path.name for path in (folder / "run").rglob("*"))
    with pytest.raises(RunError) as caught:
        run(folder, monkeypatch, override)
    assert message in str(caught.value)
    assert sorted(path.name for path in (folder / "run").rglob("*")) == before


def test_changed_examples_or_weights_are_noticed(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    rows = folder / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[1:]))
    with pytest.raises(RunError, match=r"data_fingerprint: the examples \(.*\) changed since the run"):
        run(folder, monkeypatch)
    rows.write_text("".join(lines))
    # The same recipe in another folder has checkpoints of another run.
    (folder / "other").mkdir()
    other = make_workspace(folder / "other")
    shutil.copytree(uninterrupted, other / "run")
    with pytest.raises(RunError, match="not a checkpoint of this run"):
        run(folder, monkeypatch, f"train.resume={other}/run/checkpoints/step-6")


@pytest.mark.parametrize("arguments", [{}, {"overwrite": True}])
def test_a_checkpoint_without_a_run_is_refused(workspace, monkeypatch, arguments):
    monkeypatch.chdir(workspace)
    with pytest.raises(RunError, match="there is no run here to resume"):
        train("recipe.yaml", ["run.dir=fresh", "train.resume=elsewhere/step-3"], **arguments)
    assert not (workspace / "fresh").exists()


def test_drift_is_only_what_changes_the_result():
    assert changed_keys("train: {seed: 1, logging_steps: 1}", "train: {seed: 1, logging_steps: 5}") == []
    [problem] = changed_keys("data: {train: [{path: a}]}", "data: {train: [{path: a}, {path: b}]}")
    assert str(problem) == 'data.train[1].path was null, now "b"'


DRIFTS = {
    "train.learning_rate": "train.learning_rate=5e-4",
    "train.weight_decay": "train.weight_decay=0.1",
    "lora.lora_alpha": "lora.lora_alpha=64",
    "data.packing": "data.packing=false",
}


@pytest.mark.parametrize("field", DRIFTS)
def test_an_allowed_change_takes_effect_and_is_recorded(uninterrupted, tmp_path, monkeypatch, capsys, field):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    allowed = [field] if field != "data.packing" else ["data"]
    with pytest.raises(RunError, match=rf"{field}: got .*allow it with train\.allow_drift=\[{field}\]"):
        run(folder, monkeypatch, DRIFTS[field])
    resumed = run(folder, monkeypatch, DRIFTS[field], f"train.allow_drift={json.dumps(allowed)}")
    assert f"allowed {field} was" in " ".join(capsys.readouterr().out.split())
    record = facts(resumed)
    [change] = [entry for entry in record["drift"] if entry["field"] == field]
    assert (change["step"], change["was"] != change["now"]) == (6, True)
    assert record["state"] == "finished"
    assert weights(resumed) != weights(uninterrupted)
    if field == "train.learning_rate":
        was, now = ([rate for step, rate in rates(path) if step > 6] for path in (uninterrupted, resumed))
        assert now == pytest.approx([rate / 2 for rate in was])


def test_an_allowed_change_belongs_to_the_run_once_a_checkpoint_is_written_under_it(
    uninterrupted, tmp_path, monkeypatch
):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    changed = ("train.learning_rate=5e-4", "train.allow_drift=[train.learning_rate]")
    run(folder, monkeypatch, *changed)
    first = weights(folder / "run")
    leave_unfinished(folder / "run")
    assert weights(run(folder, monkeypatch, *changed[:1])) == first
    leave_unfinished(folder / "run")
    with pytest.raises(RunError, match=r"train\.learning_rate: got 0\.001; .* started with 0\.0005"):
        run(folder, monkeypatch)
    # Before that, a change has no effect.
    leave_unfinished(folder / "run", "step-9")
    assert weights(run(folder, monkeypatch)) == weights(uninterrupted)
    assert facts(folder / "run")["drift"] == []


OTHER_FACTS = {
    "versions.torch": ("0.0.1", "the version of torch"),
    "versions.qwen-tune": ("0.0.1", "the version of qwen-tune"),
    "template_sha256": ("f" * 64, "the chat template"),
    "tokenizer_sha256": ("f" * 64, "the tokenizer"),
    "base.weights_fingerprint": ("f" * 64, "the base's weights"),
    "base.config_sha256": ("f" * 64, "the base's config.json"),
    "dtype": ("bfloat16", "the base's number type"),
    "world_size": (2, "the number of processes"),
}


@pytest.mark.parametrize("field", OTHER_FACTS)
def test_other_facts_are_refused_unless_they_are_allowed(uninterrupted, tmp_path, monkeypatch, field):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    was, what = OTHER_FACTS[field]
    written_under(folder / "run", **{field: was})
    with pytest.raises(RunError) as caught:
        run(folder, monkeypatch)
    assert f"{field}: {what} changed since the run was started: was {json.dumps(was)[:12]}" in str(caught.value)
    assert f"allow it with train.allow_drift=[{field}]" in str(caught.value)
    resumed = run(folder, monkeypatch, f"train.allow_drift=[{field.split('.')[0]}]")
    [change] = facts(resumed)["drift"]
    assert (change["step"], change["field"], change["was"]) == (6, field, was)
    assert weights(resumed) == weights(uninterrupted)


def test_another_processor_or_number_of_threads_is_reported(uninterrupted, tmp_path, monkeypatch, capsys):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    record = folder / "run" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "threads": 96}))
    run(folder, monkeypatch)
    assert (
        "96 threads a process: results agree with those of a run never stopped to rounding" in capsys.readouterr().out
    )


def test_every_proposed_name_is_accepted(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    changes = ("lora.alpha_pattern={q_proj: 64}", "data.train=[{path: rows.jsonl, columns: {chat: messages}}]")
    with pytest.raises(RunError) as caught:
        run(folder, monkeypatch, *changes)
    assert len(caught.value.problems) == 2
    proposed = "train.allow_drift=[data.train, lora.alpha_pattern]"
    assert proposed in str(caught.value)
    assert load_recipe(folder / "recipe.yaml", [proposed]).train.allow_drift


def test_keys_of_the_loader_and_the_name_change_nothing():
    before = "name: a\ntrain: {trainer_args: {dataloader_num_workers: 0, adam_beta1: 0.9}}"
    after = "name: b\ntrain: {trainer_args: {dataloader_num_workers: 2, adam_beta1: 0.8}}"
    assert [found.field for found in changed_keys(before, after)] == ["train.trainer_args.adam_beta1"]


def test_a_recipe_may_change_before_the_first_checkpoint(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    shutil.rmtree(folder / "run" / "checkpoints")
    for state in ("running", "failed"):
        (folder / "run" / "run.json").write_text(json.dumps({**facts(folder / "run"), "state": state}))
        plan = RunDir(folder / "run").check("train: {seed: 1}", overwrite=False, resume="auto")
        assert plan.starts_over


@pytest.mark.parametrize("override", ["lora.r=4", "train.optim=sgd", "train.loraplus_lr_ratio=2"])
def test_keys_that_determine_the_tensors_cannot_be_allowed(uninterrupted, tmp_path, monkeypatch, override):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    with pytest.raises(RunError, match="the checkpoints have no tensors for another value"):
        run(folder, monkeypatch, override, f"train.allow_drift=[{override.split('=')[0]}]")


def test_all_fields_are_reported_with_one_list_that_allows_them(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    with pytest.raises(RunError) as caught:
        run(folder, monkeypatch, "train.seed=1", "train.weight_decay=0.1")
    assert len(caught.value.problems) == 2
    assert str(caught.value).count("train.allow_drift=[train.seed, train.weight_decay]") == 2


def test_names_that_may_be_allowed():
    assert is_drift_name("versions")
    assert is_drift_name("data.train[1].path")
    assert not is_drift_name("train.learning_rat")
    assert set(FACTS) <= drift_names()
    with pytest.raises(RecipeError, match=r"allow_drift\[0\]: got learning_rate, .*Fix: write train\.learning_rate"):
        load_recipe(ROOT / "recipes" / "quickstart.yaml", ["train.allow_drift=[learning_rate]"])


def test_a_finished_run_reports_what_differs_in_the_recipe(uninterrupted, tmp_path, monkeypatch):
    folder = make_workspace(tmp_path)
    shutil.copytree(uninterrupted, folder / "run")
    with pytest.raises(RunError, match=r"of another recipe \(train\.seed was 42, now 1\)"):
        run(folder, monkeypatch, "train.seed=1", "train.allow_drift=[train.seed]")
