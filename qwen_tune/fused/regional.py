"""Decoder layers compiled as a whole: one graph that all layers of a model share (regional compilation).

Against steps that are kernels of their own it saves starting them, which decides where a micro-batch is small. It wants
batches of one shape (`BatchShape`): each further shape is compiled again, for half a minute or more. Under SDPA a batch
that is one sample without filling has no mask and counts as one; under `varlen` none has a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qwen_tune.errors import Problem, TrainingError, first_line

GRAPHS = 64  # of layers that differ in rank, scale, window or mask; beyond them torch gives up


def compiled(body: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """The body of a layer, compiled at its first call.

    It cannot fall apart into several graphs unseen; what then happens is for `naming_the_key`.

    Args:
        body: The function.
        backend: What torch.compile makes of the graph: machine code, or (`aot_eager`) the same steps one by one.
    """
    import torch._dynamo
    import torch._functorch.config

    # The compiler would see that the backward computes SwiGLU and norms again, and keep them from the forward instead:
    # 40,864 bytes a token and layer of 0.5B instead of 27,552.
    torch._functorch.config.cse = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    made: Callable[..., Any] = torch.compile(body, backend=backend, fullgraph=True, dynamic=False)
    return made


@contextmanager
def naming_the_key() -> Iterator[None]:
    """Names the recipe's key where a layer cannot be compiled.

    Raises:
        TrainingError: It cannot.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        what = f"got true, but the layers cannot be compiled here ({first_line(error)[:200]})"
        raise TrainingError(Problem("train.torch_compile", what, "write false")) from error
