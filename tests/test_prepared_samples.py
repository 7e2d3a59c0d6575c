"""What an example becomes: samples equal to the slow way, whole or cut, or a reason why it is dropped."""

from __future__ import annotations

import copy
import json

import pytest
from conversations import tokenize, with_template
from example_files import LONG, chat, lines, write
from templates import REVISIONS
from test_preparation import balanced

from qwen_tune.chatml.encoder import Encoder
from qwen_tune.chatml.fast_encoder import FastEncoder
from qwen_tune.chatml.template import IGNORED, ChatTemplate
from qwen_tune.data.batches import KEPT_AS_TEXT, STRADDLES
from qwen_tune.data.parallel import Division
from qwen_tune.data.preparation import NO_LABELS, OVERLONG, TRUNCATED, prepare_data
from qwen_tune.data.source_store import SourceStores
from qwen_tune.data.sources import load_sources
from qwen_tune.errors import DataError
from qwen_tune.recipe.schema import DataSpec, SourceSpec


@pytest.fixture(scope="module")
def template(tiny_tokenizer):
    return with_template(tiny_tokenizer, REVISIONS["qwen3"].text)


def test_long_examples_are_dropped_and_counted(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("a"), chat(LONG), chat("b"), chat("c"))
    prepared = prepare_data(DataSpec(train=[source], max_length_tokens=60), template, seed=1)
    balanced(prepared)
    assert prepared.facts["rows"]["dropped"] == prepared.facts["samples"]["dropped"] == {OVERLONG: 1}
    assert prepared.train.dropped_examples[OVERLONG].tolist() == [1]
    assert lines(prepared.train.samples) == [1, 3, 4]


def test_long_examples_are_cut_and_counted(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("a"), chat("b", LONG), chat(LONG, "lost"))
    data = DataSpec(train=[source], max_length_tokens=60, overlong="truncate")
    prepared = prepare_data(data, template, seed=1)
    balanced(prepared)
    whole = prepare_data(data.model_copy(update={"max_length_tokens": 4096}), template, seed=1).train.samples
    short, cut = prepared.train.samples
    assert [short, cut.input_ids] == [whole[0], whole[1].input_ids[:60]]
    assert cut.labels == whole[1].labels[:60]
    assert (short.truncated, cut.truncated) == (False, True)
    assert prepared.train.supervised == short.supervised + cut.supervised
    assert prepared.facts["warnings"][TRUNCATED] == 1
    # Of the third the cut leaves the question alone.
    assert prepared.facts["rows"]["dropped"] == {NO_LABELS: 1}


def test_long_examples_are_named_where_the_recipe_wants_an_error(tmp_path, template):
    trained = write(tmp_path / "rows.jsonl", chat("a"), chat(LONG), chat("b"), chat(LONG, "no"))
    held = write(tmp_path / "held.jsonl", chat("c"), chat(LONG, "held"))
    data = DataSpec(train=[trained], eval=[held], max_length_tokens=60, overlong="error")
    with pytest.raises(DataError) as caught:
        prepare_data(data, template, seed=1)
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"{tmp_path}/rows.jsonl:2", f"{tmp_path}/rows.jsonl:4", f"{tmp_path}/held.jsonl:2"]
    assert all("expected at most 60 (data.max_length_tokens)" in problem.what for problem in caught.value.problems)


def test_more_than_half_dropped_is_an_error(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("a"), chat(LONG), chat(LONG, "no"))
    with pytest.raises(DataError, match=r"more than half of the examples would be dropped: 2 overlong of 3"):
        prepare_data(DataSpec(train=[source], max_length_tokens=60), template, seed=1)
    half = write(tmp_path / "half.jsonl", chat("a"), chat(LONG), chat("b"), chat(LONG, "no"))
    assert len(prepare_data(DataSpec(train=[half], max_length_tokens=60), template, seed=1).train.samples) == 2


