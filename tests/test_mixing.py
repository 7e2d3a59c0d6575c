"""Which examples train, which evaluate, and how often."""

from __future__ import annotations

import hashlib
import random
from collections import Counter

import numpy as np
import pytest
from example_files import nearly, prose
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_tune.data.mixing import DUPLICATE, IN_EVALUATION, NEAR_DUPLICATE, NEAR_EVALUATION, ExampleTable, mix
from qwen_tune.data.near_duplicates import near_groups, sketch
from qwen_tune.errors import DataError
from qwen_tune.recipe.schema import DataSpec, EvalSpec, SourceSpec

MANY = [f"question {number}" for number in range(40)]


def table(*sources: list[str]) -> ExampleTable:
    """The examples of some sources by their texts."""
    texts = [text for source in sources for text in source]
    digests = np.array([int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) for text in texts], np.uint64)
    return ExampleTable(
        sources=np.repeat(np.arange(len(sources)), list(map(len, sources))),
        digests=digests,
        supervision_digests=digests,
        sketches=sketch([text.encode() for text in texts]),
    )


def source(name: str = "many", **fields) -> SourceSpec:
    return SourceSpec(path=f"{name}.jsonl", **fields)


def test_a_weight_draws_a_part_by_the_seed():
    data = DataSpec(train=[source(weight=0.5)])
    one, again, other = (mix(table(MANY), data, seed=seed) for seed in (1, 1, 2))
    assert len(one.train) == one.not_sampled == 20
    assert one.train.tolist() == again.train.tolist()
    assert set(one.train.tolist()) != set(other.train.tolist())
    # In the order of the file, so that what is drawn is easy to follow.
    assert one.train.tolist() == sorted(one.train.tolist())


def test_a_weight_above_one_repeats_examples():
    mixture = mix(table(MANY), DataSpec(train=[source(weight=2.25)]), seed=1)
    counts = Counter(mixture.train.tolist())
    assert len(mixture.train) == 90
    assert Counter(counts.values()) == {2: 30, 3: 10}
    assert (mixture.not_sampled, mixture.repeated) == (0, 50)


@pytest.mark.parametrize(("rows", "not_sampled", "repeated"), [(7, 33, 0), (40, 0, 0), (100, 0, 60)])
def test_a_number_of_examples(rows, not_sampled, repeated):
    mixture = mix(table(MANY), DataSpec(train=[source(rows=rows)]), seed=1)
    assert (len(mixture.train), mixture.not_sampled, mixture.repeated) == (rows, not_sampled, repeated)


def test_drawing_from_one_source_leaves_the_others_alone():
    few = ["a", "b", "c"]
    alone = mix(table(MANY), DataSpec(train=[source(weight=0.25)]), seed=3)
    both = mix(table(MANY, few), DataSpec(train=[source(weight=0.25), source("few")]), seed=3)
    assert both.train.tolist() == [*alone.train.tolist(), 40, 41, 42]
    after = mix(table(few, MANY), DataSpec(train=[source("few"), source(weight=0.25)]), seed=3)
    assert after.train.tolist() == [0, 1, 2, *(alone.train + 3).tolist()]


def test_the_order_of_a_file_decides_nothing():
    data = DataSpec(train=[source(weight=0.4)], eval=EvalSpec(fraction=0.2))
    shuffled = random.Random(1).sample(MANY, len(MANY))
    one, other = mix(table(MANY), data, seed=1), mix(table(shuffled), data, seed=1)
    assert {MANY[row] for row in one.train} == {shuffled[row] for row in other.train}
    assert {MANY[row] for row in one.evaluation} == {shuffled[row] for row in other.evaluation}


def test_what_is_held_out_is_never_drawn():
    data = DataSpec(train=[source(weight=3.0)], eval=EvalSpec(fraction=0.25))
    mixture = mix(table(MANY), data, seed=1)
    assert len(mixture.evaluation) == 10
    assert not set(mixture.train.tolist()) & set(mixture.evaluation.tolist())
    assert len(mixture.train) == 90
    other = mix(table(MANY), data, seed=2)
    assert set(other.evaluation.tolist()) != set(mixture.evaluation.tolist())


def test_equal_and_almost_equal_examples_are_held_out_together():
    texts = [prose(number) for number in range(60)]
    first = [*texts, *texts[:10], *map(nearly, texts[10:20])]
    second = [*texts[20:30], *map(nearly, texts[30:40]), "short", "short"]
    rows = table(first, second)
    groups = near_groups(rows.digests, rows.sketches)
    for seed in range(8):
        mixture = mix(rows, DataSpec(train=[source("a"), source("b")], eval=EvalSpec(fraction=0.2)), seed=seed)
        assert len(mixture.evaluation) >= round(0.2 * len(groups))
        assert not set(groups[mixture.train].tolist()) & set(groups[mixture.evaluation].tolist())
        assert len(mixture.contaminated) == 0
        assert len(mixture.train) + len(mixture.evaluation) == len(groups)


