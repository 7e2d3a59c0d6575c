"""Renders conversations fast: once per shape of conversation, then only texts are filled in.

`render_samples` is the reference, and renders every unusual conversation. Most conversations have one of a few shapes,
and the template tests their texts with the same results. For these a plan is made once, by `render_samples` on
stand-ins for the texts (see `tracing`), and is valid for all conversations that give the same results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

from qwen_tune.chatml.conversation import Conversation, Message
from qwen_tune.chatml.template import ChatTemplate, RenderedSample, render_samples
from qwen_tune.chatml.tracing import MARK, Guard, TracedTemplate, TracedText, UntraceableError
from qwen_tune.errors import ExampleError

if TYPE_CHECKING:
    from qwen_tune.recipe.schema import DataSpec

# A turn without its texts: its role, or (role, has reasoning, train) for a turn that is not plain.
Shape: TypeAlias = tuple[str | tuple[str, bool, bool], ...]

SEEN_BEFORE_PLANNED = 2  # a plan costs several renderings
PLANS_KEPT = 2000
TURNS_PLANNED = 32  # the cost of a plan grows with the square of the turns
SHAPES_COUNTED = 20_000  # a limit on memory if every example has another shape
CHECKED_EVERY = 500  # conversations of one shape


@dataclass(frozen=True)
class SamplePlan:
    """One sample of a shape: `parts` are fixed texts and numbers of fields, `spans` are ranges of parts."""

    parts: tuple[int | str, ...]
    spans: tuple[tuple[int, int], ...]

    @cached_property
    def _fixed(self) -> list[str]:
        return [part if isinstance(part, str) else "" for part in self.parts]

    @cached_property
    def _fields(self) -> list[tuple[int, int]]:
        return [(place, part) for place, part in enumerate(self.parts) if not isinstance(part, str)]

    def fill(self, texts: Sequence[str]) -> RenderedSample:
        """The sample with these texts in the fields."""
        pieces = self._fixed.copy()
        for place, field in self._fields:
            pieces[place] = texts[field]
        ends = [0, *accumulate(map(len, pieces))]
        return RenderedSample("".join(pieces), tuple([(ends[first], ends[last]) for first, last in self.spans]))


@dataclass
class ShapePlan:
    """The samples of a shape, and the conditions under which they are valid."""

    samples: tuple[SamplePlan, ...]
    guards: tuple[Guard, ...]
    used: int = 0


class Renderer:
    """Renders conversations as `render_samples` does.

    `plans` are those of the shapes planned so far (None: it cannot be planned), `seen` counts the shapes before that.
    """

    def __init__(self, template: ChatTemplate, data: DataSpec) -> None:
        self.template = template
        self.data = data
        self.plans: dict[Shape, ShapePlan | None] = {}
        self.seen: Counter[Shape] = Counter()
        self._traced: TracedTemplate | None = None
        # Without it every conversation is rendered by `render_samples`.
        with suppress(UntraceableError, ImportError):
            self._traced = TracedTemplate(template.source, template.tokenizer.special_tokens_map)

    def render(self, conversation: Conversation) -> list[RenderedSample]:
        """The samples of a conversation.

        Raises:
            ExampleError: See `render_samples`.
        """
        if self._traced is None:
            return render_samples(conversation, self.template, self.data)
        plain = conversation.plain
        shape, texts = (plain.roles, plain.texts) if plain is not None else _shape_and_texts(conversation)
        if not texts or len(shape) > TURNS_PLANNED or self._is_unusual("\0".join(texts)):
            return render_samples(conversation, self.template, self.data)
        plan = self._plan(shape)
        if plan is None or not all(guard.holds(texts) for guard in plan.guards):
            return render_samples(conversation, self.template, self.data)
        filled = [sample.fill(texts) for sample in plan.samples]
        plan.used += 1
        if plan.used % CHECKED_EVERY == 1 and filled != render_samples(conversation, self.template, self.data):
            raise RuntimeError(
                f"{conversation.source}: the plan for conversations of this shape gives another text than the chat "
                "template: please report this, with the template"
            )
        return filled

    def _is_unusual(self, text: str) -> bool:
        """Whether `render_samples` tests something of this text that plans do not cover."""
        # Looking for one character first takes a tenth of the time; most texts have none of these.
        if MARK in text or (">" in text and "think>" in text):
            return True
        return self.template.control_tokens.first_in(text) is not None

    def _plan(self, shape: Shape) -> ShapePlan | None:
        if shape in self.plans:
            return self.plans[shape]
        if len(self.plans) >= PLANS_KEPT:
            return None
        self.seen[shape] += 1
        if self.seen[shape] <= SEEN_BEFORE_PLANNED:
            if len(self.seen) > SHAPES_COUNTED:
                self.seen.clear()
            return None
        del self.seen[shape]
        plan = self.plans[shape] = self._make_plan(shape)
        return plan

    def _make_plan(self, shape: Shape) -> ShapePlan | None:
        assert self._traced is not None
        recording = _Recording(self.template)
        try:
            samples = render_samples(_stand_in_conversation(shape), recording, self.data)
            guards: list[Guard] = []
            for messages, kwargs, rendered in recording.calls:
                traced = [_traced_message(message, guards) for message in messages]
                if str.__str__(self._traced.render(traced, **kwargs)) != rendered:
                    return None
            guards += _divergence_guards([rendered for _, _, rendered in recording.calls])
            return ShapePlan(tuple(map(_to_plan, samples)), tuple(dict.fromkeys(guards)))
        except (UntraceableError, ExampleError):
            return None


class _Recording(ChatTemplate):
    """A template that records what was rendered."""

    def __init__(self, template: ChatTemplate) -> None:
        # Without probing the same template again.
        vars(self).update(vars(template))
        self.calls: list[tuple[Sequence[Mapping[str, Any]], dict[str, Any], str]] = []

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        text = super().render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, template_kwargs=template_kwargs
        )
        kwargs = {"add_generation_prompt": add_generation_prompt, "template_kwargs": template_kwargs}
        self.calls.append((messages, kwargs, text))
        return text


def _shape_and_texts(conversation: Conversation) -> tuple[Shape, list[str]]:
    """Shape and texts in order; no texts if the conversation is more than a shape and texts."""
    texts: list[str] = []
    if conversation.tools or conversation.chat_template_kwargs:
        return (), texts
    shape: list[tuple[str, bool, bool]] = []
    for message in conversation.messages:
        content, reasoning = message.content, message.reasoning_content
        if not content or message.role == "tool" or message.tool_calls or message.name or message.tool_call_id:
            return (), []
        texts.append(content)
        if reasoning is not None:
            # `render_samples` trims reasoning, and white space between it and the answer.
            if not reasoning or reasoning.strip() != reasoning or content[0] == "\n":
                return (), []
            texts.append(reasoning)
        shape.append((message.role, reasoning is not None, message.train))
    return tuple(shape), texts


def _stand_in_conversation(shape: Shape) -> Conversation:
    """A conversation of this shape with a stand-in for every text, numbered as in `_shape_and_texts`."""
    messages: list[Message] = []
    number = 0
    for turn in shape:
        role, reasons, train = (turn, False, True) if isinstance(turn, str) else turn
        content, reasoning = _stand_in(number), _stand_in(number + 1) if reasons else None
        messages.append(Message(role, content, reasoning, train=train))
        number += 2 if reasons else 1
    return Conversation("a shape", "a shape", tuple(messages))


def _stand_in(number: int) -> str:
    # With characters that JSON, HTML and changes of case would change.
    return f'{MARK}<&"Aa\\é{number}{MARK}'


def _parts(text: str) -> list[int | str]:
    """Fixed texts and numbers of stand-ins, in order."""
    pieces: list[int | str] = []
    for index, piece in enumerate(text.split(MARK)):
        if index % 2:
            number = int(piece.rpartition("é")[2])
            if _stand_in(number) != f"{MARK}{piece}{MARK}":
                raise UntraceableError("a stand-in was changed")
            pieces.append(number)
        elif piece:
            pieces.append(piece)
    return pieces


def _traced_message(message: Mapping[str, Any], guards: list[Guard]) -> dict[str, Any]:
    return {
        key: TracedText(value, tuple(_parts(value)), guards) if isinstance(value, str) and MARK in value else value
        for key, value in message.items()
    }


def _to_plan(sample: RenderedSample) -> SamplePlan:
    parts: list[int | str] = []
    spans: list[tuple[int, int]] = []
    position = 0
    for start, end in sample.spans:
        parts += _parts(sample.text[position:start])
        first = len(parts)
        parts += _parts(sample.text[start:end])
        spans.append((first, len(parts)))
        position = end
    parts += _parts(sample.text[position:])
    return SamplePlan(tuple(parts), tuple(spans))


def _divergence_guards(rendered: Sequence[str]) -> Iterator[Guard]:
    """Conditions on texts under which a rendering is not a prefix of the next one.

    Raises:
        UntraceableError: It depends on two texts.
    """
    for before, after in pairwise(rendered):
        if after.startswith(before) or before.startswith(after):
            continue
        position = next(index for index, (one, other) in enumerate(zip(before, after, strict=False)) if one != other)
        if before[:position].count(MARK) % 2:
            raise UntraceableError("renderings diverge between two texts")
        for text, other in ((before, after), (after, before)):
            if text[position] == MARK:
                # A text against something fixed: they diverge if the text starts with another character.
                field = _parts(text[position : text.index(MARK, position + 1) + 1])
                yield Guard(tuple(field), "startswith", (other[position],), False)
