"""Contents of a checkpoint, detection of damage, rotation, and full disks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import make_workspace
from resuming import copy_of, facts, leave_unfinished, run, weights

from qwen_tune.errors import MergeError, QwenTuneError, RunError, TrainingError
from qwen_tune.evaluation.chat import ChatModel
from qwen_tune.merging.merge import merge
from qwen_tune.runs.checkpoints import fault_of, list_checkpoints

pytest_plugins = ("resume_fixtures",)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


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


def test_a_damaged_checkpoint_is_skipped_and_named(uninterrupted, tmp_path, monkeypatch, capsys):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    damaged = folder / "run" / "checkpoints" / "step-6" / "optimizer.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    resumed = run(folder, monkeypatch)
    printed = capsys.readouterr().out
    assert "skipped checkpoint step-6: optimizer.safetensors has been changed" in " ".join(printed.split())
    assert "resuming from step-3" in printed
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
def test_damage_to_any_file_of_a_checkpoint_is_detected(uninterrupted, tmp_path, damage):
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


def test_the_cost_of_saving_is_recorded(uninterrupted):
    saves = json.loads((uninterrupted / "run.json").read_text())["saves"]
    size = sum(path.stat().st_size for path in (uninterrupted / "checkpoints" / "step-9").iterdir())
    assert (saves["count"], saves["bytes"]) == (3, size)
    assert saves["seconds"] > 0


def test_a_checkpoint_can_answer_and_be_merged_before_the_run_has_an_adapter(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    monkeypatch.chdir(folder)
    with pytest.raises(RunError, match=r"no adapter yet; .*Fix: take run/checkpoints/step-6, or finish the run"):
        ChatModel.load(Path("run"))
    with pytest.raises(MergeError, match=r"no adapter here; .*Fix: take run/checkpoints/step-6"):
        merge(Path("run"))
    checkpoint = Path("run/checkpoints/step-6")
    assert ChatModel.load(checkpoint).answer([{"role": "user", "content": "Hello!"}], max_new_tokens=4)
    assert (merge(checkpoint, output=Path("merged")) / "model.safetensors").exists()


def test_old_checkpoints_are_deleted_but_the_best_is_kept(workspace, monkeypatch):
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


def test_the_last_adapter_is_kept_unless_the_best_is_requested(workspace, monkeypatch):
    ruin = ("train.learning_rate=0.5", "train.warmup_steps=4", "train.max_grad_norm=0", "train.eval_steps=1")
    settings = ("train.max_steps=7", "train.save_steps=1", "train.lr_scheduler_type=constant_with_warmup")
    path = run(workspace, monkeypatch, *ruin, *settings)
    facts = json.loads((path / "run.json").read_text())
    assert facts["best"]["step"] < 7
    assert facts["losses"]["eval_after"] > facts["best"]["loss"]
    assert weights(path) == (path / "checkpoints" / "step-7" / "adapter_model.safetensors").read_bytes()


def fill(disk: Path, leave: int) -> Path:
    """Fills a disk except for so many bytes."""
    file = disk / "other-work"
    with file.open("wb") as stream:
        stream.write(bytes(shutil.disk_usage(disk).free - leave))
    return file


def test_a_full_disk_leaves_the_last_good_checkpoint_whole(uninterrupted, small_disk, tmp_path, monkeypatch):
    folder = make_workspace(tmp_path)
    size = sum(file.stat().st_size for file in (uninterrupted / "checkpoints" / "step-3").iterdir())
    filler = fill(small_disk, leave=round(1.6 * size))
    with pytest.raises(TrainingError) as caught:
        run(folder, monkeypatch, f"run.dir={small_disk}/run")
    assert "the checkpoint of step 6 does not fit on the disk" in str(caught.value)
    last = "the last whole checkpoint is step-3. Fix: free some room and run the same command again"
    assert last in str(caught.value)
    checkpoints = small_disk / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-3"]
    assert fault_of(checkpoints / "step-3") is None
    record = facts(small_disk / "run")
    assert (record["state"], record["exit"], record["checkpoints"]) == ("failed", 2, ["step-3"])
    filler.unlink()
    assert weights(run(folder, monkeypatch, f"run.dir={small_disk}/run")) == weights(uninterrupted)


def test_a_disk_without_a_byte_left_is_reported_as_well(uninterrupted, small_disk, tmp_path, monkeypatch):
    """Not even run.json can be written then, and the existing files do not change."""
    folder = make_workspace(tmp_path)
    shutil.copytree(uninterrupted, small_disk / "run")
    leave_unfinished(small_disk / "run", "step-9")
    filler = fill(small_disk, leave=0)
    before = (small_disk / "run" / "run.json").read_bytes()
    with pytest.raises(QwenTuneError, match="No space left"):
        run(folder, monkeypatch, f"run.dir={small_disk}/run")
    assert (small_disk / "run" / "run.json").read_bytes() == before
    assert fault_of(small_disk / "run" / "checkpoints" / "step-6") is None
    filler.unlink()
    assert weights(run(folder, monkeypatch, f"run.dir={small_disk}/run")) == weights(uninterrupted)


def test_files_that_could_contain_a_secret_are_private(tmp_path, monkeypatch):
    folder = make_workspace(tmp_path)
    monkeypatch.setenv("QWEN_TUNE_CACHE", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        path = run(folder, monkeypatch, "train.max_steps=1", "train.save_steps=1", "tracking.report_to=[tensorboard]")
    finally:
        os.umask(before)
    for name in ("run.json", "recipe.yaml", "logs", "checkpoints/step-1/manifest.json", "../cache/prepared"):
        assert (path / name).stat().st_mode & 0o077 == 0, name
    # An adapter is meant to be read by others.
    for name in ("adapter", "adapter/adapter_model.safetensors", "adapter/README.md", "metrics.jsonl"):
        assert (path / name).stat().st_mode & 0o044 == 0o044, name


RUIN = ("train.learning_rate=0.5", "train.warmup_steps=4", "train.max_grad_norm=0", "train.eval_steps=1")
BEST = (*RUIN, "train.max_steps=7", "train.save_steps=1", "train.load_best_model_at_end=true")


@pytest.mark.parametrize("kind", ["gone", "damaged"])
def test_a_damaged_best_checkpoint_is_not_used(workspace, monkeypatch, capsys, kind):
    path = run(workspace, monkeypatch, *BEST, "train.save_total_limit=7")
    best = path / "checkpoints" / f"step-{facts(path)['best']['step']}"
    assert best.name != "step-7"
    leave_unfinished(path)
    shutil.rmtree(best) if kind == "gone" else flip(best / "adapter_model.safetensors")
    run(workspace, monkeypatch, *BEST, "train.save_total_limit=7")
    assert weights(path) == (path / "checkpoints" / "step-7" / "adapter_model.safetensors").read_bytes()
    assert facts(path)["state"] == "finished"


def test_leftovers_of_killed_saves_are_deleted(uninterrupted, tmp_path, monkeypatch):
    folder = copy_of(uninterrupted, tmp_path, at="step-6")
    for left in (".adapter.77.tmp", "checkpoints/.step-9.77.tmp"):
        (folder / "run" / left).mkdir()
        (folder / "run" / left / "half").write_bytes(b"1")
    with (folder / "run" / "metrics.jsonl").open("ab") as metrics:
        metrics.write(bytes(80) + b"\n")  # as a power cut may leave a file
    resumed = run(folder, monkeypatch)
    assert not list(resumed.rglob(".*.tmp"))
    assert weights(resumed) == weights(uninterrupted)


@pytest.mark.parametrize("share", [0.15, 0.35, 0.55, 0.75, 0.95])
def test_a_full_disk_is_reported_wherever_it_fills_and_the_same_command_resumes(
    uninterrupted, small_disk, tmp_path, monkeypatch, share
):
    """In any file of the first checkpoint; different libraries write them."""
    folder = make_workspace(tmp_path)
    size = sum(file.stat().st_size for file in (uninterrupted / "checkpoints" / "step-3").iterdir())
    filler = fill(small_disk, leave=round(share * size))
    settings = (f"run.dir={small_disk}/run", "train.eval_steps=null", "data.eval=null", "train.max_steps=3")
    with pytest.raises(TrainingError, match="does not fit on the disk"):
        run(folder, monkeypatch, *settings)
    assert not list((small_disk / "run" / "checkpoints").iterdir())
    filler.unlink()
    assert (run(folder, monkeypatch, *settings) / "adapter" / "adapter_config.json").exists()


def test_a_disk_that_is_full_when_the_adapter_is_written(uninterrupted, small_disk, tmp_path, monkeypatch):
    folder = make_workspace(tmp_path)
    shutil.copytree(uninterrupted, small_disk / "run")
    shutil.rmtree(small_disk / "run" / "adapter")
    leave_unfinished(small_disk / "run")
    filler = fill(small_disk, leave=200_000)
    with pytest.raises(TrainingError, match="a disk is full"):
        run(folder, monkeypatch, f"run.dir={small_disk}/run")
    assert not list((small_disk / "run").glob(".adapter*"))
    filler.unlink()
    assert weights(run(folder, monkeypatch, f"run.dir={small_disk}/run")) == weights(uninterrupted)
