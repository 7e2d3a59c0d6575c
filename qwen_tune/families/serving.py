"""What vLLM loads of an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unsupported_by_vllm(config: Mapping[str, Any]) -> list[str]:
    """Names the parts of an adapter that vLLM refuses or ignores; its own checks are in its `peft_helper.py`.

    Args:
        config: The content of adapter_config.json; `LoraConfig.to_dict()` has the same keys.
    """
    parts = {
        "fully trained modules (modules_to_save)": config.get("modules_to_save"),
        "DoRA": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none",
        "trained token rows": config.get("trainable_token_indices"),
        "adapters of experts": config.get("target_parameters"),
    }
    return [name for name, is_used in parts.items() if is_used]
