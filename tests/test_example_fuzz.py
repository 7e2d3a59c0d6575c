"""Mutated examples: whatever stands in a file, reading and rendering it ends in examples and problems, and soon.

`scripts/evidence/fuzz_examples` runs the same with as many mutations as one likes.
"""

from __future__ import annotations

import gzip
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from conftest import TINY

from qwen_tune.chatml.conversation import Conversation
from qwen_tune.data.formats import recognise, to_training_example
from qwen_tune.data.sources import SourceReader
from qwen_tune.data.values import decode
from qwen_tune.errors import ExampleError, Problem
from qwen_tune.recipe.schema import DataSpec, SourceSpec

HANG_SECONDS = 1.0
LINES_PER_FILE = 100

USER = {"role": "user", "content": "Wie heißt der Hafen? 😀"}
CALL = {"id": "1", "type": "function", "function": {"name": "tide", "arguments": {"day": "today", "n": [1, None, 2.5]}}}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "system", "content": "s"}, USER, {"role": "assistant", "content": "Lantern Bay."}]},
    {"messages": [USER, {"role": "assistant", "content": "a", "reasoning_content": "r", "train": False}] * 2},
    {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "1", "name": "tide"},
            {"role": "assistant", "content": [{"type": "reasoning", "text": "r"}, {"type": "text", "text": "a"}]},
        ],
        "tools": [TOOL],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    {"messages": json.dumps([USER, {"role": "assistant", "content": "a"}]), "tools": json.dumps([TOOL]), "system": "s"},
    {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": 1}"}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ]
    },
    {"conversation": [{"human": "q", "assistant": "a", "system": "s"}, {"human": "q", "assistant": "a"}]},
    {"instruction": "q", "input": "i", "output": "a", "history": [["b", "c"]]},
    {"prompt": [USER], "completion": [{"role": "assistant", "content": "a"}]},
    {"prompt": "q", "completion": "a"},
    {"query": "q", "response": "a", "history": [["b", "c"]], "system": "s"},
    {"text": "Es war einmal.\n"},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]},
]
KEYS = sorted({key for row in ROWS for key in row} | USER.keys() | CALL.keys() | {"from", "value", "train", "weight"})
ROLES = [
    "system",
    "user",
    "assistant",
    "tool",
    "human",
    "gpt",
    "function_call",
    "Assistant",
    "",
    "\ud83d",
    "role" * 999,
]
TEXTS = [
    "",
    " ",
    "\x00",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "[{",
    "[]",
    '[{"role": "user"}]',
    "{{ x }}",
]
NUMBERS = [0, 1, -1, -100, 1e308, float("nan"), float("inf"), 10**400, 0.5, 1 << 40, True, False]
FRAGMENTS = [
    b"",
    b"\n",
    b"\r",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b'"',
    b"\\",
    b"\\ud800",
    b"{",
    b"[",
    b"]",
    b"}",
    b",",
    b":",
]


def deep(rng: random.Random) -> Any:
    value: Any = rng.choice([None, "x", 1])
    for _ in range(rng.choice([3, 50, 150, 300])):
        value = [value] if rng.random() < 0.5 else {"x": value}
    return value


def anything(rng: random.Random) -> Any:
    """A value of a kind that nobody asked for."""
    choice = rng.randrange(8)
    if choice == 0:
        return rng.choice(NUMBERS)
    if choice == 1:
        return rng.choice(TEXTS + ROLES)
    if choice == 2:
        return deep(rng)
    if choice == 3:
        return {rng.choice(KEYS): anything(rng) for _ in range(rng.randrange(3))}
    if choice == 4:
        return [anything(rng) for _ in range(rng.randrange(3))]
    if choice == 5:
        return rng.choice(TEXTS) * rng.choice([1, 1000])
    return None if choice == 6 else json.dumps(rng.choice(ROWS[0]["messages"]))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of an example with each key or index in it."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += [(value, key), *places(item)]
    return found


def mutate_value(row: dict[str, Any], rng: random.Random) -> None:
    """Changes one place of an example: its value, its key, its role, or how often it is there."""
    spots = places(row)
    if not spots:
        return
    container, key = rng.choice(spots)
    choice = rng.randrange(6)
    if choice == 0:
        container[key] = anything(rng)
    elif choice == 1:
        del container[key]
    elif choice == 2 and isinstance(container, dict):
        container[rng.choice([*KEYS, "x" * 5000, "\ud800", ""])] = container.pop(key)
    elif choice == 3 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), container[key])
    elif choice == 4:
        roles = [(place, name) for place, name in spots if name in ("role", "from")]
        if roles:
            container, key = rng.choice(roles)
            container[key] = rng.choice(ROLES)
    else:
        container[key] = [container[key]] if rng.random() < 0.5 else json.dumps(container[key], default=str)


def mutate_bytes(line: bytes, rng: random.Random) -> bytes:
    """Changes bytes of a line: one flipped, some cut out or put in, or the end torn off."""
    start = rng.randrange(len(line) + 1)
    choice = rng.randrange(4)
    if choice == 0:
        return line[:start] + bytes([rng.randrange(256)]) + line[start + 1 :]
    if choice == 1:
        return line[:start] + line[start + rng.randrange(1, 20) :]
    if choice == 2:
        return line[:start] + rng.choice(FRAGMENTS) * rng.choice([1, 1, 3, 2000]) + line[start:]
    return line[:start]


