"""The sections of a model card, each empty where nothing is known of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.resources import files
from string import Template
from typing import Any

from qwen_tune.publishing.compute import duration, energy_kwh, seconds_of_training
from qwen_tune.publishing.description import Description
from qwen_tune.publishing.parts import ADAPTER, MERGED

GIB = 1 << 30
_LOSS_ON = {
    "assistant": "every assistant turn",
    "last_turn": "the last assistant turn of each conversation",
    "all": "all tokens",
}
_THINKING = {
    "auto": "as each row has it",
    "off": "none: rows with reasoning were refused",
    "require": "in every assistant turn",
}


def summary(about: Description) -> str:
    """What this is, in a sentence or two."""
    kind, base, kinds = method(about), about.link(about.base.id), list(about.places)
    what = f"A {kind} adapter for {base}" if kinds == [ADAPTER] else f"{base}, fine-tuned with {kind}"
    what += ": the full model" if kinds == [MERGED] else ""
    names = {ADAPTER: "the adapter", MERGED: "the full model"}
    where = " and ".join(f"{names[part]} in `{folder}/`" for part, folder in about.places.items() if folder)
    made = " Made with qwen-tune." if about.facts or about.merge else ""
    return f"{what}{': ' if where else ''}{where}.{made}"


def method(about: Description) -> str:
    """LoRA in its kinds, as far as the record tells."""
    settings = {**about.adapter, **about.facts.get("adapter", {})}
    name = "DoRA" if settings.get("use_dora") else "rsLoRA" if settings.get("use_rslora") else "LoRA"
    return ("Q" if about.facts.get("quantization") else "") + name


def usage(about: Description) -> str:
    """Code that loads what is there, and how to serve it."""
    texts = []
    for kind, folder in about.places.items():
        name = _usage_template(kind, has_tokenizer=f"{folder}/tokenizer_config.json".lstrip("/") in about.files)
        template = Template(files(__package__).joinpath(name).read_text(encoding="utf-8"))
        texts.append(template.substitute(_usage_words(about, folder)).strip())
        if kind == ADAPTER:
            texts += serving_notes(about.adapter)
    return _section("How to use it", *texts)


def _usage_template(kind: str, *, has_tokenizer: bool) -> str:
    return f"usage_{kind}.md" if has_tokenizer or kind == MERGED else f"usage_{kind}_alone.md"


def _usage_words(about: Description, folder: str) -> dict[str, Any]:
    """What the code names: models are downloaded by each site's own means."""
    name = about.repo_id.rsplit("/", 1)[-1]
    revision = f', revision="{about.base.revision}"' if about.base.revision and about.site == "hub" else ""
    fetch = ""
    if about.site == "modelscope":
        fetch = f"modelscope download --model {about.repo_id} --local_dir {name}\nexport VLLM_USE_MODELSCOPE=true\n"
    elif folder:  # vLLM looks at the root of a repository
        fetch = f"hf download {about.repo_id} --local-dir {name}\n"
    located = 'snapshot_download("{}")' if about.site == "modelscope" else '"{}"'
    return {
        "imports": "from modelscope import snapshot_download\n" if about.site == "modelscope" else "",
        "locate": f"name = {located.format(about.repo_id)}",
        "locate_base": located.format(about.base.id),
        "subfolder": f', subfolder="{folder}"' if folder else "",
        "fetch": fetch,
        "place": f"./{name}/{folder}".rstrip("/") if fetch else about.repo_id,
        "base": about.base.id,
        "revision": revision,
        "name": name,
        "rank": _largest_rank(about.adapter),
    }


def serving_notes(config: Mapping[str, Any]) -> list[str]:
    """What of an adapter vLLM does not load, by its configuration."""
    found = {
        "modules trained as a whole": config.get("modules_to_save"),
        "DoRA": config.get("use_dora"),
        "trained biases": config.get("bias", "none") != "none",
        "trained token rows": config.get("trainable_token_indices"),
        "adapters of experts": config.get("target_parameters"),
    }
    names = [name for name, is_there in found.items() if is_there]
    return [f"vLLM does not load {' or '.join(names)}: serve the merged model."] if names else []


