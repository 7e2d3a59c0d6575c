"""Bytes that a forward pass keeps for the backward, layer by layer, and what a layer's backward takes for itself.

The sums list the tensors that autograd holds, each named beside its bytes a token; tests/test_planner.py compares them
with the distinct storages that `torch.autograd.graph.saved_tensors_hooks` sees. Sources: the modelling code of Qwen2
and Qwen3 in Transformers 5.23, PEFT 0.21's `lora.Linear` and its layers for bitsandbytes, `fused`, `training.loss`.

Letters: T tokens, h hidden size, f intermediate size, q and k the widths of all query and all key heads, H and K their
numbers, w bytes of a number (2 or 4), u the ranks of adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qwen_tune.families.shape import ExpertShape
from qwen_tune.planner.workload import Workload

Checkpointing = Literal["none", "selective", "full"]
LEVELS: tuple[Checkpointing, ...] = ("none", "selective", "full")  # from the fastest to the smallest

FLOAT = 4  # bytes of what is computed in float32 whatever the base's type is: norms, softmax
LOSS_CHUNK = 256  # training.loss.CHUNK_TOKENS

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_OUTPUT = ("self_attn.o_proj",)
INNER = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = ("mlp.down_proj",)


@dataclass(frozen=True)
class Kept:
    """Bytes of activations at their highest.

    Attributes:
        layers: Kept by decoder layers until their backward.
        ends: Kept after them: the last norm's, the loss's gradient, rotary tables, the mask that layers share.
        recomputed: What one layer's backward first computes again.
        work: What a layer's backward, or the loss, needs beside all that.
    """

    layers: int
    ends: int
    recomputed: int
    work: int


def kept(work: Workload, sequences: int, checkpointing: Checkpointing) -> Kept:
    """The activations of a forward pass over some sequences.

    Args:
        work: The run.
        sequences: Sequences that are joined into one, of `work.sequence_tokens` each.
        checkpointing: What is computed again: nothing, the MLP half of fused layers, or whole layers.
    """
    shape, w = work.shape, work.width
    tokens, masked = sequences * work.sequence_tokens, work.is_masked(sequences)
    if checkpointing == "selective" and not work.fuses_every_mlp:
        checkpointing = "none"
    # With whole layers the embeddings' output gets a gradient, so that the first one has something to go back to.
    first_needs = checkpointing == "full" or work.adapter.trains_embeddings
    halves = [
        _halves(work, tokens, masked, layer, needs_input=layer > 0 or first_needs) for layer in range(shape.layers)
    ]
    boundary = tokens * shape.hidden * w
    layers, recomputed = sum(attention + mlp for attention, mlp in halves), 0
    if checkpointing == "full":
        layers, recomputed = shape.layers * boundary, max(attention + mlp for attention, mlp in halves)
    elif checkpointing == "selective":
        recomputed = tokens * 2 * shape.intermediate * w  # gate and up
        layers -= shape.layers * recomputed
    if w == 2 and checkpointing != "full":
        # Autocast keeps its 16-bit copies of what is trained as long as the graph that it made them for.
        copied = 0 if work.is_fused or work.quantization != "none" else work.adapter.lora_parameters
        layers += 2 * (copied + sum(shape.modules[name] for name in work.adapter.whole & shape.linears.keys()))
    largest = max(_attention_work(work, tokens, masked), _mlp_work(work, tokens), _loss_work(work, tokens))
    return Kept(layers, _ends(work, tokens, masked), recomputed, largest)


def _halves(work: Workload, tokens: int, masked: bool, layer: int, *, needs_input: bool) -> tuple[int, int]:
    """Bytes that the attention of a layer keeps, and its MLP."""
    # What is trained as a whole keeps its input as an adapter does, and nothing else.
    whole = {name: 0 for name in work.shape.layer(layer) if f"model.layers.{layer}.{name}" in work.adapter.whole}
    ranks = {**whole, **work.adapter.ranks[layer]}
    attention, mlp = work.fused[layer]
    first = _attention_half(work, tokens, masked, ranks, fused=attention, needs_input=needs_input)
    if work.shape.experts and work.shape.has_experts(layer):
        return first, _experts_half(work, tokens, work.shape.experts)
    return first, _mlp_half(work, tokens, ranks, fused=mlp)


def _attention_half(
    work: Workload, tokens: int, masked: bool, ranks: Mapping[str, int], *, fused: bool, needs_input: bool
) -> int:
    shape, w = work.shape, work.width
    h, q, k = shape.hidden, shape.query, shape.key
    adapters = sum(name in ranks for name in _QKV)
    reduced = w * sum(ranks.get(name, 0) for name in _QKV + _OUTPUT)
    # With a mask, Transformers repeats keys and values for every query head; older kernels of packs need it as well.
    expanded = work.attention == "eager" or masked or work.repeats_key_heads
    keys_and_values = 2 * q * w if expanded and q != k else 2 * k * w
    core = q * w + shape.heads * FLOAT  # the output, and a logarithm of a sum for every head
    if fused:
        token = h * w + FLOAT + reduced + core  # the input, its norm's factor, x Aᵀ
        # Queries and keys are turned in one piece, which is kept whole for the queries alone.
        token += (q + k) * w + (keys_and_values if expanded and q != k else k * w)
        if shape.family.head_norms:
            token += (q + k) * w + (shape.heads + shape.kv_heads) * FLOAT
    else:
        # A fused kernel keeps its output; eager attention leaves that to the layer after it.
        keeps_output = work.attention != "eager"
        token = (h * FLOAT + FLOAT) * needs_input + reduced + core - (0 if keeps_output else q * w)
        token += q * w + keys_and_values
        token += _adapter_inputs(work, h, adapters, needs_input=needs_input)
        token += _adapter_inputs(work, q, sum(name in ranks for name in _OUTPUT), kept_anyway=keeps_output)
        if shape.family.head_norms:
            token += (q + k) * FLOAT + (shape.heads + shape.kv_heads) * FLOAT
        token += _dora_results(work, ranks, _QKV + _OUTPUT)
    return tokens * token + _scores(work, tokens, masked) + _dora_identities(work, ranks, _QKV + _OUTPUT)


def _scores(work: Workload, tokens: int, masked: bool) -> int:
    """Bytes of T x T matrices that a layer keeps."""
    if work.attention == "eager":
        # The softmax in float32 and, in 16 bits, its copy, for every head; the logarithm of no sum.
        copies = FLOAT + (work.width if work.width < FLOAT else 0)
        return work.shape.heads * (tokens * tokens * copies - tokens * FLOAT)
    # SDPA makes numbers of a mask of booleans, in every layer anew.
    return tokens * tokens * work.width if masked else 0


def _experts_half(work: Workload, tokens: int, experts: ExpertShape) -> int:
    """A layer's second half with frozen experts, as Transformers' grouped products keep it.

    With E experts, of which each token goes through c, and their width f: the norm's input in float32 and its factor;
    of the router the probabilities of all, and of the chosen ones their sum and four lists of 64-bit numbers (which
    experts they are, and the order that sorts tokens by them, there and back); for each chosen expert its weight, gate
    and up in one piece, silu(gate), and the output.
    """
    h, w, f, c = work.shape.hidden, work.width, experts.intermediate, experts.chosen
    router = (experts.count + c + 1) * FLOAT + 4 * c * 8
    return tokens * (h * FLOAT + FLOAT + router + c * (1 + 3 * f + h) * w) + 4 * experts.count


def _mlp_half(work: Workload, tokens: int, ranks: Mapping[str, int], *, fused: bool) -> int:
    shape, w = work.shape, work.width
    h, f = shape.hidden, shape.intermediate
    reduced = w * sum(ranks.get(name, 0) for name in INNER + _DOWN)
    if fused:
        return tokens * (h * w + FLOAT + 2 * f * w + reduced)  # the input, its norm's factor, gate, up
    token = h * FLOAT + FLOAT + 3 * f * w + reduced  # ..., gate, silu(gate), up
    token += _adapter_inputs(work, h, sum(name in ranks for name in INNER))
    token += _adapter_inputs(work, f, sum(name in ranks for name in _DOWN))
    token += _dora_results(work, ranks, INNER + _DOWN)
    return tokens * token + _dora_identities(work, ranks, INNER + _DOWN)


def _dora_results(work: Workload, ranks: Mapping[str, int], names: tuple[str, ...]) -> int:
    """Bytes a token that DoRA keeps besides: the base's result and the adapter's, which it weighs anew."""
    return 2 * work.width * work.dora * sum(work.shape.matrices[name].outputs for name in names if ranks.get(name))


def _dora_identities(work: Workload, ranks: Mapping[str, int], names: tuple[str, ...]) -> int:
    """Bytes that PEFT's DoRA keeps whatever the tokens: it sends an identity matrix through A to get B A."""
    return work.width * work.dora * sum(work.shape.matrices[name].inputs ** 2 for name in names if ranks.get(name))


