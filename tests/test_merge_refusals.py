"""Bases and adapters that cannot be merged: refused with the reason, and nothing is left."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from made_checkpoints import HIDDEN, VOCABULARY, rewrite, write_adapter, write_base

from qwen_tune.errors import QwenTuneError
from qwen_tune.merging.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def pair(tmp_path):
    """(base in one file, adapter)."""
    base = write_base(tmp_path / "base")
    return base, write_adapter(tmp_path / "adapter", base)


MODULE = "base_model.model.model.layers.3.self_attn.q_proj"


def without_a_module(base, adapter):
    def change(tensors):
        del tensors[f"{MODULE}.lora_A.weight"], tensors[f"{MODULE}.lora_B.weight"]

    rewrite(adapter / "adapter_model.safetensors", change)


def without_a_matrix(base, adapter):
    rewrite(adapter / "adapter_model.safetensors", lambda tensors: tensors.pop(f"{MODULE}.lora_B.weight"))


def with_a_module_more(base, adapter):
    def change(tensors):
        tensors["base_model.model.model.layers.99.self_attn.q_proj.lora_A.weight"] = torch.ones(8, HIDDEN)
        tensors["base_model.model.model.layers.99.self_attn.q_proj.lora_B.weight"] = torch.ones(HIDDEN, 8)

    rewrite(adapter / "adapter_model.safetensors", change)


def in_integers(base, adapter):
    def change(tensors):
        tensors[f"{MODULE}.lora_B.weight"] = tensors[f"{MODULE}.lora_B.weight"].to(torch.int8)

    rewrite(adapter / "adapter_model.safetensors", change)


def of_another_rank(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))


def without_alpha(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": None}))


def with_a_broken_pattern(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_(proj": 4}}))


def of_another_kind(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))


def started_from_the_base(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa_niter_16"}))


def diverged(base, adapter):
    def change(tensors):
        tensors[f"{MODULE}.lora_B.weight"][0, 0] = float("inf")

    rewrite(adapter / "adapter_model.safetensors", change)


def of_the_wrong_shape(base, adapter):
    def change(tensors):
        tensors[f"{MODULE}.lora_A.weight"] = torch.ones(8, HIDDEN + 8)

    rewrite(adapter / "adapter_model.safetensors", change)


def overlapping(base, adapter):
    file = adapter / "adapter_model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name.endswith("q_proj.lora_A.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def no_json(base, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 10) + b"not json!!" + bytes(100))


def index_outside(base, adapter):
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "../base/model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_others(base, adapter):
    index = {"metadata": {}, "weight_map": {"model.other.weight": "model.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def quantized_base(base, adapter):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))


def base_in_bytes(base, adapter):
    def change(tensors):
        name = "model.layers.3.self_attn.q_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    rewrite(base / "model.safetensors", change)


def with_a_head_of_fewer_tokens(base, adapter):
    def change(tensors):
        tensors["base_model.model.lm_head.weight"] = torch.ones(VOCABULARY - 16, HIDDEN)

    rewrite(adapter / "adapter_model.safetensors", change)


def with_a_pattern_list(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": [4]}))


def with_targets_of_no_names(base, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": 7}))


def broken_tokenizer(base, adapter):
    (adapter / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [')


def broken_companion(base, adapter):
    (base / "generation_config.json").write_text("{")


DAMAGES = [
    (with_a_head_of_fewer_tokens, "does not fit the base .*lm_head"),
    (with_a_pattern_list, "rank_pattern in adapter_config.json is not a mapping"),
    (with_targets_of_no_names, "target_modules in adapter_config.json is not a list of names"),
    (broken_tokenizer, "tokenizer.json: the file is cut off, or no JSON"),
    (broken_companion, r"generation_config\.json: cannot be read as JSON"),
    (without_a_module, r"no matrices for model\.layers\.3\.self_attn\.q_proj\.weight, which adapter_config"),
    (without_a_matrix, "expected a matrix A and a matrix B"),
    (with_a_module_more, r"layers\.99\.self_attn\.q_proj\.lora_A, which the base does not have"),
    (in_integers, "is stored as I8; expected one of F64, F32, F16, BF16"),
    (of_another_rank, r"has rank 8; adapter_config\.json says 4"),
    (without_alpha, "no lora_alpha; expected a number"),
    (with_a_broken_pattern, "not a regular expression"),
    (of_another_kind, "of the kind LOHA; expected LORA"),
    (started_from_the_base, "started by pissa_niter_16, which changes the base"),
    (diverged, "values that are not finite"),
    (of_the_wrong_shape, "does not fit the base"),
    (overlapping, "do not follow those before it"),
    (no_json, "not a safetensors file"),
    (index_outside, "which is not a file beside it"),
    (index_of_others, "which is not so"),
    (quantized_base, r"its weights are quantized \(awq\)"),
    (base_in_bytes, "is stored as F8_E4M3"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[damage.__name__ for damage, _ in DAMAGES])
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(pair, tmp_path, damage, message):
    damage(*pair)
    with pytest.raises(QwenTuneError, match=message):
        merge(pair[1], output=tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
