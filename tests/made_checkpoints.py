"""Checkpoints and adapters that no library made, for tests of the merge's files."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

LAYERS, HIDDEN, INNER, VOCABULARY = 4, 512, 2048, 1024
MANY_LAYERS = 24  # enough that writing takes a while


def write_base(folder: Path, files: int = 1, layers: int = LAYERS) -> Path:
    """A checkpoint of Qwen2's names that no library made; some tensors are none that a causal model loads."""
    torch.manual_seed(1)
    tensors = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        module = f"model.layers.{layer}"
        tensors |= {f"{module}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        tensors |= {f"{module}.mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        tensors |= {f"{module}.mlp.down_proj.weight": (HIDDEN, INNER), f"{module}.input_layernorm.weight": (HIDDEN,)}
    weights = {name: (torch.randn(shape) * 0.02).to(torch.bfloat16) for name, shape in tensors.items()}
    weights["mtp.layers.0.self_attn.q_proj.weight"] = torch.randn(HIDDEN, HIDDEN).to(torch.bfloat16)
    weights["visual.blocks.0.attn.qkv.weight"] = torch.randn(96, 32)
    weights["visual.position_ids"] = torch.arange(7)
    weights["model.scale"] = torch.tensor(3.5)
    weights["model.nothing"] = torch.empty(0, HIDDEN)
    weights["visual.merger.weight"] = torch.randn(4096, 2048).to(torch.bfloat16)  # so that the last file is the largest
    folder.mkdir(parents=True)
    config = {"model_type": "qwen2", "tie_word_embeddings": False, "rope_parameters": {"rope_theta": 1e6}}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (TINY / name).exists():
            shutil.copy(TINY / name, folder)
    (folder / "preprocessor_config.json").write_text('{"size": 448}')
    names = list(weights)
    if files == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {name: f"model-{1 + n * files // len(names):05}-of-{files:05}.safetensors" for n, name in enumerate(names)}
    for file in sorted(set(where.values())):
        part = {name: weights[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def write_adapter(folder: Path, base: Path, layers: int = LAYERS) -> Path:
    torch.manual_seed(2)
    tensors = {}
    for layer in range(layers):
        for part, rows in (("self_attn.q_proj", HIDDEN), ("mlp.up_proj", INNER)):
            module = f"base_model.model.model.layers.{layer}.{part}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(8, HIDDEN) * 0.05
            tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 8) * 0.05
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]}
    config |= {"base_model_name_or_path": str(base), "init_lora_weights": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