def test_examples_without_supervised_tokens_are_an_error(tmp_path, template):
    masked = [chat(f"q{number}", train=False) for number in range(3)]
    source = write(tmp_path / "rows.jsonl", *masked)
    with pytest.raises(DataError, match=r"none of 3 examples is left \(3 no_labels dropped\)"):
        prepare_data(DataSpec(train=[source]), template, seed=1)
    source = write(tmp_path / "some.jsonl", *masked, chat("a"))
    with pytest.raises(DataError, match=r"3 of 4 examples have no supervised token"):
        prepare_data(DataSpec(train=[source]), template, seed=1)
    source = write(tmp_path / "most.jsonl", masked[0], chat("a"))
    prepared = prepare_data(DataSpec(train=[source]), template, seed=1)
    balanced(prepared)
    assert prepared.facts["rows"]["dropped"] == {NO_LABELS: 1}
    assert prepared.facts["samples"]["dropped"] == {}


def test_conversations_of_several_samples_are_one_example(tmp_path, template):
    """Qwen3 takes thinking out of a history, so that each answer becomes a sample of its own."""
    turns = [turn for n in range(3) for turn in chat(f"q{n}", f"a{n}", reasoning_content=f"r{n}")["messages"]]
    source = write(tmp_path / "rows.jsonl", {"messages": turns}, chat("b"), weight=2.0)
    prepared = prepare_data(DataSpec(train=[source]), template, seed=1)
    balanced(prepared)
    assert lines(prepared.train.samples) == [1, 1, 1, 2] * 2
    assert prepared.facts["rows"]["trained"] == 2
    assert prepared.facts["samples"] == {"train": 8, "evaluation": 0, "expanded": 2, "repeated": 2, "dropped": {}}
    long = {"messages": [*turns, *chat(LONG, "end")["messages"]]}
    rows = write(tmp_path / "long.jsonl", long, chat("b"))
    prepared = prepare_data(DataSpec(train=[rows], max_length_tokens=120), template, seed=1)
    # The last sample does not fit; the example is trained with the others.
    assert prepared.facts["rows"]["dropped"] == {}
    assert prepared.facts["samples"]["dropped"] == {OVERLONG: 1}
    assert lines(prepared.train.samples) == [1, 1, 1, 2]


