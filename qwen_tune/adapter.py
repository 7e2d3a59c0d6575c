"""The adapter directory: everything that anyone needs to load it, beside the base."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from qwen_tune.base import BaseCheckpoint
from qwen_tune.chatml import END_OF_TURN
from qwen_tune.recipe import Recipe
from qwen_tune.run_dir import RunDir, temporary_beside

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, base: BaseCheckpoint, recipe: Recipe, run: RunDir
) -> None:
    """Writes adapter weights and configuration, tokenizer, chat template, generation configuration and a card.

    The directory appears whole: it is written beside its place and renamed.
    """
    target = run.adapter
    temporary = temporary_beside(target)
    model.save_pretrained(temporary, save_embedding_layers=False)
    _name_base(temporary / "adapter_config.json", base)
    tokenizer.save_pretrained(temporary)
    write_generation_config(temporary, base, tokenizer)
    (temporary / "README.md").write_text(_card(base, recipe), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.replace(target)


def write_generation_config(directory: Path, base: BaseCheckpoint, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes generation_config.json: the base's settings, with every token that ends an answer.

    Both the end of a turn and the end of text stop generation, whatever the base's file says.
    """
    path = base.path / "generation_config.json"
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ends = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    given = settings.get("eos_token_id") or []
    others = [token for token in ([given] if isinstance(given, int) else given) if token not in ends]
    settings["eos_token_id"] = [token for token in [*ends, *others] if token is not None]
    settings["pad_token_id"] = tokenizer.pad_token_id
    (directory / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _name_base(path: Path, base: BaseCheckpoint) -> None:
    """Names the base as PEFT will look for it: the Hub id and its commit, or the directory."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base.path) if base.is_local else base.id
    config["revision"] = base.revision
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(base: BaseCheckpoint, recipe: Recipe) -> str:
    """A README that says what this is and how to use it, with nothing of this machine in it."""
    front_matter = "" if base.is_local else f"base_model: {base.id}\nbase_model_relation: adapter\n"
    text = files("qwen_tune").joinpath("adapter_card.md").read_text(encoding="utf-8")
    return Template(text).substitute(
        front_matter=front_matter,
        name=recipe.name,
        base=base.path.name if base.is_local else base.id,
        rank=recipe.lora.r,
        alpha=recipe.lora.lora_alpha,
        loss_on=recipe.data.loss_on,
        thinking=recipe.data.thinking,
    )