def test_where_chains_are_longer_than_the_share_only_equal_examples_stay_together():
    chain = [prose(1, words=100)]
    for step in range(39):
        chain.append(nearly(chain[-1], 2 * step))
    rows = table([*chain, *chain[:5]])
    assert len(set(near_groups(rows.digests, rows.sketches).tolist())) == 1
    mixture = mix(rows, DataSpec(train=[source()], eval=EvalSpec(fraction=0.2)), seed=1)
    assert 9 <= len(mixture.evaluation) <= 11
    assert not set(rows.digests[mixture.train].tolist()) & set(rows.digests[mixture.evaluation].tolist())
    assert mixture.contaminated.tolist() == mixture.evaluation.tolist()


def test_an_example_repeated_often_is_not_held_out_as_a_small_share():
    texts = [*["the same again"] * 500, *MANY[:5]]
    for seed in range(6):
        mixture = mix(table(texts), DataSpec(train=[source()], eval=EvalSpec(fraction=0.02)), seed=seed)
        assert 1 <= len(mixture.evaluation) <= 5
        assert len(mixture.train) >= 500


@pytest.mark.parametrize("fraction", [0.05, 0.34, 0.5, 0.6])
def test_few_examples_with_equal_ones_among_them_leave_some_on_each_side(fraction):
    for texts in (["a", "b", "b"], ["a", "a", "b", "b"], ["a", "a", "a", "b"], ["a", "b"]):
        for seed in range(6):
            mixture = mix(table(texts), DataSpec(train=[source()], eval=EvalSpec(fraction=fraction)), seed=seed)
            assert 0 < len(mixture.evaluation) < len(texts)


@pytest.mark.parametrize(("texts", "fraction"), [(["a"], 0.5), (["a", "a", "a"], 0.1), (["a", "b"], 0.9)])
def test_a_share_that_leaves_nothing_is_refused(texts, fraction):
    with pytest.raises(DataError, match=r"data.eval.fraction: .* leaves none to train on"):
        mix(table(texts), DataSpec(train=[source()], eval=EvalSpec(fraction=fraction)), seed=1)


def test_evaluation_sources_share_nothing_with_training():
    texts = [prose(number) for number in range(30)]
    held = [*texts[5:9], *map(nearly, texts[20:23]), prose(99)]
    data = DataSpec(train=[source("a"), source("b")], eval=[source("held")])
    mixture = mix(table(texts, texts[5:7], held), data, seed=1)
    assert {name: rows.tolist() for name, rows in mixture.dropped.items()} == {
        IN_EVALUATION: [5, 6, 7, 8, 30, 31],
        NEAR_EVALUATION: [20, 21, 22],
    }
    assert mixture.evaluation.tolist() == [*range(32, 40)]
    assert mixture.train.tolist() == [row for row in range(30) if row not in {5, 6, 7, 8, 20, 21, 22}]
    assert len(mixture.contaminated) == 0


def test_examples_of_an_evaluation_source_that_are_not_drawn_may_train():
    mixture = mix(table(MANY, MANY[:10]), DataSpec(train=[source()], eval=[source("held", rows=4)]), seed=1)
    assert len(mixture.evaluation) == 4
    assert len(mixture.dropped[IN_EVALUATION]) == 4
    assert len(mixture.train) == 36
    assert mixture.not_sampled == 6


def test_duplicates_are_counted_and_kept():
    texts = [*(prose(number) for number in range(6)), prose(2), nearly(prose(3)), prose(2)]
    mixture = mix(table(texts), DataSpec(train=[source()]), seed=1)
    assert mixture.train.tolist() == [*range(9)]
    assert (mixture.duplicates.tolist(), mixture.near_duplicates.tolist()) == ([6, 8], [7])
    assert not any(map(len, mixture.dropped.values()))


@pytest.mark.parametrize(
    ("deduplicate", "equal", "near"), [(True, [6, 8], []), ("near", [6, 8], [7]), (False, None, None)]
)
def test_duplicates_are_dropped_where_the_recipe_says_so(deduplicate, equal, near):
    texts = [*(prose(number) for number in range(6)), prose(2), nearly(prose(3))]
    data = DataSpec(train=[source("a"), source("b")], deduplicate=deduplicate)
    mixture = mix(table(texts, [prose(2)]), data, seed=1)
    dropped = {name: rows.tolist() for name, rows in mixture.dropped.items()}
    assert dropped == ({DUPLICATE: equal, NEAR_DUPLICATE: near} if deduplicate else {})
    assert mixture.train.tolist() == [row for row in range(9) if row not in {*(equal or ()), *(near or ())}]


