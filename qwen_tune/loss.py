"""Cross-entropy on the labelled tokens alone, without ever holding all logits.

Of a batch's tokens only those with a label need logits, and the logits of a chunk are needed only until their gradient
is known: softmax(z) - onehot(y), the derivative of -log softmax(z)[y]. So the forward computes a chunk's loss and the
gradient of its hidden states at once, drops the logits, and keeps one hidden-sized row a labelled token for the
backward. The output matrix is frozen under LoRA and gets no gradient.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

CHUNK_TOKENS = 256  # 256 x 151,936 float32 logits are 156 MB


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=precise, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # One buffer for the logits of every chunk: on a CPU, fresh pages cost as much as the sums over them.
        buffer = hidden.new_empty((min(CHUNK_TOKENS, hidden.shape[0]), weight.shape[0]), dtype=weight.dtype)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            states = hidden[start : start + CHUNK_TOKENS].to(weight.dtype)
            target = targets[start : start + CHUNK_TOKENS]
            logits = torch.matmul(states, weight.T, out=buffer[: states.shape[0]]).to(precise)
            chosen = logits.gather(1, target[:, None]).squeeze(1)
            largest = logits.amax(dim=1)
            exponentials = logits.sub_(largest[:, None]).exp_()
            partition = exponentials.sum(dim=1)
            total += (partition.log() + largest - chosen).sum()
            if gradient is not None:
                # d nll / d hidden = softmax(logits) @ W - W[target], with the division after the product
                expected = exponentials.to(weight.dtype) @ weight
                step = expected.to(precise) / partition[:, None] - weight[target]
                gradient[start : start + CHUNK_TOKENS] = step
        ctx.save_for_backward(*(() if gradient is None else (gradient,)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output.to(gradient.dtype), None, None


def summed_nll(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log softmax(hidden @ weight.T)[target] over tokens, in nats.

    Args:
        hidden: Hidden states of the labelled tokens, shape (tokens, hidden_size).
        weight: The output matrix, shape (vocabulary, hidden_size); it must be frozen.
        targets: The id to be predicted at each of the tokens, shape (tokens,).

    Returns:
        A scalar in float32 (float64 for float64 input).

    Raises:
        ValueError: The output matrix is trained; its gradient is not computed here.
    """
    if weight.requires_grad:
        raise ValueError("the output matrix is trained, and this loss computes no gradient for it")
    loss: Tensor = _SummedNll.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
    return loss


def add_labelled_loss(model: PreTrainedModel) -> None:
    """Lets `model(..., labelled=positions, targets=ids)` return the summed loss instead of logits.

    `labelled` holds the positions, in the flattened batch, whose next token carries loss; `targets` those tokens' ids,
    both of shape (tokens,). The forward is patched on the instance so that wrappers (PEFT, DDP) still go through it;
    without `labelled` it is the model's own.
    """
    original = model.forward

    def forward(self: PreTrainedModel, *args: Any, labelled: Tensor | None = None, **kwargs: Any) -> Any:
        if labelled is None:
            return original(*args, **kwargs)
        targets = kwargs.pop("targets")
        # A cache would make Transformers overlook the position ids that keep packed samples apart.
        outputs = self.base_model(*args, **{**kwargs, "use_cache": False})
        hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, labelled)
        return summed_nll(hidden, self.get_output_embeddings().weight, targets)

    model.forward = types.MethodType(forward, model)