def test_plain_texts_are_supervised_up_to_their_end(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", {"text": "Es war einmal\n\nein Frosch 🐸."}, {"text": "  two "})
    prepared = prepare_data(DataSpec(train=[source]), template, seed=1)
    balanced(prepared)
    one, two = prepared.train.samples
    assert template.tokenizer.decode(one.input_ids) == "Es war einmal\n\nein Frosch 🐸.<|endoftext|>"
    assert template.tokenizer.decode(two.input_ids) == "  two <|endoftext|>"
    assert one.labels == [IGNORED, *one.input_ids[1:]]
    assert one.input_ids[-1] == template.tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_texts_that_spell_control_tokens(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", {"text": "a<|im_end|>b"}, {"text": "c"})
    with pytest.raises(DataError, match=r"rows.jsonl:1: the text spells the control token <\|im_end\|>"):
        prepare_data(DataSpec(train=[source]), template, seed=1)
    data = DataSpec(train=[source], special_tokens_in_text="neutralize")
    prepared = prepare_data(data, template, seed=1)
    one, _ = prepared.train.samples
    assert template.tokenizer.decode(one.input_ids) == "a<|im_end|>b<|endoftext|>"
    assert template.end_of_turn_id not in one.input_ids
    assert prepared.facts["warnings"] == {KEPT_AS_TEXT: 1}


def test_chats_that_spell_control_tokens(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("q <|im_end|>\n<|im_start|>system\n", "a <|im_start|> a"), chat("b"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: the text spells the control token"):
        prepare_data(DataSpec(train=[source]), template, seed=1)
    prepared = prepare_data(DataSpec(train=[source], special_tokens_in_text="neutralize"), template, seed=1)
    one, other = prepared.train.samples
    assert one.input_ids.count(template.end_of_turn_id) == other.input_ids.count(template.end_of_turn_id) == 2
    supervised = [token for token in one.labels if token != IGNORED]
    assert template.tokenizer.decode(supervised) == "a <|im_start|> a<|im_end|>"
    assert supervised.count(template.end_of_turn_id) == 1
    assert prepared.facts["warnings"] == {KEPT_AS_TEXT: 1}


def test_token_ids_are_taken_as_they_are(tmp_path, template):
    size = len(template.tokenizer)
    rows = [
        {"input_ids": [5, 6, size - 1], "labels": [IGNORED, 6, size - 1]},
        {"input_ids": [7, 8]},
        {"input_ids": [1, 2, 3], "labels": [1, IGNORED, 3]},
    ]
    prepared = prepare_data(DataSpec(train=[write(tmp_path / "rows.jsonl", *rows)]), template, seed=1)
    balanced(prepared)
    assert [(example.input_ids, example.labels) for example in prepared.train.samples] == [
        ([5, 6, size - 1], [IGNORED, 6, size - 1]),
        ([7, 8], [IGNORED, 8]),
        ([1, 2, 3], [IGNORED, IGNORED, 3]),
    ]
    source = write(tmp_path / "beyond.jsonl", rows[0], {"input_ids": [1, size]})
    with pytest.raises(DataError, match=rf"beyond.jsonl:2: input_ids\[1\] is {size}; the tokenizer has"):
        prepare_data(DataSpec(train=[source]), template, seed=1)


def test_straddling_tokens_are_reported(tmp_path, template):
    tokenizer = copy.deepcopy(template.tokenizer)
    tokenizer.chat_template = REVISIONS["qwen2_5"].text
    tokenizer.add_tokens(["\n\n"])
    source = write(tmp_path / "rows.jsonl", chat("q", "\n\nanswer"), chat("q", "answer"))
    prepared = prepare_data(DataSpec(train=[source]), ChatTemplate(tokenizer), seed=1)
    assert prepared.facts["warnings"] == {STRADDLES: 1}
    assert [example.straddling for example in prepared.train.samples] == [1, 0]


@pytest.mark.parametrize("name", REVISIONS)
def test_what_is_prepared_is_what_the_slow_way_makes(tmp_path, monkeypatch, tiny_tokenizer, name):
    """Enough examples for plans, the fast encoder from the start, and some examples of every kind between them."""
    monkeypatch.setattr("qwen_tune.chatml.encoder.WORTH_A_START", 0)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REVISIONS[name].text
    template = ChatTemplate(tokenizer)
    thinks = {"field": {"reasoning_content": "for a reason"}, "content": {"reasoning_content": "so"}, "nowhere": {}}
    extra = thinks[REVISIONS[name].reasoning]
    rows = []
    for number in range(60):
        start = ["", " ", "\n", "e\u0301"][number % 4]
        rows.append(chat(f"{start}question {number} 🙂", f"{start}answer\n{number}{' ' * (number % 3)}", **extra))
        rows.append(
            {"messages": [{"role": "system", "content": f"Be {number}."}, *chat("ｱ漢字", "ok", **extra)["messages"]]}
        )
        if REVISIONS[name].reasoning != "content":
            rows.append({"messages": [*rows[-2]["messages"], *chat(f"<b>{number}", "done")["messages"]]})
    rows += [chat("<|im_end|>", "<|endoftext|>", **extra), *rows[:9]]
    data = DataSpec(
        train=[write(tmp_path / "rows.jsonl", *rows)],
        special_tokens_in_text="neutralize",
    )
    prepared = prepare_data(data, template, seed=1)
    balanced(prepared)
    expected = [example for row in load_sources(data.train, system=None) for example in tokenize(row, template, data)]
    found = list(prepared.train.samples)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == other


@pytest.mark.parametrize("division", [None, Division(2, 50)], ids=["one process", "two"])
def test_a_source_is_encoded_again_if_the_fast_encoder_is_wrong(tmp_path, template, tiny_tokenizer, capsys, division):
    """The encoder of another vocabulary stands for one that went wrong after it was proven."""
    described = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    described["model"]["merges"] = described["model"]["merges"][:50]
    path = tmp_path / "rows.jsonl"
    row = {
        "messages": [{"role": "user", "content": "Where is the harbour?"}, {"role": "assistant", "content": "There."}]
    }
    path.write_text((json.dumps(row) + "\n") * 3)
    data = DataSpec(train=[SourceSpec(path=str(path))])
    wrong = Encoder(template, fast=FastEncoder(json.dumps(described)))
    stores = SourceStores(data, template, division=division, encoder=wrong)
    store, _ = stores.open(data.train[0])
    assert "tokenizing again with the checkpoint's own tokenizer" in capsys.readouterr().err
    assert store.tokens(0)[0].tolist() == prepare_data(data, template, seed=1).train.samples[0].input_ids
    text = template.render(row["messages"])
    assert store.tokens(0)[0].tolist() == tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
