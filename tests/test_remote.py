"""Data after URLs, through fsspec and a real server."""

from __future__ import annotations

import functools
import gzip
import json
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pytest
from example_files import load_training_examples

from qwen_tune.data.sources import check_data, source_files
from qwen_tune.errors import DataError
from qwen_tune.recipe.schema import DataSpec, SourceSpec

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


class QuietHandler(SimpleHTTPRequestHandler):
    requested: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requested.append(self.path)
        super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder of examples; what is fetched from elsewhere is cached below it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "one.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n")
    (folder / "two.json").write_text(json.dumps([ROW]))
    (folder / "notes.md").write_text("no rows")
    return folder


@pytest.fixture
def server(files):
    QuietHandler.requested.clear()
    handler = functools.partial(QuietHandler, directory=str(files))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def load(path: str, **source):
    return load_training_examples(DataSpec(train=[SourceSpec(path=path, **source)]))


def test_a_file_over_http_is_fetched_once(server):
    address = f"{server}/one.jsonl"
    assert [c.source for c in load(address)] == [f"{address}:1", f"{address}:2"]
    assert len(load(address)) == 2
    assert QuietHandler.requested.count("/one.jsonl") == 1


def test_a_file_that_changed_is_fetched_again(server, files):
    assert len(load(f"{server}/one.jsonl")) == 2
    (files / "one.jsonl").write_text(json.dumps(ROW) + "\n")
    assert len(load(f"{server}/one.jsonl")) == 1


def test_a_file_of_which_only_the_size_is_known_is_fetched_again(server, files, monkeypatch):
    send_header = QuietHandler.send_header

    def without_version(self: QuietHandler, name: str, value: str) -> None:
        if name != "Last-Modified":
            send_header(self, name, value)

    monkeypatch.setattr(QuietHandler, "send_header", without_version)
    source = SourceSpec(path=f"{server}/one.jsonl")
    [first] = source_files(source)
    written = first.path.stat().st_mtime_ns
    assert source_files(source) == [first]
    assert first.path.stat().st_mtime_ns == written
    before = (files / "one.jsonl").read_text()
    (files / "one.jsonl").write_text(before.replace('"a"', '"b"'))
    [second] = source_files(source)
    assert (first.path.read_text(), second.path.read_text()) == (before, before.replace('"a"', '"b"'))


def test_the_cache_is_where_the_user_says(server, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN_TUNE_CACHE", str(tmp_path / "chosen"))
    [file] = source_files(SourceSpec(path=f"{server}/one.jsonl"))
    assert file.path.is_relative_to(tmp_path / "chosen" / "data")
    assert list((tmp_path / "chosen" / "data").iterdir()) == [file.path.parent]


def test_folders_and_globs(files):
    (files / ".hidden").mkdir()
    (files / ".hidden" / "one.jsonl").write_text("no row")
    assert len(load(f"file://{files}")) == 3
    assert len(load(f"file://{files}/*.jsonl")) == 2


def test_packed_files_and_addresses_with_a_query(server, files):
    (files / "three.jsonl.gz").write_bytes(gzip.compress((files / "one.jsonl").read_bytes()))
    assert len(load(f"file://{files}")) == 5
    address = f"{server}/three.jsonl.gz?download=true"
    assert [c.source for c in load(address)] == [f"{address}:1", f"{address}:2"]
    [file] = source_files(SourceSpec(path=address))
    assert (file.path.name, file.name) == ("three.jsonl.gz", address)


def test_a_bad_example_is_named_by_its_address_and_line(server, files):
    (files / "one.jsonl").write_text(json.dumps(ROW) + "\n{\n")
    with pytest.raises(DataError, match=rf"{server}/one\.jsonl:2: the line is not JSON"):
        load(f"{server}/one.jsonl")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{server}/none.jsonl", "cannot be read"),
        ("file://{files}/none*.jsonl", "no data files found"),
        ("file://{files}/notes.md", "no data files found"),
        ("nosuch://bucket/rows.jsonl", "cannot be read: Protocol not known: nosuch"),
        ("s3://bucket/rows.jsonl", "pip install s3fs"),
    ],
)
def test_what_cannot_be_fetched_is_reported(server, files, path, message):
    with pytest.raises(DataError) as told:
        load(path.format(server=server, files=files))
    assert message in str(told.value)


def test_only_hub_data_sets_have_splits(server):
    with pytest.raises(DataError, match="split is for Hub data sets; this is a URL"):
        load(f"{server}/one.jsonl", split="train")


def test_validation_asks_no_network(server):
    data = DataSpec(train=[SourceSpec(path=f"{server}/one.jsonl")])
    assert check_data(data).endswith("1 remote sources not checked")
    assert QuietHandler.requested == []