def _adapter_inputs(
    work: Workload, size: int, adapters: int, *, needs_input: bool = True, kept_anyway: bool = False
) -> int:
    """Bytes a token that PEFT's layers keep of one input, for some adapters on it.

    A plain layer makes a float32 copy of a 16-bit input for each of its adapters, of which autocast keeps a 16-bit
    one; bitsandbytes' layers, and float32, share the input itself. Dropout keeps what it left and what it drew: a byte
    a number on a GPU, a number on a CPU.
    """
    w = work.width
    shares = w == FLOAT or work.quantization != "none"
    base = size * w if work.quantization == "int8" and not kept_anyway else 0  # its product keeps the input itself
    if work.dropout:
        drawn = 1 if work.on_gpu else (w if work.quantization != "none" else FLOAT)
        return base + adapters * size * (w + drawn * needs_input)
    if shares:
        return base or (size * w if adapters and not kept_anyway else 0)
    return adapters * size * w


def _ends(work: Workload, tokens: int, masked: bool) -> int:
    shape, w = work.shape, work.width
    labelled = int(tokens * work.supervised_share)
    norm = tokens * (shape.hidden * FLOAT + FLOAT)  # the last norm's input in float32
    loss = labelled * (shape.hidden * w + 8)  # its gradient, and the positions as whole numbers
    rotary = 2 * tokens * shape.head_dim * w
    mask = tokens * tokens * (w if work.attention == "eager" else 1) if masked else 0
    return norm + loss + rotary + mask


