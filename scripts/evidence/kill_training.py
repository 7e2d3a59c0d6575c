"""Kills a training with -9, again and again, and compares its adapter with that of one that nobody killed.

    python scripts/evidence/kill_training.py [KILLS]

On the tiny model, with a checkpoint after every step. Kills inside a save are those that left a checkpoint
half-written.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from conftest import environment, make_workspace  # noqa: E402
from fork_server import MODULES, fork_server  # noqa: E402
from kills import train_through_kills  # noqa: E402

SETTINGS = ["train.save_steps=1", "train.logging_steps=1", "lora.lora_dropout=0.1", "train.eval_steps=5"]


def main() -> None:
    """Trains once untouched, and once through the kills."""
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    settings = [*SETTINGS, f"train.max_steps={2 * wanted}"]
    with tempfile.TemporaryDirectory() as temporary, fork_server(MODULES, environment()) as server:
        folder = make_workspace(Path(temporary))
        whole = server("train", "recipe.yaml", "run.dir=whole", *settings, cwd=folder)
        assert whole.returncode == 0, whole.stderr
        start = time.monotonic()
        kills = train_through_kills(server, folder, "killed", settings, kills=wanted)
        name = "adapter/adapter_model.safetensors"
        is_same = (folder / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    seconds = time.monotonic() - start
    print(f"{kills.count} kills, {kills.inside_a_save} inside a save, {seconds:.0f} s; the adapter is ", end="")
    print("equal to the byte" if is_same else "ANOTHER ONE")
    sys.exit(0 if is_same and kills.count == wanted and kills.inside_a_save >= 0.4 * wanted else 1)


if __name__ == "__main__":
    main()
