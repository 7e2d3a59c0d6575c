"""The model card: what was trained, on what, how well, and how to use it.

Everything in it comes from the run's record, the adapter's configuration and the base's own card. What its readers
write between the two markers is theirs, and is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from qwen_tune import __version__
from qwen_tune.publishing import card_sections as sections
from qwen_tune.publishing.parts import ADAPTER, MERGED, PublishedBase

CURVE = "loss.png"
BEGIN = "<!-- qwen-tune: what stands from here to the next marker is yours, and is kept -->"
END = "<!-- qwen-tune: end of your text -->"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)

TAGS = ("qwen", "lora", "chatml", "qwen-tune")


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
    has_curve: bool = False
    is_on_modelscope: bool = False


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card; no front matter where it cannot be read."""
    found = _FRONT_MATTER.match(text)
    if not found:
        return {}, text
    try:
        values = yaml.safe_load(found[1] or "")
    except yaml.YAMLError:
        values = None
    return (values if isinstance(values, dict) else {}), text[found.end() :]


def kept_text(card: str | None) -> str:
    """What a card that is replaced says in its owner's words: all of it, where we have not written it."""
    if card is None:
        return ""
    body = split_card(card)[1]
    if BEGIN in body and END in body:
        return body.split(BEGIN, 1)[1].rsplit(END, 1)[0].strip("\n")
    return body.strip() if not _is_ours(card) else ""


def _is_ours(card: str) -> bool:
    """Whether it is the short card that training leaves beside an adapter, or PEFT's form with nothing filled in."""
    return "trained with qwen-tune" in card or "[More Information Needed]" in card


def licence_of(card: str | None) -> Licence | None:
    """The licence that a card names."""
    values = split_card(card)[0] if card else {}
    licence = values.get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if not isinstance(licence, str) or not licence.strip():
        return None
    name, link = values.get("license_name"), values.get("license_link")
    return Licence(licence, str(name) if name else None, str(link) if link else None)


def languages_of(card: str | None) -> tuple[str, ...]:
    """The languages that a card names."""
    values = split_card(card)[0] if card else {}
    languages = values.get("language") or values.get("languages") or []
    return tuple(map(str, [languages] if isinstance(languages, str) else languages))


def compose(about: Description, kept: str = "") -> str:
    """The card as Markdown with its front matter."""
    own = f"{BEGIN}\n{kept}\n{END}" if kept else f"{BEGIN}\n{END}"
    parts = [
        f"# {about.title}",
        own,
        sections.summary(about),
        sections.usage(about),
        sections.training(about),
        sections.data(about),
        sections.results(about),
        sections.compute(about),
        sections.limits(about),
        sections.recipe(about),
    ]
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{_front_matter(about)}---\n\n{body}\n"


def _front_matter(about: Description) -> str:
    has_model = MERGED in about.places
    quantized = bool(about.facts.get("quantization"))
    values: dict[str, Any] = {
        "base_model": about.base.id,
        "base_model_relation": "finetune" if has_model else ADAPTER,
        "library_name": "transformers" if has_model else "peft",
        "pipeline_tag": "text-generation",
        "license": about.licence.id,
        "license_name": about.licence.name,
        "license_link": about.licence.link,
        "language": list(about.languages) or None,
        "datasets": list(about.data_sets) or None,
        "tags": [*TAGS, *(["qlora"] if quantized else [])],
        "qwen_tune": _origin(about),
    }
    return yaml.safe_dump(
        {key: value for key, value in values.items() if value is not None}, sort_keys=False, allow_unicode=True
    )


def _origin(about: Description) -> dict[str, str]:
    version = about.facts.get("versions", {}).get("qwen-tune", __version__)
    fingerprint = about.facts.get("fingerprint")
    return {"version": str(version), **({"fingerprint": str(fingerprint)} if fingerprint else {})}
