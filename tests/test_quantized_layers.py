"""Quantized layers on a CPU: evaluation leaves them as they were, and computes what training computes."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qwen_tune.model.quantized_layers import keep_training_function

WIDTH, HEIGHT = 256, 128


def quantized(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    plain = nn.Linear(WIDTH, HEIGHT, dtype=dtype)
    if kind == "nf4":
        layer = bnb.nn.Linear4bit(WIDTH, HEIGHT, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=layer)
    else:
        layer = bnb.nn.Linear8bitLt(WIDTH, HEIGHT, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    layer.bias = nn.Parameter(plain.bias.data)
    return nn.Sequential(layer.to("cpu"))  # moving it quantizes it


def bits(layer: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else str(tensor).encode()
        for name, tensor in layer.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_evaluation_computes_what_training_computes_and_leaves_the_weights(kind, dtype):
    model = quantized(kind, dtype)
    keep_training_function(model)
    before = bits(model)
    torch.manual_seed(2)
    x = torch.randn(2, 24, WIDTH, dtype=dtype)
    x[0, 0, :4] *= 50  # what int8 with its outliers would treat apart
    trained = model.train()(x.clone().requires_grad_())
    model.eval()
    with torch.no_grad():
        evaluated = model(x)
    with torch.inference_mode():
        one_token = model(x[:, :1])
    again = model.train()(x.clone().requires_grad_())
    assert torch.equal(evaluated, trained)
    assert torch.equal(again, trained)
    if dtype == torch.float32:
        torch.testing.assert_close(one_token, trained[:, :1])
    else:
        # One token is another product: what is rounded to 8 bits before the bias is added differs by its last bits.
        apart = (one_token.float() - trained[:, :1].float()).abs()
        assert (apart <= 2**-6 * (trained[:, :1].float().abs() + model[0].bias.float().abs())).all()
    assert bits(model) == before
    assert not model[0].weight.is_inference()


def test_no_layer_may_repack_its_weights_whatever_the_cpu():
    """bitsandbytes asks this flag, which it sets by the CPU: only some machines would show the difference."""
    model = quantized("nf4", torch.float32)
    assert isinstance(model[0].support_avx512bf16_for_cpu, (bool, int))
    keep_training_function(model)
    assert not model[0].support_avx512bf16_for_cpu


def test_unpacked_weights_are_the_table_times_the_scale_on_every_cpu():
    """bitsandbytes has code of its own for each kind of CPU; all of it must give these values."""
    model = quantized("nf4", torch.float32)
    weight = model[0].weight
    state = weight.quant_state
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = weight.data.flatten()
    places = torch.stack([packed >> 4, packed & 15], 1).flatten().long()
    expected = (state.code[places].view(-1, state.blocksize) * scales[:, None]).view(HEIGHT, WIDTH)
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, state), expected)
