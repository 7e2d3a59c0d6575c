"""Samples as they will train, in a terminal: supervised tokens, context, and control tokens."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from qwen_tune.chatml.template import IGNORED, TokenizedExample
from qwen_tune.console import print_pairs, print_rule
from qwen_tune.data.token_store import Samples
from qwen_tune.preview.audit import IN_WORDS, Audit, Found

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTEXT_STYLE, SUPERVISED_STYLE, CONTROL_STYLE, MARK_STYLE = "dim", "bold green", "magenta", "yellow"
BAR = 8  # cells

# White space at the borders of supervised text shows whether an answer starts and ends as it should.
BORDER = {" ": "·", "\t": "⇥", "\n": "↵\n"}

# Control characters in an example must not reach the terminal.
HARMLESS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


@dataclass(frozen=True)
class Piece:
    """The smallest run of tokens that makes whole characters: usually one token, sometimes several for one character.

    `control` tokens are the tokenizer's added tokens: `<|im_end|>`, `<think>`, …
    """

    text: str
    ids: tuple[int, ...]
    supervised: bool
    control: bool


class Spelling:
    """The text of each token of a byte-level tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._control: dict[int, str] = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}
        self._bytes: dict[int, bytes] = {}

    def pieces(self, ids: Sequence[int], labels: Sequence[int]) -> Iterator[Piece]:
        """A sample in pieces; supervised and context tokens are never in the same piece."""
        for supervised, group in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
            yield from self._of_one_kind([id_ for id_, _ in group], supervised)

    def _of_one_kind(self, ids: Iterable[int], supervised: bool) -> Iterator[Piece]:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        held: list[int] = []
        text = ""
        for id_ in ids:
            control = self._control.get(id_)
            if control is None:
                held.append(id_)
                text += decoder.decode(self._bytes_of(id_))
                if decoder.getstate()[0]:
                    continue  # the last character is not complete yet
            elif held:
                text += decoder.decode(b"", final=True)
                decoder.reset()
            if held:
                yield Piece(text, tuple(held), supervised, control=False)
                held, text = [], ""
            if control is not None:
                yield Piece(control, (id_,), supervised, control=True)
        if held:
            yield Piece(text + decoder.decode(b"", final=True), tuple(held), supervised, control=False)

    def _bytes_of(self, id_: int) -> bytes:
        if id_ not in self._bytes:
            # Ids between the vocabulary and the added tokens have no token.
            token = self._tokenizer.convert_ids_to_tokens(id_) or ""
            self._bytes[id_] = bytes(_byte_of_character()[char] for char in token)
        return self._bytes[id_]


