"""GPUs and CPUs by their makers' public figures, and the types that they compute in. Light: torch is not imported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen_tune.errors import Problem, QwenTuneError
from qwen_tune.machine import cpu_bfloat16_units

GIB = 1 << 30

Dtype = Literal["bfloat16", "float16", "float32"]

SIXTEEN_BITS = ("bfloat16", "float16")


def automatic_cpu_dtype(config: Mapping[str, Any]) -> Dtype:
    """bfloat16 where the CPU multiplies in it and the checkpoint is stored in 16 bits, else float32.

    Elsewhere bfloat16 is emulated, at about a seventh of float32's speed; and a checkpoint that is stored in float32 is
    not rounded unasked.

    Args:
        config: The checkpoint's config.json, which names the type of its files as `dtype`, once `torch_dtype`.
    """
    stored = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if stored in SIXTEEN_BITS and cpu_bfloat16_units() else "float32"


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: As `--gpu` takes it.
        memory_gib: As its driver reports it, in GiB.
        tflops: Dense products of bfloat16 with float32 sums, 10¹² operations a second; of float16 where there is no
            bfloat16.
        float32_tflops: The same in float32, without TF32.
        bandwidth: Of its memory, 10⁹ bytes a second.
        watts: Rated power of its boards by the names that the driver reports, the longer names first.
        has_bfloat16: Whether it multiplies bfloat16; Ampere brought that and FlashAttention's instructions.
        is_listed: Whether `estimate` shows it where no GPU is named.
    """

    name: str
    memory_gib: float
    tflops: float
    float32_tflops: float
    bandwidth: int
    watts: Mapping[str, int] = field(hash=False)
    has_bfloat16: bool = True
    is_listed: bool = True

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * GIB)

    def dtype(self, asked: str) -> Dtype:
        """What `model.dtype` comes to on it; see `model.loading.training_dtype`.

        Raises:
            QwenTuneError: The recipe asks for bfloat16, and it has none.
        """
        if asked == "bfloat16" and not self.has_bfloat16:
            raise QwenTuneError(Problem("model.dtype", f"{self.name} has no bfloat16", "write dtype: auto or float16"))
        if asked == "auto":
            return "bfloat16" if self.has_bfloat16 else "float32"
        return "float16" if asked == "float16" else "bfloat16" if asked == "bfloat16" else "float32"


# In the order of their memory. NVIDIA's data sheets; products without sparsity.
KNOWN_GPUS = (
    Gpu("t4-16gb", 15.0, 65, 8.1, 320, {"T4": 70}, has_bfloat16=False),
    Gpu("v100-16gb", 16.0, 125, 15.7, 900, {"V100-SXM2-16GB": 300, "V100-PCIE-16GB": 250}, False, is_listed=False),
    Gpu("l4-24gb", 22.5, 121, 30.3, 300, {"L4": 72}),
    Gpu("a10-24gb", 22.5, 125, 31.2, 600, {"A10": 150}),
    Gpu("a10g-24gb", 22.5, 70, 35.0, 600, {"A10G": 300}, is_listed=False),
    Gpu("rtx3090-24gb", 24.0, 71, 35.6, 936, {"RTX 3090": 350}),
    Gpu("rtx4090-24gb", 24.0, 165, 82.6, 1008, {"RTX 4090": 450}),
    Gpu("rtx5090-32gb", 31.8, 209, 104.8, 1792, {"RTX 5090": 575}),
    Gpu("v100-32gb", 32.0, 125, 15.7, 900, {"V100-SXM2-32GB": 300}, False, is_listed=False),
    Gpu("a100-40gb", 40.0, 312, 19.5, 1555, {"A100-PCIE-40GB": 250, "A100": 400}),
    Gpu("l40s-48gb", 45.0, 362, 91.6, 864, {"L40S": 350}),
    Gpu("l40-48gb", 45.0, 181, 90.5, 864, {"L40": 300}, is_listed=False),
    Gpu("a40-48gb", 45.0, 149.7, 37.4, 696, {"A40": 300}, is_listed=False),
    Gpu("rtx6000ada-48gb", 48.0, 364, 91.1, 960, {"RTX 6000 Ada": 300}),
    Gpu("a100-80gb", 80.0, 312, 19.5, 2039, {"A100 80GB PCIe": 300, "A100": 400}),
    Gpu("h100-80gb", 79.6, 989, 67, 3350, {"H100 PCIe": 350, "H100 NVL": 400, "H100": 700}),
    Gpu("h200-141gb", 140.4, 989, 67, 4800, {"H200 NVL": 600, "H200": 700}),
    Gpu("b200-180gb", 179.0, 2250, 75, 8000, {"B200": 1000}),
)

GPUS = tuple(gpu for gpu in KNOWN_GPUS if gpu.is_listed)
"""What `estimate` shows where no GPU is named."""


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, which may leave out its memory where that is clear: h100, `RTX 4090`.

    Raises:
        QwenTuneError: There is none, or several.
    """
    wanted = _plain(name)
    found = [gpu for gpu in KNOWN_GPUS if _plain(gpu.name) == wanted]
    found = found or [gpu for gpu in KNOWN_GPUS if wanted and _plain(gpu.name.rsplit("-", 1)[0]) == wanted]
    if len(found) == 1:
        return found[0]
    names = [gpu.name for gpu in found or GPUS]
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    what = f"got {name!r}, which {'names several GPUs' if found else 'is not a known GPU'}"
    raise QwenTuneError(Problem("--gpu", what, f"write {' or '.join(names if found else near or names)}"))


def rated_watts(device: str) -> int | None:
    """Rated power in watts of the board that a driver reports under a name; None if unknown."""
    if "Laptop" in device or "Ti" in device.split():  # boards of another power under the same number
        return None
    boards = {name: watts for gpu in KNOWN_GPUS for name, watts in gpu.watts.items()}
    for name in sorted(boards, key=len, reverse=True):
        if re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", device):
            return boards[name]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|^nvidia|geforce", "", name.lower())
