"""What a run took, in words: hardware, hours and an estimate of its energy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

WATTS = {
    "B200": 1000,
    "H200 NVL": 600,
    "H200": 700,
    "H100 PCIe": 350,
    "H100 NVL": 400,
    "H100": 700,
    "A100-PCIE-40GB": 250,
    "A100 80GB PCIe": 300,
    "A100": 400,
    "L40S": 350,
    "L40": 300,
    "L4": 72,
    "A40": 300,
    "A10G": 300,
    "A10": 150,
    "V100-SXM2-16GB": 300,
    "V100-SXM2-32GB": 300,
    "V100-PCIE-16GB": 250,
    "T4": 70,
    "RTX 5090": 575,
    "RTX 4090": 450,
    "RTX 3090": 350,
}
"""Rated power of a board by its maker's data sheet; the first name that stands in the device's as a word counts."""


def seconds_of_training(facts: Mapping[str, Any]) -> float | None:
    """Seconds in steps, without evaluation and saving: tokens over their speed."""
    speed, tokens = facts.get("tokens_per_second"), facts.get("tokens", {}).get("processed")
    return tokens / speed if speed and tokens else None


def energy_kwh(facts: Mapping[str, Any]) -> float | None:
    """Rated power times hours in steps, for all processes; None where the power of the device is not known."""
    seconds, device = seconds_of_training(facts), str(facts.get("device", ""))
    words = f" {device} "
    is_other = "Laptop" in device or "Ti" in device.split()  # boards of another power under the same number
    found = (watts for name, watts in WATTS.items() if re.search(rf"(?<![\w-]){re.escape(name)}(?!\w)", words))
    watts = None if is_other else next(found, None)
    if seconds is None or watts is None:
        return None
    return watts * seconds / 3600 / 1000 * int(facts.get("world_size") or 1)


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
