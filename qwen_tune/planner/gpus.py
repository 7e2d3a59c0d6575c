"""GPUs that a run may be planned for, by their makers' public figures: rated, not measured here."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from qwen_tune.errors import Problem, QwenTuneError
from qwen_tune.model.dtypes import Dtype
from qwen_tune.planner.job import Attention, attention_on

GIB = 1 << 30


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
        has_bfloat16: Whether it multiplies bfloat16.
    """

    name: str
    memory_gib: float
    tflops: float
    float32_tflops: float
    bandwidth: int
    has_bfloat16: bool = True

    @property
    def memory_bytes(self) -> int:
        """All of its memory."""
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

    def attention(self, asked: str, dtype: Dtype, head_size: int) -> Attention:
        """What `model.attention` comes to on it.

        Raises:
            QwenTuneError: The recipe asks for one that it does not have.
        """
        # Ampere brought both.
        found = attention_on(asked, dtype, head_size, flash=self.has_bfloat16)
        if found is None:
            what = f"{self.name} does not compute {asked} with heads of {head_size} channels in {dtype}"
            raise QwenTuneError(Problem("model.attention", what, "write attention: auto"))
        return found


# In the order of their memory. NVIDIA's data sheets; products without sparsity.
GPUS = (
    Gpu("t4-16gb", 15.0, 65, 8.1, 320, has_bfloat16=False),
    Gpu("l4-24gb", 22.5, 121, 30.3, 300),
    Gpu("a10-24gb", 22.5, 125, 31.2, 600),
    Gpu("rtx3090-24gb", 24.0, 71, 35.6, 936),
    Gpu("rtx4090-24gb", 24.0, 165, 82.6, 1008),
    Gpu("rtx5090-32gb", 31.8, 209, 104.8, 1792),
    Gpu("a100-40gb", 40.0, 312, 19.5, 1555),
    Gpu("l40s-48gb", 45.0, 362, 91.6, 864),
    Gpu("rtx6000ada-48gb", 48.0, 364, 91.1, 960),
    Gpu("a100-80gb", 80.0, 312, 19.5, 2039),
    Gpu("h100-80gb", 79.6, 989, 67, 3350),
    Gpu("h200-141gb", 140.4, 989, 67, 4800),
    Gpu("b200-180gb", 179.0, 2250, 75, 8000),
)


def find_gpu(name: str) -> Gpu:
    """The GPU of a name, which may leave out its memory where that is clear: h100, `RTX 4090`.

    Raises:
        QwenTuneError: There is none, or several.
    """
    wanted = _plain(name)
    found = [gpu for gpu in GPUS if _plain(gpu.name) == wanted]
    found = found or [gpu for gpu in GPUS if wanted and _plain(gpu.name.rsplit("-", 1)[0]) == wanted]
    if len(found) == 1:
        return found[0]
    names = [gpu.name for gpu in found or GPUS]
    near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    what = f"got {name!r}, which {'several are called' if found else 'is no GPU that is known here'}"
    raise QwenTuneError(Problem("--gpu", what, f"write {' or '.join(names if found else near or names)}"))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|^nvidia|geforce", "", name.lower())
