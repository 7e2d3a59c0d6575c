"""Which attention is chosen, and that the one for packs is right where there are none. The rest needs a GPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from qwen_tune.errors import ModelError
from qwen_tune.model.attention import VARLEN, choose_attention, needs_no_mask
from qwen_tune.recipe.schema import ModelSpec

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


def test_auto_takes_what_is_here():
    on_gpu = torch.cuda.is_available()
    assert choose_attention(ModelSpec(base="x"), torch.float32, 64) == "sdpa"
    if not on_gpu:
        assert choose_attention(ModelSpec(base="x"), torch.bfloat16, 64) == "sdpa"
    assert choose_attention(ModelSpec(base="x", attention="eager"), torch.bfloat16, 64) == "eager"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
@pytest.mark.parametrize("name", [VARLEN, "flash_attention_2", "flash_attention_3"])
def test_what_is_not_here_is_refused(name):
    with pytest.raises(ModelError, match=rf"got {name}, which needs an NVIDIA GPU .* Fix: write attention: auto"):
        choose_attention(ModelSpec(base="x", attention=name), torch.bfloat16, 64)


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config], ids=["qwen2", "qwen3"])
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


def test_only_boundaries_make_a_mask_unneeded():
    assert needs_no_mask(VARLEN, {"cu_seq_lens_q": torch.tensor([0, 3])})
    assert not needs_no_mask(VARLEN, {"input_ids": torch.tensor([[1]])})
    assert not needs_no_mask("sdpa", {"cu_seq_lens_q": torch.tensor([0, 3])})
