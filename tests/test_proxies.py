"""What makes training fast on a GPU, counted where there is none: tokens, bytes, floating-point operations, waits.

Bytes that a decoder layer keeps, and its operations, are counted in test_fused_costs.py. Times are not gated: two cores
that others use as well say little about them.
"""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, environment
from live_bytes import LiveBytes, extra_bytes_of_loss, our_loss, plain_loss, trl_loss
from step_flops import step_flops
from torch.utils._python_dispatch import TorchDispatchMode

from qwen_tune.data.packing import best_fit_decreasing
from qwen_tune.train import train

sys.path.append(str(ROOT / "scripts"))

from training_bench.fairness import unlike
from training_bench.rows import ROWS_A_BATCH, draw_lengths
from training_bench.shapes import SHAPES, flops_per_token

# TRL 1.16 and PEFT 0.21 use names that Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize("capacity", [512, 4096])
def test_packs_have_next_to_no_padding_and_batches_have_much(capacity):
    lengths = np.array(draw_lengths(capacity, 4000))
    packs = len(np.unique(best_fit_decreasing(lengths, capacity)))
    batches = lengths.reshape(-1, ROWS_A_BATCH)  # in the order of the draw, as a shuffled data set has them
    assert packs * capacity / lengths.sum() <= 1.01
    assert (batches.max(axis=1) * ROWS_A_BATCH).sum() / lengths.sum() >= 1.5


def test_live_bytes_are_those_of_storages_that_are_held():
    with LiveBytes() as counted:
        one = torch.zeros(1000)
        view = one[10:]
        del one
        assert counted.live == 4000
        view = view + 1  # both are there for a moment
        assert (counted.live, counted.peak) == (990 * 4, 4000 + 990 * 4)
        view += 1
        assert counted.peak == 4000 + 990 * 4
    del view
    assert counted.live == 0


def test_the_loss_holds_a_tenth_of_the_plain_ones_memory_and_a_fifth_of_trls():
    import trl.kernels

    ours = extra_bytes_of_loss(our_loss)
    assert extra_bytes_of_loss(plain_loss) >= 10 * ours
    if not hasattr(trl.kernels, "ChunkedLogProbFunction"):
        pytest.skip("TRL 1.14 has no such loss")
    assert extra_bytes_of_loss(trl_loss) >= 5 * ours


def test_a_training_step_takes_few_more_operations_than_it_must():
    ours = step_flops(ours=True)
    assert 1 <= ours <= 1.08
    assert step_flops(ours=False, checkpointing=True) > 1.4  # the count sees what is computed twice or for nothing


@pytest.mark.parametrize(("name", "giga"), [("0.5b", 2.65), ("1.5b", 7.52), ("7b", 31.4)])
def test_the_fewest_operations_a_token_are_those_counted_by_hand(name, giga):
    """One sample of 4,096 tokens, loss on all of them."""
    assert flops_per_token(SHAPES[name], [4096], 4096) / 1e9 == pytest.approx(giga, rel=0.01)


