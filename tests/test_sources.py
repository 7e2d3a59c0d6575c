"""Real files, good and bad, through the readers that training uses."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from example_files import load_training_examples

from qwen_tune.data.files import find_files, names_hub_data_set
from qwen_tune.data.sources import check_data
from qwen_tune.errors import DataError
from qwen_tune.recipe.schema import DataSpec, SourceSpec

CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
LINE = json.dumps(CHAT)
SHAREGPT = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
ALPACA = {"instruction": "q", "input": "", "output": "a"}
PROMPT = {"prompt": "q", "completion": "a"}


def load(path: Path | str, **source):
    system = source.pop("system", None)
    return load_training_examples(DataSpec(train=[SourceSpec(path=str(path), **source)], system=system))


def problem(path: Path, **source) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **source)
    return str(caught.value)


def turns(conversation) -> list[tuple[str, str | None]]:
    return [(message.role, message.content) for message in conversation.messages]


@pytest.mark.parametrize("row", [CHAT, SHAREGPT, ALPACA, PROMPT], ids=["messages", "sharegpt", "alpaca", "prompt"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_reads_the_same_from_every_kind_of_file(tmp_path, row, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + f"{json.dumps(row)}\r\n\n{json.dumps(row)}\n".encode())
    elif suffix == ".json":
        path.write_text(json.dumps([row, row], indent=2))
    elif suffix == ".csv":
        cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
        line = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
        path.write_text(f"{','.join(row)}\n{line}\n{line}\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    one, other = load(path)
    assert turns(one) == turns(other) == [("user", "q"), ("assistant", "a")]
    assert one.source_name == "rows"


def test_lines_are_named_where_they_stand(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n  {"prompt": "q",\n   "completion": "a"},\n\n  {"prompt": "r", "completion": "b"}\n]\n')
    assert [c.source.removeprefix(str(tmp_path)) for c in load(path)] == ["/rows.json:2", "/rows.json:5"]
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"one\ntwo",a\nq,b\n')
    assert [c.source.removeprefix(str(tmp_path)) for c in load(path)] == ["/rows.csv:2", "/rows.csv:4"]


def test_folders_globs_and_lines_in_a_json_file(tmp_path):
    (tmp_path / "b.jsonl").write_text(LINE)
    (tmp_path / "a.json").write_text(f"{LINE}\n{LINE}\n")
    (tmp_path / "notes.md").write_text("no data")
    assert [Path(c.source).name for c in load(tmp_path)] == ["a.json:1", "a.json:2", "b.jsonl:1"]
    assert len(load(tmp_path / "*.jsonl")) == 1


def test_columns_system_and_tools_from_the_recipe(tmp_path):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([{"type": "function", "function": {"name": "f"}}]))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chat": CHAT["messages"]}))
    [conversation] = load(path, columns={"messages": "chat"}, system="Be brief.", tools=str(tools))
    assert turns(conversation)[0] == ("system", "Be brief.")
    assert conversation.tools[0]["function"]["name"] == "f"


def test_tool_calls_of_sharegpt_and_arguments_as_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": "{\\"x\\": null}"}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "f"}]',
    }
    path.write_text(json.dumps(row))
    [conversation] = load(path)
    assert conversation.messages[1].tool_calls[0]["function"] == {"name": "f", "arguments": {"x": None}}
    assert [message.role for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]


def test_what_a_sharegpt_turn_says_of_its_training_is_heard(tmp_path):
    path = tmp_path / "rows.jsonl"
    human, gpt = SHAREGPT["conversations"]
    path.write_text(
        json.dumps({"conversations": [human, {**gpt, "train": False}, human, {**gpt, "reasoning_content": "r"}]})
    )
    [conversation] = load(path)
    assert [message.train for message in conversation.messages] == [True, False, True, True]
    assert conversation.messages[3].reasoning_content == "r"
    path.write_text(json.dumps({"conversations": [human, {**gpt, "weight": 0}]}))
    assert 'the key "weight"' in problem(path)
    path.write_text(json.dumps({"conversations": [{**human, "from": ["human"]}, gpt]}))
    assert "conversations[0].from is a list" in problem(path)


@pytest.mark.parametrize("row", [CHAT, SHAREGPT, ALPACA, PROMPT], ids=["messages", "sharegpt", "alpaca", "prompt"])
def test_a_system_column_is_read_in_every_format(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, "system": "Be brief."}))
    [conversation] = load(path, system="The recipe's.")
    assert turns(conversation)[0] == ("system", "Be brief.")


def test_columns_that_map_nothing_are_errors(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"chat": CHAT["messages"]}))
    assert "systm is not a column" in problem(path, columns={"messages": "chat", "systm": "chat"})
    assert 'the example has no column "chats"' in problem(path, columns={"messages": "chats"})


def test_only_the_completion_of_a_chat_is_trained(tmp_path):
    path = tmp_path / "rows.jsonl"
    prompt = [*CHAT["messages"], {"role": "user", "content": "more"}]
    path.write_text(json.dumps({"prompt": prompt, "completion": [{"role": "assistant", "content": "b"}]}))
    [conversation] = load(path)
    assert [message.train for message in conversation.messages] == [True, False, True, True]


def test_nulls_that_arrow_invents_do_not_reach_a_template(tmp_path):
    path = tmp_path / "rows.parquet"
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [CHAT, {"messages": [CHAT["messages"][0], answer]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    first, second = load(path)
    assert [message.for_template() for message in first.messages] == CHAT["messages"]
    assert "tool_call_id" not in second.messages[1].for_template()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ":1: the file is empty"),
        (b"\n \n", ":1: the file is empty"),
        (b"null\n", ":1: the example is null"),
        (b'"text"\n', ":1: the example is a string"),
        (b"[1]\n", ":1: the file holds a JSON list"),
        (LINE.encode() + b"\n[1]\n", ":2: the example is a list"),
        (LINE.encode() + b'\n{"messages": [', ":2: the line is not JSON"),
        (b'{"messages": [], "messages": []}\n', ':1: the line is not JSON: the key "messages" occurs twice'),
        (b'{"messages": NaN}\n', ":1: the line is not JSON: NaN is not JSON"),
        (b'{"messages": "\\ud800"}\n', ":1: the line is not JSON: it holds half of a surrogate pair"),
        (b'{"a": "\xff"}\n', ":1: byte 8 of the line is not UTF-8"),
        (LINE.encode("utf-16"), ":1: the file is UTF-16"),
        (b"\x1f\x8b\x08\x00", ":1: after this line the gzip data are cut off"),
        (b"[" * 100_000, ":1: the line is not JSON"),
        (
            b'{"question": "q"}\n',
            ':1: the format is not recognised; the example is {"question": "q"}; accepted are messages {"messages"',
        ),
        (LINE.encode() + b'\n{"prompt": "q", "completion": "a"}\n', ":2: the example lacks messages"),
    ],
)
def test_files_that_cannot_be_read_name_the_line(tmp_path, content, expected):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    assert f"rows.jsonl{expected}" in problem(path) or expected in problem(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"rows": []}', ":1: the file holds one object"),
        ("null", ":1: the file holds null"),
        (f'[\n{LINE},\n{{"a": ]', ":3: the example is not JSON"),
        (f"[{LINE}", ":1: expected a comma or the end"),
        (f"[{LINE},\n3]", ":2: the example is the number 3"),
        (f"[{LINE}]\nmore", ":2: found text after"),
    ],
)
def test_json_files_that_hold_no_list_of_examples(tmp_path, content, expected):
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert f"rows.json{expected}" in problem(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("prompt,completion\nq\n", ":2: the line has 1 values; expected 2, one per column of the header"),
        ("prompt,prompt\nq,a\n", ":1: the header names prompt twice"),
        ("prompt,completion\n", ":1: the file has a header but no examples"),
        ('prompt,completion\n"q,a\n', "the line is not CSV"),
    ],
)
def test_csv_files_that_are_not_tables(tmp_path, content, expected):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    assert expected in problem(path)


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], "there is no assistant turn"),
        ([USER, {"role": "assistant", "content": ""}], "messages[1] (assistant) has blank content"),
        ([USER, {"role": "assistant", "content": None}], "messages[1] (assistant) has no content"),
        ([USER, {"role": "assistant", "content": " \n"}], "blank content"),
        ([USER, {"role": "asistant", "content": "a"}], 'role "asistant"'),
        ([USER, {"role": "gpt", "content": "a"}], 'write "assistant"'),
        ([USER, {"content": "a"}], "messages[1] has no role"),
        ([{"role": "assistant", "content": "a"}], "the first turn is from the assistant"),
        ([USER, {"role": "assistant", "content": "a"}, USER], "the last turn is from the user"),
        ([USER, {"role": "assistant", "content": 5}], "content is the number 5"),
        ([USER, {"role": "assistant", "content": [5]}], "messages[1].content[0] is the number 5"),
        ([USER, {"role": "assistant", "tool_calls": "f()"}], "tool_calls is a string"),
        ([USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}], "not JSON"),
        ([USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}], "names no function"),
        ([{**USER, "train": True}, {"role": "assistant", "content": "a"}], 'a user turn with "train"'),
        ([USER, {"role": "assistant", "content": "a", "train": 1}], "train is the number 1"),
        ([USER, {"role": "assistant", "content": "a", "weight": 0}], 'the key "weight"'),
        ([USER, "a"], "messages[1] is a string"),
        ([], "messages is empty"),
        ("[", "messages is a string that is not JSON"),
        (None, "messages is null"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"role": "user", "content": "\\ud800"}]', "half of a surrogate pair"),
    ],
)
def test_examples_that_train_nothing_or_something_else(tmp_path, messages, expected):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{LINE}\n{json.dumps({'messages': messages})}\n")
    text = problem(path)
    assert "rows.jsonl:2: " in text
    assert expected in text


def test_all_problems_are_reported_and_the_rest_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(LINE + "\n" + "{}\n" * 30)
    lines = problem(path).splitlines()
    assert len(lines) == 21
    assert lines[0].startswith(f"{path}:2: ")
    assert lines[-1] == "… and 10 more"


def test_images_are_not_trained_in_silence(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**CHAT, "images": ["a.png"]}))
    assert 'the example has "images"' in problem(path)


def test_missing_files_suggest_their_neighbour(tmp_path):
    (tmp_path / "train.jsonl").write_text(LINE)
    text = problem(tmp_path / "trian.jsonl")
    assert "the data file does not exist" in text
    assert "train.jsonl?" in text
    assert "no file matches" in problem(tmp_path / "*.parquet")
    (tmp_path / "empty").mkdir()
    assert "holds no data files" in problem(tmp_path / "empty")


def test_every_missing_source_is_reported_at_once(tmp_path):
    (tmp_path / "there.jsonl").write_text("{}\n")
    sources = [SourceSpec(path=str(tmp_path / f"{name}.jsonl")) for name in ("missing", "there", "gone")]
    with pytest.raises(DataError) as caught:
        check_data(DataSpec(train=sources[:2], eval=[sources[2], SourceSpec(path="owner/name")]))
    told = [problem.where.removeprefix(str(tmp_path)) for problem in caught.value.problems]
    assert told == ["/missing.jsonl", "/there.jsonl:1", "/gone.jsonl"]


@pytest.mark.parametrize("path", ["rows.jsonl", "a/rows.csv", "./a/b", "/a/b", "~/a", "a/*", "a/b/c", "name"])
def test_what_has_not_the_form_of_a_hub_data_set_is_local(path):
    assert not names_hub_data_set(path)
    with pytest.raises(DataError):
        find_files(path)


def test_a_hub_data_set_is_what_lies_nowhere_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_hub_data_set("owner/name")
    assert find_files("owner/name") is None
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert not names_hub_data_set("owner/name")


def test_a_file_that_is_no_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 but not really")
    assert "the file is not Parquet" in problem(path)
