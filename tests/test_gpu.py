"""What only a GPU can show: steps in bfloat16, packs under every attention that is there, and resuming from a save.

`scripts/gpu_checks` runs these and times the shipped recipes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config
from transformers.utils import is_flash_attn_2_available

from qwen_tune.chatml.template import IGNORED
from qwen_tune.evaluation.chat import ChatModel
from qwen_tune.evaluation.verification import compare_merged
from qwen_tune.fused.install import fuse
from qwen_tune.merging.merge import merge
from qwen_tune.model.attention import VARLEN, needs_no_mask
from qwen_tune.train import train
from qwen_tune.training.batches import BatchShape, PackCollator
from qwen_tune.training.loss import add_supervised_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # another machine, other versions
]

ATTENTIONS = ["eager", "sdpa", VARLEN, *(["flash_attention_2"] if is_flash_attn_2_available() else [])]
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
}


def run(workspace: Path, monkeypatch, name: str, *overrides: str) -> dict:
    monkeypatch.chdir(workspace)
    train("recipe.yaml", [f"run.dir={name}", "train.learning_rate=1e-2", "train.max_steps=6", *overrides])
    return json.loads((workspace / name / "run.json").read_text())


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_steps_in_bfloat16_learn_and_merge(workspace, monkeypatch, quantization, checkpointing):
    overrides = (f"model.quantization={quantization}", f"train.gradient_checkpointing={checkpointing}")
    facts = run(workspace, monkeypatch, "run", *overrides)
    assert facts["dtype"] == "bfloat16"
    assert facts["adapter"]["dtype"] == "float32"
    assert facts["losses"]["eval_after"] < facts["losses"]["eval_before"] - 0.5
    assert 0 < facts["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory
    merged = merge(workspace / "run")
    assert compare_merged([workspace / "run"], merged).passed
    for path in (workspace / "run", merged):
        model = ChatModel.load(path)
        assert model.model.device.type == "cuda"
        assert model.answer([{"role": "user", "content": "Who keeps the lighthouse?"}], max_new_tokens=8)


@pytest.mark.parametrize("shape", [None, BatchShape(tokens=100, samples=8, longest=40)], ids=["as it is", "filled"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config], ids=["qwen2", "qwen3"])
def test_every_token_of_a_pack_costs_what_it_costs_alone(config, attention, shape):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if attention not in ("eager", "sdpa") else torch.float32
    model = AutoModelForCausalLM.from_config(config(**SHAPE), attn_implementation=attention).to("cuda", dtype).eval()
    model.requires_grad_(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    samples = [torch.randint(0, 300, (length,)).tolist() for length in (17, 1, 40, 9)]
    pack = {
        "input_ids": [token for ids in samples for token in ids],
        "labels": [IGNORED if index == 0 else token for ids in samples for index, token in enumerate(ids)],
        "lengths": [len(ids) for ids in samples],
    }
    batch = {
        key: value.cuda() if isinstance(value, torch.Tensor) else value
        for key, value in PackCollator(shape)([pack]).items()
    }
    with torch.no_grad():
        alone = []
        for ids in samples:
            tokens = torch.tensor([ids], device="cuda")
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
            alone.append(cross_entropy(logits, tokens[0, 1:], reduction="none"))
        inputs = {key: value for key, value in batch.items() if key not in ("labelled", "targets")}
        if needs_no_mask(attention, batch):
            inputs["attention_mask"] = dict.fromkeys(model.config.layer_types)
        logits = model(**inputs, use_cache=False).logits[0].float()
        packed = cross_entropy(logits[batch["labelled"]], batch["targets"], reduction="none")
        add_supervised_loss(model)
        total = model(**batch)
    expected = torch.cat(alone)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
    assert (packed - expected).abs().max() < tolerance
    assert total.item() == pytest.approx(expected.sum().item(), rel=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_layers_compiled_as_a_whole_learn_the_same(workspace, monkeypatch, quantization, checkpointing):
    same = (f"model.quantization={quantization}", f"train.gradient_checkpointing={checkpointing}")
    plain = run(workspace, monkeypatch, "plain", *same)
    whole = run(workspace, monkeypatch, "whole", *same, "train.torch_compile=true")
    assert (whole["fused"]["whole"], whole["attention"]) == (True, VARLEN)
    for name in ("train_first", "train_last", "eval_after"):
        assert whole["losses"][name] == pytest.approx(plain["losses"][name], rel=2e-2)


@pytest.mark.parametrize("trained", [None, [5, 7]], ids=["rows frozen", "rows trained"])
def test_nothing_in_a_step_waits_for_the_gpu(trained):
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, attn_implementation=VARLEN)).to("cuda", torch.bfloat16)
    add_supervised_loss(model, neftune_noise_alpha=5.0)
    settings = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=trained)
    model = get_peft_model(model, settings).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    fuse(model)
    optimizer = torch.optim.AdamW(parameters, fused=True)
    row = {"input_ids": list(range(5, 65)), "labels": [IGNORED, *range(6, 65)], "lengths": [60]}
    batch = PackCollator()([row])
    batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()  # what is made once, kernels among it, may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_going_on_gives_the_same_losses(workspace, monkeypatch):
    settings = ("lora.lora_dropout=0.1", "train.save_steps=3", "train.trainer_args={full_determinism: true}")
    constant = (*settings, "train.lr_scheduler_type=constant")
    run(workspace, monkeypatch, "parts", *constant, "train.max_steps=3")
    again = run(workspace, monkeypatch, "parts", *constant)
    once = run(workspace, monkeypatch, "once", *constant)
    assert again["losses"] == once["losses"]
    assert (again["steps"], once["steps"]) == (6, 6)


def test_a_model_that_does_not_fit_ends_with_advice(workspace, monkeypatch):
    from qwen_tune.errors import TrainingError

    lines = Path(workspace / "rows.jsonl").read_text().splitlines()
    turns = [turn for line in lines[:60] for turn in json.loads(line)["messages"] if turn["role"] != "system"]
    (workspace / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")  # one long conversation
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(60e6 / total)
    try:
        with pytest.raises(TrainingError, match=r"memory ran out.*quantization=nf4"):
            run(
                workspace,
                monkeypatch,
                "run",
                *("data.max_length_tokens=2048", "data.eval=null", "train.global_batch_size=1"),
                *("train.gradient_checkpointing=none", "model.attention=eager"),
            )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
