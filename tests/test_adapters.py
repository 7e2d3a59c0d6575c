"""Every kind of adapter: trained, saved, loaded by PEFT alone, and merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_tune.errors import ModelError
from qwen_tune.families.qwen2 import QWEN2
from qwen_tune.merging.merge import merge
from qwen_tune.model.adapter import target_modules
from qwen_tune.recipe.schema import LoraSpec
from qwen_tune.train import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

KINDS = {
    "rslora": ["lora.use_rslora=true"],
    "dora": ["lora.use_dora=true"],
    "patterns": ["lora.rank_pattern={q_proj: 4}", "lora.alpha_pattern={layers.0.mlp.up_proj: 64}"],
    "excluded": ["lora.exclude_modules=[down_proj]"],
    "pissa": ["lora.init_lora_weights=pissa"],
    "pissa fast": ["lora.init_lora_weights=pissa_niter_4"],
    "olora": ["lora.init_lora_weights=olora", "lora.use_rslora=true", "train.learning_rate=1e-3"],
    "orthogonal": ["lora.init_lora_weights=orthogonal"],
    "pissa and more": [
        "lora.init_lora_weights=pissa",
        "lora.trainable_token_indices=[5, 5, 7]",
        "lora.modules_to_save=[norm]",
        "lora.bias=lora_only",
        "lora.rank_pattern={q_proj: 4}",
    ],
    "bias": ["lora.bias=all"],
    "tokens": ["lora.trainable_token_indices=[5, 7]"],
    "whole modules": ["lora.modules_to_save=[norm]", "lora.target_modules=attention"],
    "loraplus": ["train.loraplus_lr_ratio=4", "train.learning_rate=3e-3"],
}


def run(workspace: Path, monkeypatch, *overrides: str) -> Path:
    monkeypatch.chdir(workspace)
    train("recipe.yaml", ["run.dir=run", *overrides])
    return workspace / "run"


def logits(model) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=torch.randint(0, 500, (1, 40)), use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_what_was_trained_and_merges(workspace, monkeypatch, kind):
    path = run(workspace, monkeypatch, "train.learning_rate=1e-2", *KINDS[kind])
    facts = json.loads((path / "run.json").read_text())
    assert facts["losses"]["eval_after"] < facts["losses"]["eval_before"]
    # Loaded by PEFT, from the files alone, it is worth what training measured at its end.
    base = AutoModelForCausalLM.from_pretrained(workspace / "tiny-qwen")
    before = logits(base)
    model = PeftModel.from_pretrained(base, path / "adapter")
    assert (logits(model) - before).abs().max() > 1e-2
    assert held_out_loss(model, path, monkeypatch, workspace) == pytest.approx(facts["losses"]["eval_after"], rel=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(merge(path))
    assert (logits(merged) - logits(model)).abs().max() < 1e-4 * logits(model).abs().max()


def held_out_loss(model, path: Path, monkeypatch, workspace: Path) -> float:
    from qwen_tune.chatml.template import IGNORED, ChatTemplate
    from qwen_tune.data.preparation import prepare_data
    from qwen_tune.model.base import BaseCheckpoint
    from qwen_tune.model.tokenizer import load_tokenizer
    from qwen_tune.recipe.files import load_recipe

    recipe = load_recipe(path / "recipe.yaml")
    base = BaseCheckpoint(id="tiny", revision=None, path=(workspace / "tiny-qwen").resolve(), is_local=True)
    examples = prepare_data(recipe.data, ChatTemplate(load_tokenizer(recipe.model, base)), seed=recipe.train.seed)
    losses = []
    for example in examples.evaluation.samples:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([example.input_ids]), use_cache=False).logits[0, :-1]
        wanted = torch.tensor(example.labels[1:])
        each = torch.nn.functional.cross_entropy(scores, wanted, ignore_index=IGNORED, reduction="none")
        losses.append(each[wanted != IGNORED])
    return torch.cat(losses).mean().item()


def test_a_start_that_changes_the_base_is_saved_as_plain_lora(workspace, monkeypatch):
    path = run(workspace, monkeypatch, "lora.init_lora_weights=pissa", "lora.r=4", "train.save_steps=3")
    config = json.loads((path / "adapter" / "adapter_config.json").read_text())
    assert (config["init_lora_weights"], config["r"], config["lora_alpha"]) == (True, 8, 64)
    with pytest.raises(Exception, match="started by pissa, which changes the base"):
        merge(path / "checkpoints" / "step-3", output=workspace / "out")


def test_a_token_that_is_named_twice_is_trained_once(workspace, monkeypatch):
    path = run(workspace, monkeypatch, "lora.trainable_token_indices=[1202, 1202]", "train.max_steps=1")
    facts = json.loads((path / "run.json").read_text())
    assert facts["adapter"]["trained_tokens"] == [1202]
    train("recipe.yaml", ["run.dir=plain", "train.max_steps=1"])
    plain = json.loads((workspace / "plain" / "run.json").read_text())
    assert facts["losses"]["eval_before"] == pytest.approx(plain["losses"]["eval_before"], rel=1e-5)


def test_patterns_and_exclusions_decide_the_shapes(workspace, monkeypatch):
    path = run(workspace, monkeypatch, *KINDS["patterns"], *KINDS["excluded"], "lora.r=8")
    with safe_open(path / "adapter" / "adapter_model.safetensors", "pt") as file:
        ranks = {key: file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key}  # noqa: SIM118
    assert {rank for key, rank in ranks.items() if "q_proj" in key} == {4}
    assert {rank for key, rank in ranks.items() if "q_proj" not in key} == {8}
    assert not any("down_proj" in key for key in ranks)


def test_loraplus_gives_the_b_matrices_a_rate_of_their_own(workspace, monkeypatch):
    plain = run(workspace, monkeypatch, "train.max_steps=1", "train.optim=sgd", "train.learning_rate=1e-2")
    monkeypatch.chdir(workspace)
    overrides = ["train.max_steps=1", "train.optim=sgd", "train.learning_rate=1e-2", "train.loraplus_lr_ratio=8"]
    train("recipe.yaml", ["run.dir=plus", *overrides])
    one = load_file(plain / "adapter" / "adapter_model.safetensors")
    other = load_file(workspace / "plus" / "adapter" / "adapter_model.safetensors")
    for key, tensor in one.items():
        ratio = 8 if "lora_B" in key else 1  # they start at zero
        assert torch.allclose(tensor * ratio, other[key], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.target_modules=[q_prj]", "q_prj matches no linear layer of the model; it has down_proj"),
        ("lora.exclude_modules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]", "leaves no layer"),
        ("lora.rank_pattern={w_pack: 4}", "lora.rank_pattern: w_pack matches no layer that gets an adapter"),
        ("lora.alpha_pattern={w_pack: 4}", "lora.alpha_pattern: w_pack matches no layer"),
        ("lora.modules_to_save=[head]", "head matches no module"),
        ("lora.modules_to_save=[lm_head]", "lm_head is tied to the other end"),
        ("lora.trainable_token_indices=[99999]", "99999 is not a token of this model; ids go from 0"),
        ("lora.trainable_token_indices={wte: [1]}", "wte has no token rows of its own; expected embed_tokens"),
        ("lora.trainable_token_indices={lm_head: [1]}", "(its two ends are tied: one row a token)"),
        ("lora.trainable_token_indices={q_proj: [1]}", "q_proj has no token rows of its own"),
        ("lora.modules_to_save=[layers]", "layers holds layers that get an adapter"),
        ('lora.rank_pattern={"(": 4}', "( is not a regular expression"),
    ],
)
def test_what_is_not_in_the_model_is_reported(workspace, monkeypatch, override, message):
    with pytest.raises(ModelError) as caught:
        run(workspace, monkeypatch, override)
    assert message in str(caught.value)
    assert not (workspace / "run").exists()


def vision_language_model():
    """A tiny random Qwen2.5-VL: its vision tower has modules of the same names as the language model."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def test_the_vision_tower_is_trained_only_where_it_is_named():
    model = vision_language_model()
    unasked = target_modules(model, LoraSpec(), QWEN2)
    assert len(unasked) == 7
    assert all("language_model" in name for name in unasked)
    bare = target_modules(model, LoraSpec(target_modules=["gate_proj"]), QWEN2)
    assert bare == ["model.language_model.layers.0.mlp.gate_proj"]
    named = target_modules(model, LoraSpec(target_modules=["visual.blocks.0.mlp.gate_proj"]), QWEN2)
    assert named == ["visual.blocks.0.mlp.gate_proj"]


def test_a_router_is_trained_only_where_it_is_named():
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
    )
    model = Qwen2MoeForCausalLM(config)
    assert not any("shared_expert_gate" in name for name in target_modules(model, LoraSpec(), QWEN2))
    assert target_modules(model, LoraSpec(target_modules=["shared_expert_gate"]), QWEN2) == ["shared_expert_gate"]


def test_what_is_trained_is_reported_with_its_size_and_who_can_serve_it(workspace, monkeypatch, capsys):
    run(workspace, monkeypatch, *KINDS["whole modules"], "lora.use_dora=true", "lora.bias=lora_only")
    caught = " ".join(capsys.readouterr().out.split())
    assert "q_proj 4 x 4,224" in caught
    assert "modules_to_save adds 128 parameters" in caught
    refused = "fully trained modules (modules_to_save) or DoRA or trained biases"
    assert f"vLLM does not load {refused}: serve the merged model" in caught
    assert "Transformers 5.23 leaves DoRA's magnitudes out" in caught
