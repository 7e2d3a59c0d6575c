"""Rows into samples: each accounted for, each equal to the slow way."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import REVISIONS

from qwen_tune.chatml import IGNORED, ChatTemplate
from qwen_tune.encoder import Encoder, tokenize
from qwen_tune.errors import DataError
from qwen_tune.fast_encoder import FastEncoder
from qwen_tune.mixing import DUPLICATE, IN_EVALUATION, NEAR_DUPLICATE, NEAR_EVALUATION
from qwen_tune.packing import pack
from qwen_tune.preparation import NO_LABELS, OVERLONG, TRUNCATED, prepare_data
from qwen_tune.recipe import DataSpec, EvalSpec, SourceSpec
from qwen_tune.rendering import Renderer
from qwen_tune.source_store import KEPT_AS_TEXT, STRADDLES, SourceStores
from qwen_tune.sources import load_sources

WORDS = (
    "alder",
    "birch",
    "cedar",
    "dogwood",
    "elm",
    "fir",
    "ginkgo",
    "hazel",
    "juniper",
    "larch",
    "maple",
    "oak",
    "pine",
)


def chat(question: str, answer: str = "yes", **turn) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **turn}]}


def write(path: Path, *rows: dict, **source) -> SourceSpec:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SourceSpec(path=str(path), **source)


def prose(seed: int, words: int = 40) -> str:
    chosen = random.Random(seed)
    return " ".join(f"{chosen.choice(WORDS)}{chosen.choice(WORDS)}" for _ in range(words))


def nearly(text: str) -> str:
    words = text.split(" ")
    return " ".join([*words[:20], "instead", *words[21:]])


@pytest.fixture(scope="module")
def template(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REVISIONS["qwen3"].text
    return ChatTemplate(tokenizer)


@pytest.fixture
def many(tmp_path) -> SourceSpec:
    return write(tmp_path / "many.jsonl", *(chat(f"question {number}") for number in range(40)))


def lines(samples) -> list[int]:
    return [int(example.source.rpartition(":")[2]) for example in samples]


def balanced(prepared) -> None:
    rows, samples, tokens = (prepared.facts[name] for name in ("rows", "samples", "tokens"))
    assert rows["read"] == sum(source.store.rows for source in prepared.sources)
    assert rows["read"] == rows["trained"] + rows["evaluation"] + rows["not_sampled"] + sum(rows["dropped"].values())
    splits = (prepared.train, prepared.evaluation)
    assert (samples["train"], samples["evaluation"]) == tuple(len(split.examples) for split in splits)
    assert tokens["prepared"] == tokens["supervised"] + tokens["context"]
    assert tokens["prepared"] == sum(len(example.input_ids) for split in splits for example in split.examples)
    assert tokens["supervised"] == sum(example.supervised for split in splits for example in split.examples)
    by_source = Counter(example.source_name for split in splits for example in split.examples)
    assert by_source == Counter({name: sum(both.values()) for name, both in prepared.facts["sources"].items()})
    json.dumps(prepared.facts)


def test_every_row_is_accounted_for(tmp_path, many, template):
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


def test_a_recipe_that_holds_everything_out_is_told(many, template):
    data = DataSpec(train=[many], eval=[many.model_copy(update={"name": "again"})])
    with pytest.raises(DataError, match=r"data.eval: the evaluation sources hold every row of data.train"):
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
    assert lines(prepared.train.examples) == [1, 2, 3, 4, 5, 7, 9, 10, 11, 12]
    assert prepared.place(5) == f"{tmp_path}/train.jsonl:6"
    assert prepared.place(14) == f"{tmp_path}/held.jsonl:1"
    assert prepared.facts["duplicates"] == {"exact": 3, "near": 1, "evaluation_near_training": 0}


def test_held_out_rows_are_like_none_that_train(tmp_path, template):
    questions = [prose(number) for number in range(20)]
    one = write(tmp_path / "one.jsonl", *map(chat, [*questions, *questions[:5]]))
    other = write(tmp_path / "other.jsonl", *map(chat, [*map(nearly, questions[3:9]), *questions[15:]]))
    for seed in range(4):
        prepared = prepare_data(DataSpec(train=[one, other], eval=EvalSpec(fraction=0.2)), template, seed=seed)
        balanced(prepared)
        known = {question: number for number, q in enumerate(questions) for question in (q, nearly(q))}
        sides = []
        for split in (prepared.train, prepared.evaluation):
            texts = (template.tokenizer.decode(example.input_ids) for example in split.examples)
            sides.append({known[text.split("user\n")[1].split("<|im_end|>")[0]] for text in texts})
        assert sides[1]
        assert not sides[0] & sides[1]
        assert prepared.facts["duplicates"]["evaluation_near_training"] == 0


def test_near_duplicates_are_dropped_where_the_recipe_says_so(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", *map(chat, (prose(1), prose(2), nearly(prose(1)), prose(2))))
    kept, equal, near = (
        prepare_data(DataSpec(train=[source], deduplicate=how), template, seed=1) for how in (False, True, "near")
    )
    assert (lines(kept.train.examples), kept.facts["rows"]["dropped"]) == ([1, 2, 3, 4], {})
    assert (lines(equal.train.examples), equal.facts["rows"]["dropped"]) == ([1, 2, 3], {DUPLICATE: 1})
    assert lines(near.train.examples) == [1, 2]
    assert near.facts["rows"]["dropped"] == {DUPLICATE: 1, NEAR_DUPLICATE: 1}


def test_a_system_text_is_no_likeness(tmp_path, template):
    """The same long instruction stands before all rows of many a data set."""
    rows = [chat(f"{number} times {number}?", "that is a lot, and there is more of it") for number in range(20)]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": prose(1, words=200)})
    prepared = prepare_data(DataSpec(train=[write(tmp_path / "rows.jsonl", *rows)]), template, seed=1)
    assert prepared.facts["duplicates"] == {"exact": 0, "near": 0, "evaluation_near_training": 0}


LONG = "one two three four five six seven eight nine ten " * 8


def test_long_rows_are_dropped_and_counted(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("a"), chat(LONG), chat("b"), chat("c"))
    prepared = prepare_data(DataSpec(train=[source], max_length_tokens=60), template, seed=1)
    balanced(prepared)
    assert prepared.facts["rows"]["dropped"] == prepared.facts["samples"]["dropped"] == {OVERLONG: 1}
    assert prepared.train.dropped_rows[OVERLONG].tolist() == [1]
    assert lines(prepared.train.examples) == [1, 3, 4]


def test_long_rows_are_cut_and_counted(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("a"), chat("b", LONG), chat(LONG, "lost"))
    data = DataSpec(train=[source], max_length_tokens=60, overlong="truncate")
    prepared = prepare_data(data, template, seed=1)
    balanced(prepared)
    whole = prepare_data(data.model_copy(update={"max_length_tokens": 4096}), template, seed=1).train.examples
    short, cut = prepared.train.examples
    assert [short, cut.input_ids] == [whole[0], whole[1].input_ids[:60]]
    assert cut.labels == whole[1].labels[:60]
    assert (short.truncated, cut.truncated) == (False, True)
    assert prepared.train.supervised == short.supervised + cut.supervised
    assert prepared.facts["warnings"][TRUNCATED] == 1
    # Of the third the cut leaves the question alone.
    assert prepared.facts["rows"]["dropped"] == {NO_LABELS: 1}


def test_long_rows_are_named_where_the_recipe_wants_an_error(tmp_path, template):
    trained = write(tmp_path / "rows.jsonl", chat("a"), chat(LONG), chat("b"), chat(LONG, "no"))
    held = write(tmp_path / "held.jsonl", chat("c"), chat(LONG, "held"))
    data = DataSpec(train=[trained], eval=[held], max_length_tokens=60, overlong="error")
    with pytest.raises(DataError) as caught:
        prepare_data(data, template, seed=1)
    places = [problem.where for problem in caught.value.problems]
    assert places == [f"{tmp_path}/rows.jsonl:2", f"{tmp_path}/rows.jsonl:4", f"{tmp_path}/held.jsonl:2"]
    assert all("at most 60 fit (data.max_length_tokens)" in problem.what for problem in caught.value.problems)


def test_more_than_half_dropped_is_an_error(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("a"), chat(LONG), chat(LONG, "no"))
    with pytest.raises(DataError, match=r"more than half of the rows would be dropped: 2 overlong of 3"):
        prepare_data(DataSpec(train=[source], max_length_tokens=60), template, seed=1)
    half = write(tmp_path / "half.jsonl", chat("a"), chat(LONG), chat("b"), chat(LONG, "no"))
    assert len(prepare_data(DataSpec(train=[half], max_length_tokens=60), template, seed=1).train.examples) == 2


def test_rows_of_which_nothing_is_learned_are_an_error(tmp_path, template):
    masked = [chat(f"q{number}", train=False) for number in range(3)]
    source = write(tmp_path / "rows.jsonl", *masked)
    with pytest.raises(DataError, match=r"no row is left of 3 \(3 no_labels dropped\)"):
        prepare_data(DataSpec(train=[source]), template, seed=1)
    source = write(tmp_path / "some.jsonl", *masked, chat("a"))
    with pytest.raises(DataError, match=r"3 of 4 rows have no token to learn from"):
        prepare_data(DataSpec(train=[source]), template, seed=1)
    source = write(tmp_path / "most.jsonl", masked[0], chat("a"))
    prepared = prepare_data(DataSpec(train=[source]), template, seed=1)
    balanced(prepared)
    assert prepared.facts["rows"]["dropped"] == {NO_LABELS: 1}
    assert prepared.facts["samples"]["dropped"] == {}


def test_conversations_of_several_samples_are_one_row(tmp_path, template):
    """Qwen3 takes thinking out of a history, so that each answer becomes a sample of its own."""
    turns = [turn for n in range(3) for turn in chat(f"q{n}", f"a{n}", reasoning_content=f"r{n}")["messages"]]
    source = write(tmp_path / "rows.jsonl", {"messages": turns}, chat("b"), weight=2.0)
    prepared = prepare_data(DataSpec(train=[source]), template, seed=1)
    balanced(prepared)
    assert lines(prepared.train.examples) == [1, 1, 1, 2] * 2
    assert prepared.facts["rows"]["trained"] == 2
    assert prepared.facts["samples"] == {"train": 8, "evaluation": 0, "expanded": 2, "repeated": 2, "dropped": {}}
    long = {"messages": [*turns, *chat(LONG, "end")["messages"]]}
    rows = write(tmp_path / "long.jsonl", long, chat("b"))
    prepared = prepare_data(DataSpec(train=[rows], max_length_tokens=120), template, seed=1)
    # The last sample does not fit; the row is trained with the others.
    assert prepared.facts["rows"]["dropped"] == {}
    assert prepared.facts["samples"]["dropped"] == {OVERLONG: 1}
    assert lines(prepared.train.examples) == [1, 1, 1, 2]


def test_plain_texts_are_learned_whole_up_to_their_end(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", {"text": "Es war einmal\n\nein Frosch 🐸."}, {"text": "  two "})
    prepared = prepare_data(DataSpec(train=[source]), template, seed=1)
    balanced(prepared)
    one, two = prepared.train.examples
    assert template.tokenizer.decode(one.input_ids) == "Es war einmal\n\nein Frosch 🐸.<|endoftext|>"
    assert template.tokenizer.decode(two.input_ids) == "  two <|endoftext|>"
    assert one.labels == [IGNORED, *one.input_ids[1:]]
    assert one.input_ids[-1] == template.tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_texts_that_spell_control_tokens(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", {"text": "a<|im_end|>b"}, {"text": "c"})
    with pytest.raises(DataError, match=r"rows.jsonl:1: the text spells the control token <\|im_end\|>"):
        prepare_data(DataSpec(train=[source]), template, seed=1)
    data = DataSpec(train=[source], special_tokens_in_text="neutralize")
    prepared = prepare_data(data, template, seed=1)
    one, _ = prepared.train.examples
    assert template.tokenizer.decode(one.input_ids) == "a<|im_end|>b<|endoftext|>"
    assert template.end_of_turn_id not in one.input_ids
    assert prepared.facts["warnings"] == {KEPT_AS_TEXT: 1}


def test_chats_that_spell_control_tokens(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("q <|im_end|>\n<|im_start|>system\n", "a <|im_start|> a"), chat("b"))
    with pytest.raises(DataError, match=r"rows.jsonl:1: the text spells the control token"):
        prepare_data(DataSpec(train=[source]), template, seed=1)
    prepared = prepare_data(DataSpec(train=[source], special_tokens_in_text="neutralize"), template, seed=1)
    one, other = prepared.train.examples
    assert one.input_ids.count(template.end_of_turn_id) == other.input_ids.count(template.end_of_turn_id) == 2
    learned = [token for token in one.labels if token != IGNORED]
    assert template.tokenizer.decode(learned) == "a <|im_start|> a<|im_end|>"
    assert learned.count(template.end_of_turn_id) == 1
    assert prepared.facts["warnings"] == {KEPT_AS_TEXT: 1}


def test_token_ids_are_taken_as_they_are(tmp_path, template):
    size = len(template.tokenizer)
    rows = [
        {"input_ids": [5, 6, size - 1], "labels": [IGNORED, 6, size - 1]},
        {"input_ids": [7, 8]},
        {"input_ids": [1, 2, 3], "labels": [1, IGNORED, 3]},
    ]
    prepared = prepare_data(DataSpec(train=[write(tmp_path / "rows.jsonl", *rows)]), template, seed=1)
    balanced(prepared)
    assert [(example.input_ids, example.labels) for example in prepared.train.examples] == [
        ([5, 6, size - 1], [IGNORED, 6, size - 1]),
        ([7, 8], [IGNORED, 8]),
        ([1, 2, 3], [IGNORED, IGNORED, 3]),
    ]
    source = write(tmp_path / "beyond.jsonl", rows[0], {"input_ids": [1, size]})
    with pytest.raises(DataError, match=rf"beyond.jsonl:2: input_ids\[1\] is {size}; the tokenizer has"):
        prepare_data(DataSpec(train=[source]), template, seed=1)


def test_token_ids_beside_chats(tmp_path, template):
    """Sources of different forms in one recipe."""
    ids = write(tmp_path / "ids.jsonl", *({"input_ids": [number] * 3} for number in range(1, 6)))
    text = write(tmp_path / "text.jsonl", *({"text": f"text {number}"} for number in range(5)))
    chats = write(tmp_path / "chats.jsonl", *(chat(f"question {number}") for number in range(5)))
    prepared = prepare_data(DataSpec(train=[chats, ids, text]), template, seed=1)
    balanced(prepared)
    assert [example.source_name for example in prepared.train.examples] == ["chats"] * 5 + ["ids"] * 5 + ["text"] * 5


def test_straddling_tokens_are_told(tmp_path, template):
    tokenizer = copy.deepcopy(template.tokenizer)
    tokenizer.chat_template = REVISIONS["qwen2_5"].text
    tokenizer.add_tokens(["\n\n"])
    source = write(tmp_path / "rows.jsonl", chat("q", "\n\nanswer"), chat("q", "answer"))
    prepared = prepare_data(DataSpec(train=[source]), ChatTemplate(tokenizer), seed=1)
    assert prepared.facts["warnings"] == {STRADDLES: 1}
    assert [example.straddling for example in prepared.train.examples] == [1, 0]


def test_all_bad_rows_of_all_sources_are_told_at_once(tmp_path, template):
    sources = [
        write(tmp_path / f"{name}.jsonl", chat("a"), chat("b", ""), chat("c", "d <|im_end|>"), {"messages": 5})
        for name in ("one", "two")
    ]
    gone = SourceSpec(path=str(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError) as caught:
        prepare_data(DataSpec(train=[sources[0], gone], eval=[sources[1]]), template, seed=1)
    places = Counter(problem.where.removeprefix(f"{tmp_path}/") for problem in caught.value.problems)
    assert places == Counter([*(f"{name}.jsonl:{line}" for name in ("one", "two") for line in (2, 3, 4)), "gone.jsonl"])


def test_a_tools_file_that_is_not_there_is_told(tmp_path, template):
    source = write(tmp_path / "rows.jsonl", chat("a"), tools=str(tmp_path / "gone.json"))
    with pytest.raises(DataError, match="the tools file cannot be read"):
        prepare_data(DataSpec(train=[source]), template, seed=1)


def test_the_fingerprint_is_of_what_trains(tmp_path, many, template):
    data = DataSpec(train=[many], eval=EvalSpec(fraction=0.25))
    one, again, other = (prepare_data(data, template, seed=seed).fingerprint() for seed in (1, 1, 2))
    assert one == again != other
    longer = prepare_data(data.model_copy(update={"max_length_tokens": 512}), template, seed=1)
    assert longer.fingerprint() == one
    longest = max(len(example.input_ids) for example in prepare_data(data, template, seed=1).train.examples)
    cut = data.model_copy(update={"max_length_tokens": longest - 1, "overlong": "truncate"})
    assert prepare_data(cut, template, seed=1).fingerprint() != one


def test_samples_are_a_sequence(many, template):
    samples = prepare_data(DataSpec(train=[many]), template, seed=1).train.examples
    assert len(samples) == len(list(samples)) == 40
    assert samples[-1] == list(samples)[-1]
    assert list(samples[3:9:2]) == [samples[3], samples[5], samples[7]]
    assert list(samples.subset(np.array([7, 7, 1]))) == [samples[7], samples[7], samples[1]]
    assert samples.source_name(0) == "many"
    with pytest.raises(IndexError):
        samples[40]


@pytest.mark.parametrize("name", REVISIONS)
def test_what_is_prepared_is_what_the_slow_way_makes(tmp_path, monkeypatch, tiny_tokenizer, name):
    """Enough rows for plans, the fast encoder from the start, and some rows of every kind between them."""
    monkeypatch.setattr("qwen_tune.encoder.WORTH_A_START", 0)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REVISIONS[name].text
    template = ChatTemplate(tokenizer)
    thinks = {"field": {"reasoning_content": "for a reason"}, "content": {"reasoning_content": "so"}, "nowhere": {}}
    extra = thinks[REVISIONS[name].reasoning]
    rows = []
    for number in range(60):
        start = ["", " ", "\n", "e\u0301"][number % 4]
        rows.append(chat(f"{start}question {number} 🙂", f"{start}answer\n{number}{' ' * (number % 3)}", **extra))
        rows.append(
            {"messages": [{"role": "system", "content": f"Be {number}."}, *chat("ｱ漢字", "ok", **extra)["messages"]]}
        )
        if REVISIONS[name].reasoning != "content":
            rows.append({"messages": [*rows[-2]["messages"], *chat(f"<b>{number}", "done")["messages"]]})
    rows += [chat("<|im_end|>", "<|endoftext|>", **extra), *rows[:9]]
    data = DataSpec(
        train=[write(tmp_path / "rows.jsonl", *rows)],
        special_tokens_in_text="neutralize",
    )
    prepared = prepare_data(data, template, seed=1)
    balanced(prepared)
    expected = [example for row in load_sources(data.train, system=None) for example in tokenize(row, template, data)]
    found = list(prepared.train.examples)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one == other


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
def test_nothing_is_lost_between_rows_and_packs(tmp_path, template, trained, evaluated, options):
    train = [write(tmp_path / f"t{n}.jsonl", *content, **amount) for n, (content, amount) in enumerate(trained)]
    evaluation = EvalSpec(fraction=evaluated) if isinstance(evaluated, float) else None
    if isinstance(evaluated, tuple):
        evaluation = [write(tmp_path / "held.jsonl", *evaluated[0], **evaluated[1])]
    data = DataSpec(train=train, eval=evaluation, **options)
    try:
        prepared = prepare_data(data, template, seed=1)
    except DataError:
        return  # too little is left, or a row is too long
    balanced(prepared)
    for split in (prepared.train, prepared.evaluation):
        samples = [(example.input_ids, example.labels) for example in split.examples]
        assert all(len(ids) <= data.max_length_tokens for ids, _ in samples)
        assert all(any(label != IGNORED for label in labels) for _, labels in samples)
        packs = pack(split.examples, data)
        packed = []
        for index in range(len(packs)):
            row = packs.row(index)
            edges = np.cumsum([0, *row["lengths"]]).tolist()
            assert edges[-1] == len(row["input_ids"]) <= data.max_length_tokens
            for start, stop in pairwise(edges):
                packed.append((row["input_ids"][start:stop].tolist(), row["labels"][start:stop].tolist()))
        assert sorted(packed) == sorted(samples)
        if not data.packing:
            assert packed == samples


def test_rows_that_teach_different_turns_are_no_duplicates(tmp_path, template):
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


def test_a_source_is_encoded_anew_where_the_fast_encoder_is_found_wrong(tmp_path, template, tiny_tokenizer, capsys):
    """The encoder of another vocabulary stands for one that went wrong after it was proven."""
    described = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    described["model"]["merges"] = described["model"]["merges"][:50]
    path = tmp_path / "rows.jsonl"
    row = {
        "messages": [{"role": "user", "content": "Where is the harbour?"}, {"role": "assistant", "content": "There."}]
    }
    path.write_text((json.dumps(row) + "\n") * 3)
    data = DataSpec(train=[SourceSpec(path=str(path))])
    stores = SourceStores(data, template)
    encoder = Encoder(template)
    encoder._fast, encoder._looked_for_fast = FastEncoder(json.dumps(described)), True
    stores._tools = Renderer(template, data), encoder
    store, _ = stores.open(data.train[0])
    assert "once more, with the checkpoint's own tokenizer" in capsys.readouterr().err
    assert store.tokens(0)[0].tolist() == prepare_data(data, template, seed=1).train.examples[0].input_ids
    text = template.render(row["messages"])
    assert store.tokens(0)[0].tolist() == tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
