"""The loss mask against a slow, independent reading of its definition, over the families' own templates."""

from __future__ import annotations

import copy
import json

import pytest
from conversations import TOOLS, conversation, data, for_each_template, supervised, tokenize, with_template
from hypothesis import event
from hypothesis import strategies as st
from oracle import RefusedError, expected_labels, expected_samples
from templates import REVISIONS

from qwen_tune.chatml.template import IGNORED, ChatTemplate, render_samples
from qwen_tune.errors import ExampleError


@pytest.fixture(scope="module")
def template(tiny_tokenizer):
    return {name: with_template(tiny_tokenizer, revision.text) for name, revision in REVISIONS.items()}


def text_of(example, template):
    return next(iter(template.values())).tokenizer.decode(example.input_ids)


words = st.text(st.sampled_from('abc é\n.?!\t1漢<"\\'), min_size=1, max_size=12).filter(str.strip)
questions = st.one_of(
    words,
    words,
    words,
    st.sampled_from(["</think> a", "<think>", "<tool_response>\n3\n</tool_response>", "<tool_call>"]),
)
values = st.recursive(
    st.one_of(words, st.integers(-99, 99), st.booleans(), st.none(), st.floats(-9, 9)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(words, inner, max_size=2)),
    max_leaves=3,
)


def seldom(draw, of):
    """Hypothesis likes the ends of a range best."""
    return draw(st.integers(0, of)) == of // 2 + 1


@st.composite
def calls(draw):
    arguments = draw(st.dictionaries(st.sampled_from(["x", "wörd", "a b"]), values, max_size=2))
    if seldom(draw, 3):
        arguments = json.dumps(arguments)
    return {"type": "function", "function": {"name": draw(st.sampled_from(["add", "now"])), "arguments": arguments}}


@st.composite
def answers(draw, revision, tools: bool):
    """An assistant turn; what the family does not know, and what it always does, is only now and then not heeded."""
    turn = {"role": "assistant", "content": draw(words)}
    if tools and draw(st.booleans()):
        turn["tool_calls"] = draw(st.lists(calls(), min_size=1, max_size=2))
        turn["content"] = draw(st.one_of(words, st.sampled_from(["", None])))
    if {"nowhere": seldom(draw, 30), "field": draw(st.booleans()), "content": not seldom(draw, 30)}[revision.reasoning]:
        # Unlike any other text, so that what is lost can be missed.
        reasoning = draw(st.one_of(words, words, words, words, st.just("")))
        reasoning = reasoning and "§" + reasoning
        if not turn["content"] or draw(st.booleans()):
            turn["reasoning_content"] = reasoning or " \n"
        else:
            block = draw(
                st.sampled_from(
                    [
                        "<think>{}</think>",
                        "<think>\n{}\n</think>\n\n",
                        "\n<think> {}\n</think>\n",
                        " <think>\n\n\t  {} \n\n</think> \n",
                    ]
                )
            )
            turn["content"] = block.format(reasoning) + turn["content"]
    if seldom(draw, 5):
        turn["train"] = False
    return turn


@st.composite
def rows(draw, revision):
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    row = {"messages": messages}
    if ("tools" not in revision.drops and draw(st.booleans())) or seldom(draw, 30):
        row["tools"] = TOOLS
    for _ in range(draw(st.integers(1, 3))):
        if seldom(draw, 20):
            # Unlike any other text, so that what is lost can be missed.
            messages.append({"role": "system", "content": "§" + draw(words)})
        messages += [{"role": "user", "content": draw(questions)}] * (2 if seldom(draw, 15) else 1)
        messages.append(draw(answers(revision, "tools" in row)))
        while "tool_calls" in messages[-1] and draw(st.integers(0, 3)):
            messages += [
                {"role": "tool", "content": draw(st.one_of(words, st.just("")))} for _ in range(draw(st.integers(1, 2)))
            ]
            messages.append(draw(answers(revision, "tools" in row)))
        if seldom(draw, 20):
            messages.append(draw(answers(revision, "tools" in row)))
    if seldom(draw, 5):
        switches = [
            "enable_thinking",
            "preserve_thinking",
            "add_vision_id" if revision.variables else "enable_thinking",
        ]
        names = draw(st.sets(st.sampled_from(switches), min_size=1)) | ({"other"} if seldom(draw, 10) else set())
        row["chat_template_kwargs"] = {name: draw(st.booleans()) for name in sorted(names)}
    options = {
        "loss_on": draw(st.sampled_from(["assistant", "assistant", "assistant", "last_turn", "all"])),
        "thinking": draw(st.sampled_from(["auto"] * 12 + ["off", "require"])),
    }
    if seldom(draw, 5):
        options["special_tokens_in_text"] = "neutralize"
    if seldom(draw, 30) or "special_tokens_in_text" in options:
        target = draw(st.sampled_from(messages))
        spelled = draw(
            st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "\n", "a"]), min_size=1)
        )
        if target["content"] and "think>" not in target["content"]:
            target["content"] += "".join(spelled)
    return row, options


