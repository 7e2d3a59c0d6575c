"""Conversations under the families' templates, as several test files make them."""

from __future__ import annotations

import copy
import itertools
import os
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import REVISIONS

from qwen_tune.chatml.conversation import Conversation
from qwen_tune.chatml.encoder import NOT_ENDED, Encoder
from qwen_tune.chatml.template import IGNORED, ChatTemplate, TokenizedExample, render_samples
from qwen_tune.data.messages import parse_messages, parse_tools
from qwen_tune.errors import ExampleError
from qwen_tune.recipe.schema import DataSpec, SourceSpec

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},
    {"name": "now", "description": "The time."},
]


def data(**changes) -> DataSpec:
    return DataSpec(train=[SourceSpec(path="rows.jsonl")], **changes)


def conversation(messages, tools=None, **kwargs) -> Conversation:
    parsed, warnings = parse_messages(messages)
    return Conversation("rows.jsonl:1", "rows", parsed, parse_tools(tools), kwargs, warnings)


def with_template(tokenizer, text: str) -> ChatTemplate:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


@lru_cache(maxsize=8)
def exact_encoder(template: ChatTemplate) -> Encoder:
    return Encoder(template, fast=None)


def tokenize(conversation: Conversation, template: ChatTemplate, data: DataSpec) -> list[TokenizedExample]:
    """The samples of one conversation, rendered by Jinja and encoded by the checkpoint's tokenizer alone."""
    samples = render_samples(conversation, template, data)
    encoded = exact_encoder(template).encode(samples)
    if data.loss_on != "all" and not encoded.ended.all():
        raise ExampleError(NOT_ENDED)
    labels = np.where(encoded.loss_mask, encoded.ids.astype(np.int64), IGNORED)
    ends = np.cumsum(encoded.lengths)
    return [
        TokenizedExample(
            conversation.source,
            conversation.source_name,
            encoded.ids[end - length : end].tolist(),
            labels[end - length : end].tolist(),
            straddling=int(straddling),
        )
        for end, length, straddling in zip(ends, encoded.lengths, encoded.straddling, strict=True)
    ]


def supervised(example, tokenizer) -> list[str]:
    groups = itertools.groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in group]) for is_supervised, group in groups if is_supervised]


def for_each_template(examples: int):
    """So many drawn conversations for each template; ORACLE_EXAMPLES asks for more, as in scripts/evidence/oracle."""

    def decorate(test):
        test = given(drawn=st.data())(test)
        test = settings(
            max_examples=int(os.environ.get("ORACLE_EXAMPLES", examples)),
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        )(test)
        return pytest.mark.parametrize("name", REVISIONS)(test)

    return decorate
