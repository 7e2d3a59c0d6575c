"""What an engine does differently: placing, gathering and agreeing. All of it is DDP's, or one process's, today.

Under an engine that shards (FSDP2, DeepSpeed), gathering is collective: every process calls, and the first one writes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftModel
    from torch import Tensor


def make_control_group(accelerator: Accelerator) -> Any:
    """A gloo group in which processes agree past their GPUs; None for one process. Collective."""
    return torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None


def any_process(group: Any, yes: bool) -> bool:
    """Whether one of the processes of a control group says yes. Collective."""
    if group is None:
        return yes
    said = torch.tensor(int(yes))
    torch.distributed.all_reduce(said, group=group)
    return bool(said)


def gather_objects(accelerator: Accelerator, value: Any) -> list[Any]:
    """The values of all processes, in their order. Collective."""
    return list(gather_object([value])) if accelerator.num_processes > 1 else [value]


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The adapter's tensors, whole, by PEFT's names. Under sharding: gathered, collectively."""
    from peft import get_peft_model_state_dict

    # Embeddings are not part of it; "auto" would ask the Hub whether the vocabulary has grown.
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return tensors


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """The optimizer's state, whole. Under sharding: gathered, collectively."""
    state: dict[str, Any] = optimizer.state_dict()
    return state


def leave_group() -> None:
    """Takes the process group down, if there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
