"""Prepared data are made once, found again, never half, and never those of something else."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment
from templates import REVISIONS

from qwen_tune.chatml.template import ChatTemplate
from qwen_tune.data.cache import KEPT_SECONDS, cache_folder, cached
from qwen_tune.data.preparation import prepare_data
from qwen_tune.data.source_store import SourceStores
from qwen_tune.disk import key_of, sha256
from qwen_tune.errors import DataError
from qwen_tune.recipe.schema import DataSpec, EvalSpec, SourceSpec

PREPARE = """
import json, sys
from transformers import AutoTokenizer
from qwen_tune.chatml.template import ChatTemplate
from qwen_tune.data.preparation import prepare_data
from qwen_tune.recipe.schema import DataSpec, SourceSpec
template = ChatTemplate(AutoTokenizer.from_pretrained(sys.argv[1]))
prepared = prepare_data(DataSpec(train=[SourceSpec(path=sys.argv[2])]), template, seed=1)
print(json.dumps([prepared.sources[0].was_cached, prepared.fingerprint(), len(prepared.train.samples)]))
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QWEN_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


def chats(path: Path, count: int, text: str = "question") -> Path:
    with path.open("w") as file:
        for number in range(count):
            question, answer = (f"{word} {number} " + "some more words " * 12 for word in (text, "answer"))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns, "chat": turns}) + "\n")
    return path


@pytest.fixture
def rows(tmp_path) -> Path:
    return chats(tmp_path / "rows.jsonl", 5)


@pytest.fixture
def template(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REVISIONS["qwen3"].text
    return ChatTemplate(tokenizer)


def entries(cache: Path) -> set[str]:
    """Finished entries; locks and parts have a suffix."""
    return {path.name for path in cache.iterdir() if not path.suffix} if cache.is_dir() else set()


def prepare_process(path: Path, **changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, str(TINY), str(path)]
    env = environment(**changes)
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def part_is_there(cache: Path) -> bool:
    return cache.is_dir() and any(path.suffix == ".part" for path in cache.iterdir())


def test_data_are_prepared_once(rows, template, cache):
    data = DataSpec(train=[SourceSpec(path=str(rows))])
    first, again = (prepare_data(data, template, seed=1) for _ in range(2))
    assert [first.sources[0].was_cached, again.sources[0].was_cached] == [False, True]
    assert first.fingerprint() == again.fingerprint()
    assert list(first.train.samples) == list(again.train.samples)
    assert len(entries(cache)) == 1


def opened(data: DataSpec, template: ChatTemplate) -> tuple[bool, str]:
    store, was_there = SourceStores(data, template).open(data.train[0])
    return was_there, store.directory.name


def with_special_token(template: ChatTemplate) -> ChatTemplate:
    tokenizer = copy.deepcopy(template.tokenizer)
    tokenizer.add_tokens(["<|more|>"], special_tokens=True)
    return ChatTemplate(tokenizer)


def with_template(template: ChatTemplate) -> ChatTemplate:
    tokenizer = copy.deepcopy(template.tokenizer)
    tokenizer.chat_template += "{# other #}"
    return ChatTemplate(tokenizer)


def source(**changes):
    return lambda data: data.model_copy(update={"train": [data.train[0].model_copy(update=changes)]})


def section(**changes):
    return lambda data: data.model_copy(update=changes)


@pytest.mark.parametrize(
    "change",
    [
        section(loss_on="last_turn"),
        section(loss_on="all"),
        section(thinking="off"),
        section(system="Be brief."),
        section(special_tokens_in_text="neutralize"),
        source(format="messages"),
        source(columns={"messages": "chat"}),
        source(tools="tools.json"),
        with_special_token,
        with_template,
    ],
    ids=["last_turn", "all", "thinking", "system", "neutralize", "format", "columns", "tools", "tokenizer", "template"],
)
def test_what_the_tokens_depend_on_makes_another_entry(tmp_path, monkeypatch, rows, template, change):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.json").write_text('[{"name": "now"}]')
    data = DataSpec(train=[SourceSpec(path=str(rows))])
    before = opened(data, template)[1]
    if change in (with_special_token, with_template):
        was_there, after = opened(data, change(template))
    else:
        was_there, after = opened(change(data), template)
    assert not was_there
    assert after != before
    assert opened(data, template) == (True, before)


def test_the_content_of_a_tools_file_counts(tmp_path, rows, template):
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "now"}]')
    data = DataSpec(train=[SourceSpec(path=str(rows), tools=str(tools))])
    before = opened(data, template)[1]
    tools.write_text('[{"name": "then"}]')
    assert opened(data, template)[1] != before


