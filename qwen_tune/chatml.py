"""From a conversation to the text that a server would send, and to the part of it that is learned.

The checkpoint's own chat template is the only authority: it renders everything here. For each trained assistant turn i

    P = template(messages[:i],   add_generation_prompt=True)     what a server sends before the model answers
    F = template(messages[:i+1])                                 the same with the answer

and the loss falls on what F adds to P, up to and including the end of the turn. Whether the next trained turn joins
this sample or begins a new one is decided by the texts alone: it joins while F is still a prefix of the next P. So
templates that leave a history as it was give one sample a conversation, and those that strip thinking from earlier
turns give one a turn; in both, the model learns from exactly the prompts that it will be given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from qwen_tune.conversation import Conversation, Message, RowError, tool_name
from qwen_tune.errors import ModelError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_tune.recipe import DataSpec

END_OF_TURN = "<|im_end|>"
IGNORED = -100  # the label of a token without loss, PyTorch's and Transformers' convention


@dataclass(frozen=True)
class RenderedSample:
    """A text as it will be trained. `spans` are the character ranges [start, end) that carry loss, in order."""

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenizedExample:
    """A sample as the model sees it.

    `labels` has one entry a token: the token's own id where it is learned, -100 elsewhere (the shift by one happens at
    the loss). `straddling` counts tokens that hold the end of a prompt and the start of an answer: they are context.
    """

    source: str
    source_name: str
    text: str
    input_ids: list[int]
    labels: list[int]
    straddling: int = 0
    truncated: bool = False

    @property
    def supervised(self) -> int:
        """How many tokens carry loss."""
        return len(self.labels) - self.labels.count(IGNORED)


class ChatTemplate:
    """The checkpoint's chat template with what was found out about it by rendering."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Probes the tokenizer's template.

        Raises:
            ModelError: There is no template, or it is not ChatML.
        """
        self.tokenizer = tokenizer
        self.end_of_turn_id: int = _end_of_turn_id(tokenizer)
        control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control_tokens = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "reasoning_content": "~why~"}]
        try:
            rendered = self.render(probe, template_kwargs={"enable_thinking": True})
        except RowError as problem:
            raise ModelError(
                Problem("chat template", f"it cannot render one question and answer: {problem.what}")
            ) from None
        if END_OF_TURN not in rendered:
            raise ModelError(
                Problem(
                    "chat template",
                    f"it does not end turns with {END_OF_TURN}; expected a ChatML template",
                    "use the checkpoint's own template, or a ChatML file in model.chat_template",
                )
            )
        self.renders_reasoning: bool = "~why~" in rendered

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = False,
        template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The template's text for some messages.

        Args:
            messages: As an OpenAI API takes them.
            tools: What the model may call.
            add_generation_prompt: Whether the text ends where the model is to answer.
            template_kwargs: Further variables of the template, such as enable_thinking.

        Raises:
            RowError: The template refuses them.
        """
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **template_kwargs,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from None
        assert isinstance(text, str)
        return text

    def control_token_in(self, text: str) -> str | None:
        """The first control token that a text spells out, if any."""
        match = self._control_tokens.search(text)
        return match.group() if match else None


