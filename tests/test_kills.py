"""A run that is killed with -9 yields the same adapter as one that is not; scripts/evidence has a longer form."""

from __future__ import annotations

import sys

import pytest
from conftest import environment, make_workspace
from fork_server import MODULES, fork_server
from kills import train_through_kills

SETTINGS = ["train.max_steps=12", "train.save_steps=1", "train.logging_steps=1", "lora.lora_dropout=0.1"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes in /proc")
def test_kills_change_nothing(tmp_path):
    folder = make_workspace(tmp_path)
    with fork_server(MODULES, environment()) as server:
        whole = server("train", "recipe.yaml", "run.dir=whole", *SETTINGS, cwd=folder)
        assert whole.returncode == 0, whole.stderr
        kills = train_through_kills(server, folder, "killed", SETTINGS, kills=5)
    assert kills.count == 5
    assert kills.inside_a_save >= 1
    for name in ("adapter_model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (folder / "killed/adapter" / name).read_bytes() == (folder / "whole/adapter" / name).read_bytes()
