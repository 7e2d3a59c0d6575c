"""Large sources are prepared by several processes, and what comes of it is the same, whatever their number."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets
import psutil
import pytest
from conftest import TINY, environment
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import REVISIONS

from qwen_tune.chatml.template import ChatTemplate
from qwen_tune.data.files import in_ranges, read_records
from qwen_tune.data.parallel import WORTH_PROCESSES, Division, WorkerError, in_processes
from qwen_tune.data.source_file import SourceFile, split_lines
from qwen_tune.data.source_store import SourceStores
from qwen_tune.errors import DataError, Problem
from qwen_tune.machine import usable_cores
from qwen_tune.recipe.schema import DataSpec, SourceSpec

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
pytestmark = LINUX

DIVISIONS = [Division(1, 1 << 20), Division(2, 1), Division(2, 700), Division(3, 211), Division(3, 1 << 20)]


@pytest.fixture
def template(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REVISIONS["qwen3"].text
    return ChatTemplate(tokenizer)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("QWEN_TUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prepared"


def chat(number: int, **keys: object) -> dict:
    question = {
        "role": "user",
        "content": f"Frage {number}: wie heißt „🙂{'語' * (number % 7)}“?" + " word" * 14,
        **keys,
    }
    return {"messages": [question, {"role": "assistant", "content": f"Antwort {number} <|im_end|>" * (1 + number % 3)}]}


def lines(*rows: dict) -> list[bytes]:
    return [json.dumps(row, ensure_ascii=False).encode() for row in rows]


def prepared(monkeypatch, tmp_path, template, source: SourceSpec, division: Division) -> dict[str, str] | str:
    """The hash of each file of a source's store, made in a cache of its own; or what was said instead."""
    data = DataSpec(train=[source], special_tokens_in_text="neutralize")
    folder = tmp_path / f"cache-{division.processes}-{division.part_bytes}-{time.monotonic_ns()}"
    monkeypatch.setenv("QWEN_TUNE_CACHE", str(folder))
    try:
        store, was_cached = SourceStores(data, template, division=division).open(source)
    except DataError as error:
        left = [path.name for path in (folder / "prepared").iterdir() if path.suffix != ".lock"]
        assert not left
        return "\n".join(map(str, error.problems))
    assert not was_cached
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in store.directory.iterdir()}


def test_a_store_has_the_same_bytes_whatever_made_it(tmp_path, monkeypatch, template):
    folder = tmp_path / "rows"
    folder.mkdir()
    plain = lines(*(chat(number) for number in range(40)))
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(plain) + b"\n")
    # Line ends of both kinds, blank lines, none at the end; and more kinds of warnings than a store tells apart.
    odd = lines(*(chat(number, **{f"key {number}": 1, f"other {number % 5}": 2}) for number in range(90)))
    (folder / "b.jsonl").write_bytes(b"\r\n\r\n \n".join(odd))
    (folder / "c.json").write_text(json.dumps([chat(number) for number in range(30, 45)]))
    (folder / "d.jsonl").write_bytes(plain[0])
    source = SourceSpec(path=str(folder))
    one, *others = [prepared(monkeypatch, tmp_path, template, source, division) for division in DIVISIONS]
    assert len(one) == 13
    assert others == [one] * len(others)


def test_problems_are_the_same_whoever_meets_them(tmp_path, monkeypatch, template):
    rows = tmp_path / "rows.jsonl"
    good = lines(*(chat(number) for number in range(60)))
    source = SourceSpec(path=str(rows), columns={"messages": "messages"})
    bad = {
        7: b'{"messages": 5}',
        8: b"no JSON",
        31: "{'ö".encode("latin-1"),
        44: b'{"messages": []}',
        59: b'{"messages": [',
    }
    rows.write_bytes(b"\n".join(bad.get(number, line) for number, line in enumerate(good)))
    one, *others = [prepared(monkeypatch, tmp_path, template, source, division) for division in DIVISIONS]
    assert [line.split(": ")[0].rpartition(":")[2] for line in one.splitlines()] == ["8", "9", "32", "45", "60"]
    assert others == [one] * len(others)


def test_no_more_problems_are_reported_than_a_person_can_read(tmp_path, monkeypatch, template):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"\n".join([*lines(chat(1)), *(b'{"messages": %d}' % number for number in range(1500))]))
    source = SourceSpec(path=str(rows))
    one, *others = [
        prepared(monkeypatch, tmp_path, template, source, division)
        for division in (Division(1, 1), Division(2, 4000), Division(3, 900))
    ]
    assert len(one.splitlines()) == 1000
    assert others == [one, one]


@pytest.mark.parametrize("first", [b"[", b"{", b'[{"messages": []}]', b"\xff\xfe{\0", b'{"prompt": "what?"}', b"5"])
def test_a_file_that_begins_with_no_example_is_reported_as_a_whole(tmp_path, monkeypatch, template, first):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"\n".join([first, *lines(*(chat(number) for number in range(20)))]))
    source = SourceSpec(path=str(rows))
    one, *others = [prepared(monkeypatch, tmp_path, template, source, division) for division in DIVISIONS[:3]]
    assert isinstance(one, str)
    assert others == [one, one]