def training(about: Description) -> str:
    """What was trained, and how."""
    facts, config = about.facts, about.adapter
    settings, schedule = facts.get("adapter", {}), facts.get("schedule", {})
    parameters = settings.get("trainable_parameters")
    modules = settings.get("modules", {})
    targets = config.get("target_modules") or []
    where = ", ".join(modules or ([_code(targets)] if isinstance(targets, str) else sorted(targets)))
    quantization = facts.get("quantization") or {}
    rows = {
        "Base": f"{about.link(about.base.id)}" + (f" at `{about.base.revision}`" if about.base.revision else ""),
        "Method": method(about),
        "Rank, alpha": _both(settings.get("r", config.get("r")), settings.get("lora_alpha", config.get("lora_alpha"))),
        "Trained modules": where,
        "Trained parameters": f"{parameters:,}" if parameters else "",
        "Base held as": _held_as(facts.get("dtype"), quantization),
        "Steps": _steps(facts.get("steps"), schedule.get("steps_per_epoch")),
        "Taken from step": _best_step(facts),
        "Batch": _batch(schedule),
        "Changed on the way": _changes(facts.get("drift") or []),
        "Steps left out": _left_out(facts),
        "Merged from": _merged_from(about.merge),
    }
    return _section("Training", _table(rows))


def data(about: Description) -> str:
    """Rows and tokens, and what of them were supervised."""
    facts = about.facts
    rows, tokens, masking = facts.get("rows", {}), facts.get("tokens", {}), facts.get("masking", {})
    if not rows:
        return ""
    dropped = sum(rows.get("dropped", {}).values())
    lines = {
        "Rows": f"{rows['trained']:,} to train on, {rows['evaluation']:,} held out"
        + (f", {dropped:,} dropped" if dropped else ""),
        "Sources": ", ".join(
            f"{_code(name)} ({counts['train']:,})" for name, counts in facts.get("sources", {}).items()
        ),
        "Tokens": f"{tokens['prepared']:,} in one pass, {tokens['processed']:,} in all steps",
        "Tokens with loss": f"{tokens['supervised'] / max(tokens['prepared'], 1):.0%}",
        "Loss on": _LOSS_ON.get(masking.get("loss_on"), ""),
        "Reasoning": _THINKING.get(masking.get("thinking"), ""),
    }
    template = "Conversations were rendered as ChatML with the chat template that lies beside the weights."
    return _section("Data", _table(lines), template)


def results(about: Description) -> str:
    """Losses before and after."""
    losses = about.facts.get("losses") or {}
    lines = [
        (name, losses.get(before), losses.get(after))
        for name, before, after in (
            ("held out", "eval_before", "eval_after"),
            ("training, first and last logged", "train_first", "train_last"),
        )
    ]
    known = [(name, before, after) for name, before, after in lines if before is not None and after is not None]
    if not known:
        return ""
    table = ["| loss, nats/token | before | after |", "|---|---|---|"]
    table += [f"| {name} | {before:.4f} | {after:.4f} |" for name, before, after in known]
    if all(name != "held out" for name, *_ in known):
        table += [
            "",
            "No rows were held out: these numbers say how well the rows were supervised, not how well others are.",
        ]
    picture = f"![Loss over steps]({about.curve})" if about.curve else ""
    return _section("Results", "\n".join(table), picture)


def compute(about: Description) -> str:
    """Hardware, time, energy and versions."""
    facts = about.facts
    seconds, energy = seconds_of_training(facts), energy_kwh(facts)
    count = int(facts.get("world_size") or 1)
    rows = {
        "Hardware": f"{count} x {facts['device']}" if facts.get("device") else "",
        "Time in steps": duration(seconds) if seconds else "",
        "Speed": f"{facts['tokens_per_second']:,.0f} tokens/s" if facts.get("tokens_per_second") else "",
        "Peak memory": f"{facts['peak_memory_bytes'] / GIB:.1f} GiB" if facts.get("peak_memory_bytes") else "",
        "Energy, estimated": f"{energy:.2g} kWh (rated power of the board times these hours)" if energy else "",
        "Versions": ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items()),
    }
    return _section("Compute", _table(rows))


