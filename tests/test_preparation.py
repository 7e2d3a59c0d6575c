"""Sources into what trains and what evaluates: each example accounted for."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from conversations import with_template
from example_files import LONG, chat, lines, nearly, prose, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import REVISIONS

from qwen_tune.chatml.template import IGNORED
from qwen_tune.data.mixing import DUPLICATE, IN_EVALUATION, NEAR_DUPLICATE, NEAR_EVALUATION
from qwen_tune.data.packing import pack
from qwen_tune.data.preparation import prepare_data
from qwen_tune.errors import DataError
from qwen_tune.recipe.schema import DataSpec, EvalSpec, SourceSpec


@pytest.fixture(scope="module")
def template(tiny_tokenizer):
    return with_template(tiny_tokenizer, REVISIONS["qwen3"].text)


@pytest.fixture
def many(tmp_path) -> SourceSpec:
    return write(tmp_path / "many.jsonl", *(chat(f"question {number}") for number in range(40)))


def balanced(prepared) -> None:
    rows, samples, tokens = (prepared.facts[name] for name in ("rows", "samples", "tokens"))
    assert rows["read"] == sum(source.store.example_count for source in prepared.sources)
    assert rows["read"] == rows["trained"] + rows["evaluation"] + rows["not_sampled"] + sum(rows["dropped"].values())
    splits = (prepared.train, prepared.evaluation)
    assert (samples["train"], samples["evaluation"]) == tuple(len(split.samples) for split in splits)
    assert tokens["prepared"] == tokens["supervised"] + tokens["context"]
    assert tokens["prepared"] == sum(len(example.input_ids) for split in splits for example in split.samples)
    assert tokens["supervised"] == sum(example.supervised for split in splits for example in split.samples)
    by_source = Counter(example.source_name for split in splits for example in split.samples)
    assert by_source == Counter({name: sum(both.values()) for name, both in prepared.facts["sources"].items()})
    json.dumps(prepared.facts)


def test_every_example_is_accounted_for(tmp_path, many, template):
    few = write(tmp_path / "few.jsonl", *map(chat, ("question 3", "b", "c")), rows=7)
    held = write(tmp_path / "held.jsonl", *map(chat, ("question 3", "question 4", "z")), rows=2, name="held")
    data = DataSpec(train=[many.model_copy(update={"weight": 0.5}), few], eval=[held])
    prepared = prepare_data(data, template, seed=5)
    balanced(prepared)
    rows, samples = prepared.facts["rows"], prepared.facts["samples"]
    assert rows["read"] == 46
    assert samples["train"] == rows["trained"] + samples["repeated"]
    assert prepared.facts["sources"]["few"]["train"] == 7
    assert prepared.facts["sources"]["held"] == {"train": 0, "evaluation": 2}


def test_a_recipe_that_holds_everything_out_is_reported(many, template):
    data = DataSpec(train=[many], eval=[many.model_copy(update={"name": "again"})])
    with pytest.raises(DataError, match=r"data.eval: the evaluation sources contain every example of data.train"):
        prepare_data(data, template, seed=1)


def test_evaluation_shares_no_conversation_with_training(tmp_path, template):
    questions = [prose(number) for number in range(12)]
    trained = write(tmp_path / "train.jsonl", *map(chat, questions), *map(chat, questions[:2]))
    # The same under another name for a column, and almost the same.
    held = [{"chat": chat(questions[5])["messages"]}, {"chat": chat(nearly(questions[7]))["messages"]}]
    source = write(tmp_path / "held.jsonl", *held, columns={"messages": "chat"}, format="messages")
    prepared = prepare_data(DataSpec(train=[trained], eval=[source], deduplicate="near"), template, seed=1)
    balanced(prepared)
    assert prepared.facts["rows"]["dropped"] == {IN_EVALUATION: 1, NEAR_EVALUATION: 1, DUPLICATE: 2}
    assert lines(prepared.train.samples) == [1, 2, 3, 4, 5, 7, 9, 10, 11, 12]
    assert prepared.place(5) == f"{tmp_path}/train.jsonl:6"
    assert prepared.place(14) == f"{tmp_path}/held.jsonl:1"
    assert prepared.facts["duplicates"] == {"exact": 3, "near": 1, "evaluation_near_training": 0}


def test_held_out_examples_are_like_none_that_train(tmp_path, template):
    questions = [prose(number) for number in range(20)]
    one = write(tmp_path / "one.jsonl", *map(chat, [*questions, *questions[:5]]))
    other = write(tmp_path / "other.jsonl", *map(chat, [*map(nearly, questions[3:9]), *questions[15:]]))
    for seed in range(4):
        prepared = prepare_data(DataSpec(train=[one, other], eval=EvalSpec(fraction=0.2)), template, seed=seed)
        balanced(prepared)
        known = {question: number for number, q in enumerate(questions) for question in (q, nearly(q))}
        sides = []
        for split in (prepared.train, prepared.evaluation):
            texts = (template.tokenizer.decode(example.input_ids) for example in split.samples)
            sides.append({known[text.split("user\n")[1].split("<|im_end|>")[0]] for text in texts})
        assert sides[1]
        assert not sides[0] & sides[1]
        assert prepared.facts["duplicates"]["evaluation_near_training"] == 0


def test_near_duplicates_are_dropped_where_the_recipe_says_so(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", *map(chat, (prose(1), prose(2), nearly(prose(1)), prose(2))))
    kept, equal, near = (
        prepare_data(DataSpec(train=[source], deduplicate=how), template, seed=1) for how in (False, True, "near")
    )
    assert (lines(kept.train.samples), kept.facts["rows"]["dropped"]) == ([1, 2, 3, 4], {})
    assert (lines(equal.train.samples), equal.facts["rows"]["dropped"]) == ([1, 2, 3], {DUPLICATE: 1})
    assert lines(near.train.samples) == [1, 2]
    assert near.facts["rows"]["dropped"] == {DUPLICATE: 1, NEAR_DUPLICATE: 1}


def test_a_system_text_is_no_likeness(tmp_path, template):
    """The same long instruction stands before all examples of many a data set."""
    rows = [chat(f"{number} times {number}?", "that is a lot, and there is more of it") for number in range(20)]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": prose(1, words=200)})
    prepared = prepare_data(DataSpec(train=[write(tmp_path / "rows.jsonl", *rows)]), template, seed=1)
    assert prepared.facts["duplicates"] == {"exact": 0, "near": 0, "evaluation_near_training": 0}


def test_token_ids_beside_chats(tmp_path, template):
    """Sources of different forms in one recipe."""
    ids = write(tmp_path / "ids.jsonl", *({"input_ids": [number] * 3} for number in range(1, 6)))
    text = write(tmp_path / "text.jsonl", *({"text": f"text {number}"} for number in range(5)))
    chats = write(tmp_path / "chats.jsonl", *(chat(f"question {number}") for number in range(5)))
    prepared = prepare_data(DataSpec(train=[chats, ids, text]), template, seed=1)
    balanced(prepared)
    assert [example.source_name for example in prepared.train.samples] == ["chats"] * 5 + ["ids"] * 5 + ["text"] * 5


def test_all_bad_examples_of_all_sources_are_reported_at_once(tmp_path, template):
    sources = [
        write(tmp_path / f"{name}.jsonl", chat("a"), chat("b", ""), chat("c", "d <|im_end|>"), {"messages": 5})
        for name in ("one", "two")
    ]
    gone = SourceSpec(path=str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError) as caught:
        prepare_data(DataSpec(train=[sources[0], gone], eval=[sources[1]]), template, seed=1)
    places = Counter(problem.where.removeprefix(f"{tmp_path}/") for problem in caught.value.problems)
    assert places == Counter([*(f"{name}.jsonl:{line}" for name in ("one", "two") for line in (2, 3, 4)), "gone.jsonl"])


def test_a_tools_file_that_is_not_there_is_reported(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("a"), tools=str(tmp_path / "gone.json"))
    with pytest.raises(DataError, match="the tools file cannot be read"):
        prepare_data(DataSpec(train=[source]), template, seed=1)


def test_the_fingerprint_is_of_what_trains(tmp_path, many, template):
    data = DataSpec(train=[many], eval=EvalSpec(fraction=0.25))
    one, again, other = (prepare_data(data, template, seed=seed).fingerprint() for seed in (1, 1, 2))
    assert one == again != other
    longer = prepare_data(data.model_copy(update={"max_length_tokens": 512}), template, seed=1)
    assert longer.fingerprint() == one
    longest = max(len(example.input_ids) for example in prepare_data(data, template, seed=1).train.samples)
    cut = data.model_copy(update={"max_length_tokens": longest - 1, "overlong": "truncate"})
    assert prepare_data(cut, template, seed=1).fingerprint() != one


def test_samples_are_a_sequence(many, template):
    samples = prepare_data(DataSpec(train=[many]), template, seed=1).train.samples
    assert len(samples) == len(list(samples)) == 40
    assert samples[-1] == list(samples)[-1]
    assert list(samples[3:9:2]) == [samples[3], samples[5], samples[7]]
    assert list(samples.subset(np.array([7, 7, 1]))) == [samples[7], samples[7], samples[1]]
    assert samples[0].source_name == "many"
    with pytest.raises(IndexError):
        samples[40]


def test_examples_with_other_supervised_turns_are_not_duplicates(tmp_path, template):
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "r"},
        {"role": "assistant", "content": "two"},
    ]
    rows = [
        [{**turn, "train": False} if place == context else turn for place, turn in enumerate(turns)]
        for context in (1, 3, 3)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    prepared = prepare_data(DataSpec(train=[SourceSpec(path=str(path))], deduplicate=True), template, seed=1)
    assert prepared.facts["rows"] == {
        "read": 3,
        "trained": 2,
        "evaluation": 0,
        "not_sampled": 0,
        "dropped": {"duplicate": 1},
    }


questions = st.one_of(st.sampled_from("abcdefgh"), st.just(LONG[:200]), st.integers(0, 5).map(prose))
rows = st.lists(
    st.one_of(
        st.tuples(questions, st.sampled_from(["yes", LONG])).map(lambda pair: chat(*pair)),
        questions.map(lambda question: chat(question, train=False)),
        questions.map(
            lambda question: {
                "messages": [
                    *chat(question, "a", reasoning_content="why")["messages"],
                    *chat("more", "b", reasoning_content="so")["messages"],
                ]
            }
        ),
    ),
    min_size=1,
    max_size=8,
)
amounts = st.one_of(
    st.just({}),
    st.floats(0.4, 2.5).map(lambda weight: {"weight": weight}),
    st.integers(1, 9).map(lambda count: {"rows": count}),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    trained=st.lists(st.tuples(rows, amounts), min_size=1, max_size=2),
    evaluated=st.one_of(st.none(), st.floats(0.1, 0.5), st.tuples(rows, amounts)),
    options=st.fixed_dictionaries(
        {
            "overlong": st.sampled_from(["drop", "truncate", "error"]),
            "packing": st.booleans(),
            "deduplicate": st.sampled_from([False, True, "near"]),
            "max_length_tokens": st.sampled_from([48, 90, 400]),
            "loss_on": st.sampled_from(["assistant", "last_turn"]),
        }
    ),
)
def test_nothing_is_lost_between_examples_and_packs(tmp_path, template, trained, evaluated, options):
    train = [write(tmp_path / f"t{n}.jsonl", *content, **amount) for n, (content, amount) in enumerate(trained)]
    evaluation = EvalSpec(fraction=evaluated) if isinstance(evaluated, float) else None
    if isinstance(evaluated, tuple):
        evaluation = [write(tmp_path / "held.jsonl", *evaluated[0], **evaluated[1])]
    data = DataSpec(train=train, eval=evaluation, **options)
    try:
        prepared = prepare_data(data, template, seed=1)
    except DataError:
        return  # too little is left, or an example is too long
    balanced(prepared)
    for split in (prepared.train, prepared.evaluation):
        samples = [(example.input_ids, example.labels) for example in split.samples]
        assert all(len(ids) <= data.max_length_tokens for ids, _ in samples)
        assert all(any(label != IGNORED for label in labels) for _, labels in samples)
        packs = pack(split.samples, data)
        packed = []
        for index in range(len(packs)):
            row = packs.pack(index)
            edges = np.cumsum([0, *row["lengths"]]).tolist()
            assert edges[-1] == len(row["input_ids"]) <= data.max_length_tokens
            for start, stop in pairwise(edges):
                packed.append((row["input_ids"][start:stop].tolist(), row["labels"][start:stop].tolist()))
        assert sorted(packed) == sorted(samples)
        if not data.packing:
            assert packed == samples
