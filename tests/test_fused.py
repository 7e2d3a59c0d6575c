"""The fused decoder layers against PEFT's own: values, gradients, what they keep, and where they stand back."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from layer_costs import LINEAR
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from tuned_models import FUSED, KINDS, SIZES, batch, error, nodes, packed, randomize, results, tuned

from qwen_tune.fused import attention
from qwen_tune.fused import elementwise as norm
from qwen_tune.fused import elementwise as rotation
from qwen_tune.fused import mlp as fused_mlp
from qwen_tune.fused.install import fuse, unfuse
from qwen_tune.fused.lora_math import Projection

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture
def exact_norms(monkeypatch):
    """Transformers' norms are in float32 even in a float64 model; here they are as exact as the rest."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for norm_class in (Qwen2RMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(norm_class, "forward", forward)


VARIANTS = {
    "all": {},
    "rslora": {"use_rslora": True},
    "ranks": {
        "rank_pattern": {"k_proj": 1, "layers.0.mlp.up_proj": 5, "o_proj": 2},
        "alpha_pattern": {"v_proj": 11, "layers.1.mlp.down_proj": 2},
    },
    "attention": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "some": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "others": {"target_modules": ["k_proj", "o_proj", "up_proj"]},
    "upper layer": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_values_and_all_gradients_equal_pefts_in_float64(exact_norms, kind, variant):
    model = tuned(kind, **VARIANTS[variant])
    theirs, used = results(model, packed())
    assert not used
    report = fuse(model)
    assert (report.layers, report.attention, report.mlp, report.reasons) == (2, 2, 2, {})
    ours, used = results(model, packed())
    assert used == FUSED
    assert error(ours, theirs) < 1e-12


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_batch_of_rows_with_padding_and_a_bias_of_the_output_projection(exact_norms, kind):
    model = tuned(kind, sizes={"attention_bias": True} if kind == "qwen3" else None)
    inputs = batch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :4] = 0
    theirs, _ = results(model, inputs)
    fuse(model)
    ours, used = results(model, inputs)
    assert used == FUSED
    assert error(ours, theirs) < 1e-12


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_gradient_of_the_input_and_gradient_checkpointing(exact_norms, implementation, reentrant):
    model = tuned()
    model.set_attn_implementation(implementation)
    model.enable_input_require_grads()
    embedding = model.get_input_embeddings()
    inputs = []
    embedding.register_forward_hook(lambda module, args, output: (inputs.append(output), output.retain_grad())[-1])
    theirs, _ = results(model, packed())
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = []
    for layer in model.base_model.model.model.layers:
        if reentrant is not None:
            run = layer._gradient_checkpointing_func
            layer._gradient_checkpointing_func = lambda *args, run=run: (checkpointed.append(run), run(*args))[-1]
    fuse(model)
    ours, _ = results(model, packed())
    assert len(checkpointed) == (0 if reentrant is None else 2)
    assert error({**ours, "input": inputs[1].grad}, {**theirs, "input": inputs[0].grad}) < 1e-12


@pytest.mark.parametrize("kind", list(KINDS))
def test_float32_with_the_norms_of_transformers(kind):
    model = tuned(kind, torch.float32)
    theirs, _ = results(model, packed())
    fuse(model)
    ours, used = results(model, packed())
    assert used == FUSED
    assert error(ours, theirs) < 1e-4


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_as_near_to_float64_as_peft(exact_norms, kind, base):
    model = tuned(kind, base)
    exact, _ = results(copy.deepcopy(model).double(), packed())
    with torch.autocast("cpu", torch.bfloat16):
        theirs, _ = results(model, packed())
        fuse(model)
        ours, used = results(model, packed())
    assert used == FUSED

    def distance(found):
        lengths = [((found[name] - exact[name]).norm() / exact[name].norm()).item() for name in exact]
        return sum(lengths) / len(lengths)

    assert {name: tensor.dtype for name, tensor in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert 1e-4 < distance(ours) < 1.1 * distance(theirs)


def quantize(model, kind, **settings):
    """Puts bitsandbytes' layers under PEFT's, as loading a quantized base does."""
    import bitsandbytes as bnb
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt

    config = LoraConfig(r=3, lora_alpha=5)
    for name, module in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] in LINEAR:
            bias = module.bias is not None
            if kind == "nf4":
                layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias, quant_type="nf4", **settings)
            else:
                layer = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias, has_fp16_weights=False)
            layer.load_state_dict(module.state_dict())
            layer = layer.to("cpu").requires_grad_(False)
            wrapper = Linear4bit if kind == "nf4" else Linear8bitLt
            extra = {"has_fp16_weights": False, "threshold": 0, "index": None} if kind == "int8" else {}
            parent, _, last = name.rpartition(".")
            setattr(
                model.get_submodule(parent), last, wrapper(layer, "default", config=config, r=3, lora_alpha=5, **extra)
            )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.requires_grad_()
    return model.train()