def limits(about: Description) -> str:
    """What a reader should not expect."""
    texts = [f"It has the limits and the biases of {about.link(about.base.id)}, and its licence's terms."]
    if about.facts.get("rows"):
        rows = about.facts["rows"]["trained"]
        texts.append(f"What it supervised is in {rows:,} rows; on anything else it may be worse than its base.")
    if (about.facts.get("losses") or {}).get("eval_after") is not None:
        texts.append("The held-out loss is of rows like the trained ones, and says nothing about other tasks.")
    return "## Limits\n\n" + " ".join(texts)


def recipe(about: Description) -> str:
    """The recipe, folded."""
    if not about.recipe:
        return ""
    text = (
        "All of it, as in `recipe.yaml` beside this card; with the rows, `qwen-tune train recipe.yaml` trains it again."
    )
    folded = f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{about.recipe.strip()}\n```\n\n</details>"
    return _section("Recipe", text, folded)


def _section(title: str, *texts: str) -> str:
    texts = tuple(text for text in texts if text)
    return f"## {title}\n\n" + "\n\n".join(texts) if texts else ""


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {name} | {text.replace('|', chr(92) + '|')} |" for name, text in rows.items() if text]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _both(first: Any, second: Any) -> str:
    return f"{first}, {second}" if first and second else ""


def _held_as(dtype: str | None, quantization: Mapping[str, Any]) -> str:
    if not quantization:
        return dtype or ""
    name = "NF4" if quantization.get("load_in_4bit") else "int8"
    return f"{name}, computed in {dtype}"


def _steps(steps: int | None, an_epoch: int | None) -> str:
    if not steps:
        return ""
    return f"{steps:,}" + (f" ({steps / an_epoch:.2g} epochs)" if an_epoch else "")


def _best_step(facts: Mapping[str, Any]) -> str:
    """The step of the adapter, where that is not the last: its held-out loss was the lowest."""
    best, after = facts.get("best") or {}, (facts.get("losses") or {}).get("eval_after")
    is_taken = best.get("loss") is not None and best.get("loss") == after and best.get("step") != facts.get("steps")
    return f"{best['step']:,}, of the lowest held-out loss" if is_taken else ""


def _changes(drift: Iterable[Mapping[str, Any]]) -> str:
    """What was another one from some step on; values only where they are numbers, as a text may name a folder."""
    texts = []
    for entry in drift:
        was, now = entry["was"], entry["now"]
        values = f" from {was} to {now}" if isinstance(was, (int, float)) and isinstance(now, (int, float)) else ""
        texts.append(f"{_code(entry['field'])}{values} after step {entry['step']:,}")
    return ", ".join(texts)


def _left_out(facts: Mapping[str, Any]) -> str:
    bad = [entry["step"] for entry in facts.get("bad_steps") or [] if entry["step"] <= (facts.get("steps") or 0)]
    return f"{len(bad)}, as their loss was not finite or above twice that of guessing" if bad else ""


def _batch(schedule: Mapping[str, Any]) -> str:
    sizes: Iterable[int] = [
        schedule.get(key, 0) for key in ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    ]
    return f"{math.prod(sizes)} sequences a step" if all(sizes) else ""


def _merged_from(merge: Mapping[str, Any]) -> str:
    if not merge:
        return ""
    weights = merge.get("base", {}).get("weights")
    text = "the base's 4-bit or 8-bit weights, unpacked" if weights == "dequantized" else "the base's own weights"
    count = len(merge.get("adapters", []))
    return f"{text}, and {'the adapter' if count == 1 else f'{count} adapters'}"


def _largest_rank(config: Mapping[str, Any]) -> int:
    """The rank that a server has to be told: 8, 16, 32 and so on, as vLLM takes no other."""
    ranks: list[int] = [config.get("r") or 8, *(config.get("rank_pattern") or {}).values()]
    return max(8, 1 << (max(ranks) - 1).bit_length())


def _code(text: str) -> str:
    return f"`{text}`"
