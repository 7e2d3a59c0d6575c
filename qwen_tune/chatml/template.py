"""Renders a conversation to the text that a server would send, and finds the parts of it that are supervised.

Everything is rendered by the checkpoint's own chat template. For each trained assistant turn i

    P = template(messages[:i],   add_generation_prompt=True)     what a server sends before the model answers
    F = template(messages[:i+1])                                 the same with the answer

and the loss is computed on what F adds to P, up to and including the end of the turn. The next trained turn joins this
sample if F is a prefix of its P, and starts a new sample otherwise. So templates that leave the history unchanged give
one sample per conversation, and those that remove thinking from earlier turns give one per turn; in both cases the
model is trained on exactly the prompts that it will be served with.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_tune.chatml.control_tokens import ControlTokens, StandIns
from qwen_tune.chatml.conversation import Conversation
from qwen_tune.chatml.omissions import refuse_lost_answer, refuse_lost_context
from qwen_tune.chatml.sandbox import render_with_limits
from qwen_tune.chatml.thinking import OPEN, ReasoningPlace, as_in_content, reasoning_apart, refuse_unwanted
from qwen_tune.compat import template_environment
from qwen_tune.errors import ExampleError, ModelError, Problem

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.nodes import Template
    from transformers import PreTrainedTokenizerBase

    from qwen_tune.recipe.schema import DataSpec

END_OF_TURN = "<|im_end|>"
# Allowed for every model, so that a data file works with all: a template without thinking ignores them.
SWITCHES = frozenset({"enable_thinking", "preserve_thinking"})
IGNORED = -100  # the label of a token without loss, PyTorch's and Transformers' convention


class RenderedSample(NamedTuple):
    """A text as it will be trained.

    `spans` are the character ranges [start, end) that are supervised, in order. `literals` are ranges that only look
    like control tokens: `data.special_tokens_in_text: neutralize` keeps them as text.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    literals: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TokenizedExample:
    """A sample as the model sees it.

    `labels` are the token's own id where it is supervised, -100 elsewhere (the loss shifts them by one). `straddling`
    counts tokens that hold both the end of a prompt and the start of an answer; they are context.
    """

    source: str
    source_name: str
    input_ids: list[int]
    labels: list[int]
    straddling: int = 0
    truncated: bool = False

    @property
    def supervised(self) -> int:
        """The number of supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORED)


class ChatTemplate:
    """The checkpoint's chat template, and what rendering with it has shown."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Probes the tokenizer's template.

        Raises:
            ModelError: The template is missing, cannot render, or is not ChatML.
        """
        self.tokenizer = tokenizer
        self.source = _source(tokenizer)
        self.end_of_turn_id: int = _end_of_turn_id(tokenizer)
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        # It ends turns here, whether the tokenizer calls it special or not.
        self.control_tokens = ControlTokens({*special, END_OF_TURN})
        question = {"role": "user", "content": "?"}
        answer = {"role": "assistant", "content": "!", "reasoning_content": "~why~"}
        inline = {"role": "assistant", "content": "<think>\n~why~\n</think>\n\n!"}
        thinks = {"enable_thinking": True}

        def probe() -> tuple[str, str, str]:
            return (
                self.render([question], add_generation_prompt=True, template_kwargs=thinks),
                self.render([question, answer], template_kwargs=thinks),
                self.render([question, inline], template_kwargs=thinks),
            )

        # Before the template is compiled in this process, which would evaluate its constants.
        render_with_limits(probe)
        self._owned = _owned_variables(tokenizer, self.source)
        self._variables = (_variables_read(self.source) - self._owned) | SWITCHES
        try:
            prompt, rendered, rendered_inline = probe()
        except ExampleError as problem:
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
        self.reasoning: ReasoningPlace = (
            "field" if "~why~" in rendered else "content" if _opens_thinking(prompt) else "nowhere"
        )
        # Such a template gets inline thinking unchanged, and may trim it.
        self.parses_blocks = self.reasoning == "field" and rendered == rendered_inline

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
            ExampleError: The template raised an error.
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
        except (jinja2.TemplateError, TypeError, ValueError, RecursionError) as error:
            raise ExampleError(f"the chat template refuses the conversation: {error}", _why_refused(messages)) from None
        assert isinstance(text, str)
        return text

    def refuse_variables(self, conversation: Conversation) -> None:
        """Checks an example's chat_template_kwargs against the variables of the template.

        Raises:
            ExampleError: A variable would have no effect, or must not be set by examples.
        """
        for name, value in _own_kwargs(conversation).items():
            if name in self._owned:
                raise ExampleError(f'chat_template_kwargs sets "{name}", which examples must not set', "remove it")
            if name not in self._variables:
                nearest = difflib.get_close_matches(name, sorted(self._variables), n=1)
                raise ExampleError(
                    f'chat_template_kwargs sets "{name}", which this template does not read',
                    f"write {nearest[0]}" if nearest else "remove it",
                )
            if name in SWITCHES and not isinstance(value, bool):
                # Templates test `is true` and `is false`: any other value would be ignored.
                what = f"chat_template_kwargs.{name} is {value!r}; expected true or false"
                raise ExampleError(what, "write true or false")


def render_samples(conversation: Conversation, template: ChatTemplate, data: DataSpec) -> list[RenderedSample]:
    """Renders a conversation to one or more samples.

    Raises:
        ExampleError: The conversation cannot be trained on with this template and recipe.
    """
    conversation = reasoning_apart(conversation, template.reasoning, parses_blocks=template.parses_blocks)
    template.refuse_variables(conversation)
    stand_ins = StandIns({})
    if data.special_tokens_in_text == "neutralize":
        conversation, stand_ins = template.control_tokens.hide(conversation)
    else:
        template.control_tokens.refuse(conversation)
    trained = _trained_turns(conversation, data.loss_on)
    refuse_unwanted(conversation, trained, data.thinking, template.reasoning)
    if data.loss_on == "all":
        samples = [_render_whole(conversation, template)]
    else:
        samples = _render_turns(conversation, trained, template)
    return [_with_literals(sample, stand_ins) for sample in samples]


def _render_turns(conversation: Conversation, trained: Sequence[int], template: ChatTemplate) -> list[RenderedSample]:
    messages, tools = _for_template(conversation, template)
    samples: list[RenderedSample] = []
    for index in trained:
        kwargs = _template_kwargs(conversation, thinks=conversation.messages[index].reasoning_content is not None)
        prompt = template.render(messages[:index], tools=tools, add_generation_prompt=True, template_kwargs=kwargs)
        full = template.render(messages[: index + 1], tools=tools, template_kwargs=kwargs)
        if not full.startswith(prompt):
            raise ExampleError(
                f"messages[{index}]: rendered with this turn, the conversation does not start with the prompt that a "
                "server would send for it, so training would differ from serving",
                _why_not_a_prefix(conversation, index, prompt, kwargs),
            )
        span = (len(prompt), _end_of_answer(full, len(prompt), index))
        refuse_lost_context(conversation, index, prompt)
        refuse_lost_answer(conversation.messages[index], index, full[slice(*span)])
        if samples and prompt.startswith(samples[-1].text):
            samples[-1] = RenderedSample(full, (*samples[-1].spans, span))
        else:
            samples.append(RenderedSample(full, (span,)))
    return samples


def _render_whole(conversation: Conversation, template: ChatTemplate) -> RenderedSample:
    """Renders the conversation as one sample in which every token is supervised."""
    answers = [(index, turn) for index, turn in enumerate(conversation.messages) if turn.role == "assistant"]
    if any(not turn.train for _, turn in answers):
        raise ExampleError('"train": false contradicts loss_on: all', "remove it, or write loss_on: assistant")
    messages, tools = _for_template(conversation, template)
    kwargs = _template_kwargs(conversation, thinks=any(turn.reasoning_content is not None for _, turn in answers))
    text = template.render(messages, tools=tools, template_kwargs=kwargs)
    refuse_lost_context(conversation, len(messages), text, reasoning=True)
    for index, turn in answers:
        refuse_lost_answer(turn, index, text)
    return RenderedSample(text, ((0, len(text)),))


def _for_template(
    conversation: Conversation, template: ChatTemplate
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Messages and tools as a server passes them to the template."""
    place = as_in_content if template.reasoning == "content" else lambda message: message
    messages = [place(message).for_template() for message in conversation.messages]
    # The API only has tools of the type "function"; examples often have the function alone.
    tools = [
        {"type": "function", **tool} if "function" in tool else {"type": "function", "function": tool}
        for tool in conversation.tools
    ]
    return messages, tools


