"""What of an adapter other programs do not load, by its adapter_config.json. Light: torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def parts_vllm_refuses(config: Mapping[str, Any]) -> list[str]:
    """What of an adapter vLLM does not load (its checks are in its `peft_helper.py`); merging helps.

    Args:
        config: adapter_config.json, or PEFT's `LoraConfig.to_dict()`.
    """
    parts = {
        "modules trained as a whole": config.get("modules_to_save"),
        "DoRA": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none",
        "trained token rows": config.get("trainable_token_indices"),
        "adapters of experts": config.get("target_parameters"),
    }
    return [name for name, is_there in parts.items() if is_there]
