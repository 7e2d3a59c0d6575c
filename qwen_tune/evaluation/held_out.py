"""The loss of a model on held-out packs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@torch.no_grad()
def held_out_losses(
    model: nn.Module,
    loaders: Mapping[str, Iterable[dict[str, Any]]],
    summed_loss: Callable[[nn.Module, dict[str, Any]], Tensor],
    accelerator: Accelerator,
) -> dict[str, float]:
    """The sum over all supervised tokens divided by their number, in all and for each source, in nats/token.

    The mean of batches' means would let a batch of few tokens count like one of many. Logits are never gathered. Random
    numbers are restored afterwards, so that evaluating more often changes no training.

    Args:
        model: The model; it is left in evaluation mode.
        loaders: The batches of each source, with `targets`; this process's share of them.
        summed_loss: The summed loss of a batch.
        accelerator: The engine's, for autocast and for sums over processes.

    Returns:
        `loss`, and `NAME_loss` of each source.
    """
    device = accelerator.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        # for each source: summed loss, supervised tokens
        sums = torch.zeros((len(loaders), 2), dtype=torch.float64, device=device)
        for total, batches in zip(sums, loaders.values(), strict=True):
            for batch in batches:
                with accelerator.autocast():
                    total[0] += summed_loss(model, batch)
                total[1] += batch["targets"].shape[0]
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
    nll, tokens = sums.sum(dim=0).tolist()
    losses = {"loss": nll / max(tokens, 1)}
    for name, (source_nll, source_tokens) in zip(loaders, sums.tolist(), strict=True):
        losses[f"{name}_loss"] = source_nll / max(source_tokens, 1)
    return losses
