"""What is written to a store is what is read from it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_tune.chatml.encoder import EncodedSamples
from qwen_tune.chatml.template import IGNORED
from qwen_tune.data.near_duplicates import BINS, EMPTY
from qwen_tune.data.token_store import (
    DISTINCT_WARNINGS,
    FURTHER_WARNINGS,
    StoredBatch,
    StoredExample,
    StoreWriter,
    TokenStore,
)
from qwen_tune.errors import DataError

samples = st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans()), max_size=9)
rows = st.lists(
    st.tuples(
        st.sampled_from(["a.jsonl", "folder/b.jsonl", "c:d.json"]),
        st.integers(1, 2**40),
        st.integers(0, 2**64 - 1),
        st.sets(st.sampled_from(["odd", "odder", "ödd"]), max_size=2),
        st.lists(samples, max_size=3),
    ),
    max_size=6,
)


def encoded(of_samples) -> EncodedSamples:
    flat = [pair for sample in of_samples for pair in sample]
    lengths = np.array([len(sample) for sample in of_samples], np.int64)
    return EncodedSamples(
        np.array([token for token, _ in flat], np.uint32),
        np.array([flag for _, flag in flat], bool),
        lengths,
        straddling=lengths % 3,
        ended=np.ones(len(lengths), bool),
    )


def sketches(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 16, (count, BINS)).astype(np.uint16)


def write(directory, batches, facts=None) -> TokenStore:
    directory.mkdir(exist_ok=True)
    with StoreWriter(directory) as writer:
        for batch in batches:
            stored = [
                StoredExample(f"{file}:{line}", digest, digest, len(parts), tuple(sorted(warnings)))
                for file, line, digest, warnings, parts in batch
            ]
            samples = encoded([sample for row in batch for sample in row[4]])
            writer.add(StoredBatch.of(samples, stored, sketches(len(batch))))
        writer.finish(facts or {})
    return TokenStore(directory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


@settings(max_examples=60, deadline=None)
@given(batches=st.lists(rows, max_size=3))
def test_what_was_written_is_read(folder, batches):
    store = write(folder / "drawn", batches, {"recognised": {"name": "messages"}})
    expected = [row for batch in batches for row in batch]
    assert store.example_count == len(expected)
    assert store.facts["recognised"] == {"name": "messages"}
    assert store.digests.tolist() == [digest for _, _, digest, _, _ in expected]
    assert store.sketches.tolist() == [line for batch in batches for line in sketches(len(batch)).tolist()]
    sample = 0
    for number, (file, line, _, warnings, parts) in enumerate(expected):
        assert store.source(number) == f"{file}:{line}"
        found = {name for bit, name in enumerate(store.warning_names) if int(store.warnings[number]) >> bit & 1}
        assert found == warnings
        assert store.first_sample[number] == sample
        assert store.samples[number] == len(parts)
        for pairs in parts:
            example = store.sample(sample, "named")
            labels = [token if flag else IGNORED for token, flag in pairs]
            assert (example.source, example.source_name) == (f"{file}:{line}", "named")
            assert (example.input_ids, example.labels) == ([token for token, _ in pairs], labels)
            assert (example.straddling, example.truncated) == (len(pairs) % 3, False)
            assert store.supervised[sample] == sum(flag for _, flag in pairs)
            assert store.example_of(sample) == number
            if len(pairs) > 1:
                cut = store.sample(sample, "named", len(pairs) - 1)
                assert (cut.input_ids, cut.labels, cut.truncated) == (example.input_ids[:-1], labels[:-1], True)
                assert store.supervised_within(sample, len(pairs) - 1) == cut.supervised
            sample += 1
    assert len(store.lengths) == sample


def test_the_hash_is_of_what_trains(folder):
    row = ("a.jsonl", 1, 7, set(), [[(5, True), (6, False)]])
    one, again = (write(folder / name, [[row]]).sha256 for name in ("one", "again"))
    assert one == again
    elsewhere = [("b.jsonl", 2, 7, set(), row[4]), ("a.jsonl", 1, 7, {"odd"}, row[4])]
    assert {write(folder / "elsewhere", [[change]]).sha256 for change in elsewhere} == {one}
    changes = [
        ("a.jsonl", 1, 7, set(), [[(5, True), (7, False)]]),
        ("a.jsonl", 1, 7, set(), [[(5, True), (6, True)]]),
        ("a.jsonl", 1, 7, set(), [[(5, True)], [(6, False)]]),
    ]
    hashes = {write(folder / "changed", [[change]]).sha256 for change in changes}
    assert len(hashes - {one}) == len(changes)


def test_a_source_without_examples(folder):
    store = write(folder / "empty", [])
    assert (store.example_count, len(store.lengths), store.files, store.warning_names) == (0, 0, [], [])
    assert store.sketches.shape == (0, BINS)
    assert store.digests.dtype == np.uint64


def test_examples_without_samples(folder):
    store = write(folder / "no-samples", [[("a", 1, 1, set(), []), ("a", 2, 2, set(), [[(1, True)]])]])
    assert store.example_of(0) == 1
    assert store.samples.tolist() == [0, 1]


def test_warnings_beyond_the_distinct_ones_are_one(folder):
    batch = [("a", number + 1, number, {f"warning {number}"}, []) for number in range(80)]
    store = write(folder / "warnings", [batch])
    assert len(store.warning_names) == DISTINCT_WARNINGS + 1
    assert store.warning_names[-1] == FURTHER_WARNINGS
    names = [store.warning_names[int(bits).bit_length() - 1] for bits in store.warnings]
    assert names == [*(f"warning {n}" for n in range(DISTINCT_WARNINGS)), *[FURTHER_WARNINGS] * 17]


@pytest.mark.parametrize("name", ["ids.bin", "supervised.bin", "sketch.bin", "line.bin", "store.json"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99, 2])
def test_a_file_of_another_size_is_found_out(folder, name, kept):
    """A crash cannot leave one after (see test_prepared_cache); a full or broken disk, or a person, might."""
    rows = [("a.jsonl", line, line, {"odd"}, [[(line, True)] * 9]) for line in range(1, 40)]
    directory = folder / f"damaged-{name}-{kept}"
    write(directory, [rows])
    file = directory / name
    whole = file.read_bytes()
    file.write_bytes(whole * 2 if kept == 2 else whole[: int(len(whole) * kept)])
    with pytest.raises(DataError, match="damaged") as caught:
        TokenStore(directory)
    assert "remove this folder" in caught.value.problems[0].fix
    file.unlink()
    with pytest.raises(DataError, match="damaged"):
        TokenStore(directory)


def test_store_json_is_written_last(folder):
    """Without it a directory is no store."""
    directory = folder / "unfinished"
    directory.mkdir()
    with StoreWriter(directory) as writer:
        writer.add(
            StoredBatch.of(encoded([[(1, True)]]), [StoredExample("a:1", 1, 1, 1, ())], np.full((1, BINS), EMPTY))
        )
        assert not (directory / "store.json").exists()
    with pytest.raises(DataError, match="damaged"):
        TokenStore(directory)
    assert set(json.loads((write(folder / "whole", []).directory / "store.json").read_text())) >= {"sha256", "files"}
