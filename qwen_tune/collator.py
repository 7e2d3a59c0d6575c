"""Packs into the tensors of one batch: no padding, samples told apart by their positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qwen_tune.chatml import IGNORED


class PackCollator:
    """Joins packs into one row of tokens.

    Position ids start at 0 with every sample; that (with no attention mask and no cache) is what makes Transformers
    build a mask in which no sample sees another.
    """

    def __call__(self, packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Makes a batch.

        Args:
            packs: Rows with `input_ids`, `labels` (the token's own id, -100 without loss; -100 at every sample's first
                token) and `lengths` (tokens of each sample in the pack).

        Returns:
            `input_ids` and `position_ids` of shape (1, tokens); `labelled`, the positions whose next token carries
            loss, and `targets`, those next tokens, both of shape (labels,); `cu_seq_lens_q/k` of shape (samples + 1,)
            and `max_length_q/k` for attention kernels that take them.
        """
        lengths = [length for pack in packs for length in pack["lengths"]]
        input_ids = torch.tensor([token for pack in packs for token in pack["input_ids"]], dtype=torch.int64)
        labels = torch.tensor([label for pack in packs for label in pack["labels"]], dtype=torch.int64)
        learned = (labels != IGNORED).nonzero().squeeze(1)
        boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return {
            "input_ids": input_ids[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "labelled": learned - 1,
            "targets": labels[learned],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
