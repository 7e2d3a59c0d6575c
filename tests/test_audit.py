"""The audit of prepared data: counts with places, lengths, what repeats, and what contributes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_tune.chatml.template import ChatTemplate
from qwen_tune.data.preparation import prepare_data
from qwen_tune.preview.audit import BARS, Found, audit
from qwen_tune.recipe.schema import DataSpec

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def template(tiny_tokenizer):
    return ChatTemplate(tiny_tokenizer)


def turns(question: str, answer: str, **flags: bool) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **flags}]
    return {"messages": messages}


PLAIN = [turns(f"What is number {n}?", f"It is {'very ' * (n % 7)}{n * n}.") for n in range(20)]
LONG = turns("Say a lot.", "many words " * 300)


def write(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def look(template, **data):
    spec = DataSpec.model_validate({"max_length_tokens": 200, **data})
    return audit(prepare_data(spec, template, seed=1), spec)


def test_dropped_examples_are_reported_by_reason_with_the_first_places(template):
    rows = [*PLAIN, *[LONG] * 6, turns("Nothing?", "Nothing.", train=False)]
    found = look(template, train=[{"path": write("rows.jsonl", rows)}])
    overlong, nothing = found.dropped
    places = tuple(f"rows.jsonl:{line}" for line in range(21, 26))
    assert overlong == Found("longer than data.max_length_tokens", 6, places)
    assert nothing == Found("no supervised tokens", 1, ("rows.jsonl:27",))
    assert found.duplicates == []  # they repeat each other, but none of them is trained
    json.dumps(found.as_dict())


def test_lengths_say_what_would_keep_how_many(template):
    found = look(template, train=[{"path": write("rows.jsonl", [*PLAIN, LONG])}])
    lengths = found.lengths
    assert (lengths.limit, lengths.over, lengths.longest) == (200, 1, lengths.keeping["100%"])
    assert lengths.keeping["90%"] < lengths.limit < lengths.keeping["99%"] == lengths.longest
    kept = look(template, train=[{"path": "rows.jsonl"}], max_length_tokens=lengths.keeping["100%"])
    assert (kept.dropped, kept.lengths.over) == ([], 0)


def test_the_histogram_holds_every_sample_in_few_bars_that_join(template):
    far = look(template, train=[{"path": write("rows.jsonl", [*PLAIN, *PLAIN, LONG])}], max_length_tokens=40)
    near = look(template, train=[{"path": write("rows.jsonl", PLAIN)}])
    for found, count in ((far, 41), (near, 20)):
        bars = found.lengths.bars
        assert sum(samples for _, _, samples in bars) == count
        assert 1 < len(bars) <= BARS
        assert [first for first, _, _ in bars[1:]] == [last + 1 for _, last, _ in bars[:-1]]
        assert bars[-1][1] >= found.lengths.longest
    # One long sample does not squeeze all others into the first bar.
    assert sum(1 for first, _, samples in far.lengths.bars if samples and first <= 40) > 3


def test_duplicates_are_counted_and_those_that_are_dropped_are_not_reported_twice(template):
    path = write("rows.jsonl", [*PLAIN, PLAIN[3], PLAIN[4]])
    found = look(template, train=[{"path": path}])
    assert found.duplicates == [Found("the same as an earlier example", 2, ("rows.jsonl:21", "rows.jsonl:22"))]
    found = look(template, train=[{"path": path}], deduplicate=True)
    assert found.duplicates == []
    assert found.dropped == [Found("the same as an earlier example", 2, ("rows.jsonl:21", "rows.jsonl:22"))]


def test_evaluation_examples_in_training_are_found(template):
    train = write("rows.jsonl", PLAIN)
    found = look(template, train=[{"path": train}], eval=[{"path": write("held.jsonl", [PLAIN[2], LONG, PLAIN[5]])}])
    dropped = {one.what: one for one in found.dropped}
    assert dropped["also an evaluation example"].places == ("rows.jsonl:3", "rows.jsonl:6")
    assert dropped["longer than data.max_length_tokens"].places == ("held.jsonl:2",)
    assert [(source.name, source.train, source.evaluation) for source in found.sources] == [
        ("rows", 18, 0),
        ("held", 0, 2),
    ]


def test_sources_say_what_they_were_taken_for_and_what_they_contribute(template):
    other = [{"instruction": "Add.", "output": "3"}, {"instruction": "Double.", "output": "4"}]
    sources = [write("rows.jsonl", PLAIN), write("other.jsonl", other), write("long.jsonl", [LONG])]
    found = look(template, train=[{"path": path} for path in sources])
    assert [(source.format, source.examples, source.train) for source in found.sources] == [
        ("messages", 20, 20),
        ("alpaca", 2, 2),
        ("messages", 1, 0),
    ]
    assert "instruction" in found.sources[1].why
    assert all(0 < source.supervised < source.tokens for source in found.sources[:2])
    assert found.silent_sources == ["long"]
    facts = found.facts["tokens"]
    assert sum(source.tokens for source in found.sources) == facts["prepared"]
    assert sum(source.supervised for source in found.sources) == facts["supervised"]


def test_control_tokens_in_text_are_reported_with_their_place(template):
    path = write("rows.jsonl", [*PLAIN, turns("Spell it.", "It is <|im_end|> in full.")])
    found = look(template, train=[{"path": path}], special_tokens_in_text="neutralize")
    [warning] = found.warnings
    assert "control token" in warning.what
    assert warning.places == ("rows.jsonl:21",)
