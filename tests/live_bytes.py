"""The most memory that a computation holds beyond its inputs, counted tensor by tensor and without computing anything.

Tensors are fake ones (shapes and types alone), so the count is exact, the same on every machine, and takes milliseconds
at any size. What an operation needs inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

HeadLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""The summed loss from hidden states (tokens, hidden), the output matrix (vocabulary, hidden), the ids that are to be
predicted (tokens,), and the positions of those that are supervised."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that come to life in it, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def pass_over(self, *tensors: Tensor) -> None:
        """Leaves tensors out that were there before."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _freed(self, storage: int, size: int) -> None:
        self.live -= size
        self._known.discard(storage)  # its address may be given to another


def extra_bytes_of_loss(
    loss: HeadLoss,
    *,
    tokens: int = 1024,
    vocabulary: int = 151_936,
    hidden_size: int = 896,
    labelled: float = 0.55,
    dtype: torch.dtype = torch.float32,
) -> int:
    """The peak of forward and backward of a loss under a frozen output matrix; the shapes are Qwen2.5-0.5B's."""
    with FakeTensorMode():
        hidden = torch.empty(tokens, hidden_size, dtype=dtype, requires_grad=True)
        weight = torch.empty(vocabulary, hidden_size, dtype=dtype)
        targets = torch.empty(tokens, dtype=torch.int64)
        positions = torch.empty(int(tokens * labelled), dtype=torch.int64)
        counted = LiveBytes()
        counted.pass_over(hidden, weight, targets, positions)
        with counted:
            loss(hidden, weight, targets, positions).backward()
    return counted.peak


def plain_loss(hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    """As Transformers computes it: logits of all tokens, in float32; labels of -100 change no shape."""
    return cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def trl_loss(hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    """TRL's fused head as its trainer calls it without Triton: every token is scored."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    wanted = ("log_probs", "entropy", "is_top1")
    log_probs: Tensor = ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, wanted
    )[0]
    return -log_probs.sum()


def trl_loss_of_labelled(hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    """TRL's fused head as its trainer calls it where Triton is: the labelled tokens alone."""
    return trl_loss(hidden[positions], weight, targets[positions], positions)


def our_loss(hidden: Tensor, weight: Tensor, targets: Tensor, positions: Tensor) -> Tensor:
    """As `add_supervised_loss` computes it."""
    from qwen_tune.training.loss import summed_nll

    return summed_nll(hidden.index_select(0, positions), weight, targets.index_select(0, positions))