@lru_cache(maxsize=1)
def _byte_of_character() -> Mapping[str, int]:
    """The bytes of a byte-level vocabulary's characters: printable bytes as themselves, the others from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def first_of_each_source(samples: Samples, count: int) -> list[int]:
    """Places of the first samples of each source, equally many from all sources as far as possible."""
    places: dict[int, list[int]] = {}
    for place, source in enumerate(samples.source.tolist()):
        own = places.setdefault(source, [])
        if len(own) < count:
            own.append(place)
    ranked = sorted((rank, place) for own in places.values() for rank, place in enumerate(own))
    return sorted(place for _, place in ranked[:count])


def as_json(example: TokenizedExample, tokenizer: PreTrainedTokenizerBase, *, escaped: bool = False) -> str:
    """One line: source, text, input_ids, labels, and the runs of tokens that are supervised as text.

    Args:
        example: The sample.
        tokenizer: Decodes its ids.
        escaped: Escape all characters beyond ASCII, for a stream that cannot encode them.
    """
    runs = groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return json.dumps(
        {
            "source": example.source,
            "text": _decode(example.input_ids, tokenizer),
            "input_ids": example.input_ids,
            "labels": example.labels,
            "supervised_text": [_decode([id_ for id_, _ in run], tokenizer) for supervised, run in runs if supervised],
        },
        ensure_ascii=escaped,
    )


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: Any = tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(text, str)
    return text


def show_samples(examples: Iterable[TokenizedExample], spelling: Spelling, console: Console) -> None:
    """Prints samples: supervised tokens in green, context dim, control tokens in magenta."""
    for example in examples:
        tokens = f"{len(example.input_ids):,} tokens, {example.supervised:,} supervised"
        cut = ", [yellow]truncated[/]" if example.truncated else ""
        title = Text.from_markup(f"[bold]{escape(example.source)}[/]  {tokens}{cut}")
        print_rule(console, title)
        text = coloured(spelling.pieces(example.input_ids, example.labels), console)
        console.print(text, soft_wrap=True, end="\n" if text.plain.endswith("\n") else "\n\n")


def coloured(pieces: Iterable[Piece], console: Console, *, longest_run: int | None = None) -> Text:
    """The text of a sample, with supervised text highlighted.

    Args:
        pieces: The sample.
        console: Where it will be printed; without colours, ⟦ and ⟧ enclose supervised text.
        longest_run: Print on one line, and shorten text between control tokens to so many characters.
    """
    text = Text()
    for supervised, run in groupby(pieces, key=lambda piece: piece.supervised):
        enclosed = supervised and console.color_system is None
        if enclosed:
            text.append("⟦")
        parts = [(control, "".join(p.text for p in group)) for control, group in groupby(run, key=lambda p: p.control)]
        for number, (control, part) in enumerate(parts):
            style = SUPERVISED_STYLE if supervised else CONTROL_STYLE if control else CONTEXT_STYLE
            if supervised and control:
                style = f"{style} underline"
            if longest_run is not None:
                part = _in_one_line(part, longest_run)
            elif supervised:
                part = _with_borders(part, first=number == 0, last=number == len(parts) - 1)
            text.append(part.translate(HARMLESS), style)
        if enclosed:
            text.append("⟧")
    return text


def _with_borders(text: str, *, first: bool, last: bool) -> str:
    """The text with visible white space at its borders."""
    start = len(text) - len(text.lstrip()) if first else 0
    stop = max(len(text.rstrip()) if last else len(text), start)
    seen = ("".join(BORDER.get(char, char) for char in part) for part in (text[:start], text[stop:]))
    return f"{next(seen)}{text[start:stop]}{next(seen)}"


def _in_one_line(text: str, longest: int) -> str:
    if len(text) > longest:
        text = f"{text[: longest // 2]} … {text[-(longest // 2) :]}"
    return text.replace("\n", "↵ ")


def show_audit(audit: Audit, shown: int, console: Console) -> None:
    """Prints what became of all examples: sources, balance, lengths, and findings with places."""
    facts = audit.facts
    examples, samples, tokens = facts["rows"], facts["samples"], facts["tokens"]
    print_rule(console)
    enclosed = "⟦supervised⟧" if console.color_system is None else "supervised"
    console.print(
        f"{shown:,} of {samples['train']:,} training samples: [{SUPERVISED_STYLE}]{enclosed}[/]  "
        f"[{CONTEXT_STYLE}]context[/]  [{CONTROL_STYLE}]control token[/]\n",
        highlight=False,
    )
    console.print(_sources_table(audit))
    console.print()
    balance = {
        "train": examples["trained"],
        "evaluate": examples["evaluation"],
        "not drawn": examples["not_sampled"],
        "dropped": sum(examples["dropped"].values()),
    }
    parts = " + ".join(f"{count:,} {name}" for name, count in balance.items() if count)
    counted = [f"{samples['train'] + samples['evaluation']:,}"]
    if samples["expanded"]:
        counted.append(f"{samples['expanded']:,} added by examples with several")
    if samples["repeated"]:
        counted.append(f"{samples['repeated']:,} {_plural('example', samples['repeated'])} drawn again")
    lines = [
        *(("format", text) for text in _formats(audit)),
        ("data", f"{examples['read']:,} examples read = {parts}"),
        ("samples", ", ".join(counted)),
        ("tokens", f"{tokens['prepared']:,} = {tokens['supervised']:,} supervised + {tokens['context']:,} context"),
        ("lengths", _in_words(audit)),
    ]
    for style, pairs in (("dim", lines), (MARK_STYLE, findings(audit))):
        print_pairs(console, ((f"{name}:", text.translate(HARMLESS)) for name, text in pairs), style=style, indent=0)


def _sources_table(audit: Audit) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("source", overflow="fold")
    table.add_column("format")
    for name in ("examples", "train", "evaluate", "tokens"):
        table.add_column(name, justify="right")
    table.add_column("supervised")
    for source in audit.sources:
        share = source.supervised / max(source.tokens, 1)
        cells = round(share * BAR)
        numbers = (f"{count:,}" for count in (source.examples, source.train, source.evaluation, source.tokens))
        bar = f"[green]{'█' * cells}[/][dim]{'░' * (BAR - cells)}[/] {share:.0%}"
        table.add_row(escape(source.name), source.format, *numbers, bar)
    return table


def _in_words(audit: Audit) -> str:
    """The lengths of the samples, and which data.max_length_tokens would keep how many."""
    lengths = audit.lengths
    text = f"median {lengths.median:,}, longest {lengths.longest:,}; "
    if not lengths.over:
        return f"{text}all fit into data.max_length_tokens {lengths.limit:,}"
    needed = ", ".join(f"{share} into {length:,}" for share, length in lengths.keeping.items()).replace(" ", " fit ", 1)
    return f"{text}{lengths.over:,} over data.max_length_tokens {lengths.limit:,}: {needed}"


def _formats(audit: Audit) -> Iterator[str]:
    """The formats that were recognised and why, once for all sources with the same."""
    names: dict[str, list[str]] = {}
    for source in audit.sources:
        names.setdefault(f"{source.format}: {source.why}", []).append(source.name)
    for text, own in names.items():
        yield text if len(names) == 1 else f"{text} ({', '.join(own)})"


def findings(audit: Audit) -> Iterator[tuple[str, str]]:
    """What was dropped, and warnings: the kind of the finding, and a line with the first places."""
    for found in audit.dropped:
        keeps_all = f"; {audit.lengths.longest:,} would keep all" if found.what == IN_WORDS["overlong"] else ""
        yield "dropped", _with_places(found) + keeps_all
    for reason, count in audit.facts["samples"]["dropped"].items():
        if count > audit.facts["rows"]["dropped"].get(reason, 0):
            yield "dropped", f"{count:,} {_plural('sample', count)} in total: {IN_WORDS.get(reason, reason)}"
    for found in audit.duplicates:
        yield "similar", _with_places(found)
    for found in audit.warnings:
        yield "warning", _with_places(found)
    for name in audit.silent_sources:
        yield "warning", f"no sample is taken from the source {name}"


def _with_places(found: Found) -> str:
    """For example `3 examples: no supervised tokens (a.jsonl:4, 9, b.jsonl:1)`."""
    places = []
    for file, group in groupby((place.rpartition(":") for place in found.places), key=lambda parts: parts[0]):
        places.append(f"{file}:{', '.join(line for _, _, line in group)}")
    more = ", …" if found.examples > len(found.places) else ""
    return f"{found.examples:,} {_plural('example', found.examples)}: {found.what} ({', '.join(places)}{more})"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"