def _attention_work(work: Workload, tokens: int, masked: bool) -> int:
    """The backward of a layer's first half, at its highest.

    The kernel: gradients of the output, of q, and of k and v for every query head, and a float32 sum for q
    (FlashAttention 2 and the memory-efficient kernel alike). After it: the gradients of q and k turned, and with norms
    of heads three float32 tensors of that size and two narrow ones, beside the norm's own.
    """
    shape, w = work.shape, work.width
    h, q, k = shape.hidden, shape.query, shape.key
    kernel = q * (4 * w + FLOAT) + h * w
    heads = (q + k) * (3 * w + (3 * FLOAT if shape.family.head_norms else 0)) + 2 * h * w + h * FLOAT
    scores = 0
    if work.attention == "eager":
        scores = shape.heads * tokens * tokens * (2 * FLOAT + w)
    return tokens * max(kernel, heads) + scores


def _mlp_work(work: Workload, tokens: int) -> int:
    """The backward of a layer's second half, at its highest.

    Fused: three tensors of width f beside the kept ones; of width h the normed input and two temporaries in float32,
    the gradient that comes, the one that goes, and two on the way. PEFT's: in 16 bits the gradient of the product in
    the base's type, once more through the adapter, and its float32 copy; in float32 three; dropout adds one.
    """
    shape, w = work.shape, work.width
    h, f = shape.hidden, shape.intermediate
    narrow = h * (4 * w + 3 * FLOAT)
    if shape.experts and not shape.gate_and_up:
        # The gradients of an expert's output, of silu(gate) times up, of both, and of its input.
        return tokens * (shape.experts.chosen * (3 * shape.experts.intermediate + 2 * h) * w + narrow)
    if work.fuses_every_mlp:
        return tokens * (3 * f * w + narrow)
    wide = 2 * w + FLOAT if w < FLOAT else 3 * FLOAT
    # DoRA's forward makes B A, the weight, their sum and its rows' squares, in float32.
    dense = work.dora * FLOAT * (4 * h * f + f * f)
    return tokens * (f * (wide + FLOAT * work.dropout) + narrow) + dense


def _loss_work(work: Workload, tokens: int) -> int:
    """The loss, chunk by chunk: logits in the base's type, in float32, and their exponentials in the base's type again.

    Beside them stand the hidden states of all tokens and of the labelled ones. A trained output matrix has logits and
    gradients of both types, and the matrix and its gradient in 16 bits.
    """
    shape, w = work.shape, work.width
    chunk = min(LOSS_CHUNK, tokens)
    narrow = w < FLOAT
    logits = chunk * shape.vocabulary * (2 * w + FLOAT if narrow else FLOAT)
    if work.adapter.trains_head:
        logits = chunk * shape.vocabulary * (2 * w + 2 * FLOAT) + (2 * w if narrow else FLOAT) * shape.head
    return logits + int(tokens * (1 + work.supervised_share)) * shape.hidden * w