class Waits(TorchDispatchMode):
    """Counts reads of a number out of a tensor, for which a GPU would be waited for, by who asks."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name == "aten::_local_scalar_dense":
            self.asked[asker()] += 1
        return function(*args, **(kwargs or {}))


def asker() -> str:
    """The innermost place outside torch, as `file:function`; LOGGING for whatever happens while a step is logged."""
    outside = (str(Path(torch.__file__).parent), __file__)
    frames = [one for one in traceback.extract_stack() if not one.filename.startswith(outside)]
    places = [f"{'/'.join(Path(one.filename).parts[-2:])}:{one.name}" for one in frames]
    return LOGGING if LOGGING in places else places[-1]


# With a mask (SDPA, on a CPU) Transformers asks once a micro-batch whether its positions start anew anywhere. Under
# `varlen` no mask is made.
LOGGING = "training/trainer.py:log"
RECIPE = "recipes/quickstart.yaml"
COLLATOR = "training/batches.py:__call__"
STOCK = "transformers/masking_utils.py:find_packed_sequence_indices"
MICRO_BATCHES = 2


@pytest.mark.parametrize("trained", ["lora.trainable_token_indices=null", "lora.trainable_token_indices=[5, 7]"])
def test_no_step_reads_a_number_from_the_device(workspace, monkeypatch, trained):
    """Neither a step of ours nor, but for the mask, of the stock loop: what is read is read when something is logged.

    `tolist`, `cpu` and `numpy` copy without asking torch's dispatcher on a CPU, so they are counted where they are
    called; the sampler, the collator and the random states of the loader handle what never was on a GPU. A tensor that
    is made of a list would be waited for as well, on its way there: only the collator makes some.
    """
    asked = {steps: reads(workspace, monkeypatch, steps, trained) for steps in (2, 5)}
    assert asked[5][LOGGING]  # what reads is seen
    a_step = {place: (asked[5][place] - asked[2][place]) / 3 for place in asked[5]}
    found = {place: count for place, count in a_step.items() if count and place not in (LOGGING, COLLATOR)}
    assert found == {STOCK: MICRO_BATCHES}


def reads(workspace, monkeypatch, steps, *overrides):
    monkeypatch.chdir(workspace)
    waits = Waits()
    # Torch looks up once what `with torch.device(…)` applies to. If it did so while `tensor` is patched, Transformers
    # would no longer see that it builds on the meta device, and rotary frequencies would stay uninitialised memory.
    with torch.device("meta"):
        assert torch.tensor([]).is_meta
    with monkeypatch.context() as patched, waits:
        for name in ("tolist", "cpu", "numpy"):
            patched.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name), waits.asked))
        patched.setattr(torch, "tensor", counting(torch.tensor, waits.asked))
        train(
            "recipe.yaml",
            [
                "data.eval=null",
                f"train.max_steps={steps}",
                "train.logging_steps=1000",
                f"run.dir=run-{steps}",
                *overrides,
            ],
        )
    return waits.asked


def counting(method, asked):
    def counted(tensor, *args, **kwargs):
        asked[asker()] += 1
        return method(tensor, *args, **kwargs)

    return counted


@pytest.mark.parametrize(
    ("arguments", "most"), [(["--help"], 150), (["validate", RECIPE], 400), (["estimate", RECIPE], 400)], ids=str
)
def test_quick_commands_import_few_modules(arguments, most):
    """What their time is made of: 98 and 280 modules; `trl sft --help` of TRL 1.16 imports 3,371."""
    script = (
        "import contextlib, io, sys\n"
        "from qwen_tune.cli import run_command\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    assert run_command({arguments}) == 0\n"
        "print(len(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert 50 < int(done.stdout) < most


MEASURED: dict[str, Any] = {
    "probe": {"loss": 9.0, "grad_norm": 2.0},
    "supervised_share": 0.55,
    "trained_parameters": 1000,
    "checkpoints": False,
    "peak_of": "training",
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"probe": {"loss": 9.001, "grad_norm": 2.0}}, "the loss before training differs by 0.00011"),
        ({"probe": {"loss": 9.0, "grad_norm": 2.1}}, "the gradient norm before training differs by 0.05"),
        ({"probe": {"loss": float("nan"), "grad_norm": 2.0}}, "the loss before training differs by nan"),
        ({"supervised_share": 1.0}, "0.78 of the tokens have loss, and 0.55 of ours"),
        ({"trained_parameters": 5}, "trained_parameters are 1000 and 5"),
        ({"peak_of": "process"}, "peak_of are process and training"),
        ({"checkpoints": True}, "only one of them computes layers again"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_sides_that_do_other_work_get_no_ratio(change, reason, number):
    """Also where they do it in a later round alone."""
    rounds = [MEASURED, MEASURED]
    assert unlike("trl-packed", "float32", rounds, rounds) == []
    changed = [MEASURED | change if index == number else MEASURED for index in range(2)]
    assert unlike("trl-packed", "float32", rounds, changed) == [reason]
    as_it_comes = unlike("trl", "float32", rounds, changed)
    assert as_it_comes == ([] if "checkpoints" in change else [reason])