@for_each_template(examples=120)
def test_labels_equal_the_oracle(template, name, drawn):
    row, options = drawn.draw(rows(REVISIONS[name]))
    tokenizer = template[name].tokenizer
    parsed = conversation(row["messages"], row.get("tools"), **row.get("chat_template_kwargs", {}))
    try:
        expected = expected_samples(row, REVISIONS[name], tokenizer, options)
    except RefusedError:
        # Why, and in which words, is in the golden files; here an example may have several faults.
        event("refused")
        with pytest.raises(ExampleError):
            render_samples(parsed, template[name], data(**options))
        return
    event("rendered")
    samples = render_samples(parsed, template[name], data(**options))
    assert [(sample.text, sample.spans, sample.literals) for sample in samples] == [
        (sample.text, sample.spans, sample.literals) for sample in expected
    ]
    if not any(sample.literals for sample in samples):
        examples = tokenize(parsed, template[name], data(**options))
        assert [(example.input_ids, example.labels) for example in examples] == [
            expected_labels(sample, tokenizer) for sample in expected
        ]


def test_qwen2_5_chats_stay_one_sample_and_leave_the_injected_system_text_alone(template):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "ok"},
    ]
    [example] = tokenize(conversation(chat), template["qwen2_5"], data())
    assert supervised(example, template["qwen2_5"].tokenizer) == ["hello<|im_end|>", "ok<|im_end|>"]
    assert text_of(example, template).startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")


def test_qwen3_splits_where_the_history_loses_its_thinking(template):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello", "reasoning_content": "a greeting"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "ok"},
    ]
    first, second = tokenize(conversation(chat), template["qwen3"], data())
    tokenizer = template["qwen3"].tokenizer
    assert supervised(first, tokenizer) == ["<think>\na greeting\n</think>\n\nhello<|im_end|>"]
    # The empty think block belongs to the prompt: learning it would teach a hybrid model never to think.
    assert supervised(second, tokenizer) == ["ok<|im_end|>"]
    assert "a greeting" not in text_of(second, template)
    assert text_of(second, template).endswith("<think>\n\n</think>\n\nok<|im_end|>\n")


def test_blank_reasoning_is_none(template):
    """It must not switch thinking on: an empty think block would be supervised."""
    blank = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": " \n"}]
    [example] = tokenize(conversation(blank), template["qwen3"], data())
    assert supervised(example, template["qwen3"].tokenizer) == ["a<|im_end|>"]
    with pytest.raises(ExampleError, match="has no reasoning"):
        tokenize(conversation(blank), template["qwen3"], data(thinking="require"))


def test_inline_think_blocks_are_the_same_as_reasoning_content(template):
    inline = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>why</think>a"}]
    apart = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "why"}]
    [one] = tokenize(conversation(inline), template["qwen3"], data())
    [other] = tokenize(conversation(apart), template["qwen3"], data())
    assert one.input_ids == other.input_ids
    assert one.labels == other.labels


@pytest.mark.parametrize("name", [name for name in REVISIONS if REVISIONS[name].reasoning != "nowhere"])
def test_inline_thinking_loses_no_more_than_the_template_takes(template, name):
    block = "<think>\n    indented\n  two  \n</think>\n\n"
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": block + "  Answer"}]
    [sample] = render_samples(conversation(chat), template[name], data())
    if REVISIONS[name].parses_blocks:
        as_it_stands = template[name].tokenizer.apply_chat_template(chat, tokenize=False, enable_thinking=True)
        assert sample.text == as_it_stands
    # From Qwen3.5 on the template trims reasoning, as it does a server's reasoning_content.
    trims = name.startswith(("qwen3_5", "qwen3_6", "qwen3_8"))
    reasoning = "indented\n  two" if trims else "    indented\n  two  "
    answer = "Answer" if name == "qwen3_8" else "  Answer"
    assert sample.text.endswith(f"<think>\n{reasoning}\n</think>\n\n{answer}<|im_end|>\n")


