"""Resumes and merges a run that an older revision of this repository made, with that revision and with this tree.

    python scripts/evidence/resume_older.py REVISION

The older revision trains the tiny model for a few steps, with dropout and checkpoints. Copies of that run are then made
longer and merged by both. Adapters and merged models have to be equal to the byte.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from conftest import environment, make_workspace  # noqa: E402

CASES = {
    "LoRA": [],
    "PiSSA": ["lora.init_lora_weights=pissa_niter_4"],
    "token rows": ["lora.trainable_token_indices=[5, 7]", "train.optim=adamw_torch"],
}
SETTINGS = ["train.save_steps=2", "train.eval_steps=2", "lora.lora_dropout=0.1", "train.load_best_model_at_end=false"]


def main(revision: str) -> None:
    """Runs all cases and compares."""
    with tempfile.TemporaryDirectory() as temporary:
        older = Path(temporary, "older")
        subprocess.run(["git", "clone", "-q", str(ROOT), str(older)], check=True)
        subprocess.run(["git", "checkout", "-q", revision], cwd=older, check=True)
        same = [_compare(name, case, older, Path(temporary)) for name, case in CASES.items()]
    sys.exit(0 if all(same) else 1)


def _compare(name: str, case: list[str], older: Path, temporary: Path) -> bool:
    folder = temporary / name.replace(" ", "-")
    folder.mkdir()
    make_workspace(folder)
    _run(older, folder, "train", "recipe.yaml", "run.dir=begun", "train.max_steps=4", *SETTINGS, *case)
    found = []
    for tree, place in ((older, folder / "by-older"), (ROOT, folder / "by-this")):
        place.mkdir()
        make_workspace(place)
        shutil.copytree(folder / "begun", place / "begun")
        _run(tree, place, "train", "recipe.yaml", "run.dir=begun", "train.max_steps=8", *SETTINGS, *case)
        _run(tree, place, "merge", "begun")
        files = ["adapter/adapter_model.safetensors", "merged/model.safetensors", "merged/config.json"]
        found.append([(place / "begun" / file).read_bytes() for file in files])
    is_same = found[0] == found[1]
    print(f"{name}: adapter and merged model are {'equal to the byte' if is_same else 'NOT EQUAL'}", flush=True)
    return is_same


def _run(tree: Path, folder: Path, *arguments: str) -> None:
    env = environment(
        PYTHONPATH=str(tree), QWEN_TUNE_CACHE=str(folder / "cache"), TMPDIR=os.environ.get("TMPDIR", "/tmp")
    )
    command = [sys.executable, "-m", "qwen_tune", *arguments]
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{result.stderr[-3000:]}")


if __name__ == "__main__":
    main(sys.argv[1])
