"""What an engine does for processes that train as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

PROCESS = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from torch import distributed
from qwen_tune.distributed.engine import any_process, gather_objects, leave_group, make_control_group

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
group = make_control_group(accelerator)
answers = {
    "votes": [any_process(group, vote) for vote in (False, rank == 0, rank == 1, True)],
    "gathered": gather_objects(accelerator, {"rank": rank}),
}
leave_group()
answers["left"] = not distributed.is_initialized()
leave_group()
Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(answers))
"""


def test_two_processes_agree_gather_and_leave(tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, str(script), str(tmp_path)],
        env=environment(ACCELERATE_USE_CPU="true"),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    expected = {"votes": [False, True, True, True], "gathered": [{"rank": 0}, {"rank": 1}], "left": True}
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [expected, expected]


def test_one_process_has_nobody_to_ask():
    from accelerate import Accelerator

    from qwen_tune.distributed.engine import any_process, gather_objects, leave_group, make_control_group

    accelerator = Accelerator(cpu=True)
    assert make_control_group(accelerator) is None
    assert [any_process(None, vote) for vote in (False, True)] == [False, True]
    assert gather_objects(accelerator, {"rank": 0}) == [{"rank": 0}]
    leave_group()


def test_an_adapter_is_gathered_without_embeddings_and_an_optimizer_with_its_moments():
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from qwen_tune.distributed.engine import adapter_tensors, optimizer_state

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    base = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, vocab_size=32))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    shapes = {name.rsplit(".self_attn.")[1]: tuple(tensor.shape) for name, tensor in adapter_tensors(model).items()}
    assert shapes == {"q_proj.lora_A.weight": (2, 8), "q_proj.lora_B.weight": (8, 2)}
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    assert {name for state in optimizer_state(optimizer)["state"].values() for name in state} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
