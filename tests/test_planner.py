"""The planner's sums against what torch, PEFT and bitsandbytes really keep, and what it chooses from them."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT
from flash_on_cpu import FlashOnCpu
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from planned import CONFIGS, config, made_recipe, workload
from step_flops import NOT_COUNTED
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from qwen_tune.errors import ModelError, QwenTuneError
from qwen_tune.families.attention import choose_attention, kernel_of
from qwen_tune.families.shape import Shape, read_shape
from qwen_tune.fused.install import fuse
from qwen_tune.hardware import GIB, GPUS, find_gpu
from qwen_tune.model.adapter import lora_config
from qwen_tune.model.attention import VARLEN
from qwen_tune.planner.activations import LEVELS, LOSS_CHUNK, kept
from qwen_tune.planner.adapter import read_adapter
from qwen_tune.planner.choice import LARGEST_MASKED_TOKENS, choose, levels, usable_bytes
from qwen_tune.planner.estimate import flops, tokens_per_second
from qwen_tune.planner.memory import int8_bytes, memory, nf4_bytes, optimizer_bytes
from qwen_tune.planner.workload import Workload, read_workload
from qwen_tune.recipe.files import load_recipe
from qwen_tune.training.loss import CHUNK_TOKENS, add_supervised_loss

# PEFT and TRL use names that Transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONFIG_CLASSES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig}
TOKENS = 32
SHARE = 0.5
# Two layers of Qwen2.5-0.5B and of Qwen3-0.6B; the vocabulary changes nothing of what is kept.
LAYERS = {
    "qwen2": {**config("qwen2", 896, 4864, 2, 14, 2, 512), "tie_word_embeddings": True},
    "qwen3": {**config("qwen3", 1024, 3072, 2, 16, 8, 512), "tie_word_embeddings": True},
}


def model_of(kind: str, dtype: torch.dtype, attention: str, **lora: Any) -> nn.Module:
    """Such layers with the labelled loss and an adapter on them."""
    sizes = {key: value for key, value in LAYERS[kind].items() if key != "model_type"}
    made = CONFIG_CLASSES[kind](**sizes)
    model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=attention)
    add_supervised_loss(model)
    model = get_peft_model(model, lora_config(model, made_recipe(lora=lora).lora))
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model.train()


def kept_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of the distinct storages, without parameters, that a forward keeps for its backward."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no place is given twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    labels = int(TOKENS * SHARE)
    inputs: dict[str, Any] = {
        "input_ids": torch.randint(0, 500, (1, TOKENS)),
        "position_ids": torch.cat([torch.arange(TOKENS // 2)] * 2)[None],
        "labelled": torch.arange(labels),
        "targets": torch.randint(0, 500, (labels,)),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        if dtype == torch.bfloat16:
            stack.enter_context(torch.autocast("cpu", dtype))
        if model.config._attn_implementation == VARLEN:
            stack.enter_context(FlashOnCpu())
            boundaries = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)
            inputs |= {f"cu_seq_lens_{side}": boundaries for side in "qk"}
            inputs |= {f"max_length_{side}": TOKENS // 2 for side in "qk"}
            inputs["attention_mask"] = {"full_attention": None}
        model(**inputs)
    return sum(found.values())


def small_workload(kind: str, dtype: torch.dtype, attention: str, *, fused: bool, **lora: Any) -> Workload:
    """What the planner makes of the same."""
    recipe = made_recipe(
        model={"attention": attention, "kernels": "auto" if fused else "off"},
        data={"max_length_tokens": TOKENS},
        lora=lora,
    )
    name: Any = str(dtype).removeprefix("torch.")
    counted = read_workload(recipe, read_shape(LAYERS[kind], kind), dtype=name, attention=attention, on_gpu=False)
    return replace(counted, supervised_share=SHARE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("attention", "checkpointing", "fused", "lora"),
    [
        ("sdpa", "none", False, {}),
        ("sdpa", "none", True, {}),
        ("sdpa", "full", False, {}),
        ("sdpa", "full", True, {}),
        ("sdpa", "selective", True, {}),
        ("sdpa", "none", False, {"lora_dropout": 0.05}),
        ("sdpa", "none", False, {"use_dora": True}),
        ("sdpa", "none", False, {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4}),
        ("sdpa", "none", True, {"target_modules": "attention", "rank_pattern": {"layers.0.self_attn.q_proj": 64}}),
        ("sdpa", "none", False, {"modules_to_save": ["1.mlp.down_proj", "1.self_attn.v_proj"]}),
        ("eager", "none", False, {}),
        ("eager", "none", True, {}),
        (VARLEN, "none", False, {}),
        (VARLEN, "none", True, {}),
        (VARLEN, "selective", True, {}),
    ],
    ids=str,
)
def test_what_a_forward_keeps_is_what_is_counted(kind, dtype, attention, checkpointing, fused, lora):
    model = model_of(kind, dtype, attention, **lora)
    if fused:
        found = fuse(model, recompute_mlp=checkpointing == "selective")
        assert (found.attention, found.mlp) == (2, 2)
    if checkpointing == "full":
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    work = small_workload(kind, dtype, attention, fused=fused, **lora)
    counted = kept(work, 1, checkpointing)
    # The mask that layers share, and rotary tables after a checkpoint, are held but not by the graph.
    held = TOKENS * TOKENS * (work.width if attention == "eager" else 1)
    if attention == VARLEN:
        held = -(3 * 4 + 2 * 16)  # instead of a mask the boundaries, and the state of no dropout in each layer
    held += 2 * TOKENS * work.shape.head_dim * work.width if checkpointing == "full" else 0
    assert counted.layers + counted.ends - held == pytest.approx(kept_bytes(model, dtype), rel=0.05)
    if fused and not lora:
        assert counted.layers + counted.ends - held == kept_bytes(model, dtype)  # to the byte


EXPERTS = {
    **config("qwen3_moe", 1024, 3072, 3, 16, 8, 512),
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
    "tie_word_embeddings": True,
}
"""Three layers in the manner of Qwen3-30B-A3B, the second of them dense."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("attention", "fused"), [("sdpa", False), ("sdpa", True), (VARLEN, True), ("eager", False)])
def test_what_experts_keep_is_what_is_counted(monkeypatch, dtype, attention, fused):
    monkeypatch.setitem(LAYERS, "qwen3_moe", EXPERTS)
    model = model_of("qwen3_moe", dtype, attention)
    if model.config._experts_implementation != "grouped_mm":
        pytest.skip("this Transformers computes experts one by one")
    if fused:
        found = fuse(model)
        assert (found.layers, found.attention, found.mlp) == (3, 3, 1)
    work = small_workload("qwen3_moe", dtype, attention, fused=fused)
    assert work.fused == (((fused, False), (fused, fused), (fused, False)))
    counted = kept(work, 1, "none")
    held = TOKENS * TOKENS * (work.width if attention == "eager" else 1) if attention != VARLEN else 0
    assert counted.layers + counted.ends - held == pytest.approx(kept_bytes(model, dtype), rel=0.05)


