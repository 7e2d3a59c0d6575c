"""Chat templates that would take the machine down, rendered where they cannot."""

from __future__ import annotations

import copy
import time

import pytest

from qwen_tune.chatml.template import ChatTemplate
from qwen_tune.errors import ModelError

LOOPS = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
BOMBS = [
    "{{ 'a' * 3000000000 }}",
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{{ '%3000000000d' % 1 }}",
    "{{ 'a' | center(3000000000) }}",
    "{{ [0] * 1000000000 }}",
]


def with_template(tokenizer, before: str):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = before + tokenizer.chat_template
    return changed


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_template_of_gigabytes_is_refused(tiny_tokenizer, bomb):
    with pytest.raises(ModelError, match="it takes more than 1 GiB of memory"):
        ChatTemplate(with_template(tiny_tokenizer, bomb))


def test_a_template_without_an_end_is_refused(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("qwen_tune.chatml.sandbox.SECONDS", 1)
    before = time.process_time()
    with pytest.raises(ModelError, match="it takes more than 1 seconds"):
        ChatTemplate(with_template(tiny_tokenizer, LOOPS))
    assert time.process_time() - before < 30  # all of the looping was the child's


def test_a_template_that_is_refused_for_another_reason_is_reported_as_before(tiny_tokenizer):
    with pytest.raises(ModelError, match=r"it cannot render one question and answer: .*no tools today"):
        ChatTemplate(with_template(tiny_tokenizer, "{{ raise_exception('no tools today') }}"))


def test_the_sandbox_keeps_templates_from_python(tiny_tokenizer):
    for escape in ("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}"):
        with pytest.raises(ModelError):
            ChatTemplate(with_template(tiny_tokenizer, escape))
