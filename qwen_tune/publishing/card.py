"""The model card: what was trained, on what, how well, and how to use it.

Everything in it comes from the run's record, the adapter's configuration and the base's own card; its prose is in
card.md.jinja. What its readers write between the two markers is theirs, and is kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qwen_tune import __version__
from qwen_tune.errors import Problem, PublishError
from qwen_tune.families.serving import parts_vllm_refuses
from qwen_tune.hardware import GIB, rated_watts
from qwen_tune.publishing.parts import ADAPTER, MERGED, PublishedBase

if TYPE_CHECKING:
    from jinja2 import Template

BEGIN = "<!-- qwen-tune: what stands from here to the next marker is yours, and is kept -->"
END = "<!-- qwen-tune: end of your text -->"

# The card that training leaves beside an adapter, as it is.
_SHORT_CARD = re.compile(
    r"\s*# [^\n]+\n\s*A LoRA adapter \(rank \d+, alpha \d+\) for `[^`]+`, trained with qwen-tune\. Loss was taken on:"
    r"[^`#]*```python\n[^`]*```\s*"
)
_PEFT_BLANK = "[More Information Needed]"
_PEFT_BLANKS = 25  # of about forty: nobody has filled the form in

_KEPT, _RECIPE = "\0kept\0", "\0recipe\0"
"""Stand in the template for texts that go in as they are, whatever their blank lines."""

TAGS = ("qwen", "lora", "chatml", "qwen-tune")


@dataclass(frozen=True)
class Licence:
    """As a card's front matter has it; name and link where the id is `other`."""

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Description:
    """What a card is written from.

    Attributes:
        title: Its heading.
        repo_id: Where it is pushed.
        places: The folder of the repository in which each part lies; "" for the root.
        base: The base as others find it.
        licence: The licence.
        facts: The run's record.
        adapter: adapter_config.json.
        merge: merge.json.
        recipe: The public recipe.
        data_sets: Hub ids of the data.
        languages: Languages for the front matter.
        files: Names of all files that are sent.
        curve: Name of the picture of the losses; empty without one.
        site: `hub` or `modelscope`.
    """

    title: str
    repo_id: str
    places: Mapping[str, str]
    base: PublishedBase
    licence: Licence
    facts: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    merge: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    data_sets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    files: frozenset[str] = frozenset()
    curve: str = ""
    site: str = "hub"

    def link(self, model_id: str) -> str:
        """A model's page on the site, as Markdown."""
        pages = "https://modelscope.cn/models" if self.site == "modelscope" else "https://huggingface.co"
        return f"[{model_id}]({pages}/{model_id})"


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card; no front matter where it cannot be read."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

    found = REGEX_YAML_BLOCK.search(text)
    if not found:
        return {}, text
    try:
        values = RepoCard(text).data.to_dict()
    except (yaml.YAMLError, ValueError, TypeError):
        values = {}
    return values, text[found.end() :]


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
        what = "one of the two markers on the card is gone or misplaced, so your text cannot be recognized"
        raise PublishError(Problem("README.md", what, f"put them back around your text: {BEGIN} … {END}"))
    return "" if _SHORT_CARD.fullmatch(body) or body.count(_PEFT_BLANK) >= _PEFT_BLANKS else body.strip()


def front_matter_of(card: str | None) -> dict[str, Any]:
    """The metadata at the top of a card."""
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
    losses = about.facts.get("losses") or {}
    recipe = about.recipe.strip()
    text: str = _template().render(
        card_data=_card_data(about, keep or {}),
        about=about,
        begin=BEGIN,
        end=END,
        kept=kept and _KEPT,
        recipe=recipe and _RECIPE,
        method=_method(about),
        summary=_summary(about),
        uses=[_usage(about, kind, folder) for kind, folder in about.places.items()],
        training=_training(about),
        data=_data(about.facts),
        results=_results(losses),
        has_held_out=losses.get("eval_after") is not None,
        compute=_compute(about.facts),
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text.replace(_RECIPE, recipe).replace(_KEPT, kept)


@lru_cache(maxsize=1)
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("qwen_tune", "publishing")
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.get_template("card.md.jinja")


def _card_data(about: Description, keep: Mapping[str, Any]) -> str:
    """The front matter: ours, and what its owner has put there beside."""
    from huggingface_hub import ModelCardData

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
        "tags": [*tags, *(theirs if isinstance(theirs, list) else [])] or None,
        "qwen_tune": _origin(about) if about.facts else None,
    }
    data = ModelCardData(**ours)
    for key, value in keep.items():  # one by one, as they are: the constructor would take a model-index apart
        if key not in ours:
            data[key] = value
    return str(data.to_yaml())


