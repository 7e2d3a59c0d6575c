"""An adapter's adapter_config.json, as far as a merge has to understand it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from qwen_tune.artifacts.adapter_dir import AdapterDir
from qwen_tune.errors import MergeError, Problem

# Settings that change what the matrices mean; with any of them the product B·A is not what was trained.
_OTHER_KINDS = (
    "alora_invocation_tokens",
    "arrow_config",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
_NOT_WHOLE = "save the adapter again: its files do not belong together"


class AdapterSettings:
    """What an adapter's settings say about its matrices.

    Raises:
        MergeError: It is of a kind that has no merge, or its settings cannot be understood.
    """

    def __init__(self, adapter: AdapterDir) -> None:
        self._path, self._config = adapter.path, adapter.config
        kind = adapter.config.get("peft_type", "LORA")
        if kind != "LORA":
            raise self._problem(f"the adapter is of the kind {kind}; expected LORA", "merge it with PEFT itself")
        for name in _OTHER_KINDS:
            if adapter.config.get(name):
                what = f"adapter_config.json sets {name}, so its matrices are more than a product of two"
                raise self._problem(what, "serve the adapter beside its base, or merge it with PEFT")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(adapter.config.get(name) or {}, Mapping):
                raise self._problem(f"{name} in adapter_config.json is not a mapping", _NOT_WHOLE)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
            given = adapter.config.get(name) or []
            is_pattern = isinstance(given, str) and name in ("target_modules", "exclude_modules")
            if not is_pattern and not (isinstance(given, list) and all(isinstance(entry, str) for entry in given)):
                raise self._problem(f"{name} in adapter_config.json is not a list of names", _NOT_WHOLE)
        self.use_dora = bool(adapter.config.get("use_dora"))
        self.target_parameters = tuple(adapter.config.get("target_parameters") or ())

    def scaling(self, module: str, rank: int) -> float:
        """Alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023), of the patterns that fit the module.

        Raises:
            MergeError: The rank is not that of the matrices, or alpha is not finite.
        """
        patterned = self._patterned("rank_pattern", module, self._config.get("r"))
        if patterned != rank:
            raise self._problem(f"{module} has rank {rank}; adapter_config.json says {patterned}", _NOT_WHOLE)
        alpha = self._patterned("alpha_pattern", module, self._config.get("lora_alpha"))
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise self._problem(f"adapter_config.json gives {module} no lora_alpha; expected a number", _NOT_WHOLE)
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank

    def tokens(self, module: str, count: int) -> list[int]:
        """The tokens whose rows of an embedding are trained.

        Raises:
            MergeError: They are not as many as there are rows.
        """
        given = self._config.get("trainable_token_indices")
        if isinstance(given, Mapping):
            given = next((given[name] for name in given if _ends_in(module, name)), None)
        if not isinstance(given, list) or len(given) != count or not all(type(token) is int for token in given):
            what = f"{module} has {count} trained token rows; adapter_config.json names other tokens"
            raise self._problem(what, _NOT_WHOLE)
        return given

    def targets_parameter(self, name: str) -> bool:
        """Whether a parameter was targeted by its own name, rather than its module."""
        return any(_ends_in(name, target) for target in self.target_parameters)

    def is_target(self, name: str) -> bool:
        """Whether a tensor of a layer is meant to have matrices, as PEFT decides it.

        False as well where the settings leave out layers: which is not for us to count.
        """
        config = self._config
        if config.get("layers_to_transform") is not None or not name.endswith(".weight"):
            return self.targets_parameter(name)
        module = name.removesuffix(".weight")
        # What is saved whole is never targeted.
        saved = self._config.get("modules_to_save") or ()
        is_saved = any(self._is(rf"(^|.*\.){name}($|\..*)", module) for name in saved)
        if is_saved or self._matches("exclude_modules", module):
            return False
        return self._matches("target_modules", module)

    def _matches(self, setting: str, module: str) -> bool:
        given = self._config.get(setting) or ()
        if isinstance(given, str):
            return self._is(rf"(?:{given})\Z", module)
        return any(_ends_in(module, name) for name in given)

    def _patterned(self, setting: str, module: str, default: Any) -> Any:
        """The entry whose key, a regular expression, matches the end of a module's name, as PEFT looks for it."""
        for key, value in (self._config.get(setting) or {}).items():
            if self._is(rf"(.*\.)?({key})$", module):
                return value
        return default

    def _is(self, pattern: str, module: str) -> bool:
        try:
            return re.match(pattern, module) is not None
        except re.error:
            what = f"adapter_config.json has {pattern!r}, which is not a regular expression"
            raise self._problem(what, _NOT_WHOLE) from None

    def _problem(self, what: str, fix: str) -> MergeError:
        return MergeError(Problem(str(self._path), what, fix))


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
