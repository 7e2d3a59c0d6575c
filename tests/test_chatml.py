"""The loss mask against a slow, independent reading of its definition, over the families' own templates."""

from __future__ import annotations

import copy
import itertools
import json
import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from oracle import RefusedError, expected_labels, expected_samples
from templates import REVISIONS

from qwen_tune.chatml import IGNORED, ChatTemplate, render_samples
from qwen_tune.conversation import Conversation, parse_tools
from qwen_tune.encoder import tokenize
from qwen_tune.errors import ModelError
from qwen_tune.messages import parse_messages
from qwen_tune.recipe import DataSpec, SourceSpec
from qwen_tune.row_error import RowError

# Conversations for each template; scripts/evidence/oracle asks for more.
EXAMPLES = int(os.environ.get("ORACLE_EXAMPLES", "200"))
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},
    {"name": "now", "description": "The time."},
]


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"x": 12345, "how": "exactly"}}}],
}
NULLS = {"enable_thinking": None, "preserve_thinking": None}
LATE_SYSTEM = [
    {"role": "assistant", "content": "a"},
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
]


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def data(**changes) -> DataSpec:
    return DataSpec(train=[SourceSpec(path="rows.jsonl")], **changes)


def conversation(messages, tools=None, **kwargs) -> Conversation:
    parsed, warnings = parse_messages(messages)
    return Conversation("rows.jsonl:1", "rows", parsed, parse_tools(tools), kwargs, warnings)


@pytest.fixture(scope="module")
def template(tiny_tokenizer):
    def load(text: str) -> ChatTemplate:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = text
        return ChatTemplate(tokenizer)

    return {name: load(revision.text) for name, revision in REVISIONS.items()}


def learned(example, tokenizer) -> list[str]:
    groups = itertools.groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in group]) for is_learned, group in groups if is_learned]


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


@pytest.mark.parametrize("name", REVISIONS)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(drawn=st.data())
def test_labels_equal_the_oracle(template, name, drawn):
    row, options = drawn.draw(rows(REVISIONS[name]))
    tokenizer = template[name].tokenizer
    parsed = conversation(row["messages"], row.get("tools"), **row.get("chat_template_kwargs", {}))
    try:
        expected = expected_samples(row, REVISIONS[name], tokenizer, options)
    except RefusedError:
        # Why, and in which words, is in the golden files; here a row may have several faults.
        event("refused")
        with pytest.raises(RowError):
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
    assert learned(example, template["qwen2_5"].tokenizer) == ["hello<|im_end|>", "ok<|im_end|>"]
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
    assert learned(first, tokenizer) == ["<think>\na greeting\n</think>\n\nhello<|im_end|>"]
    # The empty think block belongs to the prompt: learning it would teach a hybrid model never to think.
    assert learned(second, tokenizer) == ["ok<|im_end|>"]
    assert "a greeting" not in text_of(second, template)
    assert text_of(second, template).endswith("<think>\n\n</think>\n\nok<|im_end|>\n")


def test_blank_reasoning_is_none(template):
    """It must not switch thinking on: an empty think block would be learned."""
    blank = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": " \n"}]
    [example] = tokenize(conversation(blank), template["qwen3"], data())
    assert learned(example, template["qwen3"].tokenizer) == ["a<|im_end|>"]
    with pytest.raises(RowError, match="does not reason"):
        tokenize(conversation(blank), template["qwen3"], data(thinking="require"))