def _template_kwargs(conversation: Conversation, *, thinks: bool) -> dict[str, Any]:
    return {"enable_thinking": thinks, **_own_kwargs(conversation)}


def _own_kwargs(conversation: Conversation) -> dict[str, Any]:
    # Arrow adds a null where other examples of the file have a value.
    return {name: value for name, value in conversation.chat_template_kwargs.items() if value is not None}


def _with_literals(sample: RenderedSample, stand_ins: StandIns) -> RenderedSample:
    text, literals = stand_ins.restore(sample.text)
    return sample._replace(text=text, literals=literals)


def _trained_turns(conversation: Conversation, loss_on: str) -> list[int]:
    turns = [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]
    if loss_on == "last_turn":
        turns = turns[-1:]
    return [index for index in turns if conversation.messages[index].train]


def _end_of_answer(full: str, start: int, index: int) -> int:
    fix = "use the checkpoint's own template, or a ChatML file in model.chat_template"
    position = full.find(END_OF_TURN, start)
    if position < 0:
        raise ExampleError(f"messages[{index}]: the chat template does not close the turn with {END_OF_TURN}", fix)
    end = position + len(END_OF_TURN)
    if full[end:].strip():
        raise ExampleError(f"messages[{index}]: the chat template writes text after the end of the turn", fix)
    return end


