"""What a training engine does differently from another; here as DDP does it: every process holds the whole model.

Under an engine that shards parameters, what reads them is collective: every process must call it, the first one writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, distributed

if TYPE_CHECKING:
    from peft import PeftModel


def make_control_group(accelerator: Accelerator) -> distributed.ProcessGroup | None:
    """A group in which processes agree past their GPUs, which would have to finish their work first; None for one.

    FSDP2: the same.
    """
    return distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None


def any_process(group: distributed.ProcessGroup | None, yes: bool) -> bool:
    """Whether one of the processes says yes. Collective.

    FSDP2: the same.
    """
    if group is None:
        return yes
    votes = torch.tensor(int(yes))
    distributed.all_reduce(votes, group=group)
    return bool(votes)


def gather_objects(accelerator: Accelerator, value: Any) -> list[Any]:
    """Every process's value, by rank. Collective.

    FSDP2: the same; values that differ by rank, such as random states, stay one for each process.
    """
    values: list[Any] = gather_object([value]) if accelerator.num_processes > 1 else [value]
    return values


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors by their names in `adapter_model.safetensors`. Collective.

    FSDP2: parameters are sharded `DTensor`s, and `full_tensor()` gathers each. The first process alone uses them.
    """
    from peft import get_peft_model_state_dict

    # Embeddings do not belong to it; "auto" would ask the Hub whether the vocabulary has grown.
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The optimizer's `state_dict()`. Collective.

    FSDP2: moments are sharded like their parameters, and `full_tensor()` gathers each. The first process alone uses
    them.
    """
    state: dict[str, Any] = optimizer.state_dict()
    return state


def leave_group() -> None:
    """Destroys the process group, where there is one. Only for processes that all know that the run ends.

    A process that ends with its group still up is aborted now and then by the group's own threads. FSDP2: the same.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