def test_learning_all_of_a_text_keeps_the_other_rules(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    thinks = [chat[0], {**chat[1], "reasoning_content": "for a good reason"}]
    with pytest.raises(RowError, match="thinking: off"):
        tokenize(conversation(thinks), template["qwen3"], data(loss_on="all", thinking="off"))
    with pytest.raises(RowError, match="contradicts loss_on: all"):
        tokenize(conversation([chat[0], {**chat[1], "train": False}]), template["qwen3"], data(loss_on="all"))
    with pytest.raises(RowError, match="leaves out this assistant turn"):
        tokenize(conversation([*thinks, *chat]), template["qwen3"], data(loss_on="all"))


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
        assert learned(example, template["qwen3"].tokenizer) == ["a<|im_end|>"]


def test_control_tokens_in_inline_thinking_are_told_apart_too(template):
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
    assert learned(example, tokenizer) == ["\nanswer<|im_end|>"]


def test_all_learns_every_token_but_the_first(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [example] = tokenize(conversation(chat), template["qwen2_5"], data(loss_on="all"))
    assert example.labels == [IGNORED, *example.input_ids[1:]]


def test_a_last_turn_that_is_not_trained_teaches_nothing(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]
    assert tokenize(conversation(chat), template["qwen2_5"], data(loss_on="last_turn")) == []


@pytest.mark.parametrize(
    ("name", "messages", "changes", "message"),
    [
        ("qwen2_5", [{"role": "assistant", "content": "a", "reasoning_content": "r"}], {}, "leaves out"),
        ("qwen3", [{"role": "assistant", "content": "a"}], {"thinking": "require"}, "does not reason"),
        (
            "qwen3",
            [{"role": "assistant", "content": "a", "reasoning_content": "r"}],
            {"thinking": "off"},
            "thinking: off",
        ),
        ("qwen3", [{"role": "assistant", "content": "<think>r a"}], {}, "not closed"),
        ("qwen3", [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], {}, "another text"),
        ("qwen2_5", [{"role": "assistant", "content": "a <|im_end|> b"}], {}, r"control token <\|im_end\|>"),
        ("qwen3", [{"role": "assistant", "content": "r</think>a"}], {}, "not opened"),
        ("qwen3", [{"role": "assistant", "content": "a <think>r</think>"}], {}, "not at the start"),
        ("qwen3", [{"role": "assistant", "content": "<think>r</think> \n"}], {}, "no answer behind"),
        (
            "qwen3",
            [{"role": "assistant", "content": "a", "reasoning_content": "<think>r</think>"}],
            {},
            "spells think tags",
        ),
        ("qwen3_vl", LATE_SYSTEM, {}, "leaves out this system turn"),
        # The text is there, but once for two turns.
        (
            "qwen3_vl",
            [*LATE_SYSTEM[:2], {**LATE_SYSTEM[2], "content": "Be brief."}, LATE_SYSTEM[3]],
            {},
            "leaves out this",
        ),
        (
            "qwen2_5_vl",
            [{**CALL, "train": False}, {"role": "assistant", "content": "a"}],
            {},
            "leaves out this assistant",
        ),
        ("qwen2_5_vl", [CALL], {}, 'leaves out the call to "add"'),
    ],
)
def test_what_a_template_cannot_serve_is_refused(template, name, messages, changes, message):
    chat = [{"role": "user", "content": "q"}, *messages]
    with pytest.raises(RowError, match=message):
        tokenize(conversation(chat), template[name], data(**changes))


def test_a_row_that_contradicts_its_own_arguments_is_refused(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    with pytest.raises(RowError, match="another text") as caught:
        tokenize(conversation(chat, enable_thinking=False), template["qwen3"], data())
    assert "enable_thinking" in caught.value.fix


@pytest.mark.parametrize(
    "name",
    [
        *("self", "messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "continue_final_message"),
        *("eos_token", "pad_token", "bos_token"),
        *("range", "dict", "namespace", "raise_exception", "strftime_now", "lipsum", "cycler", "joiner"),
    ],
)
def test_a_row_sets_variables_of_the_template_only(template, name):
    """The rest are the tokenizer's and Jinja's own: a row could bring another template along, or break its loops."""
    with pytest.raises(RowError, match=f'sets "{name}", which no row can set'):
        render_samples(replace(conversation(CHAT), chat_template_kwargs={name: 1}), template["qwen3"], data())


@pytest.mark.parametrize(
    ("name", "variable", "fix"),
    [
        ("qwen3", "enable_thinkng", "write enable_thinking"),
        ("qwen3_6", "preserve_thoughts", "write preserve_thinking"),
        ("qwen3_8", "reasoning_efort", "write reasoning_effort"),
        ("qwen2_5", "language", "remove it"),
        # Read only where the template has set it before.
        ("qwen3", "reasoning_content", "remove it"),
        ("qwen3_5_think", "content", "remove it"),
    ],
)
def test_a_variable_that_the_template_does_not_read_is_missed(template, name, variable, fix):
    with pytest.raises(RowError, match=f'sets "{variable}", which this template does not read') as caught:
        tokenize(conversation(CHAT, **{variable: False}), template[name], data())
    assert caught.value.fix == fix
    assert tokenize(conversation(CHAT, **{variable: None}), template[name], data())


def test_switches_of_thinking_are_legal_on_every_family(template):
    for name, loaded in template.items():
        chat = [CHAT[0], {**CHAT[1], **({"reasoning_content": "r"} if REVISIONS[name].reasoning == "content" else {})}]
        assert tokenize(conversation(chat, enable_thinking=False, preserve_thinking=True), loaded, data())
    [low], [plain] = (
        render_samples(conversation(CHAT, enable_thinking=True, **kwargs), template["qwen3_8"], data())
        for kwargs in ({"reasoning_effort": "low"}, {})
    )
    assert "effort is set to low" in low.text
    assert "effort is set to xhigh" in plain.text


@pytest.mark.parametrize(
    "default",
    ["{% if style is not defined %}{% set style = 'x' %}{% endif %}", "{% set style = style | default('x') %}"],
)
def test_a_variable_with_a_default_in_the_template_is_one_of_it(tiny_tokenizer, default):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = default + "{{ '<|im_start|>system\n' + style + '<|im_end|>\n' }}" + PLAIN
    for kwargs, style in (({}, "x"), ({"style": "terse"}, "terse")):
        [sample] = render_samples(conversation(CHAT, **kwargs), ChatTemplate(tokenizer), data())
        assert sample.text.startswith(f"<|im_start|>system\n{style}<|im_end|>")


def test_switches_of_a_row_are_booleans(template):
    """Templates ask `is false`: the text "false" would leave thinking on without a word."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(RowError, match="enable_thinking is 'false'; expected true or false"):
        tokenize(conversation(chat, enable_thinking="false"), template["qwen3"], data())
    null, absent = (tokenize(conversation(chat, **kwargs), template["qwen3"], data()) for kwargs in (NULLS, {}))
    assert null == absent


@pytest.mark.parametrize(
    ("name", "messages", "what", "fix"),
    [
        ("qwen3_5_think", LATE_SYSTEM, "System message must be at the beginning", "in the first system turn"),
        (
            "qwen3_8",
            [{"role": "user", "content": "<tool_response>\n1\n</tool_response>"}, LATE_SYSTEM[0]],
            "No user query found",
            "with the role tool",
        ),
        ("qwq", [LATE_SYSTEM[0]], "another text", "always thinks: add reasoning_content"),
    ],
)
def test_refusals_of_templates_come_with_a_fix(template, name, messages, what, fix):
    chat = messages if messages[0]["role"] == "user" else [{"role": "user", "content": "q"}, *messages]
    with pytest.raises(RowError, match=what) as caught:
        tokenize(conversation(chat), template[name], data())
    assert fix in caught.value.fix


def test_a_template_without_thinking_cannot_require_it(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nr\n</think>\n\na"}]
    with pytest.raises(RowError, match="this checkpoint's template has no thinking"):
        tokenize(conversation(chat), template["qwen2_5"], data(thinking="require"))
    # There, think tags are a text like any other: what the template does not know it cannot switch off.
    [example] = tokenize(conversation(chat), template["qwen2_5"], data(thinking="off"))
    assert learned(example, template["qwen2_5"].tokenizer) == ["<think>\nr\n</think>\n\na<|im_end|>"]


def test_a_checkpoint_that_thinks_in_its_content_gets_the_reasoning_there(template):
    """QwQ's prompt opens the think block, and its template knows no reasoning_content."""
    first = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    chat = [{"role": "user", "content": "q"}, first, {"role": "user", "content": "q"}, {**first, "content": "b"}]
    one, other = tokenize(conversation(chat), template["qwq"], data())
    tokenizer = template["qwq"].tokenizer
    assert learned(one, tokenizer) == ["r\n</think>\n\na<|im_end|>"]
    assert learned(other, tokenizer) == ["r\n</think>\n\nb<|im_end|>"]
    assert text_of(other, template).count("<think>") == 1


def test_a_checkpoint_that_always_thinks_learns_what_the_row_shows(template):
    """Its prompt is the same with thinking and without: a turn without reasoning closes the block at once."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [example] = tokenize(conversation(chat), template["qwen3_thinking_2507"], data())
    assert learned(example, template["qwen3_thinking_2507"].tokenizer) == ["\n</think>\n\na<|im_end|>"]


def test_a_bare_function_is_served_as_a_tool(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    [bare], [wrapped] = (
        tokenize(conversation(chat, [tool]), template["qwen3"], data())
        for tool in (TOOLS[1], {"type": "function", "function": TOOLS[1]})
    )
    assert text_of(bare, template) == text_of(wrapped, template)
    assert '{"type": "function", "function": {"name": "now"' in text_of(bare, template)


def test_a_lost_argument_is_missed(template, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REVISIONS["qwen3_5_think"].text.replace("{{- args_value }}", "")
    chat = conversation([{"role": "user", "content": "q"}, CALL], TOOLS)
    with pytest.raises(RowError, match='leaves out the call to "add" or a part of it'):
        render_samples(chat, ChatTemplate(tokenizer), data())
    assert "\n12345\n" in render_samples(chat, template["qwen3_5_think"], data())[0].text


def test_text_that_spells_control_tokens_is_told_apart_from_them(template):
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


@pytest.mark.parametrize(
    "written", ["tool | tojson(ensure_ascii=true)", "tool.function.name ~ tool.function.description[:-3]"]
)
def test_text_that_a_template_respells_cannot_be_told_apart(tiny_tokenizer, written):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ " + written + " }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tools = [{"name": "end", "description": "Writes <|im_end|>"}]
    with pytest.raises(RowError, match="changes text that spells"):
        render_samples(conversation(chat, tools), ChatTemplate(tokenizer), data(special_tokens_in_text="neutralize"))


def test_a_template_that_drops_tools_or_text_is_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:5] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a long answer"}]
    with pytest.raises(RowError, match="leaves out a part"):
        tokenize(conversation(chat), ChatTemplate(tokenizer), data())
    with pytest.raises(RowError, match='leaves out the tool "add"'):
        tokenize(conversation([chat[0], {"role": "assistant", "content": "a"}], TOOLS), ChatTemplate(tokenizer), data())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no chat template"),
        ("{{ messages[0].content }}", "does not end turns"),
        ("{% if %}", "cannot be read: line 1"),
        ({"default": PLAIN, "tool_use": PLAIN}, r"several chat templates \(default, tool_use\)"),
        ("{{ raise_exception('no') }}", "cannot render"),
    ],
)
def test_templates_that_are_not_chatml_are_refused(tiny_tokenizer, text, message):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = text
    with pytest.raises(ModelError, match=message):
        ChatTemplate(tokenizer)
