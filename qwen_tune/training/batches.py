"""From packs to the batches that a model gets: the records of the data set, their order, and the tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from qwen_tune.chatml.template import IGNORED
from qwen_tune.data.packing import Packs
from qwen_tune.training.batch_plan import Schedule

FILLER = -1


def pack_dataset(packs: Packs, *, multiple: int, pad_id: int) -> Dataset:
    """Records for the trainer, read from disk when they are asked for.

    Args:
        packs: The packs.
        multiple: The packs are filled up to a multiple of this with one token without loss, so that every process gets
            equally many and none is trained twice: processes times packs of each, or 1 for one process.
        pad_id: That token.

    Returns:
        Records with `input_ids`, `labels` and `lengths` (tokens of each sample in the pack). Fillers come last.
    """
    numbers = [*range(len(packs)), *[FILLER] * count_fillers(len(packs), multiple)]
    return Dataset.from_dict({"pack": numbers}).with_transform(PackReader(packs, pad_id))


@dataclass(frozen=True)
class PackReader:
    """The transform that turns pack numbers into packs."""

    packs: Packs
    pad_id: int

    def __call__(self, batch: Mapping[str, Sequence[int]]) -> dict[str, list[Any]]:
        packs = [self._filler() if number == FILLER else self.packs.pack(number) for number in batch["pack"]]
        return {name: [pack[name] for pack in packs] for name in ("input_ids", "labels", "lengths")}

    def _filler(self) -> dict[str, Any]:
        return {"input_ids": np.array([self.pad_id]), "labels": np.array([IGNORED]), "lengths": np.array([1])}


def count_fillers(packs: int, multiple: int) -> int:
    """Packs without loss that bring a number of packs up to a multiple."""
    return -packs % multiple


class SeededOrder(Sampler[int]):
    """A new order of the packs every epoch, from the seed and the epoch alone; fillers stay at the end."""

    def __init__(self, packs: int, fillers: int, seed: int) -> None:
        self.packs = packs
        self.fillers = fillers
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.packs + self.fillers

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        yield from torch.randperm(self.packs, generator=generator).tolist()
        yield from range(self.packs, self.packs + self.fillers)


@dataclass(frozen=True)
class Counts:
    """Of some micro-batches, over all processes: tokens with loss, all tokens, and those of fillers among them."""

    labels: int
    tokens: int
    padding: int


@dataclass(frozen=True)
class BatchShape:
    """What every micro-batch is filled up to, so that kernels made for one shape do for all.

    Attributes:
        tokens: Of a micro-batch.
        samples: Of a micro-batch, those of the filling and empty ones among them.
        longest: Tokens of the longest sample that there may be.
    """

    tokens: int
    samples: int
    longest: int

    @classmethod
    def holding(cls, packs: Packs, most: int, max_length: int) -> BatchShape:
        """The shape that any so many of these packs fit into.

        Args:
            packs: The packs.
            most: How many a micro-batch has at most.
            max_length: Tokens that a pack holds.
        """
        # The most samples of a pack are known, not which packs will meet; the filling takes one for each pack at most.
        return cls(most * max_length, most * (int(packs.sizes.max(initial=1)) + 1), max_length)

    def filling(self, lengths: Sequence[int]) -> list[int]:
        """The samples without loss that fill up a micro-batch of these; boundaries of empty ones are added to it."""
        whole, rest = divmod(self.tokens - sum(lengths), self.longest)
        samples = [self.longest] * whole + [rest] * (rest > 0)
        empty = self.samples - len(lengths) - len(samples)
        assert whole >= 0, f"{sum(lengths)} tokens in a micro-batch of {self.tokens}"
        assert empty >= 0, f"{len(lengths)} samples in a micro-batch of {self.samples}"
        return samples + [0] * empty


class StepPacks:
    """Which packs an optimizer step is made of, in all processes: the order is known without having been gone through.

    So no process has to ask the others how many tokens a step has, which would make each wait for its GPU.

    Args:
        packs: The packs of an epoch.
        schedule: Batch and steps.
        fillers: Packs without loss after them.
        seed: The recipe's.
        shape: What micro-batches are filled up to; None for as long as their packs are.
    """

    def __init__(
        self, packs: Packs, schedule: Schedule, fillers: int, seed: int, shape: BatchShape | None = None
    ) -> None:
        self.packs = packs
        self.schedule = schedule
        self.shape = shape
        self.sampler = SeededOrder(len(packs), fillers, seed)
        self._orders: dict[int, list[int]] = {}

    def batches(self, step: int) -> list[list[int]]:
        """The packs of each micro-batch of a step, counted through all processes; the first step is 1.

        They come in turns: one of each process, then the next one of each.
        """
        epoch, number = divmod(step - 1, self.schedule.steps_per_epoch)
        if epoch not in self._orders:
            self.sampler.set_epoch(epoch)
            self._orders = {epoch: list(self.sampler)}
        size = self.schedule.per_device_train_batch_size
        packs = size * self.schedule.num_processes * self.schedule.gradient_accumulation_steps
        of_step = self._orders[epoch][number * packs : (number + 1) * packs]
        return [of_step[start : start + size] for start in range(0, len(of_step), size)]

    def count(self, step: int, process: int | None = None) -> Counts:
        """What a step has, in all processes or in one."""
        batches = self.batches(step)
        if process is not None:
            batches = batches[process :: self.schedule.num_processes]
        packs = np.array([pack for batch in batches for pack in batch], np.int64)
        real = packs[packs < len(self.packs)]
        labels, tokens = (int(sums[real].sum()) for sums in (self.packs.supervised, self.packs.lengths))
        padding = len(batches) * self.shape.tokens - tokens if self.shape else len(packs) - len(real)
        return Counts(labels, tokens + padding, padding)

    def places(self, step: int, batches: Sequence[int] | None = None) -> list[str]:
        """Where the examples of a step stand, as `file:line`, each once; of some micro-batches, or of all when None."""
        of_step = self.batches(step)
        chosen = of_step if batches is None else [of_step[batch] for batch in batches]
        real = (pack for batch in chosen for pack in batch if pack < len(self.packs))
        return list(dict.fromkeys(place for pack in real for place in self.packs.places(pack)))


class PackCollator:
    """Joins packs into one sequence of tokens.

    Position ids start at 0 with every sample; that (with no attention mask and no cache) is what makes Transformers
    build a mask in which no sample sees another.

    Args:
        shape: What the sequence is filled up to, with samples without loss; None for as long as it is.
        pad_id: The token of the filling.
    """

    def __init__(self, shape: BatchShape | None = None, pad_id: int = 0) -> None:
        self.shape = shape
        self.pad_id = pad_id

    def __call__(self, packs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Makes a batch.

        Args:
            packs: With `input_ids`, `labels` (the token's own id, -100 without loss and at every sample's first token)
                and `lengths` (tokens of each sample in the pack).

        Returns:
            `input_ids` and `position_ids` of shape (1, tokens); `labelled`, the positions whose next token carries
            loss, and `targets`, those next tokens, both of shape (labels,); `cu_seq_lens_q/k` of shape (samples + 1,)
            and `max_length_q/k` for attention kernels that take them. All but `labelled` and `targets` are alike for
            all batches of a `BatchShape`.
        """
        lengths = [int(length) for pack in packs for length in pack["lengths"]]
        if self.shape:
            filling = self.shape.filling(lengths)
            packs = [*packs, {"input_ids": [self.pad_id] * sum(filling), "labels": [IGNORED] * sum(filling)}]
            lengths += filling
        longest = self.shape.longest if self.shape else max(lengths)
        input_ids, labels = (
            torch.from_numpy(np.concatenate([np.asarray(pack[name], np.int64) for pack in packs]))
            for name in ("input_ids", "labels")
        )
        supervised = (labels != IGNORED).nonzero().squeeze(1)
        boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return {
            "input_ids": input_ids[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "labelled": supervised - 1,
            "targets": labels[supervised],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
        }
