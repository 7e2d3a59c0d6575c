"""The definition of the loss mask, read slowly and literally, apart from the code that it judges.

It works on examples as they stand in a file and on what is documented of a family (`Revision`), where the toolkit
parses examples and learns a template by rendering. Nothing here comes from `qwen_tune`.
"""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass

import jinja2

IGNORED = -100
END = "<|im_end|>"
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


class RefusedError(Exception):
    """The example must not be trained; carries words that the message has to contain."""


@dataclass(frozen=True)
class Expected:
    """A sample: its text, its supervised character ranges, and where text only looks like control tokens."""

    text: str
    spans: tuple[tuple[int, int], ...]
    literals: tuple[tuple[int, int], ...] = ()

    @property
    def supervised(self):
        return [self.text[start:end] for start, end in self.spans]


def expected_samples(row, revision, tokenizer, options):
    """What an example has to become. `options` are fields of the recipe's data section."""
    row = copy.deepcopy(row)
    kwargs = row.get("chat_template_kwargs") or {}
    codes = {}
    if options.get("special_tokens_in_text") == "neutralize":
        row = _encoded(row, codes)
    elif any(token in json.dumps(row) for token in CONTROL):
        raise RefusedError("control token")
    messages = row["messages"]
    trained = [message.pop("train", True) for message in messages]
    for message in messages:
        _clean(message)
    reasons = [_take_reasoning(message, revision) for message in messages]
    _refuse_variables(kwargs, revision)
    if options.get("thinking") == "off" and any(reasons):
        raise RefusedError("data.thinking is off")
    tools = [tool if "type" in tool else {"type": "function", "function": tool} for tool in row.get("tools") or []]

    def render(upto, thinks, prompt=False):
        try:
            return tokenizer.apply_chat_template(
                messages[:upto],
                tools=tools or None,
                add_generation_prompt=prompt,
                tokenize=False,
                **{"enable_thinking": thinks, **kwargs},
            )
        except jinja2.TemplateError as error:
            raise RefusedError(str(error)) from None

    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if options.get("loss_on") == "last_turn":
        turns = turns[-1:]
    if options.get("loss_on") == "all":
        if not all(trained):
            raise RefusedError("contradicts loss_on: all")
        _require(turns, reasons, revision, options)
        text = render(len(messages), any(reasons))
        blocks = text.split("<|im_start|>assistant\n")[1:]
        lost = any(
            reasons[turn] and not _thinks(block, reasons[turn]) for turn, block in zip(turns, blocks, strict=True)
        )
        if lost or _loses(revision, messages, tools):
            raise RefusedError("leaves out")
        return [_decoded(text, [(0, len(text))], codes)]
    turns = [turn for turn in turns if trained[turn]]
    _require(turns, reasons, revision, options)
    samples = []
    for turn in turns:
        thinks = reasons[turn] is not None
        prompt, full = render(turn, thinks, prompt=True), render(turn + 1, thinks)
        if not full.startswith(prompt):
            raise RefusedError("does not start with the prompt")
        if _loses(revision, messages[: turn + 1], tools):
            raise RefusedError("leaves out")
        span = (len(prompt), full.index(END, len(prompt)) + len(END))
        if thinks and not _thinks(full[slice(*span)], reasons[turn]):
            raise RefusedError("leaves out")
        if samples and prompt.startswith(samples[-1][0]):
            samples[-1] = (full, [*samples[-1][1], span])
        else:
            samples.append((full, [span]))
    return [_decoded(text, spans, codes) for text, spans in samples]


def expected_labels(sample, tokenizer):
    """Ids and labels of a sample in which no text looks like a control token."""
    encoding = tokenizer(sample.text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    labels = [
        token if any(first <= start and end <= last for first, last in sample.spans) else IGNORED
        for token, (start, end) in pairs
    ]
    return encoding["input_ids"], [IGNORED, *labels[1:]]


def _refuse_variables(kwargs, revision):
    known = {"enable_thinking", "preserve_thinking", *revision.variables}
    if any(value is not None and name not in known for name, value in kwargs.items()):
        raise RefusedError("does not read")


def _clean(message):
    message["content"] = message.get("content") or ""
    if not (message.get("reasoning_content") or "").strip():
        message.pop("reasoning_content", None)
    calls = message.pop("tool_calls", None) or []
    for call in calls:
        arguments = call["function"]["arguments"]
        call["function"]["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
    if calls:
        message["tool_calls"] = calls


def _take_reasoning(message, revision):
    """The turn's reasoning; afterwards the message has it where the family's template looks for it."""
    reasoning = message.get("reasoning_content")
    if message["role"] != "assistant":
        return None
    if revision.reasoning == "nowhere":
        if reasoning is not None:
            raise RefusedError("leaves out")
        return None
    content = message["content"]
    if reasoning is not None and ("<think>" in reasoning or "</think>" in reasoning):
        raise RefusedError("think tags")
    if "<think>" in content or "</think>" in content:
        before, _, rest = content.partition("<think>")
        inside, _, answer = rest.partition("</think>")
        if before.strip() or content.count("<think>") != 1 or content.count("</think>") != 1 or "</think>" in before:
            raise RefusedError("think block")
        if reasoning is not None:
            raise RefusedError("both")
        if not answer.strip() and "tool_calls" not in message:
            raise RefusedError("no answer")
        if inside.strip() and revision.parses_blocks:
            # The template's own business: the message stays as it stands.
            return inside.strip()
        reasoning = inside.strip("\n") if inside.strip() else None
        content = answer.lstrip("\n")
    message["content"] = content
    message.pop("reasoning_content", None)
    if reasoning is not None and revision.reasoning == "field":
        message["reasoning_content"] = reasoning
    elif reasoning is not None:
        message["content"] = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
    return reasoning.strip() if reasoning is not None else None


def _require(turns, reasons, revision, options):
    if options.get("thinking") == "require":
        if turns and revision.reasoning == "nowhere":
            raise RefusedError("does not support thinking")
        if any(reasons[turn] is None for turn in turns):
            raise RefusedError("has no reasoning")


def _thinks(answer, reasoning):
    block, closed, _ = answer.partition("</think>")
    return bool(closed) and reasoning in block


def _loses(revision, messages, tools):
    if "tools" in revision.drops and (tools or any("tool_calls" in message for message in messages)):
        return True
    return "late system" in revision.drops and any(message["role"] == "system" for message in messages[1:])


def _encoded(value, codes):
    """The example with every control token as a code of its own, of the same length."""
    if isinstance(value, dict):
        return {_encoded(key, codes): _encoded(item, codes) for key, item in value.items()}
    if isinstance(value, list):
        return [_encoded(item, codes) for item in value]
    if not isinstance(value, str):
        return value
    for token in CONTROL:
        while token in value:
            code = f"Qz{len(codes):0{len(token) - 4}d}zQ"
            codes[code] = token
            value = value.replace(token, code, 1)
    return value


def _decoded(text, spans, codes):
    literals = []
    for code in codes:
        positions = [start for start in range(len(text)) if text.startswith(code, start)] if code in text else []
        literals += [(start, start + len(code)) for start in positions]
    for code, token in codes.items():
        text = text.replace(code, token)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(sorted(literals)))
    return Expected(text, tuple(spans), tuple(sorted(literals)))
