"""Which attention is chosen, and that the one for packs is right. Its kernel needs a GPU; what calls it does not."""

from __future__ import annotations

import inspect

import pytest
import torch
from flash_on_cpu import FlashOnCpu
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from qwen_tune.chatml.template import IGNORED
from qwen_tune.errors import ModelError
from qwen_tune.families.family import ATTENTION_MODULES, DENSE_GROUPS
from qwen_tune.families.shape import read_shape
from qwen_tune.fused.install import fuse
from qwen_tune.machine import repeats_key_heads
from qwen_tune.model.attention import VARLEN, choose_attention, needs_no_mask, no_mask
from qwen_tune.recipe.schema import ModelSpec
from qwen_tune.training.batches import PackCollator
from qwen_tune.training.loss import add_supervised_loss

# PEFT uses names that Transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}


EXPERTS = {Qwen3MoeConfig: {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}}
HEADS_OF_64 = read_shape({"model_type": "qwen2", **SHAPE, "head_dim": 64}, "base")


def test_auto_takes_what_is_here():
    on_gpu = torch.cuda.is_available()
    assert choose_attention(ModelSpec(base="x"), torch.float32, HEADS_OF_64) == "sdpa"
    if not on_gpu:
        assert choose_attention(ModelSpec(base="x"), torch.bfloat16, HEADS_OF_64) == "sdpa"
    assert choose_attention(ModelSpec(base="x", attention="eager"), torch.bfloat16, HEADS_OF_64) == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
@pytest.mark.parametrize("name", [VARLEN, "flash_attention_2", "flash_attention_3"])
def test_what_is_not_here_is_refused(name):
    with pytest.raises(ModelError, match=rf"got {name}, which needs an NVIDIA GPU .* Fix: write attention: auto"):
        choose_attention(ModelSpec(base="x", attention=name), torch.bfloat16, HEADS_OF_64)


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, Qwen3MoeConfig], ids=["qwen2", "qwen3", "qwen3_moe"])
def test_without_boundaries_it_is_sdpa_with_its_mask(config):
    """Padded batches, generation with a cache, and packs whose boundaries only their position ids tell."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SHAPE), attn_implementation="sdpa").eval()
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(config(**SHAPE), attn_implementation=VARLEN).eval()
    ids = torch.randint(3, 300, (2, 12))
    padded = torch.ones(2, 12, dtype=torch.long)
    padded[1, :5] = 0
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        for inputs in (
            {"input_ids": ids, "attention_mask": padded},
            {"input_ids": ids[:1], "position_ids": packed, "use_cache": False},
            {"input_ids": ids},
        ):
            assert torch.equal(model(**inputs).logits, ours(**inputs).logits)
        inputs = {"input_ids": ids, "attention_mask": padded, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**inputs), ours.generate(**inputs))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, Qwen3MoeConfig], ids=["qwen2", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("window", [None, 6])
def test_every_token_of_a_pack_costs_what_it_costs_alone(config, window, fused):
    """With gradients, by FlashAttention's formula in the place of its kernel, on any torch that we take."""
    windows = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    samples = [torch.randint(3, 300, (length,)).tolist() for length in (9, 1, 17, 5)]
    losses, gradients = {}, {}
    for attention in ("eager", VARLEN):
        torch.manual_seed(0)
        made = config(**SHAPE, **windows, **EXPERTS.get(config, {}))
        model = AutoModelForCausalLM.from_config(made, attn_implementation=attention)
        assert {layer.self_attn.sliding_window for layer in model.model.layers} == {window}
        add_supervised_loss(model)
        targets = list(ATTENTION_MODULES if config in EXPERTS else DENSE_GROUPS["all-linear"])
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).train()
        if fused:
            found = fuse(tuned)
            assert (found.attention, found.mlp) == (2, 0 if config in EXPERTS else 2)
        if attention == "eager":  # each sample alone
            batches = [PackCollator()([pack([ids])]) for ids in samples if len(ids) > 1]
            losses[attention] = sum(tuned(**batch) for batch in batches)
            losses[attention].backward()
        else:
            batch = PackCollator()([pack(samples)])
            with FlashOnCpu() as flash:
                losses[attention] = tuned(**batch)
                losses[attention].backward()
            kv_heads = SHAPE["num_attention_heads" if repeats_key_heads() else "num_key_value_heads"]
            assert flash.key_heads == [kv_heads] * 2
            assert not any("scaled_dot_product" in name for name in flash.names)
            assert config in EXPERTS or not any("item" in name for name in flash.names)  # experts are counted on a CPU
        gradients[attention] = {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}
    torch.testing.assert_close(losses[VARLEN], losses["eager"])
    torch.testing.assert_close(gradients[VARLEN], gradients["eager"], rtol=1e-4, atol=1e-4)


def pack(samples: list[list[int]]) -> dict[str, list[int]]:
    return {
        "input_ids": [token for ids in samples for token in ids],
        "labels": [IGNORED if index == 0 else token for ids in samples for index, token in enumerate(ids)],
        "lengths": [len(ids) for ids in samples],
    }


def test_key_heads_are_repeated_just_where_torch_cannot_group_them():
    from torch.nn.attention.varlen import varlen_attn

    assert repeats_key_heads() == ("enable_gqa" not in inspect.signature(varlen_attn).parameters)


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, Qwen3MoeConfig], ids=["qwen2", "qwen3", "qwen3_moe"])
def test_packs_go_through_flash_attention_without_a_mask(config):
    """On tensors without numbers, which torch's own checks of arguments and shapes see as a GPU would."""
    with torch.device("meta"):
        made = config(**SHAPE, **EXPERTS.get(config, {}))
        model = AutoModel.from_config(made, attn_implementation=VARLEN, dtype=torch.bfloat16).train()
        batch = {name: torch.zeros(1, 30, dtype=torch.long) for name in ("input_ids", "position_ids")}
        boundaries = {f"cu_seq_lens_{side}": torch.zeros(4, dtype=torch.int32) for side in "qk"}
    lengths = {"max_length_q": 12, "max_length_k": 12}
    output = model(**batch, **boundaries, **lengths, attention_mask=no_mask(torch.device("meta")), use_cache=False)
    output.last_hidden_state.sum().backward()
    assert {tuple(p.grad.shape) == tuple(p.shape) for p in model.parameters()} == {True}


def test_only_boundaries_make_a_mask_unneeded():
    assert needs_no_mask(VARLEN, {"cu_seq_lens_q": torch.tensor([0, 3])})
    assert not needs_no_mask(VARLEN, {"input_ids": torch.tensor([[1]])})
    assert not needs_no_mask("sdpa", {"cu_seq_lens_q": torch.tensor([0, 3])})
