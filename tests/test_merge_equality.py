"""Merged tensors against PEFT's own: every kind of adapter, bit by bit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from qwen_tune.merging.merge import merge

pytestmark = pytest.mark.filterwarnings("ignore")

REAL = Path(os.environ.get("QWEN_TUNE_REAL_BASE", "not-there"))  # a real checkpoint's directory, for those who have one

SIZES = {
    "vocab_size": 320,
    "hidden_size": 96,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2-tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=False),
    "moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=24,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=72,
        tie_word_embeddings=False,
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def make_base(folder: Path, kind: str, dtype: torch.dtype, max_shard_size: str = "50GB") -> Path:
    torch.manual_seed(5)
    config = MODELS[kind]
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases begin as ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (TINY / name).exists():
            (folder / name).write_bytes((TINY / name).read_bytes())
    return folder


def make_adapter(folder: Path, base: Path, settings: Mapping[str, Any], seed: int = 7) -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    tuned = get_peft_model(model, LoraConfig(**{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **settings}))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    tuned.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def by_peft(folder: Path, base: Path, adapters: list[Path]) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    tuned = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for number, adapter in enumerate(adapters[1:], start=1):
        tuned.load_adapter(adapter, adapter_name=f"a{number}")
    names = [f"a{number}" for number in range(len(adapters))]
    merged = tuned.merge_and_unload(adapter_names=names) if len(adapters) > 1 else tuned.merge_and_unload()
    merged.save_pretrained(folder)
    return weights(folder)


def assert_same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("qwen2", {"target_modules": ALL}),
    "rslora": ("qwen3", {"target_modules": ALL, "use_rslora": True}),
    "dora": ("qwen2", {"target_modules": ALL, "use_dora": True}),
    "patterns": (
        "qwen2",
        {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 16},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "down_proj": 7},
        },
    ),
    "rank one": ("qwen2", {"target_modules": ALL, "r": 1}),
    "high rank": ("qwen3", {"target_modules": ALL, "r": 96}),
    "a rank that products sum in parts": ("qwen3", {"target_modules": ALL, "r": 320, "lora_alpha": 320}),
    "bias": ("qwen2", {"target_modules": ATTENTION, "bias": "all"}),
    "bias of targets": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "bias of B": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "modules to save": ("qwen2", {"target_modules": ALL, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms to save": ("qwen2", {"target_modules": ATTENTION, "modules_to_save": ["norm", "input_layernorm"]}),
    "tokens": ("qwen2", {"target_modules": ALL, "trainable_token_indices": [1, 5, 319]}),
    "tokens of a tied base": (
        "qwen2-tied",
        {"target_modules": ALL, "trainable_token_indices": {"embed_tokens": [2, 9]}},
    ),
    "embedding and head": ("qwen2", {"target_modules": [*ALL, "embed_tokens", "lm_head"]}),
    "dora on all": ("qwen2", {"target_modules": [*ALL, "embed_tokens", "lm_head"], "use_dora": True}),
    "tied": ("qwen2-tied", {"target_modules": ALL}),
    "attention of experts": ("moe", {"target_modules": ATTENTION}),
    "experts": (
        "moe",
        {"target_modules": ATTENTION, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "all linear layers of experts": ("moe", {"target_modules": "all-linear"}),
    "a parameter that is no expert's": (
        "moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"]},
    ),
    "a block that is saved whole": ("qwen2", {"target_modules": ALL, "modules_to_save": ["layers.1.mlp"]}),
    "one of the experts' parameters": ("moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "f16", "f32"])
@pytest.mark.parametrize("case", CASES)
def test_a_merge_is_that_of_peft(tmp_path, case, dtype):
    kind, settings = CASES[case]
    base = make_base(tmp_path / "base", kind, dtype, max_shard_size="100KB" if dtype == torch.float16 else "50GB")
    adapter = make_adapter(tmp_path / "adapter", base, settings)
    merged = merge(adapter, output=tmp_path / "merged")
    assert_same(weights(merged), by_peft(tmp_path / "peft", base, [adapter]))
    facts = json.loads((merged / "merge.json").read_text())
    assert facts["unchanged_with_adapter"] == []
    assert facts["adapter_tensors"] == len(load_file(adapter / "adapter_model.safetensors"))
    loaded, report = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.config.tie_word_embeddings == MODELS[kind].tie_word_embeddings


@pytest.mark.skipif(not REAL.exists(), reason="needs a real checkpoint: QWEN_TUNE_REAL_BASE names its directory")
@pytest.mark.parametrize("case", ["lora", "rslora", "dora", "patterns", "rank one", "bias of targets", "bias of B"])
def test_a_merge_into_a_real_checkpoint_is_that_of_peft(tmp_path, case):
    adapter = make_adapter(tmp_path / "adapter", REAL, CASES[case][1])
    merged = merge(adapter, output=tmp_path / "merged")
    assert_same(weights(merged), by_peft(tmp_path / "peft", REAL, [adapter]))


def test_experts_in_one_tensor_are_merged_like_experts_in_tensors_of_their_own(tmp_path):
    settings = CASES["experts"][1]
    apart = make_base(tmp_path / "apart", "moe", torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", apart, settings)
    fused = tmp_path / "fused"
    fused.mkdir()
    (fused / "config.json").write_bytes((apart / "config.json").read_bytes())
    save_file(fuse(weights(apart)), fused / "model.safetensors", metadata={"format": "pt"})
    merged = merge(adapter, output=tmp_path / "merged", base=str(fused))
    assert_same(weights(merged), fuse(by_peft(tmp_path / "peft", apart, [adapter])))


def test_another_adapter_at_the_same_place_is_read_anew(tmp_path):
    base = make_base(tmp_path / "base", "moe", torch.bfloat16)
    for seed in (1, 2):
        adapter = make_adapter(tmp_path / "adapter", base, CASES["experts"][1], seed)
        merged = merge(adapter, output=tmp_path / f"merged{seed}")
        assert_same(weights(merged), by_peft(tmp_path / f"peft{seed}", base, [adapter]))


def fuse(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as Transformers 5 holds them in memory."""
    result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in range(SIZES["num_hidden_layers"]):
        module = f"model.layers.{layer}.mlp.experts"
        each = [
            {part: tensors[f"{module}.{e}.{part}_proj.weight"] for part in ("gate", "up", "down")} for e in range(6)
        ]
        result[f"{module}.gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in each])
        result[f"{module}.down_proj"] = torch.stack([one["down"] for one in each])
    return result


SEVERAL = {
    "lora, lora": ({"target_modules": ALL}, {"target_modules": ATTENTION, "r": 4}),
    "lora, dora": ({"target_modules": ALL}, {"target_modules": ALL, "use_dora": True}),
    "dora, lora, dora": (
        {"target_modules": ALL, "use_dora": True},
        {"target_modules": ALL},
        {"target_modules": ATTENTION, "use_dora": True, "use_rslora": True},
    ),
    "embeddings": ({"target_modules": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens"], "r": 3}),
    "tokens": (
        {"target_modules": ATTENTION, "trainable_token_indices": [1, 5]},
        {"target_modules": ATTENTION, "trainable_token_indices": [2, 318]},
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize("case", SEVERAL)
def test_several_adapters_are_merged_in_their_order(tmp_path, case, dtype):
    base = make_base(tmp_path / "base", "qwen2", dtype)
    adapters = [
        make_adapter(tmp_path / f"adapter{number}", base, settings, seed=number)
        for number, settings in enumerate(SEVERAL[case])
    ]
    merged = merge(*adapters, output=tmp_path / "merged")
    assert_same(weights(merged), by_peft(tmp_path / "peft", base, adapters))


UNTIED = {
    "the embedding alone": {"target_modules": [*ATTENTION, "embed_tokens"]},
    "the head alone": {"target_modules": [*ATTENTION, "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "a head of its own": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "an embedding of its own": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("case", UNTIED)
def test_a_tied_base_is_untied_where_the_adapter_parts_its_ends(tmp_path, case):
    """What PEFT writes of these answers otherwise than base and adapter where it adds to both ends at once."""
    base = make_base(tmp_path / "base", "qwen2-tied", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, UNTIED[case])
    merged = merge(adapter, output=tmp_path / "merged")
    facts = json.loads((merged / "merge.json").read_text())
    assert facts["untied"] is True
    assert facts["untied_bytes"] == 320 * 96 * 4
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    assert not torch.equal(weights(merged)["lm_head.weight"], weights(merged)["model.embed_tokens.weight"])
    ids = torch.arange(64).reshape(2, 32)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with torch.inference_mode():
        expected = tuned.eval()(ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits
    assert (expected - found).abs().max() < 1e-5 * expected.abs().max()


def test_a_tied_base_stays_tied_where_the_adapter_ties_its_ends(tmp_path):
    base = make_base(tmp_path / "base", "qwen2-tied", torch.bfloat16)
    settings = {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    adapter = make_adapter(tmp_path / "adapter", base, settings)
    merged = merge(adapter, output=tmp_path / "merged")
    assert_same(weights(merged), by_peft(tmp_path / "peft", base, [adapter]))
    assert json.loads((merged / "merge.json").read_text())["untied"] is False


def test_a_tied_base_stays_tied_where_its_embeddings_were_only_saved(tmp_path):
    base = make_base(tmp_path / "base", "qwen2-tied", torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, {"target_modules": ATTENTION})
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    tuned.save_pretrained(adapter, save_embedding_layers=True)
    assert any("embed_tokens" in name for name in load_file(adapter / "adapter_model.safetensors"))
    merged = merge(adapter, output=tmp_path / "merged")
    assert_same(weights(merged), by_peft(tmp_path / "peft", base, [adapter]))
    assert json.loads((merged / "merge.json").read_text())["untied"] is False


@pytest.mark.parametrize("parted", [False, True])
def test_matrices_that_are_tied_keep_the_tie_only_while_they_are_equal(tmp_path, parted):
    base = make_base(tmp_path / "base", "qwen2-tied", torch.float32)
    settings = {"target_modules": [*ATTENTION, "embed_tokens"], "ensure_weight_tying": True}
    adapter = make_adapter(tmp_path / "adapter", base, settings)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    embedding = "base_model.model.model.embed_tokens.lora_embedding_"
    for end, other in (("A", "B"), ("B", "A")):
        tensors[f"base_model.model.lm_head.lora_{end}.weight"] = tensors[embedding + other].T.contiguous()
    if parted:
        tensors["base_model.model.lm_head.lora_B.weight"][0, 0] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    merged = merge(adapter, output=tmp_path / "merged")
    assert json.loads((merged / "merge.json").read_text())["untied"] is parted


def test_other_divisions_into_files_hold_the_same_tensors(tmp_path):
    base = make_base(tmp_path / "base", "qwen2", torch.bfloat16, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = make_adapter(tmp_path / "adapter", base, {"target_modules": ALL})
    as_base = merge(adapter, output=tmp_path / "as base")
    assert {file.name for file in as_base.glob("*.safetensors")} == {file.name for file in base.glob("*.safetensors")}
    one = merge(adapter, output=tmp_path / "one", max_shard_bytes=1 << 30)
    assert [file.name for file in one.glob("*.safetensors")] == ["model.safetensors"]
    many = merge(adapter, output=tmp_path / "many", max_shard_bytes=60_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(list(many.glob("*.safetensors"))) > 3
    assert_same(weights(one), weights(as_base))
    assert_same(weights(many), weights(as_base))
    AutoModelForCausalLM.from_pretrained(many)
