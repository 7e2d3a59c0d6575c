"""How long a token takes: operations that have to be done, at a share of what a GPU is rated for.

An estimate that nothing has been measured against here. Where it is far off: models below 1.5B, whose many small
kernels wait for their launches, and short rows.
"""

from __future__ import annotations

from qwen_tune.planner.activations import INNER, Checkpointing
from qwen_tune.planner.gpus import Gpu
from qwen_tune.planner.job import Job

EFFICIENCY = 0.45
"""Of the rated operations. NeMo AutoModel publishes 14,110 tokens/s for LoRA on Qwen2.5-7B, one H100, 4,096 tokens:
31.4 GFLOP a token make 443 TFLOP/s, 45 % of 989."""

NF4_BYTES_MOVED = 2.5  # a weight: half a byte read, two written


def attention_flops(job: Job, rows: int) -> float:
    """Operations a token of all attentions' forwards.

    2 for each of QKᵀ and PV, channel and key: with a causal kernel half of the keys of the longest sample, with a mask
    every token of the joined rows.
    """
    keys = rows * job.row_tokens if job.is_masked(rows) or job.attention == "eager" else job.row_tokens / 2
    return job.shape.layers * 4 * job.shape.query * keys


def flops(job: Job, rows: int, checkpointing: Checkpointing) -> float:
    """Operations a token, forward and backward.

    4 N_body + 4 N_head (share of tokens with labels) + 6 N_lora + 3.5 attention: the base is frozen, so that its
    products need two passes and not three; the attention's backward makes its scores anew. Checkpointing adds the
    forward of what is computed again: 2 N_body, 2 N_lora and an attention, or gate and up projection alone.
    """
    shape, attention = job.shape, attention_flops(job, rows)
    total = 4 * shape.body + 4 * shape.head * job.labelled_share + 6 * job.adapter.lora_parameters + 3.5 * attention
    if checkpointing == "full":
        total += 2 * shape.body + 2 * job.adapter.lora_parameters + attention
    elif checkpointing == "selective":
        total += 2 * (shape.gate_and_up + _inner_adapters(job))
    return total


def _inner_adapters(job: Job) -> int:
    """Parameters of the adapters on gate and up projections."""
    inner = [(name, linear) for name, linear in job.shape.layer.items() if name in INNER]
    return sum(
        ranks.get(name, 0) * (linear.inputs + linear.outputs) for ranks in job.adapter.ranks for name, linear in inner
    )


def tokens_per_second(job: Job, gpu: Gpu, rows: int, checkpointing: Checkpointing) -> float:
    """Tokens a second of one process on a GPU."""
    rate = gpu.float32_tflops if job.dtype == "float32" else gpu.tflops
    seconds = flops(job, rows, checkpointing) / (rate * 1e12 * EFFICIENCY)
    if job.quantization == "nf4":
        # Every matrix is unpacked in the forward, in the backward, and in a forward that is done again.
        again = {"none": 0, "selective": job.shape.gate_and_up, "full": job.shape.body}[checkpointing]
        moved = NF4_BYTES_MOVED * (2 * job.shape.body + again)
        seconds += moved / (gpu.bandwidth * 1e9) / (rows * job.row_tokens)
    return 1 / seconds
