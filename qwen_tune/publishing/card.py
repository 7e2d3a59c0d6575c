"""The model card: what was trained, on what, how well, and how to use it.

Its text is in `card.md.jinja`. Its values come from the run's record, the adapter's configuration and the base's card.
What the owner of a repository writes between the two markers, or adds to the front matter, is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, StrictUndefined

from qwen_tune import __version__
from qwen_tune.errors import Problem, PublishError
from qwen_tune.families.serving import unsupported_by_vllm
from qwen_tune.hardware import rated_watts
from qwen_tune.publishing.parts import ADAPTER, MERGED, PublishedBase

if TYPE_CHECKING:
    from huggingface_hub import CardData

# Published cards have these two lines: they must not change.
BEGIN = "<!-- qwen-tune: what stands from here to the next marker is yours, and is kept -->"
END = "<!-- qwen-tune: end of your text -->"

TAGS = ("qwen", "lora", "chatml", "qwen-tune")

_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)

# The card that training writes next to an adapter, without changes.
_SHORT_CARD = re.compile(
    r"\s*# [^\n]+\n\s*A LoRA adapter \(rank \d+, alpha \d+\) for `[^`]+`, trained with qwen-tune\. Loss was taken on:"
    r"[^`#]*```python\n[^`]*```\s*"
)
_PEFT_BLANK = "[More Information Needed]"
_PEFT_BLANKS = 25
"""PEFT's own card has about forty: with this many left, nobody has filled it in."""


