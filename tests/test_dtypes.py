"""Which type a base is trained in on a CPU, and a run from examples to a verified merge in that type."""

from __future__ import annotations

import json

import pytest
import torch
from resuming import leave_unfinished, losses, weights
from safetensors import safe_open

from qwen_tune.evaluation.chat import ChatModel
from qwen_tune.evaluation.verification import compare_merged
from qwen_tune.hardware import automatic_cpu_dtype
from qwen_tune.machine import cpu_bfloat16_units, device_name
from qwen_tune.merging.merge import merge
from qwen_tune.train import train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says"),
]

HERE = "bfloat16" if cpu_bfloat16_units() else "float32"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, HERE),
        ({"torch_dtype": "bfloat16"}, HERE),
        ({"dtype": "float16"}, HERE),
        ({"dtype": "float32"}, "float32"),
        ({}, "float32"),
    ],
    ids=str,
)
def test_a_cpu_computes_in_bfloat16_where_it_can_and_nothing_is_rounded_for_it(config, expected):
    assert automatic_cpu_dtype(config) == expected


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="this torch does not say")
def test_the_units_are_those_that_torch_finds():
    found = torch.cpu.get_capabilities()
    expected = "AMX" if found.get("amx_bf16") else "AVX512-BF16" if found.get("avx512_bf16") else None
    assert cpu_bfloat16_units() == expected
    assert (expected or "cores") in device_name()


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_base_stored_in_bfloat16_trains_resumes_merges_and_answers(
    workspace, monkeypatch, tiny_bfloat16, capsys, quantization
):
    monkeypatch.chdir(workspace)
    run = workspace / "run"
    settings = [
        f"model.base={tiny_bfloat16}",
        f"model.quantization={quantization}",
        "run.dir=run",
        "train.max_steps=6",
        "train.save_steps=3",
        "train.eval_steps=2",
        "train.learning_rate=1e-2",
    ]
    train("recipe.yaml", settings)
    assert HERE in capsys.readouterr().out
    facts = json.loads((run / "run.json").read_text())
    assert facts["dtype"] == HERE
    assert facts["adapter"]["dtype"] == "float32"
    assert facts["losses"]["eval_after"] < facts["losses"]["eval_before"] - 0.5
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as adapter:
        assert {adapter.get_tensor(name).dtype for name in adapter.keys()} == {torch.float32}  # noqa: SIM118
    whole = weights(run), losses(run)
    leave_unfinished(run, "step-6")
    train("recipe.yaml", settings)
    assert (weights(run), losses(run)) == whole
    assert compare_merged([run], merge(run)).passed
    model = ChatModel.load(run)
    assert model.model.dtype == getattr(torch, HERE)
    assert model.answer([{"role": "user", "content": "Hello!"}], max_new_tokens=4)