def test_duplicates_of_what_evaluates_are_reported_once():
    """They are dropped because they evaluate, whatever else could be said of them."""
    data = DataSpec(train=[source()], eval=[source("held")], deduplicate="near")
    mixture = mix(table(["a", "a", "b", "b", "c"], ["a"]), data, seed=1)
    assert {name: rows.tolist() for name, rows in mixture.dropped.items() if len(rows)} == {
        IN_EVALUATION: [0, 1],
        DUPLICATE: [3],
    }


def test_an_evaluation_source_that_holds_everything_leaves_nothing_to_train():
    data = DataSpec(train=[source()], eval=[source("again")])
    with pytest.raises(DataError, match=r"data.eval: the evaluation sources contain every example of data.train"):
        mix(table(MANY, MANY), data, seed=1)


def test_a_weight_that_draws_nothing_is_reported():
    with pytest.raises(DataError, match=r"data \(many\): weight: 0.001 draws none of 40 examples"):
        mix(table(MANY), DataSpec(train=[source(weight=0.001)]), seed=1)


def test_no_examples_at_all():
    nothing = mix(table([]), DataSpec(train=[source()]), seed=1)
    assert (len(nothing.train), len(nothing.evaluation)) == (0, 0)
    with pytest.raises(DataError, match="leaves none to train on"):
        mix(table([]), DataSpec(train=[source()], eval=EvalSpec(fraction=0.5)), seed=1)


texts = st.lists(
    st.one_of(
        st.sampled_from("abcdef"), st.integers(0, 6).map(prose), st.integers(0, 6).map(lambda n: nearly(prose(n)))
    ),
    max_size=14,
)
amounts = st.one_of(
    st.just({}),
    st.floats(0.3, 3).map(lambda weight: {"weight": weight}),
    st.integers(1, 20).map(lambda rows: {"rows": rows}),
)


@settings(max_examples=120, deadline=None)
@given(
    trained=st.lists(st.tuples(texts, amounts), min_size=1, max_size=3),
    evaluated=st.one_of(st.none(), st.floats(0.01, 0.6), st.lists(st.tuples(texts, amounts), min_size=1, max_size=2)),
    deduplicate=st.sampled_from([False, True, "near"]),
    seed=st.integers(0, 3),
)
def test_every_example_is_in_one_place(trained, evaluated, deduplicate, seed):
    sources = [source(f"t{number}", **amount) for number, (_, amount) in enumerate(trained)]
    contents = [content for content, _ in trained]
    evaluation = EvalSpec(fraction=evaluated) if isinstance(evaluated, float) else None
    if isinstance(evaluated, list):
        evaluation = [source(f"e{number}", **amount) for number, (_, amount) in enumerate(evaluated)]
        contents += [content for content, _ in evaluated]
    rows = table(*contents)
    data = DataSpec(train=sources, eval=evaluation, deduplicate=deduplicate)
    try:
        mixture = mix(rows, data, seed=seed)
    except DataError:
        return
    places = [mixture.train, mixture.evaluation, *mixture.dropped.values()]
    found = [set(place.tolist()) for place in places]
    assert sum(map(len, found)) == len(set.union(*found))
    assert len(set.union(*found)) + mixture.not_sampled == len(rows.digests)
    evaluation_draws = mixture.evaluation if isinstance(evaluation, list) else mixture.evaluation[:0]
    draws = Counter([*mixture.train.tolist(), *evaluation_draws.tolist()])
    assert mixture.repeated == draws.total() - len(draws)
    is_training = rows.sources < len(trained)
    assert is_training[mixture.train].all()
    assert is_training[mixture.evaluation].all() != isinstance(evaluation, list) or not len(mixture.evaluation)
    assert not set(rows.digests[mixture.train].tolist()) & set(rows.digests[mixture.evaluation].tolist())
    if deduplicate:
        drawn = list(set(mixture.train.tolist()))
        assert len(set(rows.digests[drawn].tolist())) == len(drawn)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_number_of_examples_is_not_made_up_by_repeating_what_is_not_held_out(streaming):
    rows = [prose(seed) for seed in range(40)]
    data = DataSpec(train=[source(rows=40)], eval=EvalSpec(fraction=0.25), streaming=streaming)
    mixture = mix(table(rows), data, seed=1)
    assert (len(mixture.train), len(mixture.evaluation), mixture.repeated) == (30, 10, 0)
    asked_for_more = mix(table(rows), DataSpec(train=[source(rows=60)]), seed=1)
    assert (len(asked_for_more.train), asked_for_more.repeated) == (60, 20)