def test_the_parameters_of_experts_are_those_of_the_model(monkeypatch):
    monkeypatch.setitem(LAYERS, "qwen3_moe", EXPERTS)
    shape = read_shape(EXPERTS, "base")
    model = model_of("qwen3_moe", torch.float32, "sdpa")
    assert shape.parameters == sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert read_adapter(shape, made_recipe().lora).parameters == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    real = read_shape(CONFIGS["Qwen/Qwen3-30B-A3B"], "base")
    assert real.parameters / 1e9 == pytest.approx(30.5, abs=0.05)  # by its model card, and 3.3 of them active
    active = real.body + real.active_experts + 2 * real.head
    assert active / 1e9 == pytest.approx(3.3, abs=0.06)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"modules_to_save": ["1.mlp.down_proj"]},
        {"modules_to_save": ["up_proj"]},
        {"modules_to_save": ["o_proj"]},
        {"modules_to_save": ["0.self_attn.q_proj", "1.mlp.gate_proj"]},
        {"modules_to_save": ["input_layernorm"]},
        {"modules_to_save": ["1.post_attention_layernorm"]},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["lm_head"]},
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only", "target_modules": ["v_proj", "up_proj"]},
        {"bias": "lora_only", "target_modules": ["up_proj"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_counted_as_fused_is_what_is_fused(kind, lora):
    sizes = {**LAYERS[kind], "tie_word_embeddings": False}
    made = CONFIG_CLASSES[kind](**{k: v for k, v in sizes.items() if k != "model_type"})
    recipe = made_recipe(lora=lora)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(made)
        model = get_peft_model(base, lora_config(base, recipe.lora))
    found = fuse(model)
    counted = read_workload(recipe, read_shape(sizes, kind), dtype="float32", attention="sdpa", on_gpu=False)
    assert [sum(halves) for halves in zip(*counted.fused, strict=True)] == [found.attention, found.mlp]
    assert ("selective" in levels(counted, "auto")) == (found.mlp == found.layers)


def test_parameters_are_those_of_the_model():
    for kind, sizes in LAYERS.items():
        shape = read_shape(sizes, kind)
        model = model_of(kind, torch.float32, "sdpa", rank_pattern={"v_proj": 5}, target_modules=["v_proj", "up_proj"])
        frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
        assert shape.parameters == frozen
        recipe = made_recipe(lora={"rank_pattern": {"v_proj": 5}, "target_modules": ["v_proj", "up_proj"]})
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert read_adapter(shape, recipe.lora).parameters == trained


def test_what_is_trained_beside_the_adapter_is_counted():
    shape = read_shape(CONFIGS["Qwen/Qwen2.5-7B"], "base")
    plain = read_adapter(shape, made_recipe().lora)
    assert plain.parameters == plain.lora_parameters == 40_370_176
    whole = read_adapter(shape, made_recipe(lora={"modules_to_save": ["lm_head", "model.norm"]}).lora)
    assert whole.parameters - plain.parameters == 152064 * 3584 + 3584
    assert whole.trains_head
    norms = read_adapter(shape, made_recipe(lora={"modules_to_save": ["norm"]}).lora)
    assert norms.parameters - plain.parameters == (2 * 28 + 1) * 3584
    rows = read_adapter(
        shape, made_recipe(lora={"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1]}}).lora
    )
    assert rows.parameters - plain.parameters == 3 * 3584
    without = read_adapter(shape, made_recipe(lora={"exclude_modules": ["k_proj"]}).lora)
    assert plain.parameters - without.parameters == 28 * 16 * (3584 + 512)
    dora = read_adapter(shape, made_recipe(lora={"use_dora": True}).lora)
    assert dora.parameters - plain.parameters == sum(linear.outputs for linear in shape.linears.values())
    with pytest.raises(ModelError, match="towers matches no module"):
        read_adapter(shape, made_recipe(lora={"modules_to_save": ["towers"]}).lora)


def test_quantized_matrices_have_the_bytes_that_bitsandbytes_gives_them():
    functional = pytest.importorskip("bitsandbytes.functional")
    for outputs, inputs in ((896, 896), (128, 896), (4864, 896), (96, 40)):
        weight = torch.randn(outputs, inputs)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
        tables = (state.code, state.absmax, state.offset, state.state2.absmax, state.state2.code)
        real = packed.nbytes + sum(tensor.nbytes for tensor in tables)
        assert nf4_bytes(outputs, inputs) == real
        values, scales, _ = functional.int8_vectorwise_quant(weight.half())
        assert int8_bytes(outputs, inputs) == values.nbytes + scales.nbytes


def test_optimizers_remember_what_is_counted():
    from bitsandbytes.optim import AdamW8bit

    work = small_workload("qwen2", torch.float32, "sdpa", fused=True)
    tensors = [nn.Parameter(torch.zeros(shape)) for shape in work.adapter.tensors]
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    optimizer = torch.optim.AdamW(tensors)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    assert optimizer_bytes(work) == sum(tensor.nbytes for tensor in states)
    small = AdamW8bit(tensors)
    try:
        small.step()
    except (NotImplementedError, RuntimeError):
        pytest.skip("bitsandbytes has no 8-bit optimizer on this CPU")
    names = ("state1", "state2", "absmax1", "absmax2")
    states = [value for state in small.state.values() for name, value in state.items() if name in names]
    assert optimizer_bytes(replace(work, optim="adamw_8bit")) == sum(tensor.nbytes for tensor in states)


def test_every_optimizer_of_the_schema_is_counted():
    from typing import get_args

    from qwen_tune.recipe.schema import TrainSpec

    work = small_workload("qwen2", torch.float32, "sdpa", fused=True)
    for name in get_args(TrainSpec.model_fields["optim"].annotation):
        assert optimizer_bytes(replace(work, optim=name)) >= 0
    assert optimizer_bytes(replace(work, optim="sgd")) == 0


def test_the_loss_counts_the_chunk_that_it_has():
    assert LOSS_CHUNK == CHUNK_TOKENS


def test_operations_are_those_of_the_published_table():
    """The table of limits: GFLOP a token at r=16 on all linear layers, 4,096 tokens, every token labelled."""
    expected = {
        "Qwen2.5-0.5B-Instruct": 2.65,
        "Qwen2.5-1.5B-Instruct": 7.52,
        "Qwen2.5-7B-Instruct": 31.4,
        "Qwen3-8B": 34.8,
    }
    for name, gflops in expected.items():
        work = replace(workload(made_recipe(model={"base": f"Qwen/{name}"})), attention="varlen")
        assert flops(work, 1, "none") / 1e9 == pytest.approx(gflops, rel=0.01)
        assert 1.3 < flops(work, 1, "full") / flops(work, 1, "none") < 1.5
    work = replace(workload(made_recipe()), attention="varlen")
    assert tokens_per_second(work, find_gpu("h100"), 1, "none") == pytest.approx(14_110, rel=0.01)


@pytest.mark.parametrize("lora", [{}, {"target_modules": ["gate_proj", "down_proj"], "r": 64}], ids=str)
def test_operations_of_what_is_computed_again_are_counted(lora):
    tokens, extra = 64, []
    model = model_of("qwen2", torch.float32, "sdpa", **lora)
    for again in (False, True):
        fuse(model, recompute_mlp=again)
        counter = FlopCounterMode(display=False, custom_mapping=NOT_COUNTED)
        inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "position_ids": torch.arange(tokens)[None]}
        labels = {"labelled": torch.arange(4), "targets": torch.zeros(4, dtype=torch.long)}
        with counter:
            model(**inputs, **labels).backward()
        extra.append(counter.get_total_flops() / tokens)
    work = small_workload("qwen2", torch.float32, "sdpa", fused=True, **lora)
    difference = flops(work, 1, "selective") - flops(work, 1, "none")
    assert difference == pytest.approx(extra[1] - extra[0])


workloads = st.builds(
    lambda base, quantization, attention, dropout, packing, length, dtype: workload(
        made_recipe(
            model={"base": base, "quantization": quantization, "attention": attention},
            data={"packing": packing, "max_length_tokens": length},
            lora={"lora_dropout": dropout},
        ),
        dtype=dtype,
    ),
    st.sampled_from(sorted(CONFIGS)),
    st.sampled_from(["none", "int8", "nf4"]),
    st.sampled_from(["auto", "eager", "varlen"]),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
    st.sampled_from([8, 100, 512, 1024, 4096, 32768]),
    st.sampled_from(["bfloat16", "float32"]),
)


@settings(deadline=None, max_examples=20)
@given(workloads, st.integers(1, 200), st.integers(1, 64), st.sampled_from(["auto", "none", "full"]))
def test_a_plan_fits_divides_and_gets_no_worse_with_memory(work, gib, batch, checkpointing):
    train = made_recipe(train={"global_batch_size": batch, "gradient_checkpointing": checkpointing}).train
    choice = choose(work, train, gib * GIB)
    assert batch % choice.sequences == 0
    assert choice.sequences == 1 or choice.sequences * work.sequence_tokens <= 16_384
    if work.is_masked(choice.sequences):
        assert choice.sequences == 1 or choice.sequences * work.sequence_tokens <= LARGEST_MASKED_TOKENS
    smallest = memory(work, 1, "full" if checkpointing == "auto" else checkpointing).peak
    assert choice.fits == (choice.memory.peak <= usable_bytes(gib * GIB))
    assert choice.fits or smallest > usable_bytes(gib * GIB)
    larger = choose(work, train, 2 * gib * GIB)
    if choice.fits:
        assert larger.fits
        # Less is computed again, or as much with as many rows.
        order = (LEVELS.index(choice.checkpointing), -choice.sequences)
        assert (LEVELS.index(larger.checkpointing), -larger.sequences) <= order
    assert choose(work, train, None).fits


@settings(deadline=None, max_examples=15)
@given(workloads)
def test_computing_more_again_takes_less_memory(work):
    peaks = [memory(work, 1, level).peak for level in LEVELS]
    assert peaks == sorted(peaks, reverse=True)
    assert all(size >= 0 for level in LEVELS for size in memory(work, 1, level).parts().values())


def test_half_a_layer_is_computed_again_only_where_it_is_fused():
    plain, stock = workload(made_recipe()), workload(made_recipe(model={"kernels": "off"}))
    assert "selective" not in levels(stock, "auto")
    assert levels(plain, "selective") == ("selective",)
    saved = kept(plain, 1, "none").layers - kept(plain, 1, "selective").layers
    wide = 2 * plain.shape.intermediate * plain.width * plain.sequence_tokens * plain.shape.layers
    assert saved == pytest.approx(wide, rel=0.01)
    assert kept(stock, 1, "none").layers == kept(stock, 1, "selective").layers


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_state_the_memory_that_is_counted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    stated = re.findall(r"about (\d+) GB on a GPU(?:, (\d+) GB on a CPU)?", path.read_text(encoding="utf-8"))
    if path.stem == "quickstart":
        return
    recipe = load_recipe(path)
    least = memory(workload(recipe), 1, "full").peak / 1e9
    assert float(stated[0][0]) == pytest.approx(least, rel=0.1, abs=0.5)
    if stated[0][1]:
        on_cpu = memory(workload(recipe, on_gpu=False), 1, "none").peak / 1e9
        assert float(stated[0][1]) == pytest.approx(on_cpu, rel=0.1, abs=0.5)


def test_gpus_are_found_by_their_names():
    assert find_gpu("h100-80gb") is find_gpu("H100") is find_gpu("NVIDIA H100")
    assert find_gpu("RTX 4090").name == "rtx4090-24gb"
    with pytest.raises(QwenTuneError, match=r"names several GPUs\. Fix: write a100-40gb or a100-80gb"):
        find_gpu("a100")
    with pytest.raises(QwenTuneError, match="h200-141gb"):
        find_gpu("h220")
    with pytest.raises(QwenTuneError, match="t4-16gb has no bfloat16"):
        find_gpu("t4").dtype("bfloat16")
    assert find_gpu("t4").dtype("auto") == "float32"
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


def test_a_config_without_a_size_is_refused():
    with pytest.raises(ModelError, match="hidden_size is None; expected a positive whole number"):
        read_shape({"model_type": "qwen2", "num_attention_heads": 4}, "base")
    assert isinstance(read_shape(CONFIGS["Qwen/Qwen3-8B"], "base"), Shape)


def test_estimate_reports_every_gpu_and_the_parts(qwen_tune):
    reported = qwen_tune("estimate", "recipes/quickstart.yaml")
    assert reported.returncode == 0, reported.stderr
    assert [line.split()[0] for line in reported.stdout.splitlines()[3 : 3 + len(GPUS) + 1]] == [
        *(g.name for g in GPUS),
        "cpu",
    ]
    assert "weights of the base" in reported.stdout
    assert "not measured" in reported.stdout


def test_estimate_as_json_and_for_a_run_of_known_length(qwen_tune):
    reported = qwen_tune(
        "estimate", "recipes/quickstart.yaml", "train.max_steps=100", "--gpu", "h100", "--gpu", "RTX 4090", "--json"
    )
    first, second = (json.loads(line) for line in reported.stdout.splitlines())
    assert (first["device"], second["device"]) == ("h100-80gb", "rtx4090-24gb")
    assert first["fits"]
    assert first["fused"]
    assert sum(first["predicted_bytes"].values()) == first["predicted_peak_bytes"]
    assert first["hours"] == pytest.approx(100 * 256 / first["tokens_per_second"] / 3600)


def test_estimate_leaves_out_what_cannot_compute_it(qwen_tune):
    """FlashAttention needs a GPU with its instructions and 16 bits; such rows would promise what `train` refuses."""
    reported = qwen_tune("estimate", "recipes/quickstart.yaml", "model.attention=varlen", "--json")
    devices = [json.loads(line)["device"] for line in reported.stdout.splitlines()]
    assert "l4-24gb" in devices
    assert not {"t4-16gb", "cpu"} & set(devices)
    refused = qwen_tune("estimate", "recipes/quickstart.yaml", "model.attention=flash_attention_2", "--gpu", "t4")
    assert refused.returncode == 2
    assert "t4-16gb does not compute flash_attention_2" in refused.stderr
    nowhere = qwen_tune("estimate", "recipes/quickstart.yaml", "model.attention=varlen", "model.dtype=float32")
    assert nowhere.returncode == 2
    assert "no device that is known here computes. Fix: write attention: auto" in nowhere.stderr


@pytest.mark.parametrize(
    ("asked", "dtype", "head", "flash", "found"),
    [
        ("auto", "bfloat16", 128, True, "varlen"),
        ("auto", "float16", 128, True, "varlen"),
        ("auto", "float16", 128, False, "sdpa"),
        ("auto", "float32", 128, True, "sdpa"),
        ("auto", "bfloat16", 512, True, "sdpa"),
        ("flash_attention_2", "float16", 128, True, "varlen"),
        ("varlen", "bfloat16", 128, False, None),
        ("eager", "float32", 128, False, "eager"),
    ],
)
def test_attention_is_planned_as_it_is_chosen(asked, dtype, head, flash, found):
    shape = replace(read_shape(CONFIGS["Qwen/Qwen3-8B"], "base"), head_dim=head)
    if found is None:
        with pytest.raises(ModelError, match=f"got {asked}, which needs an NVIDIA GPU"):
            choose_attention(asked, dtype, shape, has_flash=flash)
    else:
        assert kernel_of(choose_attention(asked, dtype, shape, has_flash=flash)) == found


def test_estimate_refuses_what_it_does_not_know(qwen_tune, tmp_path):
    unknown = qwen_tune("estimate", "recipes/quickstart.yaml", "--gpu", "h220")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "Fix: write h200-141gb" in unknown.stderr
    missing = qwen_tune("estimate", "recipes/quickstart.yaml", f"model.base={tmp_path}/none")
    assert missing.returncode == 2
    assert "is not there" in missing.stderr
    target = qwen_tune("estimate", "recipes/quickstart.yaml", "lora.target_modules=[c_attn]")
    assert target.returncode == 2
    assert "matches no linear layer" in target.stderr


def test_a_run_records_its_plan(trained):
    path, output = trained
    facts = json.loads((path / "run.json").read_text())
    plan = facts["plan"]
    assert (plan["per_device_train_batch_size"], plan["gradient_checkpointing"]) == (1, "none")
    assert plan["predicted_peak_bytes"] == sum(plan["predicted_bytes"].values())
    assert "GiB at most, as counted" in output
    assert facts["gradient_checkpointing"] == "none"


def test_advice_on_memory_that_ran_out_is_in_numbers():
    from qwen_tune.errors import TrainingError
    from qwen_tune.training.batch_plan import explain_out_of_memory

    recipe = made_recipe(train={"gradient_checkpointing": "none"})
    choice = choose(workload(recipe), recipe.train, 24 * GIB)
    with pytest.raises(TrainingError) as caught, explain_out_of_memory(recipe, choice):
        raise torch.OutOfMemoryError("CUDA out of memory")
    text = str(caught.value)
    assert re.search(r"train\.gradient_checkpointing=full \(\d+\.\d GiB\); or model\.quantization=nf4 \(\d+\.\d", text)
    assert f"{choice.memory.peak / GIB:.1f} GiB were counted" in text