def test_a_column_that_no_example_has_is_reported_once(tmp_path, monkeypatch, template):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"\n".join(lines(*(chat(number) for number in range(20)))))
    source = SourceSpec(path=str(rows), columns={"tools": "functions"})
    told = {prepared(monkeypatch, tmp_path, template, source, division) for division in DIVISIONS[:3]}
    assert [text.count('no example has a column "functions"') for text in told] == [1]
    # The last example has it.
    rows.write_bytes(rows.read_bytes() + b"\n" + json.dumps({**chat(1), "functions": []}).encode())
    one, *others = [prepared(monkeypatch, tmp_path, template, source, division) for division in DIVISIONS[:3]]
    assert others == [one, one]
    assert isinstance(one, dict)


LINES = (b'{"text": "a"}', b"", b" ", '{"text": "é🙂"}'.encode(), b"{", b"\r", b"[]")


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.sampled_from([b'{"text": "a"}', b"", b" ", '{"text": "é🙂"}'.encode(), b"{", b"\r", b"[]"]), max_size=9
    ),
    st.integers(1, 40),
)
def test_ranges_have_the_examples_of_the_whole(tmp_path_factory, content, size):
    path = tmp_path_factory.getbasetemp() / "ranges.jsonl"
    path.write_bytes(b"\n".join(content))
    file = SourceFile(path, "ranges.jsonl")
    split = split_lines(file, size)
    pieces = []
    for part in split:
        with part.open() as stream:
            pieces.append(stream.read())
    assert b"".join(pieces) == path.read_bytes()
    assert all(piece.endswith(b"\n") and len(piece) > size for piece in pieces[:-1])
    parts = in_ranges(file, size)
    assert [item for part in parts for item in read_records(part)] == list(read_records(file))


def test_work_is_done_in_order_by_several_processes():
    def work(number: int) -> tuple[int, int]:
        time.sleep(0.02 * (number % 3))
        return number, os.getpid()

    done = list(in_processes(work, range(20), 3))
    assert [number for number, _ in done] == list(range(20))
    assert 1 < len({process for _, process in done}) <= 3
    assert os.getpid() not in {process for _, process in done}
    assert list(in_processes(work, [], 3)) == []


def test_what_goes_wrong_in_a_process_is_reported():
    def fails(number: int) -> int:
        if number == 2:
            raise ValueError("two is odd")
        return number

    with pytest.raises(WorkerError, match="ValueError: two is odd"):
        list(in_processes(fails, range(5), 2))

    def ends(number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(WorkerError, match="killed by signal 9"):
        list(in_processes(ends, range(5), 2))

    def is_full(number: int) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        list(in_processes(is_full, range(5), 2))

    def refuses(number: int) -> int:
        raise DataError(Problem("tools.json", "is no list", "write one"))

    with pytest.raises(DataError, match=r"tools\.json: is no list\. Fix: write one"):
        list(in_processes(refuses, range(5), 2))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_the_unpacked_copy_of_a_table_has_no_name(tmp_path, monkeypatch, suffix):
    """A process that is killed while it reads one would leave it: gigabytes, perhaps."""
    dataset = datasets.Dataset.from_list([chat(number) for number in range(3)])
    if suffix == "parquet":
        dataset.to_parquet(tmp_path / "rows.parquet")
    else:
        dataset.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / "rows.arrow")
    packed = tmp_path / f"rows.{suffix}.gz"
    packed.write_bytes(gzip.compress((tmp_path / f"rows.{suffix}").read_bytes()))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    rows = read_records(SourceFile(packed, "rows"))
    assert next(rows).columns["messages"] == chat(0)["messages"]
    assert not any((tmp_path / "temporary").iterdir())
    assert len(list(rows)) == 2


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A workspace with so much data that several processes prepare it, for some seconds."""
    folder = tmp_path_factory.mktemp("large")
    turns = [chat(number)["messages"] for number in range(500)]
    with (folder / "rows.jsonl").open("wb") as file:
        while file.tell() < 3 * WORTH_PROCESSES:
            file.write(b"\n".join(lines(*({"messages": pair * 20} for pair in turns))) + b"\n")
    recipe = {
        "model": {"base": str(TINY)},
        "data": {"train": [{"path": "rows.jsonl"}], "special_tokens_in_text": "neutralize", "max_length_tokens": 2048},
        "run": {"dir": "run"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder


def started(folder: Path, cache: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """`qwen-tune prepare`, and the processes that work for it."""
    command = [sys.executable, "-m", "qwen_tune", "prepare", "recipe.yaml"]
    env = environment(QWEN_TUNE_CACHE=str(cache.parent))
    # In the background of a shell SIGINT is ignored, and whoever is started there ignores it as well.
    takes_interrupts = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(
        command, cwd=folder, env=env, stdout=-1, stderr=-1, text=True, preexec_fn=takes_interrupts
    )
    end = time.monotonic() + 120
    begun = psutil.Process(process.pid)
    while len(begun.children()) < 2 or not any(cache.glob("*.part/*/part-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no part was begun"
        time.sleep(0.01)
    return process, begun.children()


@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_a_process_that_is_killed_is_reported_and_leaves_nothing(large, cache):
    process, workers = started(large, cache)
    assert len(workers) >= 2
    workers[0].kill()
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "rows.jsonl: a process that worked on it was killed by signal 9. Fix: free memory" in told
    assert "Traceback" not in told
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    psutil.wait_procs(workers, timeout=60)
    assert not [worker for worker in workers if worker.is_running()]


@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_processes_end_with_the_one_that_they_work_for(large, cache, how):
    process, workers = started(large, cache)
    process.send_signal(how)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not psutil.wait_procs(workers, timeout=60)[1]
