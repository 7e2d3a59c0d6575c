"""What a template cannot serve, and what an example can set in it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from conversations import TOOLS, conversation, data, supervised, tokenize, with_template
from templates import REVISIONS

from qwen_tune.chatml.template import ChatTemplate, render_samples
from qwen_tune.errors import ExampleError, ModelError

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


@pytest.fixture(scope="module")
def template(tiny_tokenizer):
    return {name: with_template(tiny_tokenizer, revision.text) for name, revision in REVISIONS.items()}


def test_supervising_every_token_keeps_the_other_rules(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    thinks = [chat[0], {**chat[1], "reasoning_content": "for a good reason"}]
    with pytest.raises(ExampleError, match="thinking is off"):
        tokenize(conversation(thinks), template["qwen3"], data(loss_on="all", thinking="off"))
    with pytest.raises(ExampleError, match="contradicts loss_on: all"):
        tokenize(conversation([chat[0], {**chat[1], "train": False}]), template["qwen3"], data(loss_on="all"))
    with pytest.raises(ExampleError, match="leaves out this assistant turn"):
        tokenize(conversation([*thinks, *chat]), template["qwen3"], data(loss_on="all"))


@pytest.mark.parametrize(
    ("name", "messages", "changes", "message"),
    [
        ("qwen2_5", [{"role": "assistant", "content": "a", "reasoning_content": "r"}], {}, "leaves out"),
        ("qwen3", [{"role": "assistant", "content": "a"}], {"thinking": "require"}, "has no reasoning"),
        (
            "qwen3",
            [{"role": "assistant", "content": "a", "reasoning_content": "r"}],
            {"thinking": "off"},
            "thinking is off",
        ),
        ("qwen3", [{"role": "assistant", "content": "<think>r a"}], {}, "not closed"),
        (
            "qwen3",
            [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
            {},
            "does not start with the prompt",
        ),
        ("qwen2_5", [{"role": "assistant", "content": "a <|im_end|> b"}], {}, r"control token <\|im_end\|>"),
        ("qwen3", [{"role": "assistant", "content": "r</think>a"}], {}, "not opened"),
        ("qwen3", [{"role": "assistant", "content": "a <think>r</think>"}], {}, "not at the start"),
        ("qwen3", [{"role": "assistant", "content": "<think>r</think> \n"}], {}, "no answer after"),
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
    with pytest.raises(ExampleError, match=message):
        tokenize(conversation(chat), template[name], data(**changes))


def test_an_example_that_contradicts_its_own_arguments_is_refused(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}]
    with pytest.raises(ExampleError, match="does not start with the prompt") as caught:
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
def test_an_example_sets_variables_of_the_template_only(template, name):
    """The tokenizer or Jinja uses the others: an example could replace the template, or break its loops."""
    with pytest.raises(ExampleError, match=f'sets "{name}", which examples must not set'):
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
    with pytest.raises(ExampleError, match=f'sets "{variable}", which this template does not read') as caught:
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


def test_switches_of_an_example_are_booleans(template):
    """Templates ask `is false`: the text "false" would leave thinking on without a word."""
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ExampleError, match="enable_thinking is 'false'; expected true or false"):
        tokenize(conversation(chat, enable_thinking="false"), template["qwen3"], data())
    null, absent = (tokenize(conversation(chat, **kwargs), template["qwen3"], data()) for kwargs in (NULLS, {}))
    assert null == absent


@pytest.mark.parametrize(
    ("name", "messages", "what", "fix"),
    [
        ("qwen3_5_think", LATE_SYSTEM, "System message must be at the beginning", "to the first system turn"),
        (
            "qwen3_8",
            [{"role": "user", "content": "<tool_response>\n1\n</tool_response>"}, LATE_SYSTEM[0]],
            "No user query found",
            "with the role tool",
        ),
        ("qwq", [LATE_SYSTEM[0]], "does not start with the prompt", "always thinks: add reasoning_content"),
    ],
)
def test_refusals_of_templates_come_with_a_fix(template, name, messages, what, fix):
    chat = messages if messages[0]["role"] == "user" else [{"role": "user", "content": "q"}, *messages]
    with pytest.raises(ExampleError, match=what) as caught:
        tokenize(conversation(chat), template[name], data())
    assert fix in caught.value.fix


def test_a_template_without_thinking_cannot_require_it(template):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nr\n</think>\n\na"}]
    with pytest.raises(ExampleError, match="this checkpoint's template does not support thinking"):
        tokenize(conversation(chat), template["qwen2_5"], data(thinking="require"))
    # There, think tags are a text like any other: what the template does not know it cannot switch off.
    [example] = tokenize(conversation(chat), template["qwen2_5"], data(thinking="off"))
    assert supervised(example, template["qwen2_5"].tokenizer) == ["<think>\nr\n</think>\n\na<|im_end|>"]


def test_a_lost_argument_is_missed(template, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REVISIONS["qwen3_5_think"].text.replace("{{- args_value }}", "")
    chat = conversation([{"role": "user", "content": "q"}, CALL], TOOLS)
    with pytest.raises(ExampleError, match='leaves out the call to "add" or a part of it'):
        render_samples(chat, ChatTemplate(tokenizer), data())
    assert "\n12345\n" in render_samples(chat, template["qwen3_5_think"], data())[0].text


@pytest.mark.parametrize(
    "written", ["tool | tojson(ensure_ascii=true)", "tool.function.name ~ tool.function.description[:-3]"]
)
def test_text_that_a_template_changes_cannot_be_kept_as_text(tiny_tokenizer, written):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for tool in tools or [] %}{{ " + written + " }}\n{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tools = [{"name": "end", "description": "Writes <|im_end|>"}]
    with pytest.raises(ExampleError, match="changes text that spells"):
        render_samples(conversation(chat, tools), ChatTemplate(tokenizer), data(special_tokens_in_text="neutralize"))


def test_a_template_that_drops_tools_or_text_is_refused(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[:5] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a long answer"}]
    with pytest.raises(ExampleError, match="leaves out a part"):
        tokenize(conversation(chat), ChatTemplate(tokenizer), data())
    with pytest.raises(ExampleError, match='leaves out the tool "add"'):
        tokenize(conversation([chat[0], {"role": "assistant", "content": "a"}], TOOLS), ChatTemplate(tokenizer), data())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no chat template"),
        ("{{ messages[0].content }}", "does not end turns"),
        ("{% if %}", "not valid Jinja: line 1"),
        ({"default": PLAIN, "tool_use": PLAIN}, r"several chat templates \(default, tool_use\)"),
        ("{{ raise_exception('no') }}", "cannot render"),
    ],
)
def test_templates_that_are_not_chatml_are_refused(tiny_tokenizer, text, message):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = text
    with pytest.raises(ModelError, match=message):
        ChatTemplate(tokenizer)