def test_4_bit_weights_are_unpacked_anew_and_never_kept():
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = quantize(randomize(KINDS["qwen2"](**sizes), torch.float32), "nf4", compress_statistics=True)
    theirs, used = results(model, packed())
    assert not used
    assert fuse(model).reasons == {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kept = []
        ours, used = results(model, packed())
    assert used == FUSED
    assert error(ours, theirs) < 1e-4
    weights = {
        (module.in_features, module.out_features) for module in model.modules() if hasattr(module, "compute_dtype")
    }
    shapes = {tuple(tensor.shape) for tensor in kept}
    assert not shapes & (weights | {(b, a) for a, b in weights})


def test_gradients_of_the_functions_themselves():
    torch.manual_seed(0)
    double = {"dtype": torch.float64}

    def projection(out, size, rank, bias=False):
        frozen = Projection(
            torch.randn(out, size, **double), torch.randn(out, **double) if bias else None, None, rank, 1.7
        )
        adapters = [torch.randn(rank, size, **double), torch.randn(out, rank, **double)] if rank else []
        return frozen, [tensor.requires_grad_() for tensor in adapters]

    hidden = torch.randn(2, 3, 6, **double).requires_grad_()
    weight, eps = torch.randn(6, **double), 0.1
    cos, sin = torch.randn(1, 3, 4, **double), torch.randn(1, 3, 4, **double)
    q, k, v = projection(8, 6, 2, bias=True), projection(4, 6, 1), projection(4, 6, 0)
    for heads in (None, (torch.randn(4, **double), torch.randn(4, **double))):
        inputs = attention.InputWeights(weight, eps, q[0], k[0], v[0], heads, 4, torch.float64)
        assert torch.autograd.gradcheck(
            lambda h, *a, w=inputs: attention.attention_inputs(h, cos, sin, w, a), (hidden, *q[1], *k[1])
        )
    o = projection(6, 8, 2)
    attended = torch.randn(2, 3, 8, **double).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, h, *a: attention.attention_output(x, h, o[0], torch.float64, a), (attended, hidden, *o[1])
    )
    gate, up, down = projection(5, 6, 2), projection(5, 6, 3), projection(6, 5, 1)
    weights = fused_mlp.MlpWeights(weight, eps, gate[0], up[0], down[0], torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, *a: fused_mlp.mlp(h, weights, list(a)), (hidden, *gate[1], *up[1], *down[1])
    )


def test_norm_and_rotation_are_those_of_transformers_in_bfloat16():
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    torch.manual_seed(0)
    x = torch.randn(7, 32).bfloat16()
    module = Qwen2RMSNorm(32).bfloat16()
    module.weight.data.normal_()
    normed, rstd = norm.rms_norm(x, module.weight, module.variance_epsilon)
    assert rstd.dtype == torch.float32
    assert torch.equal(normed, module(x))
    q = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    cos, sin = torch.randn(1, 7, 8, dtype=torch.float64), torch.randn(1, 7, 8, dtype=torch.float64)
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    assert torch.allclose(rotation.rotate(q, cos[:, :, None], sin[:, :, None]), expected, rtol=0, atol=1e-14)


def two_adapters(model):
    model.add_adapter("second", LoraConfig(r=2, target_modules=list(LINEAR)))
    model.base_model.set_adapter(["default", "second"])


def hook(model):
    for module in model.modules():
        if type(module).__name__ == "Linear" and type(module).__module__.startswith("peft"):
            module.register_forward_hook(lambda module, args, output: output * 2)


def train_norms(model):
    for name, parameter in model.named_parameters():
        if name.endswith("layernorm.weight"):
            parameter.requires_grad_()


def own_forward(model):
    for module in model.modules():
        if isinstance(module, Qwen2RMSNorm):
            module.forward = types.MethodType(lambda self, x: x * self.weight, module)


