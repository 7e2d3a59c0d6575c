"""Planner, training, merging and publishing read each fact of an architecture or a GPU from one place.

A fact is changed where it stands, and everyone who needs it must see the change. That planner and layers come to the
same halves of what is fused, for every kind of adapter, is in test_planner.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from planned import made_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from qwen_tune import hardware
from qwen_tune.artifacts import metadata_files
from qwen_tune.errors import QwenTuneError
from qwen_tune.families import known
from qwen_tune.families.shape import read_shape
from qwen_tune.hardware import find_gpu
from qwen_tune.model import adapter, attention
from qwen_tune.model.base import find_base
from qwen_tune.planner.adapter import read_adapter
from qwen_tune.planner.estimate import estimate
from qwen_tune.publishing import card, content
from qwen_tune.training import summary

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


def change(monkeypatch: pytest.MonkeyPatch, name: str, **facts) -> None:
    monkeypatch.setitem(known.FAMILIES, name, replace(known.FAMILIES[name], **facts))


def test_planner_and_adapter_read_the_same_groups_of_linear_layers(monkeypatch):
    change(monkeypatch, "qwen3", groups={"all-linear": ("v_proj", "up_proj")})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SIZES))
    recipe = made_recipe(lora={"r": 4})
    planned = read_adapter(read_shape(model.config.to_dict(), "base"), recipe.lora)
    assert adapter.lora_config(model, recipe.lora).target_modules == {"v_proj", "up_proj"}
    assert [set(layer) for layer in planned.ranks] == [{"self_attn.v_proj", "mlp.up_proj"}] * 2


@pytest.mark.parametrize("name", known.FAMILIES)
def test_linear_layers_have_the_sizes_that_transformers_gives_them(name):
    stated = {"model_type": name, **SIZES, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape = read_shape(stated, "base")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**stated))
    found = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    del found["lm_head"]
    assert {name: (linear.outputs, linear.inputs, linear.bias) for name, linear in shape.linears.items()} == {
        name: (*module.weight.shape, module.bias is not None) for name, module in found.items()
    }


def test_planner_and_loading_read_what_attention_was_shown_to_pack_right(monkeypatch):
    base = find_base(str(TINY))
    recipe = made_recipe(model={"base": str(TINY), "attention": "sdpa", "dtype": "float32"})
    assert attention.choose_attention(recipe.model, torch.float32, base.shape) == "sdpa"
    assert estimate(recipe, base, [find_gpu("h100")])
    change(monkeypatch, base.model_type, packing=("eager",))
    with pytest.raises(QwenTuneError, match="got sdpa, which was not shown to keep the samples of a pack apart"):
        attention.choose_attention(recipe.model, torch.float32, find_base(str(TINY)).shape)
    with pytest.raises(QwenTuneError, match="does not compute sdpa"):
        estimate(recipe, find_base(str(TINY)), [find_gpu("h100")])


def test_planner_and_card_read_the_same_gpus(monkeypatch):
    gpu = hardware.Gpu("x1-10gb", 10.0, 100, 20, 500, {"X1": 360})
    monkeypatch.setattr(hardware, "KNOWN_GPUS", (gpu,))
    assert find_gpu("x1") is gpu
    an_hour = {"tokens_per_second": 10, "tokens": {"processed": 36_000}}
    assert card.energy_kwh({"device": "NVIDIA X1", "world_size": 2, **an_hour}) == 0.72


def test_training_and_card_read_the_same_list_of_what_vllm_refuses():
    assert summary.unsupported_by_vllm is card.unsupported_by_vllm


def test_the_files_of_a_tokenizer_are_those_that_transformers_writes(tmp_path):
    written = AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    assert {Path(file).name for file in written} <= set(metadata_files.TOKENIZER_FILES)
    assert content.TOKENIZER_FILES is metadata_files.TOKENIZER_FILES
