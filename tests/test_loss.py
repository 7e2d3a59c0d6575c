import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qwen_tune.training.loss import (
    CHUNK_TOKENS,
    TokenRows,
    add_noise,
    add_supervised_loss,
    embed,
    summed_nll,
    summed_nll_through,
)

# PEFT 0.21 uses names that Transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize("tokens", [0, 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS - 5])
def test_equals_plain_cross_entropy_in_loss_and_gradient(tokens):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(500, 24, dtype=torch.float64) * 3
    targets = torch.randint(0, 500, (tokens,))
    ours = summed_nll(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(ours * 0.37, hidden)
    plain = cross_entropy(hidden @ weight.T, targets, reduction="sum")
    (expected,) = torch.autograd.grad(plain * 0.37, hidden)
    assert torch.allclose(ours, plain, rtol=0, atol=1e-10)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-10)


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]])
    loss = summed_nll(hidden, weight, torch.tensor([1, 1]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()
    assert loss.item() == pytest.approx(600.0)


def test_without_gradients_only_the_loss_is_computed():
    with torch.no_grad():
        loss = summed_nll(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2, 3]))
    assert not loss.requires_grad


def test_bfloat16_rounds_like_the_head_would():
    torch.manual_seed(1)
    hidden = torch.randn(40, 32).bfloat16().requires_grad_()
    weight = torch.randn(300, 32).bfloat16()
    targets = torch.randint(0, 300, (40,))
    loss = summed_nll(hidden, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        cross_entropy(hidden.float() @ weight.float().T, targets, reduction="sum").item(), rel=1e-2
    )
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.dtype == torch.bfloat16


def test_a_trained_head_is_refused():
    with pytest.raises(ValueError, match="output matrix is trained"):
        summed_nll(torch.randn(1, 4), torch.randn(7, 4, requires_grad=True), torch.tensor([1]))


@pytest.mark.parametrize("tokens", [0, 1, CHUNK_TOKENS + 3])
def test_trained_rows_of_the_frozen_matrix_get_their_gradient(tokens):
    torch.manual_seed(2)
    hidden = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 24, dtype=torch.float64)
    rows = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([7, 0, 49])
    targets = torch.randint(0, 50, (tokens,))
    ours = summed_nll(hidden, weight, targets, TokenRows(ids, rows))
    gradients = torch.autograd.grad(ours * 0.37, (hidden, rows))
    plain = cross_entropy(hidden @ weight.index_copy(0, ids, rows).T, targets, reduction="sum")
    expected = torch.autograd.grad(plain * 0.37, (hidden, rows))
    assert torch.allclose(ours, plain, rtol=0, atol=1e-10)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_trained_rows_take_the_place_of_embeddings():
    torch.manual_seed(3)
    weight = torch.randn(20, 8, dtype=torch.float64)
    rows = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([3, 19])
    tokens = torch.tensor([[3, 1, 19, 3, 0]])
    ours = embed(tokens, weight, TokenRows(ids, rows))
    plain = torch.nn.functional.embedding(tokens, weight.index_copy(0, ids, rows))
    scale = torch.randn_like(plain)
    assert torch.equal(ours, plain)
    for one, other in zip(
        torch.autograd.grad((ours * scale).sum(), rows), torch.autograd.grad((plain * scale).sum(), rows), strict=True
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, CHUNK_TOKENS + 3])
def test_an_output_layer_that_is_trained_as_a_whole(tokens):
    torch.manual_seed(4)
    layer = torch.nn.Linear(24, 50, bias=False, dtype=torch.float64)
    hidden = torch.randn(tokens, 24, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (tokens,))
    ours = summed_nll_through(layer, hidden, targets)
    plain = cross_entropy(layer(hidden), targets, reduction="sum")
    assert torch.allclose(ours, plain, rtol=0, atol=1e-10)
    for one, other in zip(
        torch.autograd.grad(ours, (hidden, layer.weight)),
        torch.autograd.grad(plain, (hidden, layer.weight)),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_under_autocast_the_sums_stay_float32():
    torch.manual_seed(5)
    hidden = torch.randn(30, 16, requires_grad=True)
    weight, rows = torch.randn(40, 16), torch.randn(2, 16, requires_grad=True)
    targets = torch.randint(0, 40, (30,))
    trained = TokenRows(torch.tensor([1, 5]), rows)
    plain = torch.autograd.grad(summed_nll(hidden, weight, targets, trained), (hidden, rows))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = summed_nll(hidden, weight, targets, trained)
    for one, other in zip(torch.autograd.grad(loss, (hidden, rows)), plain, strict=True):
        assert torch.equal(one, other)


def test_noise_is_bounded_by_each_samples_own_length():
    torch.manual_seed(0)
    boundaries = torch.tensor([0, 4, 104], dtype=torch.int32)
    embedded = torch.randn(1, 104, 64, dtype=torch.bfloat16)
    noisy = add_noise(embedded.float(), boundaries, alpha=5.0) - embedded.float()
    for start, end in ((0, 4), (4, 104)):
        most = 5.0 / ((end - start) * 64) ** 0.5
        part = noisy[0, start:end]
        assert 0.97 * most < part.abs().max() <= most * 1.0001
        assert abs(part.mean()) < 0.1 * most
    assert add_noise(embedded, boundaries, alpha=5.0).dtype == torch.bfloat16


def test_a_model_with_tied_heads_gets_the_plain_loss_and_gradients_over_several_chunks(monkeypatch):
    def exact_norm(self, x):  # Transformers' own rounds to float32 even in a float64 model
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(Qwen2RMSNorm, "forward", exact_norm)
    torch.manual_seed(6)
    sizes = {"vocab_size": 400, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = Qwen2Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3
    )
    model = Qwen2ForCausalLM(config).double()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    add_supervised_loss(model)
    tuned = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear")).double()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(0, 400, (3, 401))
    supervised = torch.rand(3, 400) < 0.55
    assert supervised.sum() > 2 * CHUNK_TOKENS
    logits = tuned(input_ids=ids[:, :-1], use_cache=False).logits
    plain = cross_entropy(logits[supervised], ids[:, 1:][supervised], reduction="sum")
    labelled = supervised.flatten().nonzero().squeeze(1)
    ours = tuned(input_ids=ids[:, :-1], labelled=labelled, targets=ids[:, 1:].flatten()[labelled])
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12, abs=1e-10)
    for one, other in zip(
        torch.autograd.grad(ours / 700, trained), torch.autograd.grad(plain / 700, trained), strict=True
    ):
        assert other.abs().max() > 1e-3
        assert torch.allclose(one, other, rtol=0, atol=1e-10)
