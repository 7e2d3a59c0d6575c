"""Texts that stand for those of an example and keep a record of what a template asks of them."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from types import MethodType
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Macro
from jinja2.utils import Namespace

MARK = "\ue0f7"  # a private-use character that stands around every stand-in, so that none gets lost unseen


class UntraceableError(BaseException):  # Jinja takes any Exception of a test for an answer
    """The template does something with a text that cannot be reported without the text."""


@dataclass(frozen=True)
class Guard:
    """A question that a template asked of a text made of stand-ins, and the answer on which the rendering rests.

    `parts` are fields (their numbers) and fixed texts between them.
    """

    parts: tuple[int | str, ...]
    question: str
    argument: Any
    answer: bool

    def holds(self, texts: Sequence[str]) -> bool:
        """Whether these texts, in the places of the stand-ins, give the same answer."""
        text = "".join(part if isinstance(part, str) else texts[part] for part in self.parts)
        return _ask(text, self.question, self.argument) == self.answer


def _ask(text: str, question: str, argument: Any) -> bool:
    if question == "contains":
        return argument in text
    if question == "equals":
        return bool(text == argument)
    if question == "is not empty":
        return bool(text)
    if question in ("startswith", "endswith"):
        return bool(getattr(text, question)(*argument))
    # strip, lstrip, rstrip: does the text stay as it is?
    return bool(getattr(text, question)(*argument) == text)


class TracedText(str):
    """A text that stands for a field of an example, or for such texts put together, and records what it is asked."""

    _parts: tuple[int | str, ...]
    _record: list[Guard]

    def __new__(cls, text: str, parts: tuple[int | str, ...], record: list[Guard]) -> TracedText:
        made = super().__new__(cls, text)
        made._parts = parts
        made._record = record
        return made

    def _asked(self, question: str, argument: Any) -> bool:
        if holds_text(argument):
            raise UntraceableError(f"{question} of another text")
        answer = _ask(str.__str__(self), question, argument)
        self._record.append(Guard(self._parts, question, argument, answer))
        return answer

    def _unchanged(self, question: str, argument: tuple[Any, ...]) -> TracedText:
        if not self._asked(question, argument):
            raise UntraceableError(question)
        return self

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return self._asked("is not empty", None)

    def __contains__(self, key: object) -> bool:
        return self._asked("contains", key)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TracedText):
            raise UntraceableError("two texts compared")
        return isinstance(other, str) and self._asked("equals", other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __add__(self, other: str) -> TracedText:
        joined: TracedText = join([self, other])
        return joined

    def __radd__(self, other: str) -> TracedText:
        joined: TracedText = join([other, self])
        return joined

    def startswith(self, *argument: Any) -> bool:
        return self._asked("startswith", argument)

    def endswith(self, *argument: Any) -> bool:
        return self._asked("endswith", argument)

    def strip(self, *argument: Any) -> TracedText:
        return self._unchanged("strip", argument)

    def lstrip(self, *argument: Any) -> TracedText:
        return self._unchanged("lstrip", argument)

    def rstrip(self, *argument: Any) -> TracedText:
        return self._unchanged("rstrip", argument)


def _refuse(name: str) -> Any:
    def method(self: TracedText, *arguments: Any, **named: Any) -> NoReturn:
        raise UntraceableError(name)

    return method


_ANSWERED = {name for name in vars(TracedText) if callable(getattr(TracedText, name))} | {
    "__class__",
    "__del__",
    "__delattr__",
    "__dir__",
    "__getattribute__",
    "__init__",
    "__init_subclass__",
    "__new__",
    "__setattr__",
    "__sizeof__",
    "__subclasshook__",
}
for _name in set(dir(str)) - _ANSWERED - {"__doc__"} | {"__iter__", "__hash__"}:
    setattr(TracedText, _name, _refuse(_name))


def join(texts: Iterable[Any]) -> Any:
    """Puts texts together; with stand-ins among them, to one that knows its parts.

    Raises:
        UntraceableError: A stand-in is among them that came through something which did not keep it.
    """
    texts = list(texts)
    parts: list[int | str] = []
    record: list[Guard] | None = None
    for text in texts:
        if isinstance(text, TracedText):
            record = text._record
            parts += text._parts
        elif MARK in text:
            raise UntraceableError("a text went through something that does not keep record")
        elif text:
            parts.append(text)
    plain = "".join(map(str.__str__, texts))
    return plain if record is None else TracedText(plain, tuple(parts), record)


def holds_text(value: Any) -> bool:
    """Whether a stand-in is among what C code is about to look at."""
    if isinstance(value, str):
        return isinstance(value, TracedText) or MARK in value
    if isinstance(value, Mapping):
        return any(map(holds_text, (*value, *value.values())))
    if isinstance(value, (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)):
        return any(map(holds_text, value))
    return isinstance(value, (Iterator, Namespace))


_FILTERS = {"trim", "length", "count", "tojson", "string", "safe", "items", "first", "last", "default", "list"}
_TESTS = {
    "string",
    "mapping",
    "iterable",
    "sequence",
    "none",
    "defined",
    "undefined",
    "true",
    "false",
    "boolean",
    "number",
}


def _contains(item: Any, container: Any) -> bool:
    # A text within a fixed one is looked for in C, where no stand-in hears of it.
    if isinstance(container, str) and not isinstance(container, TracedText) and holds_text(item):
        raise UntraceableError("a text looked for in a fixed one")
    return item in container


def _call(self: Any, context: Any, called: Any, *arguments: Any, **named: Any) -> Any:
    keeps = isinstance(called, (Macro, type)) or isinstance(getattr(called, "__self__", None), TracedText)
    # Within loops Jinja hands its own variables along.
    handed = [value for name, value in named.items() if name not in ("_loop_vars", "_block_vars")]
    if not keeps and (holds_text(arguments) or holds_text(handed)):
        raise UntraceableError("a text handed to a function")
    return type(self).call(self, context, called, *arguments, **named)


def _call_binop(self: Any, context: Any, operator: str, left: Any, right: Any) -> Any:
    if holds_text(left) or holds_text(right):
        raise UntraceableError(operator)
    return type(self).call_binop(self, context, operator, left, right)


def _deaf(function: Any) -> Any:
    def refusing(value: Any, *arguments: Any, **named: Any) -> Any:
        if holds_text(value) or holds_text(arguments) or holds_text(named):
            raise UntraceableError(function.__name__)
        return function(value, *arguments, **named)

    return refusing


def _true_of_texts(test: Any) -> Any:
    return lambda value: isinstance(value, TracedText) or test(value)


class _Generator(CodeGenerator):
    """Compiles `~` and `in` to what keeps record."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("str(")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:  # noqa: N802
        if not any(operand.op in ("in", "notin") for operand in node.ops):
            super().visit_Compare(node, frame)
            return
        if len(node.ops) > 1:
            raise UntraceableError("a chain of comparisons")
        self.write("(not " if node.ops[0].op == "notin" else "(")
        self.write("environment.contains(")
        self.visit(node.expr, frame)
        self.write(", ")
        self.visit(node.ops[0].expr, frame)
        self.write("))")


class TracedTemplate:
    """A chat template that renders stand-ins."""

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Compiles the template in the environment that Transformers renders in.

        Raises:
            UntraceableError: The template has means to ask texts what cannot be recorded.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # Overlaid, because Transformers keeps the compiled template for all others that render it.
        environment = _compile_jinja_template(source).environment.overlay()
        environment.concat = join
        tree = environment.parse(source)
        used = {node.name for node in tree.find_all(nodes.Filter)} - _FILTERS
        used |= {node.name for node in tree.find_all(nodes.Test)} - _TESTS
        # What is another thing each time it is asked.
        used |= {node.name for node in tree.find_all(nodes.Name)} & {"strftime_now", "lipsum", "cycler", "joiner"}
        if used:
            raise UntraceableError(f"filters, tests or functions: {', '.join(sorted(used))}")
        environment.code_generator_class = _Generator
        environment.contains = _contains
        environment.call = MethodType(_call, environment)
        environment.call_binop = MethodType(_call_binop, environment)
        environment.intercepted_binops = frozenset({"%"})
        environment.filters = {
            name: _deaf(function) if name in ("tojson", "safe") else function
            for name, function in environment.filters.items()
        }
        environment.tests = dict(environment.tests)
        for name in ("sequence", "iterable"):
            environment.tests[name] = _true_of_texts(environment.tests[name])
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, template_kwargs: Mapping[str, Any]
    ) -> str:
        """Renders messages whose texts are stand-ins.

        Raises:
            UntraceableError: A text is asked what cannot be recorded.
        """
        from transformers.utils import chat_template_utils

        # Later releases give templates the reasoning under several names.
        alias = getattr(chat_template_utils, "_alias_reasoning_fields", list)
        rendered: str = self._template.render(
            messages=alias([dict(message) for message in messages]),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **self._special_tokens,
            **template_kwargs,
        )
        return rendered
