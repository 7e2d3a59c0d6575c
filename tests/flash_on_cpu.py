"""torch's variable-length FlashAttention, computed on a CPU by its formula: its callers are tested without a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FORWARD, BACKWARD = "torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"


class FlashOnCpu(TorchDispatchMode):
    """Answers the two operations of `varlen_attn`; `key_heads` are the heads that each forward was given.

    Tensors have shape (tokens, heads, channels). Fewer key heads than query heads are taken as the installed torch
    takes them: with `enable_gqa`, where there is such an argument.
    """

    def __init__(self) -> None:
        super().__init__()
        self.key_heads: list[int] = []
        self.names: list[str] = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        name = function._schema.name
        self.names.append(name)
        if name not in (FORWARD, BACKWARD):
            return function(*args, **(kwargs or {}))
        given = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False))
        given |= kwargs or {}
        query, key, value = given["query"], given["key"], given["value"]
        window = given.get("window_size") or [-1, -1]
        parts = [
            (slice(start, stop), Weights(query[start:stop], key[start:stop], given["scale"], window))
            for start, stop in zip(given["cu_seq_q"].tolist(), given["cu_seq_q"].tolist()[1:], strict=False)
        ]
        if name == FORWARD:
            self.key_heads.append(key.shape[1])
            assert key.shape[1] == query.shape[1] or given["enable_gqa"]
            output = torch.zeros_like(query)
            lse = query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)
            for part, weights in parts:
                output[part], lse[:, part] = weights.output(value[part]), weights.logsumexp
            return output, lse, torch.zeros(2, dtype=torch.uint64)
        grads = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for part, weights in parts:
            for grad, of_part in zip(grads, weights.backward(given["grad_out"][part], value[part]), strict=True):
                grad[part] = of_part
        return tuple(grads)


class Weights:
    """The attention of one sample: P = softmax(s Q Kᵀ) over the keys that each query sees, (heads, queries, keys)."""

    def __init__(self, query: Tensor, key: Tensor, scale: float | None, window: list[int]) -> None:
        self.query, self.key, self.window = query.double(), key.double(), window
        self.group = query.shape[1] // key.shape[1]
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = self.scale * torch.einsum("qhc,khc->hqk", self.query, self._repeated(self.key))
        distance = torch.arange(len(query))[:, None] - torch.arange(len(key))[None]  # above 0: the key is earlier
        left, right = window
        seen = torch.ones_like(distance, dtype=torch.bool)
        seen &= distance <= left if left >= 0 else True
        seen &= distance >= -right if right >= 0 else True
        scores = scores.masked_fill(~seen, -torch.inf)
        self.logsumexp = scores.logsumexp(-1).float()
        self.p = scores.softmax(-1)

    def output(self, value: Tensor) -> Tensor:
        return torch.einsum("hqk,khc->qhc", self.p, self._repeated(value.double())).to(value.dtype)

    def backward(self, grad: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dV = Pᵀ dO, dS = P (dP - Σ dP P) with dP = dO Vᵀ, dQ = s dS K, dK = s dSᵀ Q."""
        dtype, grad, value = value.dtype, grad.double(), self._repeated(value.double())
        grad_p = torch.einsum("qhc,khc->hqk", grad, value)
        grad_s = self.p * (grad_p - (grad_p * self.p).sum(-1, keepdim=True))
        grad_query = self.scale * torch.einsum("hqk,khc->qhc", grad_s, self._repeated(self.key))
        grad_key = self.scale * torch.einsum("hqk,qhc->khc", grad_s, self.query)
        grad_value = torch.einsum("hqk,qhc->khc", self.p, grad)
        return grad_query.to(dtype), self._summed(grad_key).to(dtype), self._summed(grad_value).to(dtype)

    def _repeated(self, states: Tensor) -> Tensor:
        tokens, heads, channels = states.shape
        return states[:, :, None].expand(tokens, heads, self.group, channels).reshape(tokens, -1, channels)

    def _summed(self, grad: Tensor) -> Tensor:
        tokens, heads, channels = grad.shape
        return grad.view(tokens, heads // self.group, self.group, channels).sum(2)
