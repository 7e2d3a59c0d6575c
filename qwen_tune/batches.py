"""From packs to the batches that a model gets: the rows of the data set, their order, and the tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler

from qwen_tune.chatml import IGNORED
from qwen_tune.packing import Pack


def pack_dataset(packs: Sequence[Pack], *, multiple: int, pad_id: int) -> Dataset:
    """Rows for the trainer.

    Args:
        packs: The samples of each row.
        multiple: The rows are filled up to a multiple of this with one token without loss, so that every process gets
            equally many and none is trained twice: processes times rows of each, or 1 for one process.
        pad_id: That token.

    Returns:
        Columns `input_ids`, `labels` and `lengths` (tokens of each sample in the row). Fillers come last.
    """
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "lengths": []}
    for samples in packs:
        rows["input_ids"].append([token for sample in samples for token in sample.input_ids])
        rows["labels"].append([label for sample in samples for label in sample.labels])
        rows["lengths"].append([len(sample.input_ids) for sample in samples])
    for _ in range(count_fillers(len(packs), multiple)):
        rows["input_ids"].append([pad_id])
        rows["labels"].append([IGNORED])
        rows["lengths"].append([1])
    return Dataset.from_dict(rows)


def count_fillers(rows: int, multiple: int) -> int:
    """How many rows without loss bring a number of rows up to a multiple."""
    return -rows % multiple


class SeededOrder(Sampler[int]):
    """A new order of the rows every epoch, from the seed and the epoch alone; fillers stay at the end."""

    def __init__(self, rows: int, fillers: int, seed: int) -> None:
        self.rows = rows
        self.fillers = fillers
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows + self.fillers

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from range(self.rows, self.rows + self.fillers)


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
