"""The loss mask against a slow, independent reading of its definition, over the families' own templates."""

from __future__ import annotations

import copy
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen_tune.chatml import IGNORED, ChatTemplate, tokenize
from qwen_tune.conversation import Conversation, RowError, parse_messages, parse_tools
from qwen_tune.errors import ModelError
from qwen_tune.recipe import DataSpec, SourceSpec

TEMPLATES = ("qwen2_5", "qwen3", "qwen3_instruct_2507")
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]


def data(**changes) -> DataSpec:
    return DataSpec(train=[SourceSpec(path="rows.jsonl")], **changes)


def conversation(messages, tools=None, **kwargs) -> Conversation:
    parsed, warnings = parse_messages(messages)
    return Conversation("rows.jsonl:1", "rows", parsed, parse_tools(tools), kwargs, warnings)


@pytest.fixture(scope="module")
def template(tiny_tokenizer, official_template):
    def load(name: str) -> ChatTemplate:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = official_template(name)
        return ChatTemplate(tokenizer)

    return {name: load(name) for name in TEMPLATES}


def learned(example, tokenizer) -> list[str]:
    groups = itertools.groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in group]) for is_learned, group in groups if is_learned]


def oracle(messages, tools, template, loss_on="assistant"):
    """Ids and labels of each trained turn alone, character by character, as the definition has them."""
    tokenizer = template.tokenizer
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if loss_on == "last_turn":
        turns = turns[-1:]
    for turn in turns:
        if messages[turn].get("train") is False:
            continue
        clean = [{key: value for key, value in message.items() if key != "train"} for message in messages]
        thinks = "reasoning_content" in messages[turn]
        arguments = {"tools": tools, "tokenize": False, "enable_thinking": thinks}
        prompt = tokenizer.apply_chat_template(clean[:turn], add_generation_prompt=True, **arguments)
        full = tokenizer.apply_chat_template(clean[: turn + 1], **arguments)
        assert full.startswith(prompt)
        end = full.index("<|im_end|>", len(prompt)) + len("<|im_end|>")
        encoding = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
        labels = [
            token if start >= len(prompt) and stop <= end else IGNORED
            for token, (start, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        ]
        yield encoding["input_ids"], labels


def answers(ids, labels):
    """What a sample teaches: every labelled token with all that the model sees before it."""
    return {(tuple(ids[:position]), label) for position, label in enumerate(labels) if label != IGNORED}


words = st.text(st.sampled_from("abc é\n.?!\t1漢"), min_size=1, max_size=12).filter(str.strip)


@st.composite
def chats(draw, reasoning: bool):
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    tools = TOOLS if draw(st.booleans()) else None
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(words)})
        if tools and draw(st.booleans()):
            call = {"type": "function", "function": {"name": "add", "arguments": {"x": draw(words)}}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages += [{"role": "tool", "content": draw(words)} for _ in range(draw(st.integers(1, 2)))]
        answer = {"role": "assistant", "content": draw(words)}
        if reasoning and draw(st.booleans()):
            answer["reasoning_content"] = draw(words)
        if draw(st.integers(0, 4)) == 0:
            answer["train"] = False
        messages.append(answer)
    return messages, tools


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data(), loss_on=st.sampled_from(["assistant", "last_turn"]))
def test_labels_equal_the_oracle(template, name, drawn, loss_on):
    messages, tools = drawn.draw(chats(reasoning=template[name].renders_reasoning))
    examples = tokenize(conversation(messages, tools), template[name], data(loss_on=loss_on))
    taught = [answers(example.input_ids, example.labels) for example in examples]
    expected = [answers(ids, labels) for ids, labels in oracle(messages, tools, template[name], loss_on)]
    assert set().union(*taught) == set().union(*expected)
    # Nothing is taught twice: samples are disjoint.
    assert sum(map(len, taught)) == len(set().union(*expected))


def test_qwen2_5_chats_stay_one_sample_and_leave_the_injected_system_text_alone(template):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "ok"},
    ]
    [example] = tokenize(conversation(chat), template["qwen2_5"], data())
    assert learned(example, template["qwen2_5"].tokenizer) == ["hello<|im_end|>", "ok<|im_end|>"]
    assert example.text.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")


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
    assert "a greeting" not in second.text
    assert second.text.endswith("<think>\n\n</think>\n\nok<|im_end|>\n")


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
    with pytest.raises(RowError, match="leaves out a part"):
        tokenize(conversation([*thinks, *chat]), template["qwen3"], data(loss_on="all"))


def test_inline_think_blocks_are_the_same_as_reasoning_content(template):
    inline = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>why</think>a"}]
    apart = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "why"}]
    [one] = tokenize(conversation(inline), template["qwen3"], data())
    [other] = tokenize(conversation(apart), template["qwen3"], data())
    assert one.input_ids == other.input_ids
    assert one.labels == other.labels


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


@pytest.mark.parametrize("name", ["self", "messages"])
def test_arguments_of_a_row_are_never_a_traceback(template, name):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(RowError, match=f"refuses the conversation: .*{name}"):
        template["qwen3"].render(chat, template_kwargs={name: 1})


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
        ("{% if %}", "cannot render"),
        ("{{ raise_exception('no') }}", "cannot render"),
    ],
)
def test_templates_that_are_not_chatml_are_refused(tiny_tokenizer, text, message):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = text
    with pytest.raises(ModelError, match=message):
        ChatTemplate(tokenizer)
