"""Which attention is chosen, and that the one for packs is right where there are none. The rest needs a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, Qwen2Config, Qwen3Config

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


class Called(TorchDispatchMode):
    """The names of aten's and other operations, and how often each was called."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.names[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("window", [None, 16])
def test_packs_go_through_flash_attention_without_a_mask(config, window):
    """On tensors without numbers, which check arguments and shapes as a GPU would; only a GPU can compute them."""
    windows = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0} if window else {}
    with torch.device("meta"):
        model = AutoModel.from_config(
            config(**SHAPE, **windows), attn_implementation=VARLEN, dtype=torch.bfloat16
        ).train()
        batch = {name: torch.zeros(1, 30, dtype=torch.long) for name in ("input_ids", "position_ids")}
        boundaries = {f"cu_seq_lens_{side}": torch.zeros(4, dtype=torch.int32) for side in "qk"}
    assert set(model.config.layer_types) == {"sliding_attention" if window else "full_attention"}
    lengths = {"max_length_q": 12, "max_length_k": 12}
    with Called() as called:
        masks = dict.fromkeys(model.config.layer_types)
        output = model(**batch, **boundaries, **lengths, attention_mask=masks, use_cache=False)
        output.last_hidden_state.sum().backward()
    assert called.names["torch_attn::_varlen_attn"] == called.names["torch_attn::_varlen_attn_backward"] == 2
    assert not any("scaled_dot_product" in name or "item" in name for name in called.names)
    shapes = {tuple(p.grad.shape) == tuple(p.shape) for p in model.parameters()}
    assert shapes == {True}


def test_only_boundaries_make_a_mask_unneeded():
    assert needs_no_mask(VARLEN, {"cu_seq_lens_q": torch.tensor([0, 3])})
    assert not needs_no_mask(VARLEN, {"input_ids": torch.tensor([[1]])})
    assert not needs_no_mask("sdpa", {"cu_seq_lens_q": torch.tensor([0, 3])})
