"""Checkpoints and going on from them, with real processes and real signals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment, make_workspace

from qwen_tune.errors import Interrupted, MergeError, RunError
from qwen_tune.merging.merge import merge
from qwen_tune.model.chat import ChatModel
from qwen_tune.runs.checkpoints import fault_of, list_checkpoints
from qwen_tune.runs.resume import recipe_drift
from qwen_tune.train import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

# Dropout, packs, accumulation, evaluation, and steps that are logged at other times than they are saved.
SETTINGS = (
    "train.max_steps=9",
    "train.logging_steps=2",
    "train.eval_steps=3",
    "train.save_steps=3",
    "lora.lora_dropout=0.1",
)
STEPS_LATER = ("step-6", "step-9")


def run(folder: Path, monkeypatch, *overrides: str) -> Path:
    monkeypatch.chdir(folder)
    train("recipe.yaml", ["run.dir=run", *SETTINGS, *overrides])
    return folder / "run"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """A run that went to its end at once."""
    folder = make_workspace(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        return run(folder, patch)


def copy_of(uninterrupted: Path, tmp_path: Path, *, at: str) -> Path:
    """The same run as a kill would have left it behind a checkpoint."""
    folder = make_workspace(tmp_path)
    shutil.copytree(uninterrupted, folder / "run")
    for name in STEPS_LATER:
        if name > at:
            shutil.rmtree(folder / "run" / "checkpoints" / name)
    shutil.rmtree(folder / "run" / "adapter")
    record = folder / "run" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "running", "exit": None}))
    return folder


def weights(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(run_dir: Path) -> list[tuple]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("grad_norm"), line.get("eval_loss")) for line in lines]


def test_checkpoints_are_whole_adapters_without_pickles(uninterrupted):
    checkpoints = list_checkpoints(uninterrupted / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-3", "step-6", "step-9"]
    for path in checkpoints:
        assert fault_of(path) is None
        assert {file.suffix for file in path.iterdir()} <= {".safetensors", ".json", ".jinja", ".md", ".txt"}
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
            f.name for f in path.iterdir()
        }
    facts = json.loads((uninterrupted / "run.json").read_text())
    assert facts["checkpoints"] == ["step-3", "step-6", "step-9"]


@pytest.mark.parametrize("at", ["step-3", "step-6"])
def test_going_on_gives_the_same_bits_as_never_stopping(uninterrupted, tmp_path, monkeypatch, at):
    folder = copy_of(uninterrupted, tmp_path, at=at)
    resumed = run(folder, monkeypatch)
    assert weights(resumed) == weights(uninterrupted)
    assert losses(resumed) == losses(uninterrupted)
    old, new = (json.loads((path / "run.json").read_text()) for path in (uninterrupted, resumed))
    for key in ("losses", "tokens", "steps", "state", "best"):
        assert new[key] == old[key]


def test_a_damaged_checkpoint_is_passed_over_and_named(uninterrupted, tmp_path, monkeypatch, capsys):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    damaged = folder / "run" / "checkpoints" / "step-6" / "optimizer.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    resumed = run(folder, monkeypatch)
    printed = capsys.readouterr().out
    assert "passed over checkpoint step-6: optimizer.safetensors is not as it was written" in " ".join(printed.split())
    assert "going on from step-3" in printed
    assert weights(resumed) == weights(uninterrupted)


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [delete, truncate, zero, flip])
def test_damage_to_any_file_of_a_checkpoint_is_seen(uninterrupted, tmp_path, damage):
    whole = uninterrupted / "checkpoints" / "step-9"
    names = [path.name for path in whole.iterdir()]
    assert {"manifest.json", "optimizer.safetensors", "adapter_model.safetensors", "progress.json"} <= set(names)
    for name in names:
        copy = tmp_path / name / "step-9"
        shutil.copytree(whole, copy)
        assert fault_of(copy) is None
        damage(copy / name)
        assert name in (fault_of(copy) or ""), name


def test_every_bit_of_the_manifest_counts(uninterrupted, tmp_path):
    whole = uninterrupted / "checkpoints" / "step-9"
    copy = tmp_path / "step-9"
    shutil.copytree(whole, copy)
    data = (whole / "manifest.json").read_bytes()
    for place in range(0, len(data), 7):
        (copy / "manifest.json").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert fault_of(copy), data[place - 10 : place + 10]


def test_what_saving_costs_is_recorded(uninterrupted):
    saves = json.loads((uninterrupted / "run.json").read_text())["saves"]
    size = sum(path.stat().st_size for path in (uninterrupted / "checkpoints" / "step-9").iterdir())
    assert (saves["count"], saves["bytes"]) == (3, size)
    assert saves["seconds"] > 0


def test_a_finished_run_has_nothing_to_do_until_it_is_asked_for_more(uninterrupted, tmp_path, monkeypatch, capsys):
    folder = make_workspace(tmp_path)
    shutil.copytree(uninterrupted, folder / "run")
    run(folder, monkeypatch, "train.logging_steps=5")
    assert "nothing to do" in capsys.readouterr().out
    longer = run(folder, monkeypatch, "train.max_steps=12")
    assert "going on from step-9" in capsys.readouterr().out
    assert json.loads((longer / "run.json").read_text())["steps"] == 12
    assert losses(longer)[: len(losses(uninterrupted))] == losses(uninterrupted)
    with pytest.raises(RunError, match="4 steps are asked for, and the run has done 12 already"):
        run(folder, monkeypatch, "train.max_steps=4")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.lora_alpha=64", "lora.lora_alpha: got 64; the run in this directory was begun with 32"),
        ("train.seed=1", "train.seed: got 1; the run in this directory was begun with 42"),
        ("train.learning_rate=1e-4", "train.learning_rate: got 0.0001; the run in this directory was begun with 0.001"),
        ("data.max_length_tokens=128", "data.max_length_tokens: got 128"),
        ("train.resume=never", "unfinished run; train.resume is never"),
        ("train.resume=nowhere", "nowhere is not there; expected a checkpoint's directory"),
    ],
)
def test_another_run_is_not_gone_on_with(uninterrupted, tmp_path, monkeypatch, override, message):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    before = sorted(path.name for path in (folder / "run").rglob("*"))
    with pytest.raises(RunError) as told:
        run(folder, monkeypatch, override)
    assert message in str(told.value)
    assert sorted(path.name for path in (folder / "run").rglob("*")) == before


def test_changed_rows_or_weights_are_noticed(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    rows = folder / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(lines[1:]))
    with pytest.raises(RunError, match=r"the rows \(their token ids and labels\): changed since the run was begun"):
        run(folder, monkeypatch)
    rows.write_text("".join(lines))
    # The same recipe in another folder is another run's checkpoint.
    (folder / "other").mkdir()
    other = make_workspace(folder / "other")
    shutil.copytree(uninterrupted, other / "run")
    with pytest.raises(RunError, match="a checkpoint of another run"):
        run(folder, monkeypatch, f"train.resume={other}/run/checkpoints/step-6")


def test_a_checkpoint_can_be_asked_and_merged_where_the_run_has_no_adapter_yet(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    monkeypatch.chdir(folder)
    with pytest.raises(RunError, match=r"no adapter yet; .*Fix: take run/checkpoints/step-6, or finish the run"):
        ChatModel.load(Path("run"))
    with pytest.raises(MergeError, match=r"no adapter here; .*Fix: take run/checkpoints/step-6"):
        merge(Path("run"))
    checkpoint = Path("run/checkpoints/step-6")
    assert ChatModel.load(checkpoint).answer([{"role": "user", "content": "Hello!"}], max_new_tokens=4)
    assert (merge(checkpoint, output=Path("merged")) / "model.safetensors").exists()


def test_a_chosen_checkpoint_takes_the_run_back_to_it(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    resumed = run(folder, monkeypatch, "train.resume=run/checkpoints/step-3")
    assert weights(resumed) == weights(uninterrupted)
    assert losses(resumed) == losses(uninterrupted)


def test_a_run_whose_time_is_up_saves_and_goes_on(uninterrupted, workspace, monkeypatch):
    # A limit of a moment is over behind every step.
    for step in (1, 2):
        with pytest.raises(Interrupted, match=f"interrupted behind step {step}, which is saved"):
            run(workspace, monkeypatch, "train.max_hours=1e-9")
        assert json.loads((workspace / "run" / "run.json").read_text())["state"] == "interrupted"
    run(workspace, monkeypatch)
    assert weights(workspace / "run") == weights(uninterrupted)


def test_old_checkpoints_go_but_the_best_stays(workspace, monkeypatch):
    # A rate that ruins the model: the first evaluation with a checkpoint is the best.
    ruin = ("train.learning_rate=0.5", "train.warmup_steps=4", "train.max_grad_norm=0", "train.eval_steps=1")
    settings = (
        "train.max_steps=7",
        "train.save_total_limit=1",
        "train.load_best_model_at_end=true",
        "train.save_steps=1",
    )
    path = run(workspace, monkeypatch, *ruin, "train.lr_scheduler_type=constant_with_warmup", *settings)
    facts = json.loads((path / "run.json").read_text())
    best = facts["best"]
    assert best["step"] < 7
    assert facts["checkpoints"] == [f"step-{best['step']}", "step-7"]
    assert facts["losses"]["eval_after"] == best["loss"]
    assert weights(path) == (path / "checkpoints" / f"step-{best['step']}" / "adapter_model.safetensors").read_bytes()


def test_the_last_adapter_is_kept_unless_the_best_is_asked_for(workspace, monkeypatch):
    ruin = ("train.learning_rate=0.5", "train.warmup_steps=4", "train.max_grad_norm=0", "train.eval_steps=1")
    settings = ("train.max_steps=7", "train.save_steps=1", "train.lr_scheduler_type=constant_with_warmup")
    path = run(workspace, monkeypatch, *ruin, *settings)
    facts = json.loads((path / "run.json").read_text())
    assert facts["best"]["step"] < 7
    assert facts["losses"]["eval_after"] > facts["best"]["loss"]
    assert weights(path) == (path / "checkpoints" / "step-7" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_8bit", "adafactor"])
def test_other_optimizers_go_on_as_well(workspace, monkeypatch, optim):
    settings = (f"train.optim={optim}", "train.learning_rate=1e-3", "train.max_steps=4", "train.save_steps=2")
    run(workspace, monkeypatch, *settings, "run.dir=whole", "train.eval_steps=null")
    stopped = workspace / "run"
    shutil.copytree(workspace / "whole", stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-4")
    record = stopped / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "running"}))
    resumed = run(workspace, monkeypatch, *settings, "train.eval_steps=null")
    assert weights(resumed) == weights(workspace / "whole")


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


def test_a_merged_model_never_belongs_to_an_earlier_adapter(workspace, monkeypatch):
    merge_too = ("train.max_steps=3", "train.save_steps=3", "train.eval_steps=null", "export.merge=true")
    path = run(workspace, monkeypatch, *merge_too)
    assert (path / "merged").exists()
    run(workspace, monkeypatch, *merge_too[1:3], "train.max_steps=6")
    assert not (path / "merged").exists()
    run(workspace, monkeypatch, *merge_too[1:], "train.max_steps=6")  # nothing to train, and a model to merge
    assert (path / "merged" / "merge.json").exists()


@pytest.mark.parametrize("arguments", [{}, {"overwrite": True}])
def test_a_checkpoint_is_not_asked_for_where_there_is_none_to_go_on_from(workspace, monkeypatch, arguments):
    monkeypatch.chdir(workspace)
    with pytest.raises(RunError, match="there is no run here to go on with"):
        train("recipe.yaml", ["run.dir=fresh", "train.resume=elsewhere/step-3"], **arguments)
    assert not (workspace / "fresh").exists()


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


def test_drift_is_only_what_changes_the_result():
    assert recipe_drift("train: {seed: 1, logging_steps: 1}", "train: {seed: 1, logging_steps: 5}") == []
    [problem] = recipe_drift("data: {train: [{path: a}]}", "data: {train: [{path: a}, {path: b}]}")
    assert str(problem).startswith('data.train[1].path: got "b"; the run in this directory was begun with null')


def command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("qwen-tune")), *arguments]


def interrupted_behind(step: int, folder: Path, number: int, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own that gets a signal once a step is logged."""
    process = subprocess.Popen(
        command("train", "recipe.yaml", "run.dir=run", *overrides),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = folder / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and f'"step": {step},' in metrics.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, errors = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


LONG = ("train.max_steps=400", "train.logging_steps=1", "lora.lora_dropout=0.1")


def test_a_signal_saves_and_two_processes_go_on_to_the_same_end(workspace, qwen_tune):
    both = ("train.num_processes=2", "train.max_steps=60", "train.logging_steps=1", "lora.lora_dropout=0.1")
    stopped = interrupted_behind(3, workspace, signal.SIGTERM, *both)
    assert stopped.returncode == 130, stopped.stderr
    assert "which is saved. The same command goes on from there" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    facts = json.loads((workspace / "run" / "run.json").read_text())
    assert (facts["state"], facts["exit"], facts["world_size"], facts["engine"]) == ("interrupted", 130, 2, "ddp")
    [checkpoint] = facts["checkpoints"]
    done = int(checkpoint.removeprefix("step-"))
    assert 3 <= done < 60
    resumed = qwen_tune("train", "recipe.yaml", "run.dir=run", *both, cwd=workspace)
    assert resumed.returncode == 0, resumed.stderr
    whole = qwen_tune("train", "recipe.yaml", "run.dir=whole", *both, cwd=workspace)
    assert whole.returncode == 0, whole.stderr
    assert weights(workspace / "run") == weights(workspace / "whole")
    assert losses(workspace / "run") == losses(workspace / "whole")
    assert (workspace / "whole" / "logs" / "rank-1.log").exists()
    assert whole.stdout.count("step 60/60") == 1


def test_ctrl_c_in_one_process(workspace):
    stopped = interrupted_behind(2, workspace, signal.SIGINT, *LONG)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopping after this step" in stopped.stderr
    [checkpoint] = list_checkpoints(workspace / "run" / "checkpoints")
    assert fault_of(checkpoint) is None


def test_two_processes_learn_what_one_does(workspace, qwen_tune):
    # SGD: Adam would turn rounding into differences of its own. 27 rows: the last batch of an epoch is not full.
    same = (
        "train.optim=sgd",
        "train.learning_rate=0.1",
        "train.global_batch_size=4",
        "train.max_steps=8",
        "train.eval_steps=4",
    )
    one = qwen_tune("train", "recipe.yaml", "run.dir=one", *same, cwd=workspace)
    assert one.returncode == 0, one.stderr
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    two = subprocess.run(
        [*launch, str(ROOT / "qwen_tune" / "train.py"), "recipe.yaml", "run.dir=two", *same, "train.num_processes=2"],
        cwd=workspace,
        env=environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert two.returncode == 0, two.stderr
    from safetensors.torch import load_file

    first, second = (load_file(workspace / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert max((first[key] - second[key]).abs().max().item() for key in first) < 1e-6
    for mine, theirs in zip(losses(workspace / "one"), losses(workspace / "two"), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-6)
    facts = json.loads((workspace / "two" / "run.json").read_text())
    assert facts["tokens"]["padding"] == 1  # one filler: 27 rows for two processes
    assert (
        facts["tokens"]["processed"] - 1
        == json.loads((workspace / "one" / "run.json").read_text())["tokens"]["processed"]
    )
