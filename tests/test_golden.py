"""What the toolkit renders, to the byte, against files that a slow reading of the definition made.

`scripts/evidence/golden_renders` writes the files and says where the templates come from.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from templates import REVISIONS

from qwen_tune.chatml.conversation import Conversation
from qwen_tune.chatml.template import ChatTemplate, render_samples
from qwen_tune.data.messages import parse_messages, parse_tools
from qwen_tune.errors import ExampleError
from qwen_tune.recipe.schema import DataSpec, SourceSpec

GOLDEN = Path(__file__).with_name("golden")


def lines(name):
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").splitlines()]


CONVERSATIONS = {row["id"]: row for row in lines("conversations.jsonl")}
RENDERS = lines("renders.jsonl")


def rendered(row, template):
    messages, warnings = parse_messages(row["messages"])
    conversation = Conversation(
        "golden.jsonl:1",
        "golden",
        messages,
        parse_tools(row.get("tools")),
        row.get("chat_template_kwargs", {}),
        warnings,
    )
    data = DataSpec(train=[SourceSpec(path="golden.jsonl")], **row.get("options", {}))
    return [
        {"text": sample.text, "supervised": [sample.text[slice(*span)] for span in sample.spans]}
        | ({"literals": [sample.text[slice(*span)] for span in sample.literals]} if sample.literals else {})
        for sample in render_samples(conversation, template, data)
    ]


def test_there_are_enough_of_them():
    assert len(RENDERS) == len(CONVERSATIONS) * len(REVISIONS)
    assert sum("samples" in entry for entry in RENDERS) >= 300
    assert len(REVISIONS) >= 12


@pytest.mark.parametrize("name", REVISIONS)
def test_renders_are_the_golden_ones(tiny_tokenizer, name):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = REVISIONS[name].text
    template = ChatTemplate(tokenizer)
    assert (template.reasoning, template.parses_blocks) == (REVISIONS[name].reasoning, REVISIONS[name].parses_blocks)
    for entry in RENDERS:
        if entry["template"] != name:
            continue
        row = CONVERSATIONS[entry["conversation"]]
        if "error" in entry:
            with pytest.raises(ExampleError) as caught:
                rendered(row, template)
            assert entry["error"] in caught.value.what, entry["conversation"]
        else:
            assert rendered(row, template) == entry["samples"], entry["conversation"]
