"""The chat templates of the Qwen families.

TRL's package carries the originals of most. The others are made from those by small edits, each named below, or written
here in our own words where no original is near. `scripts/evidence/golden_renders` compares the derived ones with the
originals, where someone has them at hand.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_OPEN_PROMPT = "    {{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}"


@dataclass(frozen=True)
class Revision:
    """A template and what its family is known to do with reasoning, from the family's documentation.

    `reasoning`: rendered from the key `reasoning_content`, taken from the content after a prompt that opens a think
    block, or not known at all. `drops`: what the template passes over without a word. `parses_blocks`: it takes a
    think block out of the content by itself. `variables`: what an example may set, beside the switches of thinking.
    """

    name: str
    text: str
    reasoning: Literal["field", "content", "nowhere"]
    drops: tuple[Literal["tools", "late system"], ...] = ()
    parses_blocks: bool = False
    variables: tuple[str, ...] = ()


def _original(name: str) -> str:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def _edited(text: str, *edits: tuple[str, str]) -> str:
    for old, new in edits:
        assert old in text, f"TRL's template has changed: {old}"
        text = text.replace(old, new)
    return text


def _math() -> str:
    return _edited(
        _original("qwen2_5"),
        (
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
            r"Please reason step by step, and put your final answer within \\boxed{}.",
        ),
    )


def _qwq() -> str:
    """Qwen2.5 without a default system text, that cuts the thinking out of earlier turns and opens it in the prompt."""
    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    cut = "(message.content if loop.last else message.content.split('</think>')[-1].lstrip('\\n'))"
    return _edited(
        _original("qwen2_5"),
        ("    {%- else %}\n        {{- '<|im_start|>system\\n" + default + "<|im_end|>\\n' }}\n", ""),
        (default, ""),
        (' or (message.role == "assistant" and not message.tool_calls)', ""),
        ("            {{- '\\n' + message.content }}", "            {{- '\\n' + " + cut + " }}"),
        # A turn without calls has its line break even where it has no content.
        (
            '    {%- elif message.role == "assistant" %}',
            '    {%- elif message.role == "assistant" and not message.tool_calls %}\n'
            "        {{- '<|im_start|>assistant\\n' + " + cut + " + '<|im_end|>\\n' }}\n"
            '    {%- elif message.role == "assistant" %}',
        ),
        ("    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}", _OPEN_PROMPT),
    )


def _qwen3_early() -> str:
    """The first revision trusted every content to be a text, and distinguished absent reasoning from null."""
    return _edited(
        _original("qwen3"),
        ('message.role == "user" and message.content is string and', 'message.role == "user" and'),
        (
            "    {%- if message.content is string %}\n        {%- set content = message.content %}\n"
            "    {%- else %}\n        {%- set content = '' %}\n    {%- endif %}\n",
            "    {%- set content = message.content %}\n",
        ),
        (
            "message.reasoning_content is string",
            "message.reasoning_content is defined and message.reasoning_content is not none",
        ),
    )


def _thinking_2507() -> str:
    """Qwen3 whose thinking cannot be switched off."""
    text = _original("qwen3")
    prompt = text[text.rindex("    {{- '<|im_start|>assistant") :]
    return _edited(text, (prompt, _OPEN_PROMPT))


def _kept_thinking() -> str:
    """A user's edit of Qwen3 that leaves the reasoning in earlier turns, for agents."""
    return _edited(_original("qwen3"), ("loop.index0 > ns.last_query_index", "reasoning_content or loop.last"))


