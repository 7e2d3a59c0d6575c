"""Layers compiled as a whole, and the micro-batches of one shape that they want."""

from __future__ import annotations

import json
import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from layer_costs import adapted_layers, bytes_kept
from torch._dynamo.utils import counters
from transformers.modeling_layers import GradientCheckpointingLayer
from tuned_models import SIZES, error, packed, results, tuned

from qwen_tune.chatml.template import IGNORED
from qwen_tune.compat import compiler_settings
from qwen_tune.fused.compiled import compiled, compiling_layers
from qwen_tune.fused.install import _halves, fuse, unfuse
from qwen_tune.training.batches import BatchShape, PackCollator

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

NEAR = 1e-4  # norms are computed in float32 in models of every type


@pytest.fixture(autouse=True)
def compiling():
    torch._dynamo.reset()
    counters.clear()
    with compiling_layers():
        yield


def test_the_compilers_settings_are_restored():
    before = (torch._functorch.config.cse, torch._dynamo.config.recompile_limit)
    with suppress(ZeroDivisionError), compiler_settings(before[1] + 5):
        assert (torch._functorch.config.cse, torch._dynamo.config.recompile_limit) == (False, before[1] + 5)
        raise ZeroDivisionError
    assert (torch._functorch.config.cse, torch._dynamo.config.recompile_limit) == before


def compile_quickly(model, **how):
    """As `fuse` does it, but for machine code, which takes half a minute."""
    found = fuse(model, compile_layers=True, **how)
    body = compiled(_halves, backend="aot_eager")
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.body = body
    return found


@pytest.mark.parametrize(
    ("kind", "settings"), [("qwen2", {}), ("qwen3", {}), ("qwen2", {"target_modules": ["q_proj"]})]
)
def test_all_layers_share_a_graph_that_gives_the_same(kind, settings):
    model = tuned(kind, sizes={"num_hidden_layers": 4}, **settings)
    expected, _ = results(model, packed())
    found = compile_quickly(model)
    assert (found.attention, found.mlp, found.whole) == (4, 4, True)
    for _ in range(2):
        assert error(results(model, packed())[0], expected) < NEAR
    # The first layer's input needs no gradient; that is the other graph.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    unfuse(model)
    assert error(results(model, packed())[0], expected) == 0


@pytest.mark.parametrize("how", [{"recompute_mlp": True}, {"checkpointing": True}])
def test_compiled_layers_with_checkpointing(how):
    model = tuned(sizes={"num_hidden_layers": 3})
    expected, _ = results(model, packed())
    if how.pop("checkpointing", False):
        model.base_model.model.gradient_checkpointing_enable()
    compile_quickly(model, **how)
    assert error(results(model, packed())[0], expected) < NEAR


def test_compiled_layers_keep_no_more():
    model = adapted_layers(torch.bfloat16, layers=1)

    def growth():
        return bytes_kept(model, torch.bfloat16, 24) - bytes_kept(model, torch.bfloat16, 8)

    fuse(model)
    fused, _ = growth(), compile_quickly(model)
    assert growth() == fused


def test_without_gradients_nothing_is_compiled():
    model = tuned()
    compile_quickly(model)
    with torch.no_grad():
        model(**packed())
    model.eval()(**packed())
    assert not counters["stats"]


def test_micro_batches_of_one_shape_compile_nothing_anew():
    model = tuned(dtype=torch.float32)
    compile_quickly(model)
    shape = BatchShape(tokens=24, samples=8, longest=24)
    collate = PackCollator(shape, pad_id=1)
    inner = model.base_model.model.model

    def graphs(*packs):
        for lengths in packs:
            batch = collate([row_of(lengths)])
            assert batch["input_ids"].shape == (1, 24)
            output = inner(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            output.last_hidden_state.sum().backward()
        return counters["stats"]["unique_graphs"]

    assert graphs([12, 12], [1, 5], [3, 4, 5, 1, 2]) == 2
    # One sample that fills the shape has no mask under SDPA, which is compiled once more.
    assert graphs([24], [3, 4], [24]) == 4


def row_of(lengths, seed=0):
    generator = random.Random(seed)
    labels = [
        IGNORED if place == 0 else generator.choice([IGNORED, 3]) for length in lengths for place in range(length)
    ]
    ids = [generator.randrange(2, SIZES["vocab_size"]) for _ in labels]
    return {"input_ids": np.array(ids), "labels": np.array(labels), "lengths": np.array(lengths)}


@pytest.mark.parametrize("seed", range(20))
def test_filled_micro_batches_say_the_same_in_one_shape(seed):
    generator = random.Random(seed)
    shape = BatchShape(tokens=3 * 50, samples=3 * (8 + 1), longest=50)
    rows = [
        row_of([generator.randint(1, 6) for _ in range(generator.randint(1, 8))], seed)
        for _ in range(generator.randint(1, 3))
    ]
    plain, filled = PackCollator()(rows), PackCollator(shape, pad_id=1)(rows)
    tokens, samples = plain["input_ids"].shape[1], len(plain["cu_seq_lens_q"])
    for name in ("input_ids", "position_ids"):
        assert torch.equal(filled[name][:, :tokens], plain[name])
        assert filled[name].shape == (1, 150)
    assert (filled["input_ids"][0, tokens:] == 1).all()
    for name in ("labelled", "targets"):
        assert torch.equal(filled[name], plain[name])
    boundaries = filled["cu_seq_lens_q"]
    assert torch.equal(boundaries[:samples], plain["cu_seq_lens_q"])
    assert len(boundaries) == 27 + 1
    assert boundaries[-1] == 150
    steps = boundaries.diff()
    assert (steps >= 0).all()
    assert steps.max() <= filled["max_length_q"] == 50
    starts = [int(start) for start, size in zip(boundaries, steps, strict=False) if size]
    assert (filled["position_ids"][0] == 0).nonzero().squeeze(1).tolist() == starts


def test_a_compiled_run_counts_its_packs_alone_and_learns_the_same(workspace, qwen_tune):
    """A real run with real machine code; the filling is reported apart from the rows in its record."""
    same = ("train.max_steps=3", "export.merge=false", "train.global_batch_size=2")
    records = []
    for compiles in ("false", "true"):
        done = qwen_tune(
            *("train", "recipe.yaml", f"run.dir=run-{compiles}", f"train.torch_compile={compiles}", *same),
            cwd=workspace,
        )
        assert done.returncode == 0, done.stderr
        run = workspace / f"run-{compiles}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line.get("loss") is not None]
        records.append((json.loads((run / "run.json").read_text()), steps))
    (_, plain), (facts, whole) = records
    assert facts["fused"]["whole"] is True
    assert [line["tokens"] for line in whole] == [line["tokens"] for line in plain]
    micro_batches = 3 * facts["schedule"]["gradient_accumulation_steps"]
    shape = facts["schedule"]["per_device_train_batch_size"] * 256
    assert facts["tokens"]["processed"] == micro_batches * shape
    assert facts["tokens"]["processed"] - facts["tokens"]["padding"] == whole[-1]["tokens"]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in whole] == pytest.approx([line[name] for line in plain], rel=1e-4)


def test_layers_that_cannot_be_compiled_name_the_key(workspace, qwen_tune, tmp_path):
    changed = {"PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}  # no compiler there
    done = qwen_tune("train", "recipe.yaml", "train.torch_compile=true", cwd=workspace, **changed)
    assert done.returncode == 2
    assert "train.torch_compile: got true, but the layers cannot be compiled here" in done.stderr
    assert done.stderr.rstrip().endswith("Fix: write false")
    assert "Traceback" not in done.stderr