def _origin(about: Description) -> dict[str, str]:
    version = about.facts.get("versions", {}).get("qwen-tune", __version__)
    fingerprint = about.facts.get("fingerprint")
    return {"version": str(version), **({"fingerprint": str(fingerprint)} if fingerprint else {})}


def _method(about: Description) -> str:
    """LoRA or its variant, from the record."""
    settings = {**about.adapter, **about.facts.get("adapter", {})}
    name = "DoRA" if settings.get("use_dora") else "rsLoRA" if settings.get("use_rslora") else "LoRA"
    return ("Q" if about.facts.get("quantization") else "") + name


def _summary(about: Description) -> str:
    """What this is, in a sentence or two."""
    kind, base, kinds = _method(about), about.link(about.base.id), list(about.places)
    what = f"A {kind} adapter for {base}" if kinds == [ADAPTER] else f"{base}, fine-tuned with {kind}"
    what += ": the full model" if kinds == [MERGED] else ""
    names = {ADAPTER: "the adapter", MERGED: "the full model"}
    where = " and ".join(f"{names[part]} in `{folder}/`" for part, folder in about.places.items() if folder)
    made = " Made with qwen-tune." if about.facts or about.merge else ""
    return f"{what}{': ' if where else ''}{where}.{made}"


def _usage(about: Description, kind: str, folder: str) -> dict[str, Any]:
    """What the code that loads a part names: models are downloaded by each site's own means."""
    name = about.repo_id.rsplit("/", 1)[-1]
    revision = f', revision="{about.base.revision}"' if about.base.revision and about.site == "hub" else ""
    fetch = ""
    if about.site == "modelscope":
        fetch = f"modelscope download --model {about.repo_id} --local_dir {name}\nexport VLLM_USE_MODELSCOPE=true"
    elif folder:  # vLLM looks at the root of a repository
        fetch = f"hf download {about.repo_id} --local-dir {name}"
    located = 'snapshot_download("{}")' if about.site == "modelscope" else '"{}"'
    ranks: list[int] = [about.adapter.get("r") or 8, *(about.adapter.get("rank_pattern") or {}).values()]
    return {
        "is_adapter": kind == ADAPTER,
        "has_tokenizer": f"{folder}/tokenizer_config.json".lstrip("/") in about.files,
        "locate": located.format(about.repo_id),
        "locate_base": located.format(about.base.id),
        "subfolder": f', subfolder="{folder}"' if folder else "",
        "fetch": fetch,
        "place": f"./{name}/{folder}".rstrip("/") if fetch else about.repo_id,
        "revision": revision,
        "name": name,
        "rank": max(8, 1 << (max(ranks) - 1).bit_length()),  # vLLM takes powers of two from 8 on
        "not_served": parts_vllm_refuses(about.adapter) if kind == ADAPTER else [],
    }


def _training(about: Description) -> dict[str, str]:
    """How it was trained."""
    facts, config = about.facts, about.adapter
    settings, schedule = facts.get("adapter", {}), facts.get("schedule", {})
    rank, alpha = settings.get("r", config.get("r")), settings.get("lora_alpha", config.get("lora_alpha"))
    targets = config.get("target_modules") or []
    modules = settings.get("modules") or ([f"`{targets}`"] if isinstance(targets, str) else sorted(targets))
    parameters = settings.get("trainable_parameters")
    sizes = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    batch = math.prod(schedule.get(key, 0) for key in sizes)
    return {
        "base": about.link(about.base.id) + (f" at `{about.base.revision}`" if about.base.revision else ""),
        "rank_and_alpha": f"{rank}, {alpha}" if rank and alpha else "",
        "modules": ", ".join(modules),
        "parameters": f"{parameters:,}" if parameters else "",
        "held_as": _held_as(facts.get("dtype"), facts.get("quantization") or {}),
        "steps": _steps(facts.get("steps"), schedule.get("steps_per_epoch")),
        "best_step": _best_step(facts),
        "batch": f"{batch} sequences per step" if batch else "",
        "changes": _changes(facts),
        "skipped": _skipped(facts),
        "merged_from": _merged_from(about.merge),
    }


def _held_as(dtype: str | None, quantization: Mapping[str, Any]) -> str:
    if not quantization:
        return dtype or ""
    return f"{'NF4' if quantization.get('load_in_4bit') else 'int8'}, computed in {dtype}"


