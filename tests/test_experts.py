"""Qwen3's mixtures of experts: adapters on the attention, and all else as it was. On a small random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from qwen_tune.evaluation.verification import verify_merged
from qwen_tune.merging.merge import merge
from qwen_tune.train import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

SIZES = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint as Transformers saves it, which keeps the experts of a layer apart; with the tiny tokenizer."""
    folder = tmp_path_factory.mktemp("base") / "experts"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((TINY / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "eos_token_id")
    sizes = {name: settings[name] for name in (*kept, "max_position_embeddings", "tie_word_embeddings")}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**sizes, **SIZES, intermediate_size=64, num_hidden_layers=2, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copy(TINY / "generation_config.json", folder)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        from conftest import make_workspace

        patched.chdir(make_workspace(tmp_path_factory.mktemp("run")))
        train("recipe.yaml", [f"model.base={base}", "run.dir=run", "train.save_steps=2", "train.learning_rate=1e-2"])
        return Path("run").resolve()


def test_only_the_attention_is_trained(run):
    facts = json.loads((run / "run.json").read_text())
    assert set(facts["adapter"]["modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert facts["fused"]["attention"] == 2
    assert facts["fused"]["reasons"] == {"Qwen3MoeSparseMoeBlock is not a layer that is known here": 2}
    assert facts["losses"]["eval_after"] < facts["losses"]["eval_before"]
    names = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_merged_model_has_the_bases_experts_and_routers_to_the_bit(run, base):
    target = merge(run)
    before = {n: t for file in base.glob("*.safetensors") for n, t in load_file(file).items()}
    after = {n: t for file in target.glob("*.safetensors") for n, t in load_file(file).items()}
    assert before.keys() == after.keys()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sum(".experts." in name for name in after) >= 2 * 2
    comparison = verify_merged([run], target)
    assert comparison.passed


def test_a_run_is_resumed_to_the_same_bits(run, base, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    settings = [f"model.base={base}", "run.dir=run", "train.save_steps=2", "train.learning_rate=1e-2"]
    shutil.copytree(run, "run")
    shutil.rmtree("run/adapter")
    shutil.rmtree("run/merged", ignore_errors=True)
    facts = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**facts, "state": "interrupted"}))
    shutil.rmtree("run/checkpoints/step-3", ignore_errors=True)
    train("recipe.yaml", settings)
    expected, found = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (run, Path("run")))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "lora.target_modules=mlp",
            "lora.target_modules: got mlp; Qwen3 MoE has all-linear, attention",
        ),
        ("lora.target_modules=[gate_proj]", "lora.target_modules: gate_proj matches no linear layer of the model"),
    ],
)
def test_experts_are_refused_as_targets(base, workspace, qwen_tune, override, message):
    for command in (("train", "--dry-run"), ("estimate",)):
        result = qwen_tune(*command[:1], "recipe.yaml", *command[1:], f"model.base={base}", override, cwd=workspace)
        assert (result.returncode, result.stdout) == (2, "") or command == ("estimate",)
        assert message in result.stderr
