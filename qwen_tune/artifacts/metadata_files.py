"""Everything beside the weights that a merged model needs: configuration, ends of answers, tokenizer, processors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen_tune.artifacts.adapter_dir import AdapterDir
from qwen_tune.chatml.template import END_OF_TURN
from qwen_tune.disk import read_json
from qwen_tune.errors import ModelError, Problem
from qwen_tune.model.tokenizer import END_OF_TEXT

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What speaks of weights or of an adapter, and what is written anew.
_NOT_COPIED = ("config.json", "generation_config.json", "adapter_config.json", "merge.json", "trainer_state.json")
_COPIED = ("*.json", "*.jinja", "*.txt", "LICENSE*", "NOTICE*")


def write_metadata_files(target: Path, adapter: AdapterDir, *, untied: bool) -> None:
    """Writes all files but the weights.

    The tokenizer, its chat template and what ends an answer come from the adapter where it has them, else from the
    base, like everything else that the base keeps beside its weights.
    """
    base = adapter.base
    from_adapter = any((adapter.path / name).exists() for name in ("tokenizer.json", "vocab.json"))
    for pattern in _COPIED:
        for file in sorted(base.path.glob(pattern)):
            if file.name in _NOT_COPIED or file.name.endswith(".safetensors.index.json") or not file.is_file():
                continue
            if not (from_adapter and file.name in TOKENIZER_FILES):
                _copy(file, target)
    if from_adapter:
        for name in TOKENIZER_FILES:
            if (adapter.path / name).is_file():
                _copy(adapter.path / name, target)
    ends = _Ends(target)
    written = adapter.path / "generation_config.json"
    if written.exists():
        shutil.copyfile(written, target / written.name)
    else:
        write_generation_settings(target, base.path, ends.all, ends.padding)
    _write(target / "config.json", _config(base.config, end=ends.of_turn, untied=untied))


def _copy(file: Path, target: Path) -> None:
    """Copies a file. Of JSON the ends are looked at, which a file that is cut off does not have.

    Raises:
        ModelError: It is cut off.
    """
    shutil.copyfile(file, target / file.name)
    if file.suffix == ".json":
        text = file.read_bytes().strip()
        if (text[:1], text[-1:]) not in ((b"{", b"}"), (b"[", b"]")):
            raise ModelError(Problem(str(file), "the file is cut off, or no JSON", "download or save it again"))


def _config(base: Mapping[str, Any], *, end: int | None, untied: bool) -> dict[str, Any]:
    """config.json: the base's, ending texts where turns end, with the keys under which Transformers 4 and 5 look.

    Without the former's keys it takes 10,000 for rope_theta, saying nothing.
    """
    config = dict(base)
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
    for name, other in (("dtype", "torch_dtype"), ("torch_dtype", "dtype")):
        if name in config:
            config.setdefault(other, config[name])
    if end is not None:
        config["eos_token_id"] = end
    if untied:
        config["tie_word_embeddings"] = False
    config.pop("_name_or_path", None)  # a path of the machine that wrote it
    return config


class _Ends:
    """The ids of the tokens that end an answer, from a tokenizer's files."""

    def __init__(self, folder: Path) -> None:
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        ids: dict[str, int] = {}
        added = settings.get("added_tokens_decoder")
        for id_, token in added.items() if isinstance(added, dict) else ():
            ids[_text(token)] = int(id_)
        if END_OF_TURN not in ids and (folder / "tokenizer.json").exists():
            for token in _added_tokens(folder / "tokenizer.json"):
                ids[token["content"]] = int(token["id"])
        self.all = [ids[token] for token in (END_OF_TURN, END_OF_TEXT) if token in ids]
        self.of_turn = ids.get(_text(settings.get("eos_token")))
        self.padding = ids.get(_text(settings.get("pad_token")))


def _added_tokens(path: Path) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json. All of it, as objects, would take more memory than the merge."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r'"added_tokens"\s*:\s*', text)
    try:
        return json.JSONDecoder().raw_decode(text, found.end())[0] if found else []
    except ValueError:
        raise ModelError(Problem(str(path), "cannot be read as JSON", "download it again")) from None


def _text(token: Any) -> str:
    return str(token.get("content")) if isinstance(token, Mapping) else str(token)


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