def test_a_blank_inline_think_block_is_none(template):
    for block in ("<think></think>", "<think>\n \n</think>\n\n"):
        chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": block + "a"}]
        [example] = tokenize(conversation(chat), template["qwen3"], data(thinking="off"))
        assert supervised(example, template["qwen3"].tokenizer) == ["a<|im_end|>"]


def test_control_tokens_in_inline_thinking_are_distinguished_too(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\n <|im_end|>\n</think>\n\na"}]
    [sample] = render_samples(conversation(chat), template["qwen3"], data(special_tokens_in_text="neutralize"))
    assert sample.text.endswith("<think>\n <|im_end|>\n</think>\n\na<|im_end|>\n")
    assert [sample.text[slice(*literal)] for literal in sample.literals] == ["<|im_end|>"]


def test_a_token_across_the_boundary_is_context_and_counted(template):
    # In the large vocabularies two line breaks are one token; here the prompt ends with one and the answer begins so.
    tokenizer = copy.deepcopy(template["qwen2_5"].tokenizer)
    tokenizer.add_tokens(["\n\n"])
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n\nanswer"}]
    [example] = tokenize(conversation(chat), ChatTemplate(tokenizer), data())
    assert example.straddling == 1
    assert supervised(example, tokenizer) == ["\nanswer<|im_end|>"]


def test_all_supervises_every_token_except_the_first(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [example] = tokenize(conversation(chat), template["qwen2_5"], data(loss_on="all"))
    assert example.labels == [IGNORED, *example.input_ids[1:]]


def test_a_last_turn_that_is_not_trained_teaches_nothing(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]
    assert tokenize(conversation(chat), template["qwen2_5"], data(loss_on="last_turn")) == []


def test_a_checkpoint_that_thinks_in_its_content_gets_the_reasoning_there(template):
    """QwQ's prompt opens the think block, and its template knows no reasoning_content."""
    first = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    chat = [{"role": "user", "content": "q"}, first, {"role": "user", "content": "q"}, {**first, "content": "b"}]
    one, other = tokenize(conversation(chat), template["qwq"], data())
    tokenizer = template["qwq"].tokenizer
    assert supervised(one, tokenizer) == ["r\n</think>\n\na<|im_end|>"]
    assert supervised(other, tokenizer) == ["r\n</think>\n\nb<|im_end|>"]
    assert text_of(other, template).count("<think>") == 1


def test_a_checkpoint_that_always_thinks_is_trained_on_the_reasoning_of_the_example(template):
    """Its prompt is the same with thinking and without: a turn without reasoning closes the block at once."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [example] = tokenize(conversation(chat), template["qwen3_thinking_2507"], data())
    assert supervised(example, template["qwen3_thinking_2507"].tokenizer) == ["\n</think>\n\na<|im_end|>"]


def test_a_bare_function_is_served_as_a_tool(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [bare], [wrapped] = (
        tokenize(conversation(chat, [tool]), template["qwen3"], data())
        for tool in (TOOLS[1], {"type": "function", "function": TOOLS[1]})
    )
    assert text_of(bare, template) == text_of(wrapped, template)
    assert '{"type": "function", "function": {"name": "now"' in text_of(bare, template)


def test_text_that_spells_control_tokens_is_distinguished_from_them(template):
    chat = [{"role": "user", "content": "What is <|im_end|>?"}, {"role": "assistant", "content": "<|im_end|>!"}]
    [sample] = render_samples(conversation(chat), template["qwen3"], data(special_tokens_in_text="neutralize"))
    [learned_range] = sample.spans
    # An end of turn in an answer does not end it.
    assert sample.text[slice(*learned_range)] == "<|im_end|>!<|im_end|>"
    assert [sample.text[slice(*literal)] for literal in sample.literals] == ["<|im_end|>"] * 2
    assert sample.literals[1][0] == learned_range[0]
    plain = [{**turn, "content": turn["content"].replace("<|im_end|>", "0123456789")} for turn in chat]
    [other] = render_samples(conversation(plain), template["qwen3"], data())
    assert sample.text == other.text.replace("0123456789", "<|im_end|>")
    assert (sample.spans, other.literals) == (other.spans, ())
