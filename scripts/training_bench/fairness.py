"""Whether two sides did the same work, so that a ratio of them says something."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Relative differences that sides may have over the same rows with the same adapters: loss a token, gradient norm.
# A pack whose samples see each other moved them by 0.2 % and 8.2 % (0.5b-small, 512 tokens): the gradient tells more.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (5e-3, 3e-2), "nf4": (5e-3, 3e-2)}
SUPERVISED_SHARE = 0.05  # sides draw their batches in orders of their own, so that the share in some steps differs
OWN_CHECKPOINTING = ("trl", "unsloth")  # one as it comes, the other with its own kind


def probe_differences(ours: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """The largest relative differences of loss and gradient norm, of all rounds to our first."""
    first = ours[0]["probe"]
    found = [one["probe"] for one in [*ours, *other]]
    loss, norm = (
        # A NaN is larger than any number here; `max` alone would pass over it.
        max((abs(probe[key] / first[key] - 1) for probe in found), key=lambda apart: (math.isnan(apart), apart))
        for key in ("loss", "grad_norm")
    )
    return loss, norm


def unlike(
    side: str, held: str, ours: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]
) -> Sequence[str]:
    """In what a side's work differs from ours by more than it may.

    Args:
        side: Its name.
        held: How the base is held, which decides the tolerance.
        ours: What was found in each round of ours.
        other: The same of the side.
    """
    reasons = []
    for name, apart, most in zip(
        ("loss", "gradient norm"), probe_differences(ours, other), TOLERANCES[held], strict=True
    ):
        if not apart <= most:
            reasons.append(f"the {name} before training differs by {apart:.2g}")
    for key in ("trained_parameters", "peak_of"):
        values = {str(found.get(key)) for found in [*ours, *other]}
        if len(values) > 1:
            reasons.append(f"{key} are {' and '.join(sorted(values))}")
    shares = [sum(found["supervised_share"] for found in rounds) / len(rounds) for rounds in (ours, other)]
    if not abs(shares[0] - shares[1]) <= SUPERVISED_SHARE:
        reasons.append(f"{shares[1]:.2f} of the tokens have loss, and {shares[0]:.2f} of ours")
    checkpointed = {found["checkpoints"] for found in [*ours, *other]}
    if side not in OWN_CHECKPOINTING and len(checkpointed) > 1:
        reasons.append("only one of them computes layers again")
    return reasons
