"""A short run with checkpoints, finished and as a kill would have left it, for tests of resuming."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from conftest import make_workspace

from qwen_tune.runs.checkpoints import MANIFEST, OWN_HASH, fault_of, list_checkpoints
from qwen_tune.train import train

# Dropout, packs, accumulation, evaluation, and logging at other steps than saving.
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
    chosen = ["run.dir=run", *SETTINGS, *overrides]
    train("recipe.yaml", chosen)
    return folder / [text.removeprefix("run.dir=") for text in chosen if text.startswith("run.dir=")][-1]


def copy_of(uninterrupted: Path, tmp_path: Path, *, at: str) -> Path:
    """The same run as a kill would have left it after a checkpoint."""
    folder = make_workspace(tmp_path)
    shutil.copytree(uninterrupted, folder / "run")
    for name in STEPS_LATER:
        if name > at:
            shutil.rmtree(folder / "run" / "checkpoints" / name)
    shutil.rmtree(folder / "run" / "adapter")
    leave_unfinished(folder / "run")
    return folder


def weights(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(run_dir: Path) -> list[tuple]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("grad_norm"), line.get("eval_loss")) for line in lines]


def facts(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())


def leave_unfinished(run_dir: Path, *gone: str) -> None:
    """Turns a finished run into one that was killed after its last checkpoint, without the checkpoints `gone`."""
    for name in gone:
        shutil.rmtree(run_dir / "checkpoints" / name)
    (run_dir / "run.json").write_text(json.dumps({**facts(run_dir), "state": "running", "exit": None}))


def written_under(run_dir: Path, **other_facts) -> None:
    """Rewrites a run's checkpoints as if written under other facts."""
    for path in list_checkpoints(run_dir / "checkpoints"):
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["facts"] |= other_facts
        own = {key: value for key, value in manifest.items() if key != OWN_HASH}
        manifest[OWN_HASH] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        (path / MANIFEST).write_text(json.dumps(manifest))
        assert fault_of(path) is None


def rates(run_dir: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["learning_rate"]) for line in lines if "loss" in line]
