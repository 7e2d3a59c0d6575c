"""Functions of element-wise steps that become one kernel each on a GPU.

Step by step, every step reads and writes all of its numbers; as one kernel they are read and written once.
torch.compile makes Triton kernels of them on a GPU. Until then they are plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from qwen_tune.compat import compile_errors, compiler_settings
from qwen_tune.errors import Problem, TrainingError, first_line

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class OneKernel(Generic[Arguments, Result]):
    """A function that is called plain or compiled."""

    def __init__(self, plain: Callable[Arguments, Result]) -> None:
        update_wrapper(self, plain)
        self.plain = plain
        self.compiled: Callable[Arguments, Result] | None = None

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Calls it; plain inside of a layer that is compiled as a whole."""
        if self.compiled is None or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        return self.compiled(*args, **kwargs)

    def compile(self) -> None:
        """Compiles it at its next call, once for any number of tokens."""
        self.compiled = torch.compile(self.plain, dynamic=True)

    def stay_plain(self) -> None:
        self.compiled = None


GRAPHS = 64  # of layers that differ in rank, scale, window or mask; beyond them torch gives up


def compiled(body: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """The body of a layer, compiled at its first call.

    It cannot fall apart into several graphs unseen. Call it inside of `compiling_layers`.

    Args:
        body: The function.
        backend: What torch.compile makes of the graph: machine code, or (`aot_eager`) the same steps one by one.
    """
    made: Callable[..., Any] = torch.compile(body, backend=backend, fullgraph=True, dynamic=False)
    return made


@contextmanager
def compiling_layers() -> Iterator[None]:
    """The compiler's settings for layers, for the length of a block; names the recipe's key where one fails.

    Raises:
        TrainingError: A layer cannot be compiled.
    """
    try:
        with compiler_settings(GRAPHS):
            yield
    except compile_errors() as error:
        what = f"got true, but the layers cannot be compiled here ({first_line(error)[:200]})"
        raise TrainingError(Problem("train.torch_compile", what, "write false")) from error