@dataclass(frozen=True)
class Licence:
    """A licence as in a card's front matter; name and link belong to the id `other`."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class CardInputs:
    """What a card is written from."""

    title: str
    repo_id: str
    folders: Mapping[str, str]
    """The folder of each part in the repository, by its kind; "" is the root."""

    base: PublishedBase
    licence: Licence
    facts: Mapping[str, Any] = field(default_factory=dict)
    """run.json."""

    adapter: Mapping[str, Any] = field(default_factory=dict)
    """adapter_config.json."""

    merge: Mapping[str, Any] = field(default_factory=dict)
    """merge.json."""

    recipe: str = ""
    data_sets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    files: frozenset[str] = frozenset()
    """The names of all files that are sent."""

    curve: str = ""
    """The file name of the loss curve; empty if there is none."""

    site: str = "hub"
    """`hub` or `modelscope`."""


def split_card(text: str | None) -> tuple[dict[str, Any], str]:
    """Returns front matter and body. Front matter that cannot be read is empty.

    huggingface_hub's `RepoCard` raises on such front matter, and `ModelCardData` rewrites a `model-index`.
    """
    found = _FRONT_MATTER.match(text or "")
    if not found:
        return {}, text or ""
    try:
        values = yaml.safe_load(found[1] or "")
    except yaml.YAMLError:
        values = None
    return (values if isinstance(values, dict) else {}), found.string[found.end() :]


def kept_text(card: str | None) -> str:
    """Returns what the owner wrote on a card: the text between the markers, or a card that is not ours as a whole.

    Raises:
        PublishError: One of the two markers is missing.
    """
    body = split_card(card)[1]
    begin, end = body.find(BEGIN), body.rfind(END)
    if 0 <= begin < end:
        return body[begin + len(BEGIN) : end].strip("\r\n")
    if begin != end:
        what = "one of the two markers on the card is missing or misplaced, so your text cannot be found"
        raise PublishError(Problem("README.md", what, f"put them back around your text: {BEGIN} … {END}"))
    return "" if _SHORT_CARD.fullmatch(body) or body.count(_PEFT_BLANK) >= _PEFT_BLANKS else body.strip()


def licence_of(card: str | None) -> Licence | None:
    values, _ = split_card(card)
    licence = values.get("license")
    if isinstance(licence, list) and len(licence) == 1:
        licence = licence[0]
    if not isinstance(licence, str) or not licence.strip():
        return None
    name, link = values.get("license_name"), values.get("license_link")
    return Licence(licence, str(name) if name else None, str(link) if link else None)


def languages_of(card: str | None) -> tuple[str, ...]:
    languages = split_card(card)[0].get("language") or []
    listed = languages if isinstance(languages, list) else [languages]
    # YAML reads Norwegian's code as false.
    return tuple("no" if each is False else str(each) for each in listed)


def compose(card: CardInputs, kept: str = "", keep: Mapping[str, Any] | None = None) -> str:
    """Returns the card as Markdown with front matter.

    Args:
        card: The values.
        kept: The owner's text.
        keep: The front matter of the card that is replaced.
    """
    # Not `RepoCard.from_template`: there a misspelt name is empty, and every block leaves an empty line.
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["comma"] = lambda number: f"{int(number):,}"
    template = environment.from_string(files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8"))
    front_matter = _front_matter(card, keep or {})
    return template.render(front_matter=front_matter, begin=BEGIN, end=END, kept=kept, **_values(card))


def _front_matter(card: CardInputs, keep: Mapping[str, Any]) -> CardData:
    from huggingface_hub import CardData

    is_model = MERGED in card.folders
    tags = [*(TAGS if card.facts else ()), *(["qlora"] if card.facts.get("quantization") else [])]
    theirs = keep.get("tags")
    ours = {
        "base_model": card.base.id,
        "base_model_relation": "finetune" if is_model else ADAPTER,
        "library_name": "transformers" if is_model else "peft",
        "pipeline_tag": "text-generation",
        "license": card.licence.id,
        "license_name": card.licence.name,
        "license_link": card.licence.link,
        "language": list(card.languages) or None,
        "datasets": list(card.data_sets) or keep.get("datasets"),
        "tags": list(dict.fromkeys([*tags, *(theirs if isinstance(theirs, list) else [])])) or None,
        "qwen_tune": _origin(card.facts) if card.facts else None,
    }
    data = CardData(**ours)
    for key, value in keep.items():
        if key not in ours:
            data[key] = value
    return data


def _origin(facts: Mapping[str, Any]) -> dict[str, str]:
    version, fingerprint = facts.get("versions", {}).get("qwen-tune", __version__), facts.get("fingerprint")
    return {"version": str(version), **({"fingerprint": str(fingerprint)} if fingerprint else {})}


def _values(card: CardInputs) -> dict[str, Any]:
    """What the template needs beside the inputs themselves."""
    facts, schedule = card.facts, card.facts.get("schedule", {})
    adapter = {**card.adapter, **facts.get("adapter", {})}
    quantization = facts.get("quantization") or {}
    targets = adapter.get("target_modules") or []
    sizes = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    steps, steps_per_epoch = facts.get("steps") or 0, schedule.get("steps_per_epoch")
    losses, seconds = facts.get("losses") or {}, training_seconds(facts)
    before_and_after = {
        "held out": (losses.get("eval_before"), losses.get("eval_after")),
        "training, first and last logged": (losses.get("train_first"), losses.get("train_last")),
    }
    pages = "https://modelscope.cn/models" if card.site == "modelscope" else "https://huggingface.co"
    method = "DoRA" if adapter.get("use_dora") else "rsLoRA" if adapter.get("use_rslora") else "LoRA"
    return {
        "card": card,
        "facts": facts,
        "adapter": adapter,
        "base_link": f"[{card.base.id}]({pages}/{card.base.id})",
        "method": f"Q{method}" if quantization else method,
        "quantization": ("NF4" if quantization.get("load_in_4bit") else "int8") if quantization else "",
        "modules": adapter.get("modules") or ([f"`{targets}`"] if isinstance(targets, str) else sorted(targets)),
        "rank_of_vllm": _rank_of_vllm(card.adapter),
        "unsupported_by_vllm": unsupported_by_vllm(card.adapter),
        "epochs": steps / steps_per_epoch if steps_per_epoch else None,
        "best_step": _best_step(facts),
        "sequences_per_step": math.prod(schedule.get(size, 0) for size in sizes),
        "skipped_steps": sum(entry["step"] <= steps for entry in facts.get("bad_steps") or []),
        "losses": {name: pair for name, pair in before_and_after.items() if None not in pair},
        "duration": duration(seconds) if seconds else "",
        "energy": energy_kwh(facts),
    }


def _rank_of_vllm(config: Mapping[str, Any]) -> int:
    """Returns the `--max-lora-rank` of an adapter: vLLM takes 8, 16, 32 and so on."""
    ranks: list[int] = [config.get("r") or 8, *(config.get("rank_pattern") or {}).values()]
    return max(8, 1 << (max(ranks) - 1).bit_length())


def _best_step(facts: Mapping[str, Any]) -> int | None:
    """Returns the step of the adapter if that is not the last step: its held-out loss was the lowest."""
    best, after = facts.get("best") or {}, (facts.get("losses") or {}).get("eval_after")
    is_taken = best.get("loss") is not None and best.get("loss") == after and best.get("step") != facts.get("steps")
    return int(best["step"]) if is_taken else None


def training_seconds(facts: Mapping[str, Any]) -> float | None:
    """Seconds in steps, without evaluation and saving: tokens over their speed."""
    speed, tokens = facts.get("tokens_per_second"), facts.get("tokens", {}).get("processed")
    return tokens / speed if speed and tokens else None


def energy_kwh(facts: Mapping[str, Any]) -> float | None:
    """Rated power times hours in steps, for all processes; None if the power of the device is not known."""
    seconds, watts = training_seconds(facts), rated_watts(str(facts.get("device", "")))
    if seconds is None or watts is None:
        return None
    return watts * seconds / 3600 / 1000 * int(facts.get("world_size") or 1)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
