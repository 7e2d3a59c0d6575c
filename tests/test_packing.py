from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_tune.chatml.template import IGNORED, ChatTemplate
from qwen_tune.data.packing import best_fit_decreasing, pack, pack_by_source
from qwen_tune.data.preparation import prepare_data
from qwen_tune.recipe.schema import DataSpec, SourceSpec
from qwen_tune.training.batches import PackCollator, pack_dataset


@given(st.lists(st.integers(1, 64), max_size=300))
def test_every_sample_is_in_exactly_one_pack_and_none_overflows(lengths):
    pack_of = best_fit_decreasing(np.array(lengths, np.int64), 64)
    assert len(pack_of) == len(lengths)
    sums = sorted(np.bincount(pack_of, lengths).tolist()) if lengths else []
    assert all(0 < total <= 64 for total in sums)
    # Any two packs of best fit hold more than one capacity together.
    assert len(sums) < 2 or sums[0] + sums[1] > 64


def test_packs_are_filled_best_first():
    assert best_fit_decreasing(np.array([5, 4, 3, 3, 1]), 8).tolist() == [0, 1, 0, 1, 1]


def test_a_sample_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="9 tokens does not fit into a pack of 8"):
        best_fit_decreasing(np.array([3, 9]), 8)


def test_short_samples_fill_packs_nearly_whole():
    lengths = np.array([(i * 7919) % 400 + 20 for i in range(5000)])
    packs = best_fit_decreasing(lengths, 4096).max() + 1
    assert lengths.sum() / (packs * 4096) > 0.995


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_tokenizer):
    """Tokenized examples of known ids from two sources, one example in three without labels of its own."""
    folder = tmp_path_factory.mktemp("packing")
    for name, rows in (("few", 9), ("many", 40)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for number in range(rows):
                ids = [100 + number] * (number % 11 + 2)
                file.write(f'{{"input_ids": {ids}, "labels": {[*ids[:-1], IGNORED] if number % 3 else ids}}}\n')
    sources = [SourceSpec(path=str(folder / f"{name}.jsonl")) for name in ("few", "many")]
    data = DataSpec(train=sources, max_length_tokens=32)
    return data, prepare_data(data, ChatTemplate(tiny_tokenizer), seed=1).train.samples


def rows_of(packs) -> list[tuple[list[int], list[int]]]:
    """Every sample of every pack, cut out of it again."""
    found = []
    for index in range(len(packs)):
        row = packs.pack(index)
        assert sum(row["lengths"]) == len(row["input_ids"]) == len(row["labels"])
        edges = np.cumsum([0, *row["lengths"]]).tolist()
        for start, stop in pairwise(edges):
            found.append((row["input_ids"][start:stop].tolist(), row["labels"][start:stop].tolist()))
    return found


def test_packs_hold_the_samples_as_they_were_prepared(prepared):
    data, samples = prepared
    expected = sorted((example.input_ids, example.labels) for example in samples)
    packs = pack(samples, data)
    assert len(packs) < len(samples)
    assert all(sum(packs.pack(index)["lengths"]) <= 32 for index in range(len(packs)))
    assert sorted(rows_of(packs)) == expected
    # A pack's samples keep their order, so that a run can be followed.
    assert all(labels[0] == IGNORED for _, labels in rows_of(packs))


def test_without_packing_each_sample_is_a_pack(prepared):
    data, samples = prepared
    packs = pack(samples, data.model_copy(update={"packing": False}))
    assert rows_of(packs) == [(example.input_ids, example.labels) for example in samples]


def test_packs_of_each_source_hold_its_samples_alone(prepared):
    data, samples = prepared
    by_source = pack_by_source(samples, data)
    assert set(by_source) == {"few", "many"}
    for name, packs in by_source.items():
        expected = [(example.input_ids, example.labels) for example in samples if example.source_name == name]
        assert sorted(rows_of(packs)) == sorted(expected)


def test_a_data_set_reads_packs_when_it_is_asked(prepared):
    data, samples = prepared
    packs = pack(samples, data)
    rows = pack_dataset(packs, multiple=8, pad_id=7)
    assert len(rows) % 8 == 0
    assert len(rows) - len(packs) < 8
    batch = PackCollator()([rows[0], rows[len(packs) - 1], rows[len(rows) - 1]])
    expected = [packs.pack(0), packs.pack(len(packs) - 1)]
    ids = np.concatenate([row["input_ids"] for row in expected]).tolist()
    assert batch["input_ids"][0].tolist()[: len(ids)] == ids
    labels = np.concatenate([row["labels"] for row in expected])
    assert batch["labelled"].tolist() == (np.flatnonzero(labels != IGNORED) - 1).tolist()
    assert batch["targets"].tolist() == labels[labels != IGNORED].tolist()
    if len(rows) > len(packs):
        assert rows[len(rows) - 1]["input_ids"].tolist() == [7]
        assert rows[len(rows) - 1]["labels"].tolist() == [IGNORED]
