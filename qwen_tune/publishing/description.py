"""What a card is written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_tune.publishing.parts import PublishedBase


@dataclass(frozen=True)
class Licence:
    """As a card's front matter has it; name and link where the id is `other`."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Description:
    """What a card is written from. `places` says in which folder of the repository each part lies; "" for the root."""

    title: str
    repo_id: str
    places: Mapping[str, str]
    base: PublishedBase
    licence: Licence
    facts: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    """adapter_config.json."""

    merge: Mapping[str, Any] = field(default_factory=dict)
    """merge.json."""

    recipe: str = ""
    data_sets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    files: frozenset[str] = frozenset()
    """Names of all files that are sent."""

    curve: str = ""
    """Name of the picture of the losses; empty where there is none."""

    site: str = "hub"
    """`hub` or `modelscope`."""

    def link(self, model_id: str) -> str:
        """A model's page on the site, as Markdown."""
        pages = "https://modelscope.cn/models" if self.site == "modelscope" else "https://huggingface.co"
        return f"[{model_id}]({pages}/{model_id})"