def _steps(steps: int | None, steps_per_epoch: int | None) -> str:
    if not steps:
        return ""
    return f"{steps:,}" + (f" ({steps / steps_per_epoch:.2g} epochs)" if steps_per_epoch else "")


def _best_step(facts: Mapping[str, Any]) -> str:
    """The step of the adapter, where that is not the last: its held-out loss was the lowest."""
    best, after = facts.get("best") or {}, (facts.get("losses") or {}).get("eval_after")
    is_taken = best.get("loss") is not None and best.get("loss") == after and best.get("step") != facts.get("steps")
    return f"{best['step']:,}, of the lowest held-out loss" if is_taken else ""


def _changes(facts: Mapping[str, Any]) -> str:
    """What was changed while the run was resumed; values only where they are numbers, as a text may name a folder."""
    texts = []
    for entry in facts.get("drift") or []:
        was, now = entry["was"], entry["now"]
        values = f" from {was} to {now}" if isinstance(was, (int, float)) and isinstance(now, (int, float)) else ""
        texts.append(f"`{entry['field']}`{values} after step {entry['step']:,}")
    return ", ".join(texts)


def _skipped(facts: Mapping[str, Any]) -> str:
    bad = [entry for entry in facts.get("bad_steps") or [] if entry["step"] <= (facts.get("steps") or 0)]
    return f"{len(bad)}, as their loss was not finite or above twice that of guessing" if bad else ""


def _merged_from(merge: Mapping[str, Any]) -> str:
    if not merge:
        return ""
    weights = merge.get("base", {}).get("weights")
    text = "the base's 4-bit or 8-bit weights, unpacked" if weights == "dequantized" else "the base's own weights"
    count = len(merge.get("adapters", []))
    return f"{text}, and {'the adapter' if count == 1 else f'{count} adapters'}"


def _data(facts: Mapping[str, Any]) -> dict[str, str]:
    """The examples and their tokens; empty where the record has none."""
    rows, tokens, masking = facts.get("rows", {}), facts.get("tokens", {}), facts.get("masking", {})
    if not rows:
        return {}
    dropped = sum(rows.get("dropped", {}).values())
    sources = facts.get("sources", {}).items()
    return {
        "trained": f"{rows['trained']:,}",
        "examples": f"{rows['trained']:,} to train on, {rows['evaluation']:,} held out"
        + (f", {dropped:,} dropped" if dropped else ""),
        "sources": ", ".join(f"`{name}` ({counts['train']:,})" for name, counts in sources),
        "tokens": f"{tokens['prepared']:,} in one pass, {tokens['processed']:,} in all steps",
        "supervised": f"{tokens['supervised'] / max(tokens['prepared'], 1):.0%}",
        "loss_on": masking.get("loss_on", ""),
        "thinking": masking.get("thinking", ""),
    }


def _results(losses: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Losses before and after, where both are known."""
    lines = [
        ("held out", losses.get("eval_before"), losses.get("eval_after")),
        ("training, first and last logged", losses.get("train_first"), losses.get("train_last")),
    ]
    return [(name, before, after) for name, before, after in lines if before is not None and after is not None]


def _compute(facts: Mapping[str, Any]) -> dict[str, str]:
    """Hardware, time, energy and versions; empty where nothing is known."""
    seconds, energy = seconds_of_training(facts), energy_kwh(facts)
    speed, memory = facts.get("tokens_per_second"), facts.get("peak_memory_bytes")
    known = {
        "hardware": f"{int(facts.get('world_size') or 1)} x {facts['device']}" if facts.get("device") else "",
        "time": duration(seconds) if seconds else "",
        "speed": f"{speed:,.0f} tokens/s" if speed else "",
        "memory": f"{memory / GIB:.1f} GiB" if memory else "",
        "energy": f"{energy:.2g} kWh (rated power of the board times these hours)" if energy else "",
        "versions": ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()),
    }
    return known if any(known.values()) else {}


def seconds_of_training(facts: Mapping[str, Any]) -> float | None:
    """Seconds in steps, without evaluation and saving: tokens over their speed."""
    speed, tokens = facts.get("tokens_per_second"), facts.get("tokens", {}).get("processed")
    return tokens / speed if speed and tokens else None


def energy_kwh(facts: Mapping[str, Any]) -> float | None:
    """Rated power times hours in steps, for all processes; None where the power of the device is not known."""
    seconds, watts = seconds_of_training(facts), rated_watts(str(facts.get("device", "")))
    if seconds is None or watts is None:
        return None
    return watts * seconds / 3600 / 1000 * int(facts.get("world_size") or 1)


def duration(seconds: float) -> str:
    """Hours and minutes, or seconds."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
