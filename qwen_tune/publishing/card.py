"""The model card: what was trained, on what, how well, and how to use it.

Everything in it comes from the run's record, the adapter's configuration and the base's own card. What its readers
write between the two markers is theirs, and is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from qwen_tune import __version__
from qwen_tune.errors import Problem, PublishError
from qwen_tune.publishing import card_sections as sections
from qwen_tune.publishing.description import Description, Licence
from qwen_tune.publishing.parts import ADAPTER, MERGED

BEGIN = "<!-- qwen-tune: what stands from here to the next marker is yours, and is kept -->"
END = "<!-- qwen-tune: end of your text -->"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)

# The card that training leaves beside an adapter, as it is.
_SHORT_CARD = re.compile(
    r"\s*# [^\n]+\n\s*A LoRA adapter \(rank \d+, alpha \d+\) for `[^`]+`, trained with qwen-tune\. Loss was taken on:"
    r"[^`#]*```python\n[^`]*```\s*"
)
_PEFT_BLANK = "[More Information Needed]"
_PEFT_BLANKS = 25  # of about forty: nobody has filled the form in

TAGS = ("qwen", "lora", "chatml", "qwen-tune")


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
    """What a card that is replaced says in its owner's words: all of it, where we have not written it.

    Raises:
        PublishError: Of the two markers one is gone, so that nobody can tell where those words end.
    """
    if card is None:
        return ""
    body = split_card(card)[1]
    begin, end = body.find(BEGIN), body.rfind(END)
    if 0 <= begin < end:
        return body[begin + len(BEGIN) : end].strip("\r\n")
    if begin != end:
        what = "one of the two markers on the card is gone or misplaced, so it cannot be told what is yours"
        raise PublishError(Problem("README.md", what, f"put them back around your text: {BEGIN} … {END}"))
    return "" if _SHORT_CARD.fullmatch(body) or body.count(_PEFT_BLANK) >= _PEFT_BLANKS else body.strip()


def front_matter_of(card: str | None) -> dict[str, Any]:
    """What a card says at its top."""
    return split_card(card)[0] if card else {}


def licence_of(card: str | None) -> Licence | None:
    """The licence that a card names."""
    values = front_matter_of(card)
    licence = values.get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if not isinstance(licence, str) or not licence.strip():
        return None
    name, link = values.get("license_name"), values.get("license_link")
    return Licence(licence, str(name) if name else None, str(link) if link else None)


def languages_of(card: str | None) -> tuple[str, ...]:
    """The languages that a card names."""
    languages = front_matter_of(card).get("language") or []
    listed = languages if isinstance(languages, list) else [languages]
    # Norwegian's code is YAML's word for false.
    return tuple("no" if each is False else str(each) for each in listed)


def compose(about: Description, kept: str = "", keep: Mapping[str, Any] | None = None) -> str:
    """The card as Markdown with its front matter.

    Args:
        about: What it tells.
        kept: Its owner's text.
        keep: The front matter of the card that is replaced.
    """
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
    return f"---\n{_front_matter(about, keep or {})}---\n\n{body}\n"


def _front_matter(about: Description, keep: Mapping[str, Any]) -> str:
    has_model = MERGED in about.places
    tags = [*(TAGS if about.facts else ()), *(["qlora"] if about.facts.get("quantization") else [])]
    theirs = keep.get("tags")
    ours: dict[str, Any] = {
        "base_model": about.base.id,
        "base_model_relation": "finetune" if has_model else ADAPTER,
        "library_name": "transformers" if has_model else "peft",
        "pipeline_tag": "text-generation",
        "license": about.licence.id,
        "license_name": about.licence.name,
        "license_link": about.licence.link,
        "language": list(about.languages) or keep.get("language"),
        "datasets": list(about.data_sets) or keep.get("datasets"),
        "tags": list(dict.fromkeys([*tags, *(theirs if isinstance(theirs, list) else [])])) or None,
        "qwen_tune": _origin(about) if about.facts else None,
    }
    kept = {key: value for key, value in keep.items() if key not in ours}
    values = {key: value for key, value in {**ours, **kept}.items() if value is not None}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _origin(about: Description) -> dict[str, str]:
    version = about.facts.get("versions", {}).get("qwen-tune", __version__)
    fingerprint = about.facts.get("fingerprint")
    return {"version": str(version), **({"fingerprint": str(fingerprint)} if fingerprint else {})}
