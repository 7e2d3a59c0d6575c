"""Cross-entropy on the labelled tokens alone, without ever holding all logits.

Of a batch's tokens only those with a label need logits, and the logits of a chunk are needed only until their gradient
is known: softmax(z) - onehot(y), the derivative of -log softmax(z)[y]. So the forward computes a chunk's loss and the
gradient of its hidden states at once, drops the logits, and keeps one hidden-sized row a labelled token for the
backward. The output matrix is frozen under LoRA and gets no gradient, but for single rows of it that are trained
(`trainable_token_indices`); an output layer that is trained as a whole takes the slower way through its own forward.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from qwen_tune.compat import attention_of
from qwen_tune.model.attention import needs_no_mask, no_mask

CHUNK_TOKENS = 256  # 256 x 151,936 float32 logits are 156 MB


@dataclass(frozen=True)
class TokenRows:
    """Rows of a frozen matrix that are trained: their ids, and what stands in their place, shape (ids, hidden)."""

    ids: Tensor
    rows: Tensor


class _SummedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, row_ids: Tensor | None
    ) -> Tensor:
        precise = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=precise, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        if rows is not None and row_ids is not None:
            new_examples = rows.to(weight.dtype)
            change = new_examples - weight[row_ids]
            rows_gradient = torch.zeros_like(rows, dtype=precise)
        # One buffer for the logits of every chunk: on a CPU, fresh pages cost as much as the sums over them.
        buffer = hidden.new_empty((min(CHUNK_TOKENS, hidden.shape[0]), weight.shape[0]), dtype=weight.dtype)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            states = hidden[start : start + CHUNK_TOKENS].to(weight.dtype)
            target = targets[start : start + CHUNK_TOKENS]
            raw = torch.matmul(states, weight.T, out=buffer[: states.shape[0]])
            if row_ids is not None:
                raw[:, row_ids] = states @ new_examples.T
            logits = raw.to(precise)
            chosen = logits.gather(1, target[:, None]).squeeze(1)
            largest = logits.amax(dim=1)
            exponentials = logits.sub_(largest[:, None]).exp_()
            partition = exponentials.sum(dim=1)
            total += (partition.log() + largest - chosen).sum()
            if not any(ctx.needs_input_grad):
                continue
            # d nll / d hidden = softmax(logits) @ W - W[target], with the division after the product
            expected = exponentials.to(weight.dtype) @ weight
            wanted = weight[target]
            if rows is not None and row_ids is not None:
                shares = exponentials[:, row_ids]
                is_row = (target[:, None] == row_ids).to(precise)
                expected += shares.to(weight.dtype) @ change
                wanted = wanted + is_row.to(weight.dtype) @ change
                rows_gradient += (shares / partition[:, None] - is_row).T @ states.to(precise)
            if gradient is not None:
                gradient[start : start + CHUNK_TOKENS] = expected.to(precise) / partition[:, None] - wanted
        kept = (gradient, rows_gradient.to(rows.dtype) if rows is not None else None)
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradient, rows_gradient = ctx.saved_tensors
        scaled = [None if kept is None else kept * grad_output.to(kept.dtype) for kept in (gradient, rows_gradient)]
        return scaled[0], None, None, scaled[1], None


def summed_nll(hidden: Tensor, weight: Tensor, targets: Tensor, trained: TokenRows | None = None) -> Tensor:
    """The sum of -log softmax(hidden @ weight.T)[target] over tokens, in nats.

    Args:
        hidden: Hidden states of the labelled tokens, shape (tokens, hidden_size).
        weight: The output matrix, shape (vocabulary, hidden_size); it must be frozen.
        targets: The id to be predicted at each of the tokens, shape (tokens,).
        trained: Rows that stand in the place of the matrix's own and get a gradient.

    Returns:
        A scalar in float32 (float64 for float64 input).

    Raises:
        ValueError: The output matrix is trained; its gradient is not computed here.
    """
    if weight.requires_grad:
        raise ValueError("the output matrix is trained, and this loss computes no gradient for it")
    rows, ids = (trained.rows, trained.ids) if trained else (None, None)
    # Types are chosen here, product by product; autocast would make 16 bits of the float32 ones.
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _SummedNll.apply(hidden, weight, targets, rows, ids)  # type: ignore[no-untyped-call]
    return loss


def summed_nll_through(layer: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same sum for an output layer that is trained, whatever it is made of.

    Logits of a chunk are computed once for the loss and again for the gradient, so that only one chunk's are held.
    """

    def chunk_nll(states: Tensor, target: Tensor) -> Tensor:
        logits = layer(states)
        return cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target, reduction="sum")

    # An empty batch still takes part, with a gradient of zero: other processes wait for it.
    total: Tensor = (hidden if hidden.shape[0] else layer(hidden)).sum() * 0
    for start in range(0, hidden.shape[0], CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        total = total + checkpoint(chunk_nll, hidden[part], targets[part], use_reentrant=False)
    return total


def add_supervised_loss(model: PreTrainedModel, *, neftune_noise_alpha: float | None = None) -> None:
    """Lets `model(..., labelled=positions, targets=ids)` return the summed loss instead of logits.

    `labelled` holds the positions, in the flattened batch, whose next token supervised; `targets` those tokens' ids,
    both of shape (tokens,). The forward is patched on the instance so that wrappers (PEFT, DDP) still go through it;
    without `labelled` it is the model's own.

    Args:
        model: The model.
        neftune_noise_alpha: Strength of the noise on embeddings while it trains; none when None. See `add_noise`.
    """
    original = model.forward

    def forward(self: PreTrainedModel, *args: Any, labelled: Tensor | None = None, **kwargs: Any) -> Any:
        if labelled is None:
            return original(*args, **kwargs)
        targets = kwargs.pop("targets")
        embedding, output = self.get_input_embeddings(), self.get_output_embeddings()
        trained_inputs, trained_outputs = trained_rows(embedding), trained_rows(output)
        noise = neftune_noise_alpha if self.training else None
        if trained_inputs is not None or noise:
            ids = kwargs.pop("input_ids")
            embedded = embed(ids, frozen_weight(embedding), trained_inputs) if trained_inputs else embedding(ids)
            kwargs["inputs_embeds"] = add_noise(embedded, kwargs["cu_seq_lens_q"], noise) if noise else embedded
        if needs_no_mask(attention_of(self.config), kwargs):
            kwargs["attention_mask"] = no_mask(self.device)
        # A cache would make Transformers overlook the position ids that keep packed samples apart.
        outputs = self.base_model(*args, **{**kwargs, "use_cache": False})
        hidden = outputs.last_hidden_state.flatten(0, 1).index_select(0, labelled)
        if trained_outputs is None and not (type(output) is nn.Linear and not output.weight.requires_grad):
            return summed_nll_through(output, hidden, targets)
        return summed_nll(hidden, frozen_weight(output), targets, trained_outputs)

    model.forward = types.MethodType(forward, model)


def trained_rows(module: nn.Module) -> TokenRows | None:
    """The rows that PEFT's `trainable_token_indices` trains in an embedding or an output layer, if any are active.

    PEFT's own forward copies the whole matrix for them in every step, and its gradient has the matrix's size.
    """
    adapter = getattr(module, "token_adapter", None)
    if adapter is None or adapter.disable_adapters or adapter.merged or not adapter.active_adapters:
        return None
    (name,) = adapter.active_adapters
    rows: Tensor = adapter.trainable_tokens_delta[name]
    return TokenRows(_on_device(tuple(adapter.token_indices[name]), rows.device), rows)


@lru_cache(maxsize=16)
def _on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """The ids as a tensor, made once: to copy them there makes the GPU wait."""
    return torch.tensor(ids, device=device)


def frozen_weight(module: nn.Module) -> Tensor:
    """The matrix of an embedding or an output layer, below the wrapper that PEFT may have put around it."""
    adapter = getattr(module, "token_adapter", None)
    weight = (module if adapter is None else adapter.base_layer).weight
    assert isinstance(weight, Tensor)
    return weight


def embed(input_ids: Tensor, weight: Tensor, trained: TokenRows) -> Tensor:
    """Embeddings with some rows in the place of the matrix's own.

    Args:
        input_ids: Shape (batch, tokens).
        weight: The frozen matrix, shape (vocabulary, hidden_size).
        trained: The rows, and the ids that they stand for.

    Returns:
        Shape (batch, tokens, hidden_size).
    """
    is_row = input_ids[..., None] == trained.ids  # (batch, tokens, ids)
    embedded = nn.functional.embedding(input_ids, weight)
    replaced = is_row.to(embedded.dtype) @ trained.rows.to(embedded.dtype)
    return torch.where(is_row.any(dim=-1, keepdim=True), replaced, embedded)


def add_noise(embedded: Tensor, boundaries: Tensor, alpha: float) -> Tensor:
    """Embeddings with uniform noise of at most alpha / sqrt(length x hidden_size), as in NEFTune (arXiv:2310.05914).

    The length is that of each sample, as if it stood alone: that of the pack would make the noise of short samples
    weaker the more of them a pack holds.

    Args:
        embedded: Shape (1, tokens, hidden_size).
        boundaries: Where samples begin and the last one ends, shape (samples + 1,).
        alpha: Strength of the noise.

    Returns:
        Of the shape and type of `embedded`.
    """
    lengths = boundaries.diff()
    # With the size given, nothing waits for the GPU to count.
    of_token = lengths.repeat_interleave(lengths, output_size=embedded.shape[1])
    most = alpha / (of_token * embedded.shape[2]).float().sqrt()
    noise = torch.empty_like(embedded, dtype=torch.float32).uniform_(-1, 1)
    return embedded + (noise * most[:, None]).to(embedded.dtype)
