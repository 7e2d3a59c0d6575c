"""Private names of Transformers, torch and huggingface_hub, each with the reason and what would make it unnecessary.

Nothing else in the package touches these. Where a release has taken one away, a LibraryError names it before anything
is trained. Light: libraries are imported by the functions that need them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qwen_tune.errors import LibraryError, Problem

if TYPE_CHECKING:
    from torch import nn

TRAINER_METHODS = {
    "_get_num_items_in_batch": "the loss is divided by the supervised tokens of a step, which our batches count",
    "_get_grad_norm": "a step whose gradient is not finite is found there",
    "_get_train_sampler": "the order of packs depends on seed and epoch alone",
    "_save_checkpoint": "checkpoints are safetensors and JSON, whole or not at all",
    "_load_from_checkpoint": "pickles are never loaded",
    "_load_optimizer_and_scheduler": "pickles are never loaded",
    "_load_scaler": "pickles are never loaded",
    "_load_rng_state": "pickles are never loaded",
    "_prepare_inputs": "it moves the batches of an evaluation to the device",
}
"""Methods of Transformers' Trainer that are overridden, and one that is called: an override that it no longer calls
would be skipped without a word.
They can go when the Trainer has public hooks for them."""


def check_trainer(trainer: type) -> None:
    """Looks whether a trainer class still has the methods that are overridden.

    Raises:
        LibraryError: It does not.
    """
    if missing := [f"{name} ({why})" for name, why in TRAINER_METHODS.items() if not hasattr(trainer, name)]:
        raise _gone("transformers", f"Trainer has no {', '.join(missing)}")


@cache
def is_checkpointed_by_call() -> bool:
    """Whether a layer is checkpointed by its `__call__`, as before Transformers 5.23, or by the `forward` that `fused`
    replaces. Can go with Transformers 5.22.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    return "__call__" in vars(GradientCheckpointingLayer)


def template_environment(source: str) -> Any:
    """The Jinja environment that Transformers renders a chat template in, for which it has no public function."""
    utils = import_module("transformers.utils.chat_template_utils")
    return _required(utils, "_compile_jinja_template", "transformers")(source).environment


def hub_client_factory() -> Callable[[], Any]:
    """The function with which the Hub's client makes its HTTP session, with its own headers and hooks. The public
    `set_client_factory` replaces it, and nothing gives back what it was.
    """
    factory: Callable[[], Any] = _required(
        import_module("huggingface_hub.utils._http"), "default_client_factory", "huggingface_hub"
    )
    return factory


def attention_of(config: Any) -> str:
    """The attention that a model computes with. Transformers has a setter for it (`set_attn_implementation`), and no
    public way to read it.
    """
    return str(_required(config, "_attn_implementation", "transformers"))


def checkpointed(layer: nn.Module, function: Any, hidden: Any) -> Any:
    """Runs a layer's replaced forward under gradient checkpointing, as its class's own forward would (Transformers 5.23
    and later; https://github.com/huggingface/transformers has no public function for it).
    """
    return _required(layer, "_gradient_checkpointing_func", "transformers")(function, hidden)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children, straight from their dictionary: `nn.Module.__getattr__` would cost as much as a layer's
    kernels, several times a layer and forward.
    """
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters, as `children_of`."""
    return module._parameters


def has_hooks(module: nn.Module) -> bool:
    """Whether a module carries hooks, which going around its `__call__` would skip. torch has no public way to ask."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def set_last_rates(scheduler: Any, rates: list[float]) -> None:
    """Sets what a scheduler says of its last learning rates (`get_last_lr`), for one that resumes with other settings.
    torch sets it in `step()` alone.
    """
    _required(scheduler, "_last_lr", "torch")
    scheduler._last_lr = rates


@contextmanager
def compiler_settings(graphs: int) -> Iterator[None]:
    """Settings of torch.compile that have no argument, for the length of a block.

    Args:
        graphs: Versions of one function that may be compiled, at least.
    """
    functorch, dynamo = import_module("torch._functorch.config"), import_module("torch._dynamo.config")
    # Merging equal steps: the compiler would see that the backward computes SwiGLU and norms again, and keep them from
    # the forward instead: 40,864 bytes per token and layer of 0.5B instead of 27,552.
    wanted = [(functorch, "cse", False), (dynamo, "recompile_limit", max(graphs, _required(dynamo, "recompile_limit")))]
    before = [(config, name, _required(config, name)) for config, name, _ in wanted]
    try:
        for config, name, value in wanted:
            setattr(config, name, value)
        yield
    finally:
        for config, name, value in before:
            setattr(config, name, value)


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where it cannot compile a function."""
    return (_required(import_module("torch._dynamo.exc"), "TorchDynamoException"),)


def _required(owner: Any, name: str, library: str = "torch") -> Any:
    value = getattr(owner, name, None)
    if value is None and not hasattr(owner, name):
        raise _gone(library, f"{getattr(owner, '__name__', type(owner).__name__)} has no {name}")
    return value


def _gone(library: str, what: str) -> LibraryError:
    version = getattr(import_module(library), "__version__", "?")
    fix = "install a version that pyproject.toml allows (constraints.txt lists one that was tested)"
    return LibraryError(Problem(f"{library} {version}", what, fix))
