"""Files of examples as they lie about: every kind, packed or not, cut off, damaged, or larger than memory should be."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, environment

from qwen_tune.data import json_files as json_rows
from qwen_tune.data import tables as table_rows
from qwen_tune.data.files import READERS, find_files, is_data_file, names_hub_data_set, read_records
from qwen_tune.data.source_file import Record, SourceFile
from qwen_tune.data.sources import SourceReader, source_files
from qwen_tune.errors import DataError, Problem
from qwen_tune.recipe.schema import SourceSpec

ROWS = [{"prompt": f"q {i}", "completion": f"answer ä {i}"} for i in range(700)]


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def as_is(content: bytes) -> bytes:
    return content


PACKINGS = {"plain": ("", as_is), "gzip": (".gz", gzip.compress), "zstd": (".zst", zstd)}


def content(suffix: str, folder: Path) -> bytes:
    """The examples as the bytes of one kind of file."""
    if suffix in (".jsonl", ".ndjson"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
    if suffix == ".json":
        return json.dumps(ROWS, indent=1).encode()
    if suffix in (".csv", ".tsv"):
        between = "," if suffix == ".csv" else "\t"
        return "".join(f"{a}{between}{b}\r\n" for a, b in [tuple(ROWS[0]), *(row.values() for row in ROWS)]).encode()
    path = folder / "table"
    table = pyarrow.Table.from_pylist(ROWS)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=300)
    else:
        with path.open("wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    return path.read_bytes()


def read(path: Path) -> list[Record | Problem]:
    return list(read_records(SourceFile(path, path.name)))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("suffix", READERS)
def test_every_kind_of_file_packed_and_plain(tmp_path, suffix, packing):
    packed_suffix, pack = PACKINGS[packing]
    packed = pack(content(suffix, tmp_path))
    named, unnamed = tmp_path / f"rows{suffix}{packed_suffix}", tmp_path / f"again{suffix}"
    for path in (named, unnamed):
        path.write_bytes(packed)
        rows = read(path)
        assert [dict(row.columns) for row in rows] == ROWS
        first = {".json": 2, ".csv": 2, ".tsv": 2}.get(suffix, 1)
        step = 4 if suffix == ".json" else 1
        assert [row.source for row in rows] == [f"{path.name}:{first + step * i}" for i in range(len(ROWS))]


def test_arrow_as_datasets_writes_it(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    [file] = source_files(SourceSpec(path=str(tmp_path / "saved" / "*.arrow")))
    with file.path.open("rb") as stream:
        assert stream.read(6) != b"ARROW1"
    assert [dict(row.columns) for row in read(file.path)] == ROWS


def test_tables_keep_empty_columns_and_lose_invented_nulls(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [
        {"messages": [{"a": {"x": 1}}], "system": None},
        {"messages": [{"a": {"y": [{"z": 1}, {}]}}], "system": "s"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [dict(row.columns) for row in read(path)] == rows


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
@pytest.mark.parametrize("packing", ["gzip", "zstd"])
@pytest.mark.parametrize("damage", ["cut off", "overwritten", "only a beginning"])
def test_packed_files_that_are_damaged(tmp_path, suffix, packing, damage):
    packed = PACKINGS[packing][1](content(suffix, tmp_path))
    middle = len(packed) // 2
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(
        {
            "cut off": packed[:-5],
            "overwritten": packed[:middle] + bytes(64) + packed[middle + 64 :],
            "only a beginning": packed[:6],
        }[damage]
    )
    *_, last = read(path)
    assert isinstance(last, Problem)
    assert last.where.startswith(f"rows{suffix}:")
    # What follows the damage may be read before the check sum that gives it away, and be no example.
    assert ("after this line the" in last.what and packing in last.what) or damage == "overwritten"


def test_the_line_reached_is_reported(tmp_path):
    letters = random.Random(0)
    lines = [json.dumps({"text": "".join(letters.choices("abcdefghijklmnop", k=300))}) for _ in range(4000)]
    packed = gzip.compress("\n".join(lines).encode())
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    *rows, problem = read(path)
    assert 1000 < len(rows) < 2001
    assert problem.where == f"rows.jsonl.gz:{len(rows)}"


@pytest.mark.parametrize(
    ("name", "start", "expected"),
    [
        ("rows.jsonl", b"BZh9", "the file is bzip2-compressed; expected gzip, zstd or none. Fix: decompress it"),
        ("rows.json", b"\xfd7zXZ\0", "xz-compressed"),
        ("rows.csv", b"PK\x03\x04", "zip-compressed"),
        ("rows.jsonl", b"PAR1", "the content is a .parquet file; the name ends in .jsonl. Fix: rename it to .parquet"),
        ("rows.parquet", b"ARROW1\0\0", "the content is a .arrow file"),
        ("rows.parquet", b'{"a": 1}', "the file is not Parquet"),
        ("rows.arrow", b'{"a": 1}', "the file is not Arrow"),
        ("rows.arrow", b"ARROW1\0\0", "the file is not Arrow"),
        ("rows.parquet", b"", "the file is not Parquet"),
        ("rows.jsonl", '{"a": 1}'.encode("utf-16-le"), ":1: the file is UTF-16"),
        ("rows.csv", "a,b".encode("utf-16-be"), ":1: the file is UTF-16"),
        ("rows.jsonl", bytes(100), ":1: the line is not JSON"),
    ],
)
def test_files_that_are_something_else(tmp_path, name, start, expected):
    path = tmp_path / name
    path.write_bytes(start)
    [problem] = read(path)
    assert expected in str(problem)


def test_a_table_with_one_name_for_two_columns(tmp_path):
    path = tmp_path / "rows.arrow"
    batch = pyarrow.record_batch([pyarrow.array([1]), pyarrow.array([2])], names=["a", "a"])
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as writer:
        writer.write_batch(batch)
    [problem] = read(path)
    assert "two columns are named a" in problem.what


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_a_list_is_read_through_a_window_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    rows = [{"a": 'ä\n"\\]}' * 9, "b": [1.5e3, True, None, {"c": "😀"}]}, {}, {"d": [{"e": []}] * 7}] * 3
    for indent in (None, 2):
        path = tmp_path / "rows.json"
        path.write_text(f" \n{json.dumps(rows, indent=indent)}\n ")
        assert [row.columns for row in read(path)] == rows
    path.write_text("[\n1234567890123, NaN]")
    assert [str(item).split(":", 1)[1].split(";")[0] for item in read(path)] == [
        "2: the example is the number 1234567890123",
        "2: the example is not JSON: NaN is not JSON. Fix: complete or remove it",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"a": 1},\n\n{"a": nul}]', 3),
        ('[{"a": 1},\n{"a": 1\n', 3),
        ('[{"a": 1}\n{"a": 1}]', 2),
        ('[{"a": 1},\n]', 2),
        ('[{"a": 1},\n{"a": "\\x"}]', 2),
        ('[{"a": 1},\n{"b": 1, "b": 2}]', 2),
        ('[\n{"a": "\\ud800"}]', 2),
        ('[{"a": 1},\n{"a": "never ends}]\n', 2),
        ("[\n\n" + "[" * 100_000, 3),
        ("[\n", 2),
    ],
)
@pytest.mark.parametrize("chunk", [3, 1 << 20])
def test_lists_that_break_off_or_go_wrong(tmp_path, monkeypatch, text, line, chunk):
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", chunk)
    path = tmp_path / "rows.json"
    path.write_text(text)
    *_, problem = read(path)
    assert isinstance(problem, Problem)
    assert problem.where == f"rows.json:{line}"
    assert problem.fix


@pytest.mark.parametrize(
    ("value", "fix"),
    [
        ({"version": 1, "data": [{"a": 1}]}, 'the examples seem to be under the key "data"'),
        ({"prompt": ["q"], "completion": ["a"]}, '"prompt" holds a column: write one object per example'),
        ({"prompt": {"0": "q"}, "completion": {"0": "a"}}, 'orient="records"'),
        ({"messages": [{"role": "user"}]}, "write [{…}, {…}], or one object per line"),
        ({}, "write [{…}, {…}]"),
        ("text", "write [{…}, {…}]"),
    ],
)
def test_objects_that_hold_examples_in_another_way(tmp_path, value, fix):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(value))
    [problem] = read(path)
    assert problem.where == "rows.json:1"
    assert "expected a list of examples" in problem.what
    assert fix in problem.fix


def test_an_object_spread_over_lines_where_one_a_line_was_expected(tmp_path):
    path = tmp_path / "rows.jsonl"
    for value, fix in (({"a": 1}, "write each object on one line"), ([{"a": 1}], "name it .json")):
        path.write_text(json.dumps(value, indent=1))
        [problem] = read(path)
        assert (problem.where, problem.fix) == ("rows.jsonl:1", fix)


def test_objects_spread_over_lines_are_to_be_one_list(tmp_path):
    path = tmp_path / "rows.json"
    spread = json.dumps({"a": 1}, indent=1)
    path.write_text(f"\n{spread}\n{spread}\n")
    [problem] = read(path)
    assert (problem.where, problem.fix) == ("rows.json:2", "write one list, [{…}, {…}]")
    path.write_text(spread)
    [problem] = read(path)
    assert "write [{…}, {…}]" in problem.fix
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [row.columns for row in read(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_line_or_a_value_above_the_limit_is_refused_with_its_place(tmp_path, monkeypatch, suffix):
    for module in (json_rows, table_rows):
        monkeypatch.setattr(module, "VALUE_LIMIT_BYTES", 1 << 20)
    long = "x" * (3 << 20)
    path = tmp_path / f"rows{suffix}"
    text = {
        ".jsonl": f'{{"a": 1}}\n{{"a": "{long}"}}\n{{"a": 2}}\n',
        ".json": f'[{{"a": 1}},\n{{"a": "{long}"}}, {{"a": 2}}]',
        ".csv": f"a,b\n{long},2\n3,4\n",
    }[suffix]
    path.write_text(text)
    problems = [item for item in read(path) if isinstance(item, Problem)]
    assert [problem.where for problem in problems] == [f"rows{suffix}:2"]
    assert "longer than 1 MiB" in problems[0].what
    if suffix == ".jsonl":
        assert [item.source for item in read(path) if isinstance(item, Record)] == ["rows.jsonl:1", "rows.jsonl:3"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    row = {"prompt": "q" * 1000, "completion": "a" * 3000}
    count = 50_000  # 200 MB
    path = tmp_path / f"rows{suffix}"
    if suffix in (".parquet", ".arrow"):
        # One row group, one batch: what many tools write, whatever the size.
        table = pyarrow.table({name: pyarrow.repeat(text, count) for name, text in row.items()})
        if suffix == ".parquet":
            pyarrow.parquet.write_table(
                table, path, row_group_size=count, use_dictionary=False, compression="none", write_statistics=False
            )
        else:
            with path.open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
        assert path.stat().st_size > count * 4000
    else:
        line = ",".join(row.values()) if suffix == ".csv" else json.dumps(row)
        before, between, after = {".json": ("[", ",\n", "]"), ".csv": ("prompt,completion\n", "\n", "")}.get(
            suffix, ("", "\n", "")
        )
        with path.open("w") as file:
            file.write(before + line)
            for _ in range(count - 1):
                file.write(between + line)
            file.write(after)
    # The pages of a mapped file are shared with the kernel's cache, which drops them when memory is short.
    code = (
        "import sys, psutil\n"
        "from qwen_tune.recipe.schema import SourceSpec\n"
        "from qwen_tune.data.sources import SourceReader\n"
        "if sys.argv[1].endswith(('.arrow', '.parquet')): import pyarrow.ipc, pyarrow.parquet\n"
        "def own():\n"
        "    info = psutil.Process().memory_info()\n"
        "    return info.rss - getattr(info, 'shared', 0)\n"
        "before = most = own()\n"
        "for count, _ in enumerate(SourceReader(SourceSpec(path=sys.argv[1]), system=None), start=1):\n"
        "    if count % 100 == 1: most = max(most, own())\n"
        "print(count, most - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    read_count, grown = map(int, result.stdout.split())
    assert read_count == count
    assert grown < 80 << 20  # what Arrow's own allocator holds on to varies by several MB


def test_names_of_data_files():
    for name in ("a.jsonl", "a.JSONL", "a.jsonl.gz", "a.b.json.zst", "a.csv.GZ", "a.tsv.zstd", "a.arrow.gzip"):
        assert is_data_file(name), name
        assert not names_hub_data_set(f"data/{name}")
    for name in ("a.txt", "a.gz", "a.jsonl.bz2", "gz", ".jsonl", "a.jsonl.old"):
        assert not is_data_file(name), name


def test_folders_and_globs_of_packed_files(tmp_path):
    for name in ("a.jsonl.gz", "b.csv.zst", "c.txt", "d.jsonl"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in find_files(str(tmp_path))] == ["a.jsonl.gz", "b.csv.zst", "d.jsonl"]
    assert [file.name for file in find_files(str(tmp_path / "*.gz"))] == ["a.jsonl.gz"]
    with pytest.raises(DataError, match=r"unknown file type; expected \.jsonl, .*\.gz or \.zst"):
        find_files(str(tmp_path / "c.txt"))


def test_source_files_are_what_is_read_and_what_it_is_called(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "t"}\n')
    assert source_files(SourceSpec(path=str(path))) == [SourceFile(path, str(path))]
    assert source_files(SourceSpec(path="owner/name")) is None
    [row] = SourceReader(SourceSpec(path=str(path)), system=None)
    assert row.source == f"{path}:1"
    with pytest.raises(DataError, match="split is for Hub data sets; this is a local path"):
        source_files(SourceSpec(path=str(path), split="train"))


def test_files_from_whoever_asked_before_are_read_instead_of_the_path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "t"}\n')
    reader = SourceReader(SourceSpec(path="nowhere.jsonl"), system=None, files=[SourceFile(path, "told")])
    assert [row.source for row in reader] == ["told:1"]


def test_what_is_hidden_in_a_folder_is_not_read(tmp_path):
    folder = tmp_path / ".kept" / "data"
    for name in ("d.jsonl", ".e.jsonl", ".ipynb_checkpoints/d-checkpoint.jsonl", "more/f.jsonl", "more/.g/h.jsonl"):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    for path in (folder, folder / "**" / "*.jsonl"):
        assert [str(file.relative_to(folder)) for file in find_files(str(path))] == ["d.jsonl", "more/f.jsonl"]


def test_a_folder_that_datasets_saved(tmp_path):
    import datasets

    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"of a map")
    state = tmp_path / "saved" / "state.json"
    names = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    for order in (names, names[::-1]):
        state.write_text(json.dumps({"_data_files": [{"filename": name} for name in order]}))
        assert [file.name for file in find_files(str(tmp_path / "saved"))] == order
    state.write_text(json.dumps({"_data_files": [{"filename": "gone.arrow"}]}))
    with pytest.raises(DataError, match=r"state\.json: it lists gone\.arrow, which does not exist. Fix: copy"):
        find_files(str(tmp_path / "saved"))
    for broken in ("[]", "{", '{"_data_files": 1}'):
        state.write_text(broken)
        with pytest.raises(DataError, match=r"state\.json: it does not list the data set's files"):
            find_files(str(tmp_path / "saved"))
    datasets.DatasetDict(train=saved, test=saved).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        DataError, match=r"several splits \(.*splits/test, .*splits/train\).*write the path of one split's folder"
    ):
        find_files(str(tmp_path / "splits"))
    assert len(find_files(str(tmp_path / "splits" / "train"))) == 1


def test_notes_beside_examples_are_not_read(tmp_path):
    for name in ("dataset_infos.json", "train.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [file.name for file in find_files(str(tmp_path))] == ["train.jsonl"]


def test_a_pipe_is_no_data_file(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl: not a regular file"):
        find_files(str(tmp_path / "rows.jsonl"))
    for path in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError):
            find_files(str(path))
