import pytest
import torch
from torch.nn.functional import cross_entropy

from qwen_tune.loss import CHUNK_TOKENS, summed_nll


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
