"""The memory of a run at its highest, in parts, each a sum over shapes.

| Part | Bytes |
|---|---|
| weights | w a parameter; quantized matrices see `nf4_bytes`, `int8_bytes` |
| adapter | 4 a trained parameter, and 4 for its gradient; DDP's buckets are 4 more |
| optimizer | see `optimizer_bytes` |
| activations | see `activations` |
| unpacked weights | of a quantized base: the matrices that are unpacked at the same time, w a parameter |
| runtime | `RUNTIME_BYTES`, on a CPU `CPU_RUNTIME_BYTES`, and in bfloat16 `CPU_PRIMITIVE_BYTES` |
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import ceil, prod

from qwen_tune.planner.activations import FLOAT, Checkpointing, kept
from qwen_tune.planner.workload import Workload

RUNTIME_BYTES = 1_000_000_000
"""CUDA's context (about 0.5 GB), cuBLAS' workspaces, and what the allocator cannot use; stated, not measured."""

CPU_RUNTIME_BYTES = 900_000_000
"""Python with torch, Transformers, PEFT and TRL, as the quickstart's process has it before its model."""

CPU_PRIMITIVE_BYTES = 200_000_000
"""What oneDNN keeps of its bfloat16 kernels on a CPU (`prepare_process`), measured with Qwen2.5-0.5B."""

NF4_BLOCK = 64  # weights of one scale
NF4_SCALES = 256  # scales of one scale of scales
NF4_TABLES = 16 * 4 + 256 * 4 + 4  # of a matrix: the values of 4 bits and of 8, and the scales' mean
BLOCK_8BIT = 256  # states of one scale, in bitsandbytes' optimizers
SMALLEST_8BIT = 4096  # numbers; smaller tensors have 32-bit states
SMALLEST_PAGED = 100_000  # numbers; smaller tensors stay on the device

STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 2,
    "lion_32bit": 1,
    "lion_8bit": 1,
    "paged_lion_32bit": 1,
    "paged_lion_8bit": 1,
    "ademamix": 3,
    "ademamix_8bit": 3,
    "paged_ademamix_32bit": 3,
    "paged_ademamix_8bit": 3,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
}
"""Numbers that an optimizer remembers for each trained one."""


@dataclass(frozen=True)
class Memory:
    """Peak memory of a run in bytes, by purpose."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    ends: int
    recomputed: int
    work: int
    unpacked_weights: int
    runtime: int

    @property
    def peak(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return asdict(self)


def memory(work: Workload, sequences: int, checkpointing: Checkpointing) -> Memory:
    """The memory of a process.

    Args:
        work: The run.
        sequences: Sequences of a microbatch.
        checkpointing: Which activations are computed again.
    """
    activations = kept(work, sequences, checkpointing)
    return Memory(
        weights=weight_bytes(work),
        adapter=work.adapter.parameters * (2 * FLOAT + (FLOAT if work.processes > 1 else 0)),
        optimizer=optimizer_bytes(work),
        activations=activations.layers,
        ends=activations.ends,
        recomputed=activations.recomputed,
        work=activations.work,
        unpacked_weights=_unpacked_bytes(work),
        runtime=RUNTIME_BYTES if work.on_gpu else CPU_RUNTIME_BYTES + CPU_PRIMITIVE_BYTES * (work.width < FLOAT),
    )


def weight_bytes(work: Workload) -> int:
    """The base's weights in memory."""
    shape = work.shape
    if work.quantization == "none":
        return work.width * shape.parameters
    matrices = shape.linears.values()
    of_one = nf4_bytes if work.quantization == "nf4" else int8_bytes
    quantized = sum(of_one(matrix.outputs, matrix.inputs) for matrix in matrices)
    return quantized + work.width * (shape.parameters - shape.body)


def nf4_bytes(outputs: int, inputs: int) -> int:
    """A matrix in bitsandbytes' NF4 with double quantization (QLoRA, Dettmers et al. 2023, section 3).

    4 bits a weight, 8 bits a block of 64 for its scale, 32 bits for 256 such scales, and tables.
    """
    weights = outputs * inputs
    blocks = ceil(weights / NF4_BLOCK)
    return ceil(weights / 2) + blocks + 4 * ceil(blocks / NF4_SCALES) + NF4_TABLES


def int8_bytes(outputs: int, inputs: int) -> int:
    """A matrix in bitsandbytes' 8 bits (LLM.int8(), Dettmers et al. 2022): a byte a weight, a float32 scale a row."""
    return outputs * inputs + 4 * outputs


def optimizer_bytes(work: Workload) -> int:
    """What the optimizer remembers, on the device.

    `STATES` float32 numbers for each trained one; in 8 bits a byte and 4 bytes a block of 256, for tensors of at least
    4,096 numbers; Adafactor a row and a column of each matrix. Paged states of large tensors are counted as host
    memory, where CUDA moves them when room runs out.
    """
    total = 0
    for shape in work.adapter.tensors:
        numbers = prod(shape)
        if work.optim == "adafactor":
            total += FLOAT * (sum(shape) if len(shape) == 2 else numbers)
            continue
        if work.optim.startswith("paged_") and numbers >= SMALLEST_PAGED:
            continue
        in_8_bits = work.optim.endswith("8bit") and numbers >= SMALLEST_8BIT
        of_one = numbers + FLOAT * ceil(numbers / BLOCK_8BIT) if in_8_bits else FLOAT * numbers
        total += STATES[work.optim] * of_one
    return total


def _unpacked_bytes(work: Workload) -> int:
    """Matrices that a quantized base unpacks at the same time.

    A fused half still holds one when it unpacks the next; bitsandbytes' own 4-bit product holds one, its 8-bit product
    one and the half of another as it scales it.
    """
    if work.quantization == "none":
        return 0
    largest = work.width * max(matrix.parameters for matrix in work.shape.linears.values())
    return 2 * largest if work.is_fused or work.quantization == "int8" else largest
