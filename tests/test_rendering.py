"""Conversations rendered by plans against the same conversations rendered by Jinja, one by one."""

from __future__ import annotations

import json

import pytest
from conversations import data, for_each_template, with_template
from hypothesis import event
from hypothesis import strategies as st
from templates import REVISIONS
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from qwen_tune.chatml import rendering
from qwen_tune.chatml.conversation import Conversation, Message
from qwen_tune.chatml.rendering import SEEN_BEFORE_PLANNED, TURNS_PLANNED, Renderer, SamplePlan
from qwen_tune.chatml.template import ChatTemplate, render_samples
from qwen_tune.errors import ExampleError, ModelError

HOOKED = """
{%- macro twice(text) %}{{ text }}{{ text }}{% endmacro -%}
{%- set ns = namespace(seen='') -%}{%- set word = 'abc magic' -%}
{%- for message in messages -%}
{%- set c = message.content -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'user' -%}HOOK{%- endif -%}
{{ message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def when(condition: str) -> str:
    return f"{{% if {condition} %}}YES{{% endif %}}"


# What an edited template may do with a text `c`; "magic" and a long text are where most of these change their minds.
HOOKS = [
    "{{ c|length }}",
    when("c|length > 20"),
    when("c|count > 20"),
    when("c|list|length > 20"),
    when("(c|string)|length < 6"),
    "{% for i in range(c|length) %}.{% endfor %}",
    "{{ c[:3] }}",
    "{{ c[0] }}{{ c[-1] }}",
    "{{ c[::-1] }}",
    "{{ c|first }}{{ c|last }}",
    "{{ c|reverse }}",
    "{% for letter in c %}{{ letter }}.{% endfor %}",
    "{{ c|upper }}",
    "{{ c.upper() }}",
    "{{ c.title() }}",
    when("c.isdigit()"),
    when("c is lower"),
    "{{ c|replace('a', 'b') }}",
    "{{ c.replace('a', 'b') }}",
    "{{ c.split('a')[0] }}",
    "{{ c.partition('a')[0] }}",
    "{{ c.splitlines()|length }}",
    "{{ c|wordcount }}{{ c|int }}",
    "{{ c.encode() }}",
    "{{ c * 2 }}{{ 2 * c }}",
    # Texts put together, and questions to what comes of it.
    "{{ c ~ '!' }}",
    "{{ c + '!' }}{{ '!' + c }}",
    when("('!' + c) == '!magic'"),
    when("(c ~ '') == 'magic'"),
    when("'magic' in (c ~ '')"),
    when("(c ~ 'x')|length > 20"),
    when("((c ~ '') ~ '').startswith('magic')"),
    when("(c ~ '').upper() == 'MAGIC'"),
    when("(c ~ c) in ['magicmagic']"),
    "{{ {'magic': 1}.get(c ~ '') }}",
    "{% if c ~ '' == 'magic' %}{{ raise_exception('no') }}{% endif %}",
    "{% set ns.seen = ns.seen + c %}" + when("'magic' in ns.seen"),
    "{% set ns.seen = ns.seen ~ c %}" + when("'magic' in ns.seen"),
    "{% set x %}{{ c }}!{% endset %}" + when("x == 'magic!'"),
    "{% set x %} {{ c }} {% endset %}" + when("x|trim == 'magic'"),
    "{{ twice(c) }}",
    when("twice(c) == 'magicmagic'"),
    "{{ [c, 'a']|join }}",
    when("ns.seen.join([c]) == 'magic'"),
    when("word.join([c, c])|length > 60"),
    when("('%s' % c) == 'magic'"),
    when("('%s' % (c,)) == 'magic'"),
    "{{ '%.3s' % (c,) }}",
    "{{ '%r' % (c,) }}",
    "{{ '%a' % (c,) }}",
    "{{ '{}'.format(c) }}",
    "{{ (word ~ '{:.3}').format(c) }}",
    "{{ '%s'|format(c) }}",
    # Where a text is looked for in another, rather than the other way round.
    when("c in 'abc magic'"),
    when("c in word"),
    when("c in ('abc ' ~ 'magic')"),
    when("c in message.role"),
    when("c in eos_token"),
    when("c in ['abc', 'magic']"),
    when("c in {'abc': 1}"),
    when("c is in ['magic']"),
    when("'magic' in [c]"),
    when("'magic' in message.values()"),
    when("'abc magic'.startswith(c)"),
    when("word.startswith(c)"),
    when("word.find(c) >= 0"),
    "{{ word.count(c) }}",
    "{{ word.replace(c, '') }}",
    "{{ word.split(c)|length }}",
    "{{ {'magic': 1}[c] }}{{ {'magic': 1}.get(c) }}",
    # Texts compared with each other.
    when("c == messages[0].content"),
    when("c.startswith(messages[0].content)"),
    when("messages[0].content in c"),
    "{{ c.strip(messages[0].content) }}",
    when("message == messages[0]"),
    "{% for m in messages %}{{ 'C' if loop.changed(m.content) }}{% endfor %}",
    when("c < 'b'"),
    when("'b' < c"),
    "{{ [c, 'm']|max }}{{ [c, 'm']|sort }}",
    when("[c] == ['magic']"),
    when("{'a': c} == {'a': 'magic'}"),
    when("c == []"),
    # Texts in another spelling.
    "{{ c|tojson }}",
    "{{ c|tojson(ensure_ascii=true) }}",
    "{{ message|tojson(ensure_ascii=true) }}",
    when("c|tojson|length > 22"),
    when("'magic' in (c|tojson)"),
    when("messages|tojson|length > 200"),
    "{{ [c] }}",
    "{{ message }}",
    "{{ dict(a=c) }}",
    when("[c]|string|length > 24"),
    when("'magic' in message|string"),
    "{{ c|safe }}",
    when("(c|safe) == 'magic'"),
    when("c|safe|length > 20"),
    "{{ strftime_now(c) }}",
    when("strftime_now(c ~ '') == 'magic'"),
    # Questions whose answer is hidden after another.
    when("c is string and c == 'magic'"),
    when("c is sequence and c == 'magic'"),
    when("c is iterable and c == 'magic'"),
    when("c.parts is not defined and c == 'magic'"),
    when("c.record is not defined and c == 'magic'"),
    "{{ c|default('x', true) }}{{ c or 'x' }}{{ 'x' if c else 'y' }}",
    "{{ c.strip() }}{{ c.strip('m') }}{{ c|trim('m') }}{{ c.lstrip('\\n') }}",
    when("c.endswith(('c', 'magic'))"),
    "{% if c == 'magic' %}{{ raise_exception('no') }}{% endif %}",
    "{% for m in messages if m.content == 'magic' %}YES{% endfor %}",
    "{{ messages|selectattr('content', 'equalto', 'magic')|list|length }}",
    "{{ messages|groupby('content')|length }}",
    "{% for key, value in message|items %}{{ key }}{{ value }}{% endfor %}",
    "{% for key, value in message.items() %}" + when("value == 'magic'") + "{% endfor %}",
    "{% set j = joiner(c) %}{{ j() }}{{ j() }}",
    "{% set j = cycler(c, 'x') %}" + when("j.next() == 'magic'"),
    "{% set other = namespace(x=c) %}" + when("other.x == 'magic'"),
    "{% filter trim %} {{ c }} {% endfilter %}",
]

EQUALITY_HOOKS = [
    when("c == messages[0].content"),
    when("c != messages[0].content"),
    when("c is sameas messages[0].content"),
    when("c in messages[0].content"),
    when("message == messages[0]"),
    when("messages.index(message) == 0"),
    "{{ messages|map(attribute='content')|unique|list|length }}",
]

TRIGGERS = [
    "magic",
    "magic ",
    "  magic",
    "\n\nmagic",
    "abc",
    "a",
    "m",
    "im_end",
    "user",
    "x magic y",
    "magicmagic",
    "9",
    "b" * 40,
    "é漢🙂",
    "<tool_response>",
]


def dialogue(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(Message(roles[index % 2], text) for index, text in enumerate(texts))
    return Conversation("rows.jsonl:1", "rows", messages)


def outcome(render):
    """The samples, or the words of the refusal."""
    try:
        return [(sample.text, sample.spans, sample.literals) for sample in render()]
    except ExampleError as error:
        return error.what, error.fix


def renders_alike(renderer: Renderer, conversation: Conversation) -> bool:
    expected = outcome(lambda: render_samples(conversation, renderer.template, renderer.data))
    found = outcome(lambda: renderer.render(conversation))
    assert found == expected
    return isinstance(expected, list)


def used(renderer: Renderer) -> int:
    return sum(plan.used for plan in renderer.plans.values() if plan)


@pytest.fixture(scope="module")
def load(tiny_tokenizer):
    return lambda text: with_template(tiny_tokenizer, text)


@pytest.fixture(scope="module")
def renderers(load):
    """One for each template and data section, kept: plans come with the number of conversations."""
    templates = {name: load(revision.text) for name, revision in REVISIONS.items()}
    made: dict[tuple[str, str], Renderer] = {}

    def renderer(name: str, **options: str) -> Renderer:
        key = (name, repr(sorted(options.items())))
        if key not in made:
            made[key] = Renderer(templates[name], data(**options))
        return made[key]

    return renderer


contents = st.one_of(
    st.text(min_size=1, max_size=8),
    st.text(st.sampled_from('ab <>|\n\t{}"\\é漢🙂\ue0f7\u2028'), min_size=1, max_size=12),
    st.tuples(
        st.sampled_from(["", " ", "\n", "\n\n", "\u00a0", "\x1c"]),
        st.sampled_from(
            [
                "a",
                "<",
                "<|",
                "<t",
                "<think",
                "<tool_response>",
                "<tool_response>\n1\n</tool_response>",
                "</tool_response>",
                "<think>a</think>b",
                "a</think>b",
                "think>",
                "<tool_call>",
                "<|im_end",
                "im_end|>",
                "|>",
                "</",
                "S",
                "assistant",
            ]
        ),
        st.sampled_from(["", " ", "\n", "\n\n", "<", "</tool_response>", "\u00a0"]),
    ).map("".join),
).filter(lambda text: text.strip())


@st.composite
def shapes(draw):
    """Roles, which turns reason, which are trained."""
    turns = [("system", False, True)] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(("user", False, True))
        if draw(st.integers(0, 9)) == 4:
            turns.append(("user", False, True))
        turns.append(("assistant", draw(st.booleans()), draw(st.integers(0, 4)) != 3))
        if draw(st.integers(0, 15)) == 7:
            turns.append(("assistant", False, True))
    if draw(st.integers(0, 15)) == 7:
        turns.insert(draw(st.integers(1, len(turns) - 1)), ("system", False, True))
    return tuple(turns)


def with_texts(shape, texts) -> Conversation:
    texts = iter(texts)
    messages = [
        Message(role, next(texts), next(texts) if reasons else None, train=train) for role, reasons, train in shape
    ]
    return Conversation("rows.jsonl:1", "rows", tuple(messages))


@for_each_template(examples=25)
def test_plans_render_what_the_template_renders(renderers, name, drawn):
    options = {
        "loss_on": drawn.draw(st.sampled_from(["assistant", "assistant", "last_turn", "all"])),
        "thinking": drawn.draw(st.sampled_from(["auto", "auto", "auto", "off", "require"])),
        "special_tokens_in_text": drawn.draw(st.sampled_from(["reject", "neutralize"])),
    }
    shape = drawn.draw(shapes())
    if REVISIONS[name].reasoning == "nowhere" and drawn.draw(st.integers(0, 9)) < 9:
        shape = tuple((role, False, train) for role, _, train in shape)
    renderer = renderers(name, **options)
    for number in range(SEEN_BEFORE_PLANNED + 1):
        plain = with_texts(shape, [f"text {number} of {place}" for place in range(2 * len(shape))])
        renders_alike(renderer, plain)
    for _ in range(3):
        texts = [drawn.draw(contents) for _ in range(2 * len(shape))]
        if drawn.draw(st.booleans()):
            texts = [text if index == 1 else f"text {index}" for index, text in enumerate(texts)]
        plans_used = used(renderer)
        renders_alike(renderer, with_texts(shape, texts))
        event("by plan" if used(renderer) > plans_used else "by Jinja")


def test_plain_chats_are_rendered_by_plans(renderers):
    planned = set()
    for name in REVISIONS:
        renderer = renderers(name, system="of this test alone")
        always_thinks = REVISIONS[name].reasoning == "content"
        for number in range(SEEN_BEFORE_PLANNED + 3):
            chat = dialogue(*(f"text {number}.{place}" for place in range(2 if always_thinks else 4)))
            if always_thinks:
                chat = with_texts((("user", False, True), ("assistant", True, True)), ("q", f"a{number}", "because"))
            assert renders_alike(renderer, chat)
        if used(renderer) == 3:
            planned.add(name)
    assert len(planned) >= 12, f"by Jinja alone: {set(REVISIONS) - planned}"


@pytest.mark.parametrize("hook", HOOKS)
def test_edited_templates_render_equal_whatever_they_ask(load, hook):
    try:
        renderer = Renderer(load(HOOKED.replace("HOOK", hook)), data())
    except ModelError:
        return  # it cannot even render a question, so nothing is trained with it
    for _ in range(SEEN_BEFORE_PLANNED + 1):
        renders_alike(renderer, dialogue("a plain question", "an answer", "another", "and its answer"))
    for text in TRIGGERS:
        for texts in (
            (text, "ok", "more", "ok"),
            ("magic", "ok", text, "ok"),
            (text, f"x{text}y", f"q{text}", text),
        ):
            renders_alike(renderer, dialogue(*texts))


def test_keys_of_a_turn_that_are_no_texts_reach_the_template(load):
    """tool_call_id stands on tool turns as a rule; an example may have it anywhere."""
    renderer = Renderer(load(HOOKED.replace("HOOK", "{{ message.tool_call_id or 'none' }}")), data())
    messages = dialogue("q", "a").messages
    for _ in range(SEEN_BEFORE_PLANNED + 2):
        renders_alike(renderer, dialogue("q", "a"))
    for call_id in ("call-7", "<|im_end|>"):
        marked = Message("user", "q", tool_call_id=call_id)
        renders_alike(renderer, Conversation("rows.jsonl:1", "rows", (marked, messages[1])))


def test_white_space_before_an_answer_behind_reasoning(renderers):
    """QwQ gets its reasoning in the content, where line breaks before the answer are cut off."""
    for name in REVISIONS:
        renderer = renderers(name)
        for answer in ("a", "b", "c", "d", "\na", "\n\n a", " \na", "a\n"):
            turns = (Message("user", "q"), Message("assistant", answer, "because"))
            renders_alike(renderer, Conversation("rows.jsonl:1", "rows", turns))


def test_an_end_of_turn_that_is_no_special_token_is_looked_for_in_the_texts(tiny_tokenizer):
    spelled = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    for token in spelled["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>" and token["special"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spelled)))
    tokenizer.chat_template = REVISIONS["qwen3"].text
    renderer = Renderer(ChatTemplate(tokenizer), data())
    for number in range(SEEN_BEFORE_PLANNED + 2):
        renders_alike(renderer, dialogue("q", f"a{number}"))
    renders_alike(renderer, dialogue("q", "a<|im_end|>b"))


def test_unusual_examples_are_rendered_by_the_reference(renderers):
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    tool = {"name": "add", "parameters": {"type": "object"}}
    for name in REVISIONS:
        renderer = renderers(name)
        plain = dialogue("q", "a")
        for _ in range(SEEN_BEFORE_PLANNED + 2):
            renders_alike(renderer, plain)
        calls = (
            Message("user", "q"),
            Message("assistant", "", tool_calls=(call,)),
            Message("tool", "3"),
            Message("assistant", "a"),
        )
        for conversation in (
            Conversation("r:1", "r", plain.messages, chat_template_kwargs={"enable_thinking": True}),
            Conversation("r:1", "r", plain.messages, tools=(tool,)),
            Conversation("r:1", "r", calls, tools=(tool,)),
            Conversation("r:1", "r", (Message("user", "q", name="Ada"), Message("assistant", "a"))),
            Conversation("r:1", "r", (Message("user", "q <|im_end|>"), Message("assistant", "a"))),
            Conversation("r:1", "r", (Message("user", "q"), Message("assistant", " \n"))),
        ):
            renders_alike(renderer, conversation)


def test_equal_texts_of_a_conversation_are_distinguished(renderers, load):
    """The same string object in several turns, and equal ones that are not the same."""
    for name in REVISIONS:
        renderer = renderers(name, system="of equal texts alone")
        renderers_of_hooks = [Renderer(load(HOOKED.replace("HOOK", hook)), data()) for hook in EQUALITY_HOOKS]
        for one in [renderer, *(renderers_of_hooks if name == "qwen3" else [])]:
            for number in range(SEEN_BEFORE_PLANNED + 2):
                renders_alike(one, dialogue(*(f"text {number}.{place}" for place in range(4))))
            for word in ("same", "magic", "text 0.0", "a"):
                copied = ["".join(list(word)) for _ in range(4)]
                for texts in ([word] * 4, copied, [word, "other", word, word], [word, word, "other", word]):
                    renders_alike(one, dialogue(*texts))


def test_long_conversations_are_never_planned(renderers):
    """A plan renders every turn on stand-ins, prompt and answer: minutes for a thousand turns."""
    renderer = renderers("qwen2_5", system="of long ones alone")
    for turns in (TURNS_PLANNED, TURNS_PLANNED + 2):
        for number in range(SEEN_BEFORE_PLANNED + 2):
            assert renders_alike(renderer, dialogue(*(f"text {number}.{place}" for place in range(turns))))
    assert [len(shape) for shape in renderer.plans] == [TURNS_PLANNED]
    assert not renderer.seen


def test_shapes_that_come_once_do_not_fill_the_memory(load, monkeypatch):
    monkeypatch.setattr(rendering, "SHAPES_COUNTED", 5)
    monkeypatch.setattr(rendering, "PLANS_KEPT", 1)
    renderer = Renderer(load(REVISIONS["qwen3_instruct_2507"].text), data())
    for turns in range(2, 32, 2):
        renderer.render(dialogue(*"abcdefghijklmnopqrstuvwxyzABCDEFG"[:turns]))
        assert len(renderer.seen) <= 5
    for _ in range(SEEN_BEFORE_PLANNED + 2):
        renderer.render(dialogue("q", "a"))
    renderer.render(dialogue("q", "a", "q", "a"))
    assert len(renderer.plans) == 1


def test_a_plan_that_gives_another_text_is_a_bug(load, monkeypatch):
    """And detected under `python -O` too."""
    renderer = Renderer(load(REVISIONS["qwen3"].text), data())
    monkeypatch.setattr(SamplePlan, "fill", lambda self, texts: None)
    for _ in range(SEEN_BEFORE_PLANNED):
        renderer.render(dialogue("q", "a"))
    with pytest.raises(RuntimeError, match=r"rows\.jsonl:1: the plan for conversations of this shape"):
        renderer.render(dialogue("q", "a"))
