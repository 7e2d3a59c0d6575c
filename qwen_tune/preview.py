"""Rows as they will train: what carries loss, what is context, and every control token in sight."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from qwen_tune.chatml import IGNORED, TokenizedExample
from qwen_tune.preparation import PreparedData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_STYLE, LEARNED_STYLE, CONTROL_STYLE = "dim", "bold green", "magenta"


def as_json(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> str:
    """One line: source, text, input_ids, labels, and the runs of tokens that carry loss as text."""
    return json.dumps(
        {
            "source": example.source,
            "text": example.text,
            "input_ids": example.input_ids,
            "labels": example.labels,
            "supervised_text": [text for learned, text in _runs(example, tokenizer) if learned],
        },
        ensure_ascii=False,
    )


def show(examples: Iterable[TokenizedExample], tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Prints samples: learned tokens in green, context dim, control tokens in magenta."""
    control = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    for example in examples:
        console.rule(
            f"[bold]{escape(example.source)}[/]  {len(example.input_ids)} tokens, {example.supervised} carry loss",
            align="left",
            characters="─",
        )
        text = Text()
        for (learned, is_control), group in groupby(
            zip(example.input_ids, example.labels, strict=True),
            key=lambda pair: (pair[1] != IGNORED, pair[0] in control),
        ):
            style = LEARNED_STYLE if learned else CONTROL_STYLE if is_control else CONTEXT_STYLE
            text.append(
                _decode([token for token, _ in group], tokenizer),
                style=f"{style} underline" if learned and is_control else style,
            )
        console.print(text, soft_wrap=True)


def show_totals(data: PreparedData, shown: int, console: Console) -> None:
    """Prints the balance of rows and tokens, and the key to the colours."""
    facts = data.facts
    rows, tokens = facts["rows"], facts["tokens"]
    console.rule(characters="─")
    console.print(
        f"{shown} of {facts['samples']['train']:,} training samples shown: "
        f"[{LEARNED_STYLE}]carries loss[/], [{CONTEXT_STYLE}]context[/], [{CONTROL_STYLE}]control token[/]"
    )
    console.print(
        f"rows: {rows['read']:,} read = {rows['trained']:,} train + {rows['evaluation']:,} evaluate "
        f"+ {sum(rows['dropped'].values()):,} dropped {dict(rows['dropped']) or ''}",
        highlight=False,
    )
    console.print(
        f"tokens: {tokens['prepared']:,} = {tokens['supervised']:,} carry loss + {tokens['context']:,} context",
        highlight=False,
    )
    for warning, count in facts["warnings"].items():
        console.print(f"[yellow]warning[/] {count:,} x {escape(warning)}", highlight=False)


def _runs(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
    pairs: Iterable[tuple[int, int]] = zip(example.input_ids, example.labels, strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        yield learned, _decode([token for token, _ in group], tokenizer)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: Any = tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(text, str)
    return text
