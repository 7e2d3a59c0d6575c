"""Texts that say almost the same, distinguished from those that only look alike."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_tune.data.near_duplicates import BINS, EMPTY, SHORTEST_RUNS, near_groups, sketch

WORDS = [f"{a}{b}{c}" for a in ("ba", "ko", "ri", "tu", "me") for b in ("l", "n", "st", "r") for c in ("a", "os", "im")]


def digests_of(texts) -> np.ndarray:
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return np.array([numbers[text] for text in texts], np.uint64)


def groups(*texts: str) -> list[int]:
    return near_groups(digests_of(texts), sketch([text.encode() for text in texts])).tolist()


def prose(seed: int, words: int = 80) -> str:
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS) + chosen.choice(WORDS) for _ in range(words))


def changed(text: str, *places: int) -> str:
    words = text.split(" ")
    for place in places:
        words[place] = "another"
    return " ".join(words)


def test_equal_and_almost_equal_texts_are_one_group():
    one, other = prose(1), prose(2)
    assert groups(one, other, one, changed(one, 40), changed(other, 11, 70)) == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("edit", [str.upper, str.title, "\n{}!!".format, lambda text: text.replace(" ", "\n", 9)])
def test_case_and_punctuation_do_not_matter(edit):
    assert groups(prose(3), edit(prose(3))) == [0, 0]


def test_texts_that_have_nothing_to_do_with_each_other_are_not_joined():
    texts = [prose(seed) for seed in range(400)]
    assert groups(*texts) == list(range(400))


def test_texts_that_share_a_beginning_only_are_not_joined():
    """Examples made from one instruction: the instruction is the same, what is asked with it is not."""
    instruction = prose(5, words=60)
    texts = [f"{instruction} {prose(seed, words=60)}" for seed in range(50, 90)]
    assert groups(*texts) == list(range(40))


@pytest.mark.parametrize("words", range(1, SHORTEST_RUNS))
def test_short_texts_are_joined_only_when_equal(words):
    text = " ".join(WORDS[:words])
    assert groups(text, text, text + "s", text.upper()) == [0, 0, 2, 3]


def test_being_alike_is_passed_on():
    """Each is like the next; the first and the last would be on different sides."""
    chain = [prose(7, words=100)]
    for step in range(12):
        chain.append(changed(chain[-1], 8 * step, 8 * step + 1))
    assert groups(chain[0], chain[-1]) == [0, 1]
    assert groups(*chain) == [0] * len(chain)
    assert groups(*reversed(chain)) == [0] * len(chain)


def test_scripts_without_spaces_have_runs_too():
    chosen = random.Random(4)
    one, other = ("".join(chr(chosen.randrange(0x4E00, 0x9FA0)) for _ in range(120)) for _ in range(2))
    assert groups(one, other, one[:60] + "漢" + one[61:], one) == [0, 1, 0, 0]


def test_nothing_and_one_text():
    assert groups() == []
    assert sketch([]).shape == (0, BINS)
    assert groups("a") == [0]
    assert groups(prose(1)) == [0]
    assert groups("", "", " ") == [0, 0, 2]
    assert (sketch([b"", b"a few words"]) == EMPTY).all()


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(
        st.one_of(st.integers(0, 30).map(prose), st.text(max_size=60), st.binary(max_size=40)), min_size=1, max_size=20
    ),
    cuts=st.lists(st.integers(0, 20), max_size=4),
)
def test_a_sketch_depends_on_its_text_alone(texts, cuts):
    data = [text.encode() if isinstance(text, str) else text for text in texts]
    whole = sketch(data)
    assert np.array_equal(whole, np.concatenate([sketch([text]) for text in data]))
    assert np.array_equal(whole, sketch(data[::-1])[::-1])
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    batches = [sketch(data[start:stop]) for start, stop in pairwise(edges)]
    assert np.array_equal(whole, np.concatenate(batches))


@settings(max_examples=40, deadline=None)
@given(chosen=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 79)), max_size=40), order=st.randoms())
def test_groups_hold_equal_texts_together_and_name_their_first(chosen, order):
    texts = [changed(prose(seed), place) for seed, place in chosen]
    found = groups(*texts)
    assert found == groups(*texts)
    for index, first in enumerate(found):
        assert first <= index
        assert found[first] == first
    for one, text in enumerate(texts):
        assert found[texts.index(text)] == found[one]
    shuffled = list(range(len(texts)))
    order.shuffle(shuffled)
    again = groups(*(texts[index] for index in shuffled))

    def partition(numbers, places):
        joined: dict[int, set[str]] = {}
        for number, place in zip(numbers, places, strict=True):
            joined.setdefault(number, set()).add(texts[place])
        return {frozenset(group) for group in joined.values()}

    assert partition(found, range(len(texts))) == partition(again, shuffled)