def _coder() -> str:
    """The documented format of Qwen3-Coder; how to call tools is said in the words of Qwen3.5, which are the same."""
    [how_to_call] = re.findall(r"'(\\n\\nIf you choose to call a function.*?</IMPORTANT>)'", _original("qwen3_5_think"))
    return (
        r"""
{%- macro others(fields, known) -%}
{%- for key, value in (fields or {}).items() if key not in known -%}
{{ '\n<' ~ key ~ '>' ~ (value if value is string or value is number else value | tojson) ~ '</' ~ key ~ '>' }}
{%- endfor -%}
{%- endmacro -%}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- if messages[0].role == 'system' or tools -%}
{{ '<|im_start|>system\n' }}
{{- system or 'You are Qwen, a helpful AI assistant that can interact with a computer to solve tasks.' }}
{%- if tools -%}
{{ '\n\n# Tools\n\nYou have access to the following functions:\n\n<tools>' }}
{%- for tool in tools -%}
{%- set tool = tool.function or tool -%}
{{ '\n<function>\n<name>' ~ tool.name ~ '</name>' }}
{%- if tool.description is defined -%}{{ '\n<description>' ~ tool.description.strip() ~ '</description>' }}{%- endif -%}
{{ '\n<parameters>' }}
{%- for name, fields in ((tool.parameters or {}).properties or {}).items() -%}
{{ '\n<parameter>\n<name>' ~ name ~ '</name>' }}
{%- if fields.type is defined -%}{{ '\n<type>' ~ fields.type ~ '</type>' }}{%- endif -%}
{%- if fields.description is defined -%}
{{ '\n<description>' ~ fields.description.strip() ~ '</description>' }}
{%- endif -%}
{{ others(fields, ['name', 'type', 'description']) ~ '\n</parameter>' }}
{%- endfor -%}
{{ others(tool.parameters, ['type', 'properties']) ~ '\n</parameters>' }}
{{- others(tool, ['type', 'name', 'description', 'parameters']) ~ '\n</function>' }}
{%- endfor -%}
{{ '\n</tools>"""
        + how_to_call
        + r"""' }}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- for turn in turns -%}
{%- if turn.role == 'tool' -%}
{{ '<|im_start|>user\n' if loop.previtem and loop.previtem.role != 'tool' else '' }}
{{- '<tool_response>\n' ~ turn.content ~ '\n</tool_response>\n' }}
{{- '<|im_end|>\n' if loop.last or loop.nextitem.role != 'tool' else '' }}
{%- elif turn.tool_calls -%}
{{ '<|im_start|>assistant' ~ ('\n' ~ turn.content.strip() ~ '\n' if turn.content.strip() else '') }}
{%- for call in turn.tool_calls -%}
{{ '\n<tool_call>\n<function=' ~ call.function.name ~ '>\n' }}
{%- for name, value in call.function.arguments.items() -%}
{{ '<parameter=' ~ name ~ '>\n' }}
{{- value | tojson if value is mapping or value is sequence and value is not string else value }}
{{- '\n</parameter>\n' }}
{%- endfor -%}
{{ '</function>\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- else -%}
{{ '<|im_start|>' ~ turn.role ~ '\n' ~ turn.content ~ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}"""
    )


REVISIONS = {
    revision.name: revision
    for revision in (
        # Qwen2.5-Coder has this text too.
        Revision("qwen2_5", _original("qwen2_5"), "nowhere"),
        Revision("qwen2_5_math", _math(), "nowhere"),
        Revision("qwen2_5_vl", _original("qwen2_5_vl"), "nowhere", ("tools",), variables=("add_vision_id",)),
        Revision("qwq", _qwq(), "content"),
        Revision("qwen3", _original("qwen3"), "field", parses_blocks=True),
        Revision("qwen3_early", _qwen3_early(), "field", parses_blocks=True),
        Revision("qwen3_kept_thinking", _kept_thinking(), "field", parses_blocks=True),
        Revision("qwen3_instruct_2507", _original("qwen3_instruct_2507"), "nowhere"),
        Revision("qwen3_thinking_2507", _thinking_2507(), "field", parses_blocks=True),
        Revision("qwen3_coder", _coder(), "nowhere"),
        Revision("qwen3_vl", _original("qwen3_vl"), "nowhere", ("late system",), variables=("add_vision_id",)),
        Revision(
            "qwen3_5_think", _original("qwen3_5_think"), "field", parses_blocks=True, variables=("add_vision_id",)
        ),
        Revision(
            "qwen3_5_nothink", _original("qwen3_5_nothink"), "field", parses_blocks=True, variables=("add_vision_id",)
        ),
        Revision("qwen3_6", _original("qwen3_6"), "field", parses_blocks=True, variables=("add_vision_id",)),
        Revision("qwen3_8", _original("qwen3_8"), "field", variables=("add_vision_id", "reasoning_effort")),
    )
}
