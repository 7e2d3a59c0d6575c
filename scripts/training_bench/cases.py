"""What is measured: models, lengths and sides, the most important first."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SIDES = {
    "ours": "qwen-tune through its own `train`: packs, `attention: auto`, `kernels: auto`",
    "ours-compiled": "the same with `train.torch_compile: true`",
    "trl": "TRL as it comes: padded batches of 8, gradient checkpointing on",
    "trl-packed": "TRL with packing (best fit decreasing), gradient checkpointing as in the case",
    "trl-liger": "the same with Liger's layer kernels",
    "unsloth": "Unsloth with packing; where the case says `full`, its own checkpointing",
}
COMPARED = [side for side in SIDES if side != "ours-compiled"]  # compiling takes more time than a budget has for all


@dataclass(frozen=True)
class Case:
    """A base, how it is held, and the length of a pack, which is also the tokens of an optimizer step."""

    shape: str
    held: str
    """float32, bfloat16, or nf4 (multiplied in bfloat16)."""
    length: int
    checkpointing: str = "none"
    warm_up_steps: int = 5
    measured_steps: int = 24

    @property
    def name(self) -> str:
        """For people and for --only."""
        return f"{self.shape} {self.held} {self.length}" + (" full" if self.checkpointing == "full" else "")

    def facts(self) -> dict[str, Any]:
        """For the result."""
        return asdict(self)


@dataclass(frozen=True)
class Preset:
    """Cases, and how long all of it may take."""

    cases: tuple[Case, ...]
    rounds: int
    budget_seconds: float


PRESETS = {
    "cpu": Preset((Case("0.5b-small", "float32", 512, warm_up_steps=2, measured_steps=12),), 1, 170),
    # The true shape: a step takes some ten seconds on two cores, and the base 2 GB on the disk.
    "cpu-0.5b": Preset((Case("0.5b", "float32", 512, warm_up_steps=1, measured_steps=3),), 2, 1200),
    # Rounds go over all cases before any is repeated, so that a budget that ends early has cut repeats first.
    "gpu": Preset(
        (
            Case("7b", "bfloat16", 4096),
            Case("0.5b", "bfloat16", 4096),
            Case("7b", "nf4", 8192, "full", measured_steps=12),
            Case("0.5b", "bfloat16", 512, measured_steps=48),
            Case("1.5b", "bfloat16", 4096),
            Case("7b", "bfloat16", 8192, "full", measured_steps=12),
            Case("0.5b", "bfloat16", 8192),
            Case("1.5b", "nf4", 2048),
            Case("0.5b", "nf4", 2048),
            Case("7b", "nf4", 2048),
            Case("1.5b", "bfloat16", 1024, measured_steps=48),
        ),
        2,
        480,
    ),
}
