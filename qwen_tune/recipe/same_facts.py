"""What a run has to be the same in beside its recipe; `train.allow_drift` knows these names."""

from __future__ import annotations

import re

from qwen_tune.recipe.errors import known_sections

FACTS = {
    "base.weights_fingerprint": "the base's weights",
    "base.config_sha256": "the base's config.json",
    "dtype": "the type that the base is held in",
    "tokenizer_sha256": "the tokenizer",
    "template_sha256": "the chat template",
    "data_fingerprint": "the rows (their token ids and labels)",
    "world_size": "the number of processes",
    **{
        f"versions.{name}": f"the version of {name}"
        for name in ("qwen-tune", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes")
    },
}
"""Keys of run.json, and what each is."""


def drift_names() -> set[str]:
    """Every name that may stand in `train.allow_drift`: keys of the recipe, facts, and what holds one of them."""
    keys = {
        f"{section}.{name}".lstrip(".") for section, known in known_sections().items() for name in known.model_fields
    }
    names = {re.sub(r"\[\]", "", key) for key in keys} | set(FACTS)
    return names | {"versions", "base"}


def is_drift_name(name: str) -> bool:
    """Whether a name may stand there: `data.train[1].path` is as good as `data.train.path`."""
    plain = re.sub(r"\[\d+\]", "", name)
    return plain in drift_names() or plain.startswith("train.trainer_args.")
