"""What a benchmark ran on, for the figures that depend on it."""

from __future__ import annotations

import platform
import re
from pathlib import Path

from qwen_tune.machine import cpu_bfloat16_units, usable_cores


def processor() -> str:
    """The processor as Linux calls it, with what tells it from others of that name; elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.exists() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.+)$", text, re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return f"{name}, {usable_cores()} cores, bfloat16: {cpu_bfloat16_units() or 'none'}"
