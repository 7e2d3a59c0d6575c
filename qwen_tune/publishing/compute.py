"""What a run took, in words: hardware, hours and an estimate of its energy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_tune.hardware import rated_watts


def seconds_of_training(facts: Mapping[str, Any]) -> float | None:
    """Seconds in steps, without evaluation and saving: tokens over their speed."""
    speed, tokens = facts.get("tokens_per_second"), facts.get("tokens", {}).get("processed")
    return tokens / speed if speed and tokens else None


def energy_kwh(facts: Mapping[str, Any]) -> float | None:
    """Rated power times hours in steps, for all processes; None where the power of the device is not known."""
    seconds, watts = seconds_of_training(facts), rated_watts(str(facts.get("device", "")))
    if seconds is None or watts is None:
        return None
    return watts * seconds / 3600 / 1000 * int(facts.get("world_size") or 1)


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