def test_the_bytes_of_the_data_count_and_nothing_else_of_the_file(rows, template):
    data = DataSpec(train=[SourceSpec(path=str(rows))])
    _, before = opened(data, template)
    content = rows.read_bytes()
    rows.write_bytes(content.replace(b"question 3", b"question 7"))
    assert opened(data, template)[0] is False
    rows.write_bytes(content)
    os.utime(rows, (1, 1))
    assert opened(data, template) == (True, before)


def test_a_file_more_in_a_folder_counts(tmp_path, template):
    folder = tmp_path / "folder"
    folder.mkdir()
    chats(folder / "a.jsonl", 3)
    data = DataSpec(train=[SourceSpec(path=str(folder))])
    _, before = opened(data, template)
    chats(folder / "b.jsonl", 2)
    was_there, after = opened(data, template)
    assert (was_there, before != after) == (False, True)


@pytest.mark.parametrize(
    "change",
    [
        section(max_length_tokens=512),
        section(overlong="truncate"),
        section(packing=False),
        section(eval=EvalSpec(fraction=0.5)),
        section(deduplicate="near"),
        source(weight=2.5),
        source(rows=3),
        source(name="other"),
        lambda data: data,
    ],
    ids=["max_length_tokens", "overlong", "packing", "eval", "deduplicate", "weight", "rows", "name", "seed"],
)
def test_what_they_do_not_depend_on_makes_none(rows, template, cache, change):
    data = DataSpec(train=[SourceSpec(path=str(rows))])
    prepare_data(data, template, seed=1)
    changed = change(data).model_copy(update={"overlong": "truncate"})
    again = prepare_data(changed, template, seed=2)
    assert again.sources[0].was_cached
    assert len(entries(cache)) == 1