def render_samples(conversation: Conversation, template: ChatTemplate, data: DataSpec) -> list[RenderedSample]:
    """Renders a conversation to one sample or several.

    Raises:
        RowError: The conversation cannot be trained as the template and the recipe want it.
    """
    _refuse_control_tokens(conversation, template)
    conversation = _with_reasoning_apart(conversation, template)
    messages = [message.for_template() for message in conversation.messages]
    tools = conversation.tools
    if data.loss_on == "all":
        return [_render_whole(conversation, template, data)]
    samples: list[RenderedSample] = []
    for index in _trained_turns(conversation, data.loss_on):
        kwargs = {
            "enable_thinking": _enable_thinking(conversation.messages[index], index, data.thinking),
            **conversation.chat_template_kwargs,
        }
        prompt = template.render(messages[:index], tools=tools, add_generation_prompt=True, template_kwargs=kwargs)
        full = template.render(messages[: index + 1], tools=tools, template_kwargs=kwargs)
        if not full.startswith(prompt):
            raise RowError(
                f"messages[{index}]: with this turn the template writes another text than the prompt that a server "
                "would send for it, so what is trained would not be what is served",
                _why_not_a_prefix(conversation, index, kwargs),
            )
        span = (len(prompt), _end_of_answer(full, len(prompt), index))
        _refuse_losses(conversation, index, prompt, full[slice(*span)])
        if samples and prompt.startswith(samples[-1].text):
            samples[-1] = RenderedSample(full, (*samples[-1].spans, span))
        else:
            samples.append(RenderedSample(full, (span,)))
    return samples


def _render_whole(conversation: Conversation, template: ChatTemplate, data: DataSpec) -> RenderedSample:
    """The conversation in one piece, every token of it learned."""
    answers = [(index, turn) for index, turn in enumerate(conversation.messages) if turn.role == "assistant"]
    if any(not turn.train for _, turn in answers):
        raise RowError('"train": false contradicts loss_on: all', "remove it, or write loss_on: assistant")
    thinks = [_enable_thinking(turn, index, data.thinking) for index, turn in answers]
    kwargs = {"enable_thinking": any(thinks), **conversation.chat_template_kwargs}
    messages = [message.for_template() for message in conversation.messages]
    text = template.render(messages, tools=conversation.tools, template_kwargs=kwargs)
    for index, _ in answers:
        _refuse_losses(conversation, index, text, text)
    return RenderedSample(text, ((0, len(text)),))


def tokenize(conversation: Conversation, template: ChatTemplate, data: DataSpec) -> list[TokenizedExample]:
    """Renders a conversation and turns each sample into token ids and labels.

    A text is tokenized whole and labels are found by offsets: tokens of segments that are tokenized apart and joined
    differ from what a server sees, wherever white space meets a boundary.

    Raises:
        RowError: See `render_samples`.
    """
    samples = render_samples(conversation, template, data)
    return [_encode(sample, conversation, template, must_end=data.loss_on != "all") for sample in samples]


