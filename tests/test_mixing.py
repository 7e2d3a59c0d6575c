"""Which rows train, which evaluate, and how often."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from qwen_tune.chatml import ChatTemplate
from qwen_tune.errors import DataError
from qwen_tune.mixing import IN_EVALUATION, mix
from qwen_tune.preparation import prepare_data
from qwen_tune.recipe import DataSpec, EvalSpec, SourceSpec


def write(path: Path, *questions: str) -> str:
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]}
        for question in questions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(conversations) -> list[str]:
    return [conversation.messages[0].content for conversation in conversations]


@pytest.fixture
def many(tmp_path) -> str:
    return write(tmp_path / "many.jsonl", *(f"question {number}" for number in range(40)))


def test_a_weight_draws_a_part_by_the_seed(many):
    data = DataSpec(train=[SourceSpec(path=many, weight=0.5)])
    one, again, other = mix(data, seed=1), mix(data, seed=1), mix(data, seed=2)
    assert len(one.train) == one.not_sampled == 20
    assert asked(one.train) == asked(again.train)
    assert set(asked(one.train)) != set(asked(other.train))
    # In the order of the file, so that what is drawn is easy to follow.
    assert asked(one.train) == sorted(asked(one.train), key=lambda text: int(text.split()[1]))


def test_a_weight_above_one_repeats_rows(many):
    mixture = mix(DataSpec(train=[SourceSpec(path=many, weight=2.25)]), seed=1)
    counts = Counter(asked(mixture.train))
    assert len(mixture.train) == 90
    assert Counter(counts.values()) == {2: 30, 3: 10}
    assert (mixture.not_sampled, mixture.repeated) == (0, 50)


@pytest.mark.parametrize(("rows", "not_sampled", "repeated"), [(7, 33, 0), (40, 0, 0), (100, 0, 60)])
def test_a_number_of_rows(many, rows, not_sampled, repeated):
    mixture = mix(DataSpec(train=[SourceSpec(path=many, rows=rows)]), seed=1)
    assert (len(mixture.train), mixture.not_sampled, mixture.repeated) == (rows, not_sampled, repeated)


def test_drawing_from_one_source_leaves_the_others_alone(tmp_path, many):
    few = write(tmp_path / "few.jsonl", "a", "b", "c")
    data = DataSpec(train=[SourceSpec(path=many, weight=0.25), SourceSpec(path=few)])
    alone = mix(DataSpec(train=[SourceSpec(path=many, weight=0.25)]), seed=3)
    assert asked(mix(data, seed=3).train) == [*asked(alone.train), "a", "b", "c"]


def test_what_is_held_out_is_never_drawn(many):
    data = DataSpec(train=[SourceSpec(path=many, weight=3.0)], eval=EvalSpec(fraction=0.25))
    mixture = mix(data, seed=1)
    assert len(mixture.evaluation) == 10
    assert not set(asked(mixture.train)) & set(asked(mixture.evaluation))
    assert len(mixture.train) == 90


def test_evaluation_sources_share_no_conversation_with_training(tmp_path, many):
    # The same conversations under another file and with another name for a column.
    twins = tmp_path / "twins.jsonl"
    rows = [json.loads(line) for line in Path(many).read_text().splitlines()[5:9]]
    twins.write_text("".join(json.dumps({"chat": row["messages"]}) + "\n" for row in rows))
    source = SourceSpec(path=str(twins), columns={"messages": "chat"}, format="messages")
    mixture = mix(DataSpec(train=[SourceSpec(path=many)], eval=[source]), seed=1)
    assert len(mixture.evaluation) == 4
    assert mixture.dropped == {IN_EVALUATION: 4}
    assert not set(asked(mixture.train)) & set(asked(mixture.evaluation))


def test_every_row_is_accounted_for(tmp_path, many, tiny_tokenizer):
    few = write(tmp_path / "few.jsonl", "question 3", "b", "c")
    data = DataSpec(
        train=[SourceSpec(path=many, weight=0.5), SourceSpec(path=few, rows=7)],
        eval=[SourceSpec(path=write(tmp_path / "held.jsonl", "question 3", "question 4", "z"), rows=2, name="held")],
    )
    prepared = prepare_data(data, ChatTemplate(tiny_tokenizer), seed=5)
    rows, samples = prepared.facts["rows"], prepared.facts["samples"]
    assert rows["read"] == 46
    assert rows["read"] == rows["trained"] + rows["evaluation"] + rows["not_sampled"] + sum(rows["dropped"].values())
    assert samples["train"] == rows["trained"] + samples["repeated"]
    assert prepared.facts["sources"]["few"]["train"] == 7
    assert prepared.facts["tokens"]["prepared"] == prepared.train.tokens + prepared.evaluation.tokens


def test_an_evaluation_source_that_holds_everything_leaves_nothing_to_train(many, tiny_tokenizer):
    data = DataSpec(train=[SourceSpec(path=many)], eval=[SourceSpec(path=many, name="again")])
    with pytest.raises(DataError, match=r"data.eval: the evaluation sources hold every row of data.train"):
        prepare_data(data, ChatTemplate(tiny_tokenizer), seed=1)


def test_a_weight_that_draws_nothing_is_told(many):
    with pytest.raises(DataError, match=r"data \(many\): weight: 0.001 of 40 rows draws none"):
        mix(DataSpec(train=[SourceSpec(path=many, weight=0.001)]), seed=1)