def _opens_thinking(prompt: str) -> bool:
    return prompt.rstrip().endswith(OPEN)


def _why_refused(messages: Sequence[Mapping[str, Any]]) -> str:
    if any(message.get("role") == "system" for message in messages[1:]):
        return "move it to the first system turn or to a user turn: this template accepts no other system turn"
    users = [str(message.get("content")) for message in messages if message.get("role") == "user"]
    if all(text.strip().startswith("<tool_response>") for text in users):
        return (
            "write the result of a tool as a turn with the role tool; the template finds no question in the user turns"
        )
    return "change the example to what the template accepts, or remove it"


def _why_not_a_prefix(conversation: Conversation, index: int, prompt: str, kwargs: Mapping[str, Any]) -> str:
    reasons = conversation.messages[index].reasoning_content is not None
    if reasons and not kwargs["enable_thinking"]:
        return "the turn has reasoning, but thinking is off: remove enable_thinking from chat_template_kwargs"
    if not reasons and _opens_thinking(prompt):
        return "this checkpoint always thinks: add reasoning_content to the turn"
    if index > 0 and conversation.messages[index - 1].role == "assistant":
        return "join consecutive assistant turns into one"
    return "check whether this template closes system or tool turns differently before an answer"


def _source(tokenizer: PreTrainedTokenizerBase) -> str:
    source = tokenizer.chat_template
    if not source:
        raise ModelError(
            Problem(
                "tokenizer",
                "it has no chat template; expected one to render conversations",
                "use an Instruct checkpoint, or name a .jinja file in model.chat_template",
            )
        )
    if not isinstance(source, str):
        # Transformers would choose by whether an example has tools, and a server may choose differently.
        raise ModelError(
            Problem(
                "tokenizer",
                f"it has several chat templates ({', '.join(sorted(source))}); expected one",
                "write the one that your server uses to a .jinja file and name it in model.chat_template",
            )
        )
    return source


def _owned_variables(tokenizer: PreTrainedTokenizerBase, source: str) -> frozenset[str]:
    """Variables that an example must not set, because the tokenizer or Jinja uses them.

    Otherwise an example could replace the template or the end of turns, or break the template's loops.
    """
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters
    # The attributes include tokens that this tokenizer does not have.
    tokens = {*tokenizer.SPECIAL_TOKENS_ATTRIBUTES, *tokenizer.special_tokens_map}
    return frozenset({"self", "messages", *parameters, *tokens, *_parsed(source)[0].globals})


def _variables_read(source: str) -> frozenset[str]:
    """The variables that a template reads, without those that it sets itself before it reads them."""
    from jinja2 import meta, nodes

    _, tree = _parsed(source)
    names = list(tree.find_all(nodes.Name))
    in_macros = {id(name) for macro in tree.find_all(nodes.Macro) for name in macro.find_all(nodes.Name)}
    # `{% if x is not defined %}{% set x = … %}` and `{% set x = x | default(…) %}` leave x to the caller.
    asked = {
        node.node.name
        for node in tree.find_all((nodes.Test, nodes.Filter))
        if node.name in ("defined", "undefined", "default", "d")
        and isinstance(node.node, nodes.Name)
        and id(node.node) not in in_macros
    }
    own = {name.name for name in names if name.ctx != "load"} - asked
    return frozenset(meta.find_undeclared_variables(tree) - own)


def _parsed(source: str) -> tuple[Environment, Template]:
    """The environment that Transformers renders in, and the template as a tree.

    Raises:
        ModelError: The template is not valid Jinja.
    """
    import jinja2

    try:
        environment = template_environment(source)
        return environment, environment.parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            Problem("chat template", f"it is not valid Jinja: line {error.lineno}: {error.message}")
        ) from None
    except RecursionError:
        raise ModelError(Problem("chat template", "it is nested too deeply")) from None


def _end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    ids = tokenizer.encode(END_OF_TURN, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(Problem("tokenizer", f"{END_OF_TURN} is not one token: is this a Qwen tokenizer?"))
    return int(ids[0])