def test_a_killed_process_leaves_nothing_under_a_name(tmp_path, cache):
    path = chats(tmp_path / "many.jsonl", 20_000)
    process = prepare_process(path)
    wait_for(lambda: part_is_there(cache) or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert not entries(cache)
    assert part_is_there(cache)
    # The next one makes it, over what the first left, and takes the lock of the dead.
    chats(path, 50)
    key = next(part.stem for part in cache.iterdir() if part.suffix == ".part")
    made, was_there = cached(key, lambda part: (part / "made").write_text(str(list(part.iterdir()))), Path)
    assert (was_there, (made / "made").read_text()) == (False, "[]")
    assert not part_is_there(cache)


def test_two_processes_at_once_make_it_once(tmp_path, cache):
    path = chats(tmp_path / "many.jsonl", 2500)
    processes = [prepare_process(path) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (first, one, rows), (second, other, _) = (json.loads(output) for output, _ in outputs)
    assert sorted([first, second]) == [False, True]
    assert one == other
    assert rows == 2500
    assert len(entries(cache)) == 1
    assert not part_is_there(cache)


def test_those_who_wait_for_one_entry_get_it_from_the_first(cache):
    """The first holds the lock until the others stand before it."""
    made: list[int] = []
    waiting = threading.Event()

    def make(part: Path) -> None:
        assert waiting.wait(60)
        made.append(1)
        (part / "file").write_text("whole")

    found: list[tuple[Path, bool]] = []
    threads = [threading.Thread(target=lambda: found.append(cached("key", make, Path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_for(lambda: part_is_there(cache))
    waiting.set()
    for thread in threads:
        thread.join()
    assert made == [1]
    assert sorted(was_there for _, was_there in found) == [False, True, True, True]
    assert {(entry / "file").read_text() for entry, _ in found} == {"whole"}


def test_what_fails_leaves_nothing(cache):
    def make(part: Path) -> None:
        (part / "file").write_text("half")
        raise DataError("an example is wrong")

    with pytest.raises(DataError, match="an example is wrong"):
        cached("key", make, Path)
    assert not entries(cache)
    assert not part_is_there(cache)


def test_examples_that_cannot_be_trained_on_leave_nothing(rows, template, cache):
    with rows.open("a") as file:
        file.write('{"messages": 5}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:6"):
        prepare_data(DataSpec(train=[SourceSpec(path=str(rows))]), template, seed=1)
    assert not entries(cache)
    assert not part_is_there(cache)


def test_a_cache_that_cannot_be_written_is_reported_with_a_fix(workspace, qwen_tune):
    taken = workspace / "taken"
    taken.write_text("a file, where a folder would have to be")
    result = qwen_tune("train", "recipe.yaml", cwd=workspace, QWEN_TUNE_CACHE=str(taken))
    assert result.returncode == 2, result.stderr
    assert "taken/prepared: prepared data cannot be written here" in result.stderr
    assert "set QWEN_TUNE_CACHE to another folder" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_cache_that_can_only_be_read_gives_what_it_has(rows, template, cache):
    data = DataSpec(train=[SourceSpec(path=str(rows))])
    prepare_data(data, template, seed=1)
    locks = [path for path in cache.iterdir() if path.suffix == ".lock"]
    for lock in locks:
        lock.unlink()
    cache.chmod(0o555)
    try:
        assert prepare_data(data, template, seed=1).sources[0].was_cached
        assert not [path for path in cache.iterdir() if path.suffix == ".lock"]
    finally:
        cache.chmod(0o755)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, template, cache):
    path = chats(tmp_path / "many.jsonl", 6000)

    def append() -> None:
        wait_for(lambda: part_is_there(cache))
        with path.open("a") as file:
            file.write(path.read_text().splitlines()[0] + "\n")

    thread = threading.Thread(target=append)
    thread.start()
    try:
        with pytest.raises(DataError, match="the file changed while it was read") as caught:
            prepare_data(DataSpec(train=[SourceSpec(path=str(path))]), template, seed=1)
    finally:
        thread.join()
    assert caught.value.problems[0].fix == "run the command again"
    assert not entries(cache)


def test_a_file_that_vanishes_while_it_is_read_is_not_a_fault_of_the_cache(tmp_path, template, cache):
    path = chats(tmp_path / "many.jsonl", 6000)

    def remove() -> None:
        wait_for(lambda: part_is_there(cache))
        path.unlink()

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        with pytest.raises(DataError) as caught:
            prepare_data(DataSpec(train=[SourceSpec(path=str(path))]), template, seed=1)
    finally:
        thread.join()
    assert "many.jsonl" in caught.value.problems[0].where


def test_what_nothing_has_used_for_a_month_is_removed(cache):
    for key in ("old", "used", "new"):
        cached(key, lambda part: (part / "file").write_text("x"), Path)
    (cache / "dead.part").mkdir()
    old = time.time() - KEPT_SECONDS - 60
    for name in ("old", "used", "dead.part"):
        os.utime(cache / name, (old, old))
    assert cached("used", pytest.fail, Path) == (cache / "used", True)
    cached("another", lambda part: None, Path)
    assert entries(cache) == {"used", "new", "another"}
    assert not part_is_there(cache)


def test_the_place_of_the_cache(monkeypatch, tmp_path):
    assert cache_folder("prepared") == tmp_path / "cache" / "prepared"
    monkeypatch.delenv("QWEN_TUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("prepared") == tmp_path / "xdg" / "qwen-tune" / "prepared"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("prepared") == tmp_path / "home" / ".cache" / "qwen-tune" / "prepared"


def test_keys_are_of_what_is_in_them_not_of_its_order(tmp_path):
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("name", ["ids.bin", "sketch.bin", "store.json"])
def test_a_damaged_entry_is_made_again(rows, template, cache, name):
    """A flipped bit as well: what trains is what was prepared."""
    data = DataSpec(train=[SourceSpec(path=str(rows))])
    first = prepare_data(data, template, seed=1)
    file = cache / next(iter(entries(cache))) / name
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    again = prepare_data(data, template, seed=1)
    assert not again.sources[0].was_cached
    assert again.fingerprint() == first.fingerprint()
    assert prepare_data(data, template, seed=1).sources[0].was_cached
