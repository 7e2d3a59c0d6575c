"""What fused layers keep and do, what is computed again, and their compiled steps."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from conftest import environment
from layer_costs import adapted_layers, angles, forward, layer_costs
from tuned_models import FUSED, KINDS, error, packed, results, tuned

from qwen_tune.fused.install import fuse
from qwen_tune.fused.self_check import STEPS, compile_steps

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def test_bytes_kept_and_operations_of_a_layer_of_qwen2_5_0_5b():
    model = adapted_layers(torch.bfloat16, layers=1)
    theirs = layer_costs(model, torch.bfloat16)
    fuse(model)
    ours = layer_costs(model, torch.bfloat16)
    assert ours.bytes <= 28_000
    assert theirs.bytes / ours.bytes >= 2.2
    assert ours.operations <= 0.75 * theirs.operations
    assert ours.computing <= 0.5 * theirs.computing


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_mlp_that_is_computed_again_gives_the_same_bits(kind):
    model = tuned(kind, torch.float32)
    fuse(model)
    once, _ = results(model, packed())
    fuse(model, recompute_mlp=True)
    again, used = results(model, packed())
    assert used == FUSED
    assert error(again, once) == 0


def test_bytes_kept_where_the_mlp_is_computed_again():
    model = adapted_layers(torch.bfloat16, layers=1)
    fuse(model)
    kept = layer_costs(model, torch.bfloat16).bytes
    fuse(model, recompute_mlp=True)
    # Without two tensors of the intermediate size, of two bytes a number.
    assert layer_costs(model, torch.bfloat16).bytes == kept - 2 * 2 * 4864


def test_steps_that_cannot_be_compiled_stay_as_they_are(tmp_path):
    """In a process of its own: the compiler is looked for once."""
    script = (
        "import torch\n"
        "from qwen_tune.fused.self_check import STEPS, compile_steps\n"
        "print(compile_steps(torch.device('cpu'), torch.float32), any(step.compiled for step in STEPS))\n"
    )
    variables = environment(CXX="/bin/false", TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("they cannot be compiled here (")
    assert result.stdout.endswith("False\n")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_that_are_compiled_give_the_same(dtype):
    """On a CPU, where compiling them takes half a minute; `auto` does it on a GPU alone."""
    try:
        assert compile_steps(torch.device("cpu"), dtype) is None
        model = tuned(dtype=torch.float32)
        fuse(model)
        compiled, used = results(model, packed())
        assert used == FUSED
    finally:
        for step in STEPS:
            step.stay_plain()
    plain, _ = results(model, packed())
    assert error(compiled, plain) < 1e-5


@pytest.mark.gpu
def test_on_a_gpu_it_is_as_near_to_float32_as_peft():
    model = adapted_layers(torch.bfloat16).cuda()
    hidden = torch.randn(1, 64, 896, device="cuda").bfloat16()

    def run(model, hidden):
        model.zero_grad(set_to_none=True)
        hidden = hidden.detach().clone().requires_grad_()
        output = forward(model, hidden, angles(model, hidden))
        output.float().square().sum().backward()
        return [output.detach(), hidden.grad, *(p.grad for p in model.parameters() if p.requires_grad)]

    exact = run(copy.deepcopy(model).float(), hidden.float())
    theirs = run(model, hidden)
    fused = fuse(model)
    assert (fused.reasons, fused.plain) == ({}, None)
    ours = run(model, hidden)
    distances = [
        sum(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)) for found in (ours, theirs)
    ]
    assert distances[0] < 1.1 * distances[1]
