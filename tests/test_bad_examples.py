"""What people's files get wrong: each a real file, each told with its line and what to do, none a traceback.

What needs a tokenizer (control tokens, labels that are all masked) goes through the real command at the end.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from conftest import TINY

from qwen_tune.data.messages import LOSS_KEYS
from qwen_tune.data.sources import load_sources
from qwen_tune.errors import SHOWN_PROBLEMS, DataError, Problem
from qwen_tune.recipe.schema import SourceSpec

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, ANSWER]}
LINE = json.dumps(GOOD).encode() + b"\n"


def chat(*messages: object) -> bytes:
    return json.dumps({"messages": list(messages)}).encode()


def answer(content: object, **more: object) -> bytes:
    return chat(USER, {"role": "assistant", "content": content, **more})


def calls(*calls: object) -> bytes:
    return answer(None, tool_calls=list(calls))


def row(**columns: object) -> bytes:
    return json.dumps(columns).encode()


def sharegpt(*turns: object) -> bytes:
    return row(conversations=list(turns))


HUMAN = {"from": "human", "value": "q"}
GPT = {"from": "gpt", "value": "a"}

# Each stands after a good example, in line 2: what is wrong with it.
BAD_LINES: dict[str, tuple[bytes, str]] = {
    "an empty answer": (answer(""), "messages[1] (assistant) has blank content"),
    "a blank answer": (answer(" \n\t"), "blank content"),
    "a null answer": (answer(None), "no content"),
    "an answer of ideographic space": (answer("\u3000"), "blank content"),
    "an empty question": (chat({"role": "user", "content": ""}, ANSWER), "messages[0] (user) has blank content"),
    "an empty system text": (chat({"role": "system", "content": ""}, USER, ANSWER), "(system) has blank content"),
    "a number for an answer": (answer(5), "content is the number 5"),
    "an object for an answer": (answer({"text": "a"}), "content is an object"),
    "a part that is an image": (
        answer([{"type": "image_url", "image_url": {}}]),
        "messages[1].content[0] holds image data",
    ),
    "the assistant first": (chat(ANSWER), "the first turn is from the assistant"),
    "the assistant after the system": (chat({"role": "system", "content": "s"}, ANSWER), "first turn is from the ass"),
    "a tool first": (chat({"role": "tool", "content": "1"}, ANSWER), "the first turn is from the tool"),
    "the user last": (chat(USER, ANSWER, USER), "the last turn is from the user"),
    "no assistant": (chat(USER), "there is no assistant turn"),
    "only a system": (chat({"role": "system", "content": "s"}), "there is no assistant turn"),
    "a misspelt role": (chat(USER, {"role": "asistant", "content": "a"}), 'Fix: write "assistant"'),
    "another tool's role": (chat(USER, {"role": "gpt", "content": "a"}), 'Fix: write "assistant"'),
    "an upper-case role": (chat({"role": "User", "content": "q"}, ANSWER), 'Fix: write "user"'),
    "no role": (chat({"content": "q"}, ANSWER), "messages[0] has no role"),
    "a role that is a list": (chat({"role": ["user"], "content": "q"}, ANSWER), "messages[0].role is a list"),
    "a turn that is text": (chat(USER, "a"), "messages[1] is a string"),
    "a turn that is null": (chat(USER, None), "messages[1] is null"),
    "no turns": (chat(), "messages is empty"),
    "messages that are null": (row(messages=None), "messages is null"),
    "messages that are an object": (row(messages={"role": "user"}), "messages is an object"),
    "messages that are broken JSON text": (row(messages='[{"role": '), "messages is a string that is not JSON"),
    "a key that means training elsewhere": (answer("a", weight=0), 'the key "weight"'),
    "ms-swift's loss": (answer("a", loss=False), 'the key "loss"'),
    "a mask": (chat(USER, {**ANSWER, "mask": 0}, USER, ANSWER), 'Fix: write "train": true or "train": false'),
    "a part with a loss": (answer([{"type": "text", "text": "a", "loss": False}]), 'content[0] has the key "loss"'),
    "an escape sequence": (chat(USER, {"role": "\x1b[31m", "content": "a"}), 'has the role "\\x1b[31m"'),
    "train on a user's turn": (chat({**USER, "train": True}, ANSWER), 'a user turn with "train"'),
    "train that is a number": (answer("a", train=1), "train is the number 1"),
    "reasoning under another name": (answer("a", thinking="r"), 'Fix: write "reasoning_content"'),
    "reasoning of the user": (chat({**USER, "reasoning_content": "r"}, ANSWER), "only assistant turns reason"),
    "reasoning that is a list": (answer("a", reasoning_content=["r"]), "reasoning_content is a list"),
    "tool calls as text": (answer(None, tool_calls="f()"), "tool_calls is a string"),
    "a tool call that is text": (calls("f()"), "tool_calls[0] is a string"),
    "a tool call without a name": (calls({"arguments": {}}), "names no function"),
    "arguments that are no JSON": (calls({"function": {"name": "f", "arguments": "{x: 1}"}}), "not JSON"),
    "arguments that are a list": (calls({"function": {"name": "f", "arguments": [1]}}), "arguments is a list"),
    "arguments that are infinite": (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": '
        b'[{"name": "f", "arguments": {"x": 1e999}}]}]}',
        "arguments holds the number inf",
    ),
    "calls of the user": (chat({**USER, "tool_calls": [{"name": "f"}]}, ANSWER), "only assistant turns call tools"),
    "the old function_call": (answer(None, function_call={"name": "f"}), 'the key "function_call"'),
    "a tool without a result": (chat(USER, {"role": "tool", "content": None}, ANSWER), "(tool) has no content"),
    "tools that are an object": (row(**GOOD, tools={"name": "f"}), "tools is an object"),
    "tools that are broken text": (row(**GOOD, tools="[{"), "tools is a string that is not JSON"),
    "tools without a name": (row(**GOOD, tools=[{"type": "function"}]), "tools[0] names no function"),
    "two system texts": (
        row(messages=[{"role": "system", "content": "s"}, USER, ANSWER], system="t"),
        'a "system" column and another system turn',
    ),
    "a system that is a list": (row(**GOOD, system=["s"]), "system is a list"),
    "images": (row(**GOOD, images=["a.png"]), 'the example has "images"'),
    "another form": (row(instruction="q", output="a"), "the example lacks messages; this source is read as messages"),
    "no columns": (b"{}", "the example has no columns"),
    "null": (b"null", "the example is null"),
    "a list": (b"[1]", "the example is a list"),
    "a number": (b"1", "the example is the number 1"),
    "text": (b'"text"', "the example is a string"),
    "a line cut off": (LINE[:40], "complete or remove the last line, which is cut off"),
    "two objects in a line": (LINE.strip() * 2, "Extra data"),
    "a comma at the end": (LINE.strip() + b",", "Extra data"),
    "single quotes": (b"{'messages': []}", "the line is not JSON"),
    "a key twice": (b'{"messages": [], "messages": []}', 'the key "messages" occurs twice'),
    "NaN": (b'{"messages": [], "score": NaN}', "NaN is not JSON"),
    "minus infinity": (b'{"score": -Infinity}', "-Infinity is not JSON"),
    "a line break inside a string": (b'{"messages": "a\tb"}', "Invalid control character"),
    "half of a surrogate pair": (answer("\ud83d"), "half of a surrogate pair"),
    "half of a pair in a key": (b'{"\\udc00": 1}', "half of a surrogate pair"),
    "bytes that are not UTF-8": (b'{"messages": "\xe4"}', "byte 15 of the line is not UTF-8"),
    "a surrogate in UTF-8": (b'{"messages": "\xed\xa0\x80"}', "is not UTF-8"),
    "a number without an end": (b'{"score": ' + b"9" * 5000 + b"}", "too many digits"),
    "nesting without an end": (b'{"a":' * 50_000, "the line is not JSON"),
    "nested arguments": (
        b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"name": "f", '
        b'"arguments": ' + b'{"a":' * 300 + b"1" + b"}" * 300 + b"}]}]}",
        "more than 100 levels",
    ),
}

# Files that begin with the example given: the rest is not what the first example says, or not what any example says.
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("rows.jsonl", b"", ":1: the file is empty"),
    "blank": ("rows.jsonl", b"\n \r\n\n", ":1: the file is empty"),
    "a mark and nothing": ("rows.jsonl", b"\xef\xbb\xbf", ":1: the file is empty"),
    "null alone": ("rows.jsonl", b"null\n", ":1: the example is null"),
    "a list in lines": ("rows.jsonl", b"[" + LINE.strip() + b"]\n", ":1: the file holds a JSON list"),
    "indented JSON in lines": ("rows.jsonl", json.dumps(GOOD, indent=1).encode(), ":1: the line is not JSON"),
    "UTF-16": ("rows.jsonl", LINE.decode().encode("utf-16"), ":1: the file is UTF-16"),
    "UTF-16 without a mark": ("rows.jsonl", LINE.decode().encode("utf-16-le"), ":1: the file is UTF-16"),
    "an unknown form": ("rows.jsonl", b'{"question": "q", "answer": "a"}\n', ":1: the format is not recognised"),
    "gzip cut off": ("rows.jsonl.gz", gzip.compress(LINE * 9)[:-9], "the gzip data are cut off"),
    "zstd cut off": ("rows.jsonl", bytes(pyarrow.compress(LINE, "zstd", asbytes=True))[:-3], "the zstd data are"),
    "a zip": ("rows.jsonl", b"PK\x03\x04....", ": the file is zip-compressed"),
    "an object around": ("rows.json", b'{"data": [' + LINE.strip() + b"]}", 'be under the key "data"'),
    "columns": ("rows.json", b'{"prompt": ["q", "r"], "completion": ["a", "b"]}', '"prompt" holds a column'),
    "JSON null": ("rows.json", b"null", ":1: the file holds null"),
    "JSON cut off": ("rows.json", b"[" + LINE + b"," + LINE[:30], ":2: the example is not JSON"),
    "a list that does not end": ("rows.json", b"[" + LINE, ":2: expected a comma or the end of the list"),
    "a list of lists": ("rows.json", b"[\n[1]]", ":2: the example is a list"),
    "an empty list": ("rows.json", b"[]", ":1: the file is empty"),
    "more after the list": ("rows.json", b"[" + LINE.strip() + b"]\n[]", ":2: found text after the list"),
    "CSV with a value too few": ("rows.csv", b"prompt,completion\nq,a\nq\n", ":3: the line has 1 values"),
    "CSV without rows": ("rows.csv", b"prompt,completion\n", ":1: the file has a header but no examples"),
    "CSV with a name twice": ("rows.csv", b"prompt,prompt\nq,a\n", ":1: the header names prompt twice"),
    "CSV with an open quote": ("rows.csv", b'prompt,completion\nq,a\n"q,a\n', ":3: the line is not CSV"),
    "CSV with an empty completion": ("rows.csv", b"prompt,completion\nq,\n", ":2: completion is an empty string"),
    "CSV that is not UTF-8": ("rows.csv", b"prompt,completion\nq,a\nq,\xe4\n", ":3: byte 3 of the line is not UTF-8"),
    "CSV of other columns": ("rows.tsv", b"question\tanswer\nq\ta\n", ":2: the format is not recognised"),
    "no Parquet": ("rows.parquet", b"PAR1" * 9, "the file is not Parquet"),
    "no Arrow": ("rows.arrow", b"ARROW1" * 9, "the file is not Arrow"),
    "an unknown speaker": ("rows.jsonl", sharegpt({**HUMAN, "from": "alien"}, GPT), 'conversations[0].from is "alien"'),
    "a speaker's loss": ("rows.jsonl", sharegpt(HUMAN, {**GPT, "loss_scale": 0.0}), ":1: conversations[1] has the key"),
    "a speaker's null": ("rows.jsonl", sharegpt(HUMAN, {**GPT, "value": None}), ":1: conversations[1] (assistant) has"),
    "a call that is no JSON": ("rows.jsonl", sharegpt(HUMAN, {"from": "function_call", "value": "f()"}), "not JSON"),
    "a turn of nothing known": (
        "rows.jsonl",
        sharegpt({"who": "me", "what": "q"}, GPT),
        "conversations[0] has who, what",
    ),
    "an empty output": ("rows.jsonl", row(instruction="q", output=""), ":1: output is an empty string"),
    "an instruction's null": ("rows.jsonl", row(instruction=None, output="a"), ":1: instruction is null"),
    "an input that is a list": ("rows.jsonl", row(instruction="q", input=["i"], output="a"), ":1: input is a list"),
    "an empty completion": ("rows.jsonl", row(prompt="q", completion=" "), ":1: completion is an empty string"),
    "no completion": ("rows.jsonl", row(prompt=[USER], completion=[]), ":1: completion is empty"),
    "a prompt of another kind": ("rows.jsonl", row(prompt=[USER], completion="a"), "of different kinds"),
    "a response's null": ("rows.jsonl", row(query="q", response=None), ":1: response is null"),
    "an empty text": ("rows.jsonl", row(text=""), ":1: text is an empty string"),
    "ids that are text": ("rows.jsonl", row(input_ids=["a"]), ":1: input_ids[0] is a string"),
    "labels of another length": ("rows.jsonl", row(input_ids=[1, 2], labels=[1]), ":1: labels has 1 values"),
    "labels that are shifted": ("rows.jsonl", row(input_ids=[1, 2], labels=[2, -100]), ":1: labels[0] is 2"),
    "no data file": ("rows.txt", b"text", ": unknown file type"),
}


def told(path: Path, **source: object) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_sources([SourceSpec(path=str(path), **source)], system=None)
    assert all(problem.fix for problem in caught.value.problems), caught.value
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_example_is_reported_with_its_line(tmp_path, name):
    bad, expected = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + bad)
    [message] = told(path)
    assert message.startswith(f"{path}:2: ")
    assert expected in message
    assert ". Fix: " in message
    assert len(message) < 2000


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_reported_with_its_place(tmp_path, name):
    file_name, content, expected = BAD_FILES[name]
    path = tmp_path / file_name
    path.write_bytes(content)
    [message] = told(path)
    assert message.startswith(f"{path}:")
    assert expected in message
    assert "Fix: " in message


@pytest.mark.parametrize("key", sorted(LOSS_KEYS))
def test_no_other_tools_word_for_training_is_passed_over(tmp_path, key):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(answer("a", **{key: False}) + b"\n" + answer("a", **{key: None}))
    [message] = told(path)
    assert message.startswith(f'{path}:1: messages[1] has the key "{key}"')
    assert message.endswith('Fix: write "train": true or "train": false')


def test_control_characters_of_an_example_are_shown():
    problem = Problem("a\x00", "b\x1b[2J\x7f\x9b\tä\u2026", "c\nd")
    assert str(problem) == "a\\x00: b\\x1b[2J\\x7f\\x9b\\x09ä\u2026. Fix: c\nd"


def test_there_are_enough_of_them():
    assert len(BAD_LINES) + len(BAD_FILES) >= 100


def test_mixed_schemas_are_reported_example_by_example(tmp_path):
    path = tmp_path / "rows.jsonl"
    other = row(prompt="q", completion="a") + b"\n"
    path.write_bytes((LINE + other) * 3)
    messages = told(path)
    assert [message.split(": ")[0] for message in messages] == [f"{path}:{line}" for line in (2, 4, 6)]
    assert "the example lacks messages" in messages[0]
    assert "the example has prompt, completion" in messages[0]
    assert "the example lacks prompt and completion" in told(path, format="prompt_completion")[0]


def test_the_first_twenty_problems_are_listed_and_the_others_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([bad for bad, _ in BAD_LINES.values()]))
    *shown, rest = told(path)
    assert len(shown) == SHOWN_PROBLEMS
    assert [message.split(": ")[0] for message in shown] == [f"{path}:{line}" for line in range(1, SHOWN_PROBLEMS + 1)]
    assert rest == f"… and {len(BAD_LINES) - SHOWN_PROBLEMS} more"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINE,
        LINE.replace(b"\n", b"\r\n"),
        b"\n\n" + LINE + b" \n\t\n",
        LINE.strip(),
        b"  " + LINE,
        gzip.compress(LINE, mtime=0),
        pyarrow.compress(LINE, "zstd", asbytes=True),
        row(messages=json.dumps(GOOD["messages"])),
        row(**GOOD, images=[], tools=None, system="", chat_template_kwargs={"enable_thinking": None}),
        answer("a", name=None, tool_calls=[], reasoning_content=" "),
    ],
)
def test_what_only_looks_bad_is_read(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    [conversation] = load_sources([SourceSpec(path=str(path))], system=None)
    assert [message.for_template() for message in conversation.messages] == [USER, ANSWER]
    assert conversation.warnings == ()
    assert conversation.chat_template_kwargs == {}


@pytest.mark.parametrize(
    ("content", "warning"),
    [
        (chat(USER, USER, ANSWER), "two user turns in a row"),
        (chat(USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER), "system turn that is not the first"),
        (answer("a", mood="good"), 'message key "mood" is not used'),
        (answer("a", **{"\x1bc": "good"}), 'message key "\\x1bc" is not used'),
        (row(text="t", system="s"), 'column "system" is not used by format text'),
    ],
)
def test_unusual_turns_are_a_warning(tmp_path, content, warning):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    [loaded] = load_sources([SourceSpec(path=str(path))], system=None)
    assert loaded.warnings == (warning,)


def recipe(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    path = folder / "recipe.yaml"
    path.write_text(f"model: {{base: {TINY}}}\ndata: {{train: [{{path: {name}}}], max_length_tokens: 128}}\n")
    return path


@pytest.mark.parametrize("name", ["a blank answer", "null", "half of a surrogate pair", "a key twice"])
def test_the_command_ends_with_the_place_and_no_traceback(tmp_path, qwen_tune, name):
    bad, expected = BAD_LINES[name]
    result = qwen_tune("validate", str(recipe(tmp_path, "rows.jsonl", LINE + bad)), cwd=tmp_path)
    assert result.returncode == 2
    assert "rows.jsonl:2: " in result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["empty", "JSON null", "gzip cut off", "no Parquet", "CSV with an open quote"])
def test_the_command_ends_with_the_file_and_no_traceback(tmp_path, qwen_tune, name):
    file_name, content, expected = BAD_FILES[name]
    result = qwen_tune("validate", str(recipe(tmp_path, file_name, content)), cwd=tmp_path)
    assert result.returncode == 2
    assert f"{file_name}:" in result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (answer("a<|im_end|>b"), "rows.jsonl:2: "),
        (answer("a", train=False), ""),
    ],
)
def test_what_needs_the_tokenizer_is_reported_too(tmp_path, qwen_tune, content, expected):
    rows = LINE + content + b"\n" if expected else content
    result = qwen_tune("preview", str(recipe(tmp_path, "rows.jsonl", rows)), cwd=tmp_path)
    assert result.returncode == 2, result.stdout
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
