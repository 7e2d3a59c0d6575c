"""Training that is killed with -9 again and again, often during a save."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from fork_server import ForkServer


@dataclass
class Kills:
    """How often a run was killed, and how often during a save, as a half-written checkpoint proves."""

    count: int = 0
    inside_a_save: int = 0


def train_through_kills(
    server: ForkServer, folder: Path, run: str, overrides: list[str], *, kills: int, seed: int = 0
) -> Kills:
    """Trains `folder/recipe.yaml`, kills it `kills` times, and lets it end.

    Two of three kills wait for a save to begin; the others come at any moment.
    """
    chance, done = random.Random(seed), Kills()
    command = ["train", "recipe.yaml", f"run.dir={run}", *overrides]
    checkpoints = folder / run / "checkpoints"
    while done.count < kills:
        before = _unfinished(checkpoints)
        process = server.start(*command, cwd=folder)
        if done.count % 3 < 2:
            _wait_for_a_save(process, checkpoints, before)
            time.sleep(chance.random() * 0.01)  # anywhere in it
        else:
            time.sleep(chance.random() * 3)
        was_alive = _kill(process)
        result = server.wait()
        if not was_alive:
            assert result.returncode == 0, result.stderr
            break  # it has finished in the meantime
        done.count += 1
        done.inside_a_save += bool(_unfinished(checkpoints) - before)
    result = server(*command, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / run / "run.json").read_text())["state"] == "finished"
    return done


def _unfinished(checkpoints: Path) -> set[str]:
    """Checkpoints that are being written."""
    return {path.name for path in checkpoints.glob(".step-*.tmp")} if checkpoints.is_dir() else set()


def _wait_for_a_save(process: int, checkpoints: Path, before: set[str]) -> None:
    while not _unfinished(checkpoints) - before and _is_alive(process):
        time.sleep(0.0005)


def _is_alive(process: int) -> bool:
    """Whether it is running: an ended process stays a zombie until the server has waited for it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _kill(process: int) -> bool:
    if not _is_alive(process):
        return False
    os.kill(process, signal.SIGKILL)
    return True
