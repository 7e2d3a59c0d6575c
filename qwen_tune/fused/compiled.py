"""Functions of element-wise steps that become one kernel each on a GPU.

Step by step, every step reads and writes all of its numbers; as one kernel they are read and written once.
torch.compile makes Triton kernels of them on a GPU. Until then they are plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Generic, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class OneKernel(Generic[Arguments, Result]):
    """A function that is called as it is, or compiled."""

    def __init__(self, plain: Callable[Arguments, Result]) -> None:
        update_wrapper(self, plain)
        self.plain = plain
        self.compiled: Callable[Arguments, Result] | None = None

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        """Calls it; inside of what is being compiled as a whole it is as it was written."""
        if self.compiled is None or torch.compiler.is_compiling():
            return self.plain(*args, **kwargs)
        return self.compiled(*args, **kwargs)

    def compile(self) -> None:
        """Has it compiled at its next call, once for any number of tokens."""
        self.compiled = torch.compile(self.plain, dynamic=True)

    def stay_plain(self) -> None:
        """Takes that back."""
        self.compiled = None
