"""The architectures that are trained, by the `model_type` of config.json. A new one is a module and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qwen_tune.errors import ModelError, Problem
from qwen_tune.families.family import Family
from qwen_tune.families.qwen2 import QWEN2
from qwen_tune.families.qwen3 import QWEN3
from qwen_tune.families.qwen3_moe import QWEN3_MOE

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (QWEN2, QWEN3, QWEN3_MOE)}


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The architecture of a checkpoint.

    Args:
        config: Its config.json.
        where: What to call it in a message.

    Raises:
        ModelError: It is not one that is trained.
    """
    name = str(config.get("model_type"))
    if name not in FAMILIES:
        titles = ", ".join(f"{family.model_type} ({family.title})" for family in FAMILIES.values())
        what = f'not yet: the model type is "{name}"; supported are {titles}'
        raise ModelError(Problem(f"{where}/config.json", what, "choose such a base"))
    return FAMILIES[name]
