import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_tune.packing import best_fit_decreasing


@given(st.lists(st.integers(1, 64), max_size=300))
def test_every_sample_is_in_exactly_one_pack_and_none_overflows(lengths):
    packs = best_fit_decreasing(lengths, 64)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 64 for pack in packs)
    # Any two packs of best fit hold more than one capacity together.
    sums = sorted(sum(lengths[index] for index in pack) for pack in packs)
    assert len(sums) < 2 or sums[0] + sums[1] > 64


def test_packs_are_filled_best_first():
    assert best_fit_decreasing([5, 4, 3, 3, 1], 8) == [[0, 2], [1, 3, 4]]


def test_a_sample_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="9 tokens does not fit into a pack of 8"):
        best_fit_decreasing([3, 9], 8)


def test_short_samples_fill_packs_nearly_whole():
    lengths = [(i * 7919) % 400 + 20 for i in range(5000)]
    packs = best_fit_decreasing(lengths, 4096)
    assert sum(lengths) / (len(packs) * 4096) > 0.995
