"""The adapter directory: everything that anyone needs to load it, beside the base."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from qwen_tune.artifacts.adapter_dir import ADAPTER_FILE
from qwen_tune.artifacts.directory import written_whole
from qwen_tune.artifacts.metadata_files import write_generation_settings
from qwen_tune.chatml.template import END_OF_TURN
from qwen_tune.distributed.engine import adapter_tensors
from qwen_tune.errors import Problem, RunError
from qwen_tune.model.adapter import is_converted
from qwen_tune.model.base import BaseCheckpoint
from qwen_tune.model.tensor_files import FINGERPRINT_KEY, set_metadata
from qwen_tune.model.tokenizer import END_OF_TEXT
from qwen_tune.recipe.schema import LoraSpec, Recipe
from qwen_tune.runs.directory import RunDir

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass
class AdapterWriter:
    """Writes an adapter as a directory that is complete beside its base, and reads it back."""

    tokenizer: PreTrainedTokenizerBase
    base: BaseCheckpoint
    recipe: Recipe
    start: dict[str, Tensor] | None = None
    """The adapter's tensors before the first step, where the adapter took a part of the base (PiSSA, OLoRA)."""

    def remember_start(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the start of an adapter that is saved as the difference to it."""
        if is_converted(self.recipe.lora):
            self.start = {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    def start_sha256(self) -> str | None:
        """Identifies the start; None where none has to be kept."""
        if self.start is None:
            return None
        digest = hashlib.sha256()
        for name in sorted(self.start):
            digest.update(self.start[name].numpy().tobytes())
        return digest.hexdigest()

    def write(self, directory: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        """Writes an adapter as it is, with tokenizer, chat template and generation configuration beside it.

        Args:
            directory: Made where it is not there.
            config: PEFT's configuration.
            tensors: The adapter's tensors, by PEFT's names.
        """
        self._write(directory, config, tensors, {})

    def write_plain(self, directory: Path, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
        """Writes it as plain LoRA, however the adapter was initialized."""
        # Loading it does not begin with another start, such as a decomposition of the base, only to overwrite it.
        changes: dict[str, Any] = {"init_lora_weights": True}
        if self.start is not None:
            tensors = _without_start(tensors, self.start)
            changes |= _twice_the_rank(self.recipe.lora)
        self._write(directory, config, tensors, changes)

    def read(self, directory: Path, model: PeftModel) -> None:
        """Puts the tensors of an adapter directory into a model.

        Raises:
            RunError: They are not this adapter's.
        """
        from peft import set_peft_model_state_dict

        tensors = load_file(directory / ADAPTER_FILE)
        if tensors.keys() != adapter_tensors(model).keys():
            what = "its tensors are not those of the recipe's adapter"
            raise RunError(Problem(str(directory), what, "begin another run with run.dir="))
        set_peft_model_state_dict(model, tensors)

    def _write(
        self, directory: Path, config: PeftConfig, tensors: Mapping[str, Tensor], changes: Mapping[str, Any]
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        settings = {
            **{key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()},
            "inference_mode": True,
            # As PEFT will look for it: the Hub id and its commit, or the directory.
            "base_model_name_or_path": str(self.base.path) if self.base.is_local else self.base.id,
            "revision": self.base.revision,
            **changes,
        }
        _write_json(directory / "adapter_config.json", settings)
        save_file(_apart(tensors), directory / ADAPTER_FILE)
        # The base's fingerprint stands in the file itself: an adapter is copied and published without its run.
        set_metadata(directory / ADAPTER_FILE, {"format": "pt", FINGERPRINT_KEY: self._fingerprint})
        self.tokenizer.save_pretrained(directory)
        ends = self.tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
        write_generation_settings(directory, self.base.path, ends, self.tokenizer.pad_token_id)
        (directory / "README.md").write_text(_card(self.base, self.recipe, settings), encoding="utf-8")

    @cached_property
    def _fingerprint(self) -> str:
        return self.base.weights_fingerprint()


def save_adapter(run: RunDir, writer: AdapterWriter, config: PeftConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes the run's adapter, whole or not at all; arguments are those of `AdapterWriter.write`."""
    with written_whole(run.adapter) as directory:
        writer.write_plain(directory, config, tensors)
    # A model that was merged from an earlier adapter of this run is not this one's.
    shutil.rmtree(run.merged, ignore_errors=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own: safetensors takes no others."""
    apart: dict[int, Tensor] = {}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        found[name] = plain.clone() if plain.data_ptr() in apart else plain
        apart[plain.data_ptr()] = plain
    return found


def _without_start(tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter as the difference to its start: B·A - B₀·A₀ = [B, -B₀] · [A; A₀], of twice the rank.

    All that is not a LoRA matrix (token rows, biases, modules that are saved whole) stays as it is.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, first in start.items():
        if ".lora_A." in name:
            plain[name] = torch.cat([plain[name], first])
        elif ".lora_B." in name:
            plain[name] = torch.cat([plain[name], -first], dim=1)
    return plain


def _twice_the_rank(lora: LoraSpec) -> dict[str, Any]:
    """PEFT's settings under which matrices of twice the rank are scaled as before: by alpha / r, or alpha / sqrt(r)."""
    times = math.sqrt(2) if lora.use_rslora else 2
    return {
        "r": 2 * lora.r,
        "lora_alpha": times * lora.lora_alpha,
        "rank_pattern": {name: 2 * rank for name, rank in lora.rank_pattern.items()},
        "alpha_pattern": {name: times * alpha for name, alpha in lora.alpha_pattern.items()},
    }


def _write_json(path: Path, settings: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _card(base: BaseCheckpoint, recipe: Recipe, shape: Mapping[str, Any]) -> str:
    """The adapter's README, without anything of this machine."""
    front_matter = "" if base.is_local else f"base_model: {base.id}\nbase_model_relation: adapter\n"
    text = files("qwen_tune.artifacts").joinpath("adapter_card.md").read_text(encoding="utf-8")
    return Template(text).substitute(
        front_matter=front_matter,
        name=recipe.name,
        base=base.path.name if base.is_local else base.id,
        rank=shape["r"],
        alpha=shape["lora_alpha"],
        loss_on=recipe.data.loss_on,
        thinking=recipe.data.thinking,
    )
