"""Constants and helpers for tests of a push."""

from __future__ import annotations

from pathlib import Path

from conftest import environment
from fakes.hub_write_server import ServedHub

TOKEN = "hf_" + "CanaryTokenOfTheTests" + "0123456789"
BASE = ("--base-id", "qwen/tiny")


def client(hub: ServedHub, folder: Path, **changes: str) -> dict[str, str]:
    return environment(
        **{
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "hf"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            **changes,
        }
    )


def writes(hub: ServedHub) -> list[str]:
    return [path for method, path, _ in hub.requests if method in ("POST", "PUT", "DELETE")]