def _encode(
    sample: RenderedSample, conversation: Conversation, template: ChatTemplate, *, must_end: bool
) -> TokenizedExample:
    encoding = template.tokenizer(sample.text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoding["input_ids"]
    offsets: list[tuple[int, int]] = encoding["offset_mapping"]
    labels = [IGNORED] * len(ids)
    straddling = 0
    token = 0
    for start, end in sample.spans:
        while token < len(ids) and offsets[token][0] < start:
            if offsets[token][1] > start:
                straddling += 1
            token += 1
        first = token
        while token < len(ids) and offsets[token][1] <= end:
            labels[token] = ids[token]
            token += 1
        if must_end and (token == first or ids[token - 1] != template.end_of_turn_id):
            raise RowError(f"the tokenizer does not end the answer with {END_OF_TURN}")
    if labels:
        labels[0] = IGNORED  # nothing precedes it, so nothing can predict it
    return TokenizedExample(
        conversation.source, conversation.source_name, sample.text, ids, labels, straddling=straddling
    )


def _trained_turns(conversation: Conversation, loss_on: str) -> list[int]:
    turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    if loss_on == "last_turn":
        turns = turns[-1:]
    return [index for index in turns if conversation.messages[index].train]


def _enable_thinking(message: Message, index: int, thinking: str) -> bool:
    reasons = message.reasoning_content is not None
    if thinking == "off" and reasons:
        raise RowError(
            f"messages[{index}] reasons, and the recipe says data.thinking: off",
            "remove the reasoning, or write thinking: auto",
        )
    if thinking == "require" and not reasons:
        raise RowError(
            f"messages[{index}] does not reason, and the recipe says data.thinking: require",
            "add reasoning_content, or write thinking: auto",
        )
    return reasons


def _refuse_control_tokens(conversation: Conversation, template: ChatTemplate) -> None:
    for text in conversation.texts():
        if token := template.control_token_in(text):
            raise RowError(
                f"the text spells the control token {token}, which would be read as the end or start of a turn",
                "remove it from the text",
            )


def _with_reasoning_apart(conversation: Conversation, template: ChatTemplate) -> Conversation:
    """Moves inline `<think>…</think>` to `reasoning_content` where the template knows it."""
    messages: list[Message] = []
    for index, message in enumerate(conversation.messages):
        if message.reasoning_content is not None and not template.renders_reasoning:
            raise RowError(
                f"messages[{index}] has reasoning_content, which this checkpoint's template leaves out",
                "remove it, or train a checkpoint that thinks",
            )
        if message.role == "assistant" and template.renders_reasoning and message.content:
            message = _split_inline_thinking(message, index)
        messages.append(message)
    return replace(conversation, messages=tuple(messages))


def _split_inline_thinking(message: Message, index: int) -> Message:
    content = message.content or ""
    if "<think>" not in content and "</think>" not in content:
        return message
    match = re.fullmatch(r"\s*<think>(?P<reasoning>.*?)</think>(?P<answer>.*)", content, re.DOTALL)
    if match is None or "<think>" in match["reasoning"] + match["answer"] or "</think>" in match["answer"]:
        raise RowError(
            f"messages[{index}] has a think block that is not closed, or not at the start of the answer",
            "write <think>…</think> once, before the answer, or use reasoning_content",
        )
    if message.reasoning_content is not None:
        raise RowError(f"messages[{index}] has both reasoning_content and a <think> block", "keep one of them")
    reasoning = match["reasoning"].strip("\n").strip()
    return replace(message, content=match["answer"].lstrip("\n"), reasoning_content=reasoning or None)


def _end_of_answer(full: str, start: int, index: int) -> int:
    position = full.find(END_OF_TURN, start)
    if position < 0:
        raise RowError(f"messages[{index}]: the chat template does not close the turn with {END_OF_TURN}")
    end = position + len(END_OF_TURN)
    if full[end:].strip():
        raise RowError(f"messages[{index}]: the chat template writes text behind the end of the turn")
    return end


def _refuse_losses(conversation: Conversation, index: int, prompt: str, answer: str) -> None:
    """A template may leave out what it does not know; what a row teaches must be in the text that is trained."""
    message = conversation.messages[index]
    taught = [message.content, message.reasoning_content, *(call["function"]["name"] for call in message.tool_calls)]
    if any(text and text.strip() not in answer for text in taught):
        raise RowError(f"messages[{index}]: the chat template leaves out a part of this turn")
    for tool in conversation.tools:
        if tool_name(tool) not in prompt:
            raise RowError(
                f'the chat template leaves out the tool "{tool_name(tool)}"', "use a checkpoint that knows tools"
            )


def _why_not_a_prefix(conversation: Conversation, index: int, kwargs: Mapping[str, Any]) -> str:
    message = conversation.messages[index]
    if index > 0 and conversation.messages[index - 1].role == "assistant":
        return "join two assistant turns in a row into one"
    if message.reasoning_content is not None and not kwargs.get("enable_thinking"):
        return "the turn reasons while thinking is off: remove enable_thinking from the row's chat_template_kwargs"
    return "does this template close the system or tool turns differently when an answer follows?"


def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if not tokenizer.chat_template:
        raise ModelError(
            Problem(
                "tokenizer",
                "it has no chat template, so nothing says how conversations are written",
                "use an Instruct checkpoint, or give a .jinja file in model.chat_template",
            )
        )
    ids = tokenizer.encode(END_OF_TURN, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(Problem("tokenizer", f"{END_OF_TURN} is not one token: is this a Qwen tokenizer?"))
    return int(ids[0])
