"""generation_config.json: the base's settings, with every token that ends an answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from qwen_tune.model.base import read_json


def write_generation_settings(folder: Path, base: Path, ends: Iterable[int | None], padding: int | None) -> None:
    """Writes generation_config.json into a folder.

    Both the end of a turn and the end of text stop generation, whatever the base's file says.

    Args:
        folder: An adapter's or a model's.
        base: The base checkpoint's.
        ends: Ids of the tokens that end an answer, the first of them first; None for one that there is not.
        padding: Id of the token that fills batches.
    """
    path = base / "generation_config.json"
    settings = dict(read_json(path)) if path.exists() else {}
    given = settings.get("eos_token_id") or []
    ids = dict.fromkeys([*ends, *([given] if isinstance(given, int) else given)])
    settings["eos_token_id"] = [token for token in ids if token is not None]
    settings["pad_token_id"] = padding
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
