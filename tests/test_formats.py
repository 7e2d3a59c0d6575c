"""Every form of examples: what it becomes, how it is recognised, and under which other names its columns may stand."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
from pathlib import Path

import pytest

from qwen_tune.chatml.conversation import Conversation, Message, PlainTurns
from qwen_tune.data.documents import PretokenizedExample, TextExample
from qwen_tune.data.formats import ACCEPTED, COLUMNS, FORMATS, recognise, to_training_example
from qwen_tune.data.messages import parse_messages
from qwen_tune.data.sources import SourceReader
from qwen_tune.errors import ExampleError, Problem
from qwen_tune.recipe.schema import SourceSpec

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
PLAIN = [("user", "q"), ("assistant", "a")]


def convert(row: dict, format_name: str | None = None, **settings):
    name = format_name or recognise(row).name
    return to_training_example(row, name, source="rows.jsonl:1", source_name="rows", **settings)


def turns(conversation: Conversation) -> list[tuple[str, str | None]]:
    return [(message.role, message.content) for message in conversation.messages]


def refusal(row: dict, format_name: str | None = None) -> str:
    with pytest.raises(ExampleError) as caught:
        convert(row, format_name)
    assert caught.value.fix
    return caught.value.what


def write(path: Path, *rows: dict) -> SourceSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec(path=str(path))


SAME = {
    "messages": {"messages": [USER, ANSWER]},
    "messages as text": {"messages": json.dumps([USER, ANSWER])},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ANSWER]},
    "from and value": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "human and assistant": {"conversation": [{"human": "q", "assistant": "a"}]},
    "from and value as messages": {"messages": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
    "role and content as conversations": {"conversations": [USER, ANSWER]},
    "role and content as conversation": {"conversation": [USER, ANSWER]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "alpaca with the text made of it": {"instruction": "q", "output": "a", "text": "Below is an instruction…"},
    "prompt": {"prompt": "q", "completion": "a"},
    "prompt of turns": {"prompt": [USER], "completion": [ANSWER]},
    "prompt of turns as text": {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
    "query": {"query": "q", "response": "a"},
    "query with no history": {"query": "q", "response": "a", "history": []},
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_the_same_two_turns_in_every_spelling(row):
    conversation = convert(row)
    assert turns(conversation) == PLAIN
    assert [message.train for message in conversation.messages] == [True, True]
    assert conversation.warnings == ()
    assert conversation.content_hash() == convert(SAME["messages"]).content_hash()
    assert turns(convert({**row, "system": "s"})) == [("system", "s"), *PLAIN]
    assert turns(convert(row, system="s")) == [("system", "s"), *PLAIN]
    assert convert({**row, "tools": json.dumps([{"name": "f"}])}).tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        (SAME["messages"], "messages", 'column "messages" holds a list of turns with role and content'),
        (SAME["messages as text"], "messages", "role and content, as JSON text"),
        (SAME["from and value"], "sharegpt", 'column "conversations" holds a list of turns with from and value'),
        (SAME["from and value as messages"], "sharegpt", 'column "messages" holds a list of turns with from and value'),
        (SAME["human and assistant"], "sharegpt", "turns with human and assistant"),
        (SAME["role and content as conversations"], "messages", 'column "conversations" holds'),
        (SAME["alpaca"], "alpaca", 'columns "instruction" and "output"'),
        (SAME["prompt"], "prompt_completion", 'columns "prompt" and "completion"'),
        (SAME["query"], "query_response", 'columns "query" and "response"'),
        ({"input_ids": [1], "text": "t"}, "tokenized", 'column "input_ids"'),
        ({"text": "t", "url": "u"}, "text", 'column "text"'),
        ({"messages": None, "text": "t"}, "text", 'column "text"'),
        ({"messages": None}, "messages", 'column "messages"'),
    ],
)
def test_what_is_recognised_and_why(row, name, reason):
    recognised = recognise(row)
    assert recognised.name == name
    assert reason in recognised.reason


def test_what_is_not_recognised_is_shown_with_what_would_be():
    row = {"question": "q" * 1000, "answers": [[["deep"]]] * 50, "score": 0.5, "nothing": None, "more": {"a": {"b": 1}}}
    with pytest.raises(ExampleError) as caught:
        recognise(row)
    assert '{"question": "qqq' in caught.value.what
    assert '"score": 0.5, "nothing": null' in caught.value.what
    assert ACCEPTED in caught.value.what
    assert all(name in caught.value.what for name in FORMATS)
    assert len(caught.value.what) < len(ACCEPTED) + 400


def test_a_reader_says_what_it_recognised_once_an_example_is_read(tmp_path):
    source = write(tmp_path / "rows.jsonl", SAME["query"], SAME["query"])
    reader = SourceReader(source, system=None)
    assert reader.recognised is None
    rows = iter(reader)
    assert turns(next(rows)) == PLAIN
    assert reader.recognised.name == "query_response"
    assert len(list(reader)) == 2
    told = SourceReader(source.model_copy(update={"format": "query_response"}), system=None)
    assert len(list(told)) == 2
    assert told.recognised.reason == "the recipe says format: query_response"


def test_examples_are_read_as_they_are_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    source = write(path, *[SAME["messages"]] * 3)
    rows = iter(SourceReader(source, system=None))
    next(rows)
    assert [row.source for row in rows] == [f"{path}:2", f"{path}:3"]


def test_text_parts_are_put_together_as_they_stand():
    content = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}, {"text": "\n"}, "c"]
    conversation = convert({"messages": [{"role": "user", "content": content}, ANSWER]})
    assert conversation.messages[0].content == "a b\nc"


def test_reasoning_and_tool_calls_as_parts():
    call = {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": "q"}]},
            {"role": "assistant", "content": [{"type": "reasoning", "value": "why"}, call, call]},
            {"role": "tool", "content": [{"type": "text", "value": "1"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "a"}]},
        ]
    }
    _, calls, result, answer = convert(row).messages
    assert calls.reasoning_content == "why"
    assert [call["function"] for call in calls.tool_calls] == [{"name": "f", "arguments": {"x": 1}}] * 2
    assert (result.role, result.content) == ("tool", "1")
    assert (answer.reasoning_content, answer.content) == ("so", "a")


TEXT = {"type": "text", "text": "a"}
REASON = {"type": "reasoning", "text": "r"}
CALL = {"type": "tool_call", "tool_call": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([{"type": "image", "image": "a.png"}], "messages[1].content[0] holds image data"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "holds image data"),
        ([{"type": "input_audio", "input_audio": {}}], "holds audio data"),
        ([{"video": "x.mp4"}], "holds video data"),
        ([TEXT, {"type": "tool_result", "content": "1"}], 'content[1] has the type "tool_result"; expected text'),
        ([{"type": 5}], "content[0].type is the number 5"),
        ([{"type": "text"}], "content[0] has no text"),
        ([{"type": "text", "text": 5}], "content[0].text is the number 5"),
        ([TEXT, REASON], "content[1] is reasoning after the answer"),
        ([CALL, TEXT], "content[1] is text after a tool call"),
        ([{**TEXT, "train": False}], 'the key "train"'),
        ([{**CALL, "tool_call": "{"}], "content[0] is a string that is not JSON"),
        ([{**CALL, "tool_call": None}], "tool_calls[0] is null"),
        ([REASON], "blank content"),
        ([], "blank content"),
    ],
)
def test_parts_that_no_template_would_write(parts, expected):
    assert expected in refusal({"messages": [USER, {"role": "assistant", "content": parts}]})


def test_only_the_assistant_reasons_and_calls():
    assert "a reasoning part of a user turn" in refusal({"messages": [{"role": "user", "content": [REASON]}, ANSWER]})
    twice = {"role": "assistant", "content": [REASON, TEXT], "reasoning_content": "r"}
    assert "has both reasoning_content and parts" in refusal({"messages": [USER, twice]})


def test_history_comes_before_the_question():
    for row in ({"query": "q", "response": "a"}, {"instruction": "q", "output": "a"}):
        for history in ([["q0", "a0"]], '[["q0", "a0"]]'):
            conversation = convert({**row, "history": history, "system": "s"})
            assert turns(conversation) == [("system", "s"), ("user", "q0"), ("assistant", "a0"), *PLAIN]
        assert "history[0] is a list of 1" in refusal({**row, "history": [["q0"]]})
        assert "history[0] is a string" in refusal({**row, "history": ["q0"]})
        assert "history[0] is null" in refusal({**row, "history": [["q0", None]]})
        assert "history is an object" in refusal({**row, "history": {"q": "a"}})


def test_a_system_text_inside_the_turns():
    pairs = [{"system": "s", "human": "q", "assistant": "a"}, {"human": "q", "assistant": "a"}]
    assert turns(convert({"conversation": pairs})) == [("system", "s"), *PLAIN, *PLAIN]
    assert "conversation[1] has a system text" in refusal({"conversation": pairs[::-1]})
    assert 'the key "weight"' in refusal({"conversation": [{**pairs[0], "weight": 0}]})
    assert "conversation[0].assistant is null" in refusal({"conversation": [{"human": "q"}]})


def test_a_text_that_only_looks_like_turns_stays_a_text():
    assert turns(convert({"prompt": '[{"x": 1}]', "completion": "a"}))[0] == ("user", '[{"x": 1}]')
    assert turns(convert({"prompt": "[{what", "completion": "a"}))[0] == ("user", "[{what")


def test_places_are_those_of_the_example_whatever_is_put_before_it():
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}
    with pytest.raises(ExampleError, match=r"^conversations\[1\] \(assistant\) has blank content"):
        convert(row, system="s")


def test_a_text_example():
    row = convert({"text": "Grüße\n"})
    assert row == TextExample("rows.jsonl:1", "rows", "Grüße\n")
    assert row.content_bytes() == "Grüße\n".encode()
    assert row.content_hash() == convert({"text": "Grüße\n", "url": "u"}).content_hash()
    assert row.content_hash() != convert({"text": "Grüße"}).content_hash()
    assert "text is an empty string" in refusal({"text": " "})
    assert "text is the number 5" in refusal({"text": 5})
    assert convert({"text": "t", "system": "s"}).warnings == ('column "system" is not used by format text',)
    assert 'has "images"' in refusal({"text": "t", "images": ["a.png"]})


def test_a_tokenized_example():
    row = convert({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]})
    assert row == PretokenizedExample("rows.jsonl:1", "rows", (5, 6, 7), (-100, 6, 7))
    assert row.content_bytes() == struct.pack("<3I", 5, 6, 7)
    everything = convert({"input_ids": "[5, 6, 7]"})
    assert everything.labels == (5, 6, 7)
    assert everything.content_hash() == row.content_hash()
    assert convert({"input_ids": [5], "labels": None, "attention_mask": None}).labels == (5,)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": None}, "input_ids is null"),
        ({"input_ids": "abc"}, "input_ids is a string that is not JSON"),
        ({"input_ids": [1, True]}, "input_ids[1] is a boolean"),
        ({"input_ids": [1, 2.0]}, "input_ids[1] is the number 2.0"),
        ({"input_ids": [1, -1]}, "input_ids[1] is -1; expected a token id"),
        ({"input_ids": [-1]}, "input_ids[0] is -1"),
        ({"input_ids": [1 << 31]}, "input_ids[0] is 2147483648"),
        ({"input_ids": [1], "labels": [1, 2]}, "labels has 2 values; input_ids has 1"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "labels[0] is 2; expected 1, the token's own id, or -100"),
        ({"input_ids": [1], "labels": [True]}, "labels[0] is a boolean"),
        ({"input_ids": [1, 2], "attention_mask": [1, 0]}, "attention_mask[1] is not 1"),
        ({"input_ids": [1], "attention_mask": []}, "attention_mask has 0 values"),
    ],
)
def test_ids_that_are_none(row, expected):
    assert expected in refusal(row, "tokenized")


def test_every_column_may_have_another_name(tmp_path):
    rows = {
        "messages": {"messages": [USER, ANSWER], "system": "s", "tools": [{"name": "f"}]},
        "sharegpt": {"conversation": [{"human": "q", "assistant": "a"}], "chat_template_kwargs": {"x": 1}},
        "alpaca": {"instruction": "q", "input": "i", "output": "a", "history": [["b", "c"]]},
        "prompt_completion": {"prompt": "q", "completion": "a"},
        "query_response": {"query": "q", "response": "a", "history": [["b", "c"]]},
        "tokenized": {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
        "text": {"text": "t"},
    }
    renamed = {"conversations"}
    for name, row in rows.items():
        expected = convert(row, name)
        other = write(tmp_path / "rows.jsonl", {f"the {column}": value for column, value in row.items()})
        for format_name in ("auto", name):
            columns = {column: f"the {column}" for column in row}
            [found] = SourceReader(other.model_copy(update={"format": format_name, "columns": columns}), system=None)
            assert not isinstance(found, Problem), found
            assert dataclasses.replace(found, source="rows.jsonl:1") == expected
        renamed |= row.keys()
    assert renamed == set(COLUMNS)


def test_a_renamed_column_is_no_longer_there_under_its_old_name(tmp_path):
    source = write(tmp_path / "rows.jsonl", {"instruction": "q", "output": "a"})
    columns = {"prompt": "instruction", "completion": "output"}
    reader = SourceReader(source.model_copy(update={"columns": columns}), system=None)
    assert [turns(row) for row in reader] == [PLAIN]
    assert reader.recognised.name == "prompt_completion"


def test_a_renamed_column_that_examples_may_lack(tmp_path):
    source = write(tmp_path / "rows.jsonl", SAME["messages"], {**SAME["messages"], "sys": "s"})
    columns = {"system": "sys"}
    rows = list(SourceReader(source.model_copy(update={"columns": columns}), system=None))
    assert [len(row.messages) for row in rows] == [2, 3]
    *rows, problem = SourceReader(source.model_copy(update={"columns": {"system": "syst"}}), system=None)
    assert len(rows) == 2
    assert str(problem).startswith(f'{source.path}: no example has a column "syst", which the recipe maps to system')


def test_tools_of_a_table_as_texts():
    tools = [json.dumps({"type": "function", "function": {"name": "f"}}), {"name": "g"}]
    assert [tool.get("name") for tool in convert({**SAME["messages"], "tools": tools}).tools] == [None, "g"]
    assert "tools[0] names no function" in refusal({**SAME["messages"], "tools": ["{}"]})
    assert "tools is an object" in refusal({**SAME["messages"], "tools": {}})


def test_what_a_template_could_not_write_is_refused():
    deep: dict = {}
    for _ in range(200):
        deep = {"x": deep}
    for value, found in ((float("inf"), "the number inf"), (deep, "more than 100 levels"), ({1}, "a set")):
        call = {"function": {"name": "f", "arguments": {"x": value}}}
        row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
        assert f"arguments holds {found}" in refusal(row)
        assert f"tools[0] holds {found}" in refusal({**SAME["messages"], "tools": [{"name": "f", "x": value}]})


def test_hashes_tell_apart_what_is_said_and_nothing_else():
    def digest(*messages: Message, **fields) -> str:
        return Conversation("a:1", "a", messages, **fields).content_hash()

    hashes = [
        digest(Message("user", "q")),
        digest(Message("assistant", "q")),
        digest(Message("user", "q "), Message("assistant", "a")),
        digest(Message("user", "q"), Message("assistant", " a")),
        digest(Message("user", "q 1 assistant 1 a")),
        digest(Message("user", "q"), Message("assistant", "a", reasoning_content="r")),
        digest(Message("user", "q"), Message("assistant", "a", name="r")),
        digest(Message("user", "q"), tools=({"name": "f"},)),
        digest(Message("user", '[{"name": "f"}]')),
    ]
    assert len(set(hashes)) == len(hashes)
    assert digest(Message("user")) == digest(Message("user", ""))
    assert all(len(bytes.fromhex(value)) == 32 for value in hashes)


def test_content_bytes_leave_out_what_nobody_says_in_the_conversation():
    calls = ({"function": {"name": "f", "arguments": {}}},)
    messages = (
        Message("system", "s"),
        Message("user", "q"),
        Message("assistant", None, tool_calls=calls),
        Message("tool", "1"),
        Message("assistant", "ä", reasoning_content="r"),
    )
    assert Conversation("a:1", "a", messages, tools=({"name": "f"},)).content_bytes() == (
        'q\n{"arguments": {}, "name": "f"}\n1\nr\nä'.encode()
    )


def test_plain_turns_are_like_any_others():
    made = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"))
    turns = [{"role": message.role, "content": message.content} for message in made]
    plain, _ = parse_messages(turns)
    assert isinstance(plain, PlainTurns)
    assert plain == made
    assert tuple(plain) == made
    assert plain[1:] == made[1:]
    assert hash(plain) == hash(made)
    assert repr(plain) == repr(made)
    assert pickle.loads(pickle.dumps(plain)) == made
    plain_row, made_row = Conversation("a:1", "a", plain), Conversation("a:1", "a", made)
    assert plain_row == made_row
    assert plain_row.content_hash() == made_row.content_hash()
    assert plain_row.content_bytes() == made_row.content_bytes()
    written_out, _ = parse_messages([{**turns[0], "name": None}, *turns[1:]])
    assert isinstance(written_out, tuple)
    assert written_out == made