def mutated_lines(rng: random.Random, count: int) -> Iterator[bytes]:
    """Lines made of good examples by one to three mutations."""
    for _ in range(count):
        row = json.loads(json.dumps(rng.choice(ROWS)))
        changes = rng.choice([1, 1, 2, 3])
        if rng.random() < 0.7:
            for _ in range(changes):
                mutate_value(row, rng)
            text = json.dumps(row, ensure_ascii=rng.random() < 0.5)
            if rng.random() < 0.05:  # as deep as the parser just takes, which what follows it may not
                levels = rng.randrange(800, 1000)
                text = text.replace('"a"', "[" * levels + "]" * levels, 1)
            yield text.encode("utf-8", "surrogatepass")
        else:
            line = json.dumps(row, ensure_ascii=False).encode()
            for _ in range(changes):
                line = mutate_bytes(line, rng)
            yield line


def files_of(folder: Path) -> dict[str, bytes]:
    """Good files of the kinds that are not lines, to be damaged."""
    rows = [ROWS[8]] * 50
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "good.parquet")
    with (folder / "good.arrow").open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    listed = json.dumps(ROWS, indent=1).encode()
    return {
        "rows.json": listed,
        "rows.csv": b'prompt,completion\n"q ""1""\nmore",a\n' + b"q,a\n" * 20,
        "rows.jsonl.gz": gzip.compress(listed),
        "rows.jsonl.zst": bytes(pyarrow.compress(listed, "zstd", asbytes=True)),
        "rows.parquet": (folder / "good.parquet").read_bytes(),
        "rows.arrow": (folder / "good.arrow").read_bytes(),
    }


class Watch:
    """Runs what must end in time, and counts how it ended."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0

    def timed(self, what: Callable[[], Any], shown: Any) -> Any:
        begun = time.perf_counter()
        try:
            return what()
        except ExampleError as problem:
            return problem
        finally:
            self.slowest = max(self.slowest, time.perf_counter() - begun)
            assert self.slowest < HANG_SECONDS, repr(shown)[:2000]


def fuzz(count: int, seed: int, folder: Path, render: Callable[[Conversation], Any] | None) -> Watch:
    """Reads mutated examples and files; anything but an example or a problem is raised, and so is a hang."""
    rng = random.Random(seed)
    watch = Watch()
    path = folder / "rows.jsonl"
    for start in range(0, count, LINES_PER_FILE):
        lines = list(mutated_lines(rng, min(LINES_PER_FILE, count - start)))
        # The first example decides on the format; the others are of every format.
        path.write_bytes(b"\n".join([json.dumps(rng.choice(ROWS)).encode(), *lines]))
        _read(path, watch)
        for line in lines:
            _read_line(line, watch, render)
    for name, content in files_of(folder).items():
        for _ in range(count // 100):
            damaged = content
            for _ in range(rng.randrange(1, 4)):
                damaged = mutate_bytes(damaged, rng)
            (folder / name).write_bytes(damaged)
            _read(folder / name, watch)
    return watch


def _read(path: Path, watch: Watch) -> None:
    rows = iter(SourceReader(SourceSpec(path=str(path)), system=None))
    while (item := watch.timed(lambda: next(rows, None), path.name)) is not None:
        if isinstance(item, Problem):
            assert item.where.startswith(str(path))
            assert item.fix
            assert len(str(item)) < 3000, item
            str(item).encode()
        else:
            item.content_hash()
            item.content_bytes()
        watch.outcomes["problem" if isinstance(item, Problem) else "row"] += 1


def _read_line(line: bytes, watch: Watch, render: Callable[[Conversation], Any] | None) -> None:
    """One example alone, as the first of its file: recognised by itself, and rendered if it is a conversation."""
    try:
        row = decode(line.decode())
    except ValueError:
        return
    if not isinstance(row, dict):
        return
    converted = watch.timed(
        lambda: to_training_example(row, recognise(row).name, source="rows.jsonl:1", source_name="rows", system="s"),
        row,
    )
    if isinstance(converted, Conversation):
        watch.outcomes["conversation"] += 1
        if render:
            rendered = watch.timed(lambda: render(converted), row)
            watch.outcomes["not rendered" if isinstance(rendered, ExampleError) else "rendered"] += 1


def tiny_renderer() -> Callable[[Conversation], Any]:
    """Renders a conversation as training does, with the bundled tiny model's template."""
    from transformers import AutoTokenizer

    from qwen_tune.chatml.template import ChatTemplate, render_samples

    template = ChatTemplate(AutoTokenizer.from_pretrained(TINY))
    data = DataSpec(train=[SourceSpec(path="rows.jsonl")])
    return lambda conversation: render_samples(conversation, template, data)


def test_ten_thousand_mutated_examples_end_in_examples_and_problems(tmp_path):
    outcomes = fuzz(10_000, 0, tmp_path, tiny_renderer()).outcomes
    # That most examples broke on the first look would say little of what comes after it.
    assert outcomes["problem"] > 5000
    assert outcomes["row"] > 1000
    assert outcomes["conversation"] > 1000
    assert outcomes["rendered"] > 500