STATIC = {
    "DoRA": ({"use_dora": True}, None, "DoRA"),
    "dropout": ({"lora_dropout": 0.5}, None, "dropout"),
    "bias": ({"lora_bias": True}, None, "a bias"),
    "trained bias": ({"bias": "all", "target_modules": ["q_proj", "k_proj", "v_proj"]}, None, "base is trained"),
    "two": ({}, two_adapters, "not just one"),
    "merged": ({}, lambda model: model.merge_adapter(), "switched off or merged"),
    "hooks": ({}, hook, "hooks"),
    "norms": ({}, train_norms, "a norm is trained"),
    "saved": ({"modules_to_save": ["mlp"], "target_modules": ["q_proj"]}, None, "ModulesToSaveWrapper"),
    "forward": ({}, own_forward, "forward of its own"),
}


@pytest.mark.parametrize("name", list(STATIC))
def test_what_is_not_plain_lora_goes_its_usual_way(name):
    lora, change, reason = STATIC[name]
    model = tuned("qwen2", torch.float32, **lora)
    if change:
        change(model)
    torch.manual_seed(0)
    theirs, _ = results(model, packed()) if name != "merged" else (None, None)
    wanted = model(**packed()).logits
    report = fuse(model)
    assert any(reason in text for text in report.reasons), report
    assert reason in str(report)
    if theirs:
        torch.manual_seed(0)
        ours, used = results(model, packed())
        halves = {"_MlpBackward"} if name == "trained bias" else FUSED - {"_MlpBackward"} if name == "saved" else set()
        assert used == halves
        if not halves:
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert error(ours, theirs) < 1e-4
    elif name == "merged":
        assert torch.equal(model(**packed()).logits, wanted)


def test_8_bit_weights_and_mixtures_of_experts_go_their_usual_way():
    model = quantize(randomize(KINDS["qwen2"](), torch.float32), "int8")
    report = fuse(model)
    assert (report.attention, report.mlp) == (0, 0)
    assert any("Linear8bitLt" in text for text in report.reasons)
    moe = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**SIZES, num_experts=2, moe_intermediate_size=8, shared_expert_intermediate_size=8)
    )
    report = fuse(get_peft_model(moe, LoraConfig(target_modules=["q_proj"])))
    assert (report.layers, report.attention, report.mlp) == (2, 0, 0)
    assert report.reasons == {"Qwen2MoeDecoderLayer is not a layer that is known here": 4}


def test_a_state_that_changes_is_seen_at_every_forward():
    model = tuned(dtype=torch.float32)
    inputs = packed()
    plain = model(**inputs).logits
    with model.disable_adapter():
        base = model(**inputs).logits
    model.eval()
    evaluated = model(**inputs).logits
    generated = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.train()
    fuse(model)
    ours = model(**inputs)
    assert nodes(ours.loss) & FUSED == FUSED
    assert torch.allclose(ours.logits, plain, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base)
    assert not torch.equal(base, plain)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain)
    model.eval()
    assert torch.equal(model(**inputs).logits, evaluated)
    again = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(again, generated)
    model.train()
    two_adapters(model)
    assert not nodes(model(**inputs).loss) & FUSED
    model.set_adapter("default")
    assert nodes(model(**inputs).loss) & FUSED == FUSED
    # bfloat16 below float32 adapters: PEFT multiplies them in float32 unless autocast is on.
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    assert not nodes(model(**inputs).loss) & FUSED
    with torch.autocast("cpu", torch.bfloat16):
        assert nodes(model(**inputs).loss) & FUSED == FUSED


def test_names_and_parameters_stay_and_unfusing_leaves_nothing():
    model = tuned(dtype=torch.float32)
    names, parameters = list(model.state_dict()), list(model.parameters())
    theirs, _ = results(model, packed())
    fuse(model)
    assert fuse(model).attention == 2
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert not torch.equal(copied(**packed()).logits, theirs["logits"])  # the copy's layers are its own
    assert error(results(model, packed())[0], theirs) < 1e-4
    unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())
    ours, used = results(model, packed())
    assert not used
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_gradients_accumulate_and_pass_through_ddp():
    from torch import distributed

    model = tuned(dtype=torch.float32)
    fuse(model)
    once, _ = results(model, packed())
    once = {name: tensor.clone() for name, tensor in once.items()}
    model(**packed()).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, 2 * once[name], rtol=1e-5, atol=1e-7)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model.zero_grad(set_to_none=True)
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(**packed()).loss.backward()
        assert all(torch.allclose(p.grad, once[n]) for n, p in model.named_parameters() if p.requires_grad)
    finally:
        distributed.destroy_process_group()


def test_uninitialized_memory_is_never_read():
    model = tuned(dtype=torch.float32)
    fuse(model)
    wanted, _ = results(model, packed())
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        ours, _ = results(model, packed())
    finally:
        torch.use_deterministic_algorithms(False)
    assert error(ours, wanted) == 0
