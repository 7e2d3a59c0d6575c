"""Stand-ins for the texts of an example that record how a template tests them."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from types import MethodType
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Macro
from jinja2.utils import Namespace

from qwen_tune.compat import template_environment

MARK = "\ue0f7"  # a private-use character before and after every stand-in, so that a lost one is detected


class UntraceableError(BaseException):  # in tests, Jinja catches Exception
    """The result of an operation of the template depends on the text."""


@dataclass(frozen=True)
class Guard:
    """A test of a text by the template, and the result on which the rendering depends.

    `parts` of the text are numbers of fields, and fixed texts between them.
    """

    parts: tuple[int | str, ...]
    question: str
    argument: Any
    answer: bool

    def holds(self, texts: Sequence[str]) -> bool:
        """Whether the test has the same result with these texts in the fields."""
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
    """A stand-in for a field of an example, or several of them joined with text, that records the tests of it."""

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
    """Joins texts; to a TracedText if one of them is.

    Raises:
        UntraceableError: One of them contains a stand-in, but is a plain string.
    """
    texts = list(texts)
    parts: list[int | str] = []
    record: list[Guard] | None = None
    for text in texts:
        if isinstance(text, TracedText):
            record = text._record
            parts += text._parts
        elif MARK in text:
            raise UntraceableError("an operation on a text was not recorded")
        elif text:
            parts.append(text)
    plain = "".join(map(str.__str__, texts))
    return plain if record is None else TracedText(plain, tuple(parts), record)


def holds_text(value: Any) -> bool:
    """Whether a value contains a stand-in."""
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
    # str.__contains__ of a fixed text does not call the stand-in.
    if isinstance(container, str) and not isinstance(container, TracedText) and holds_text(item):
        raise UntraceableError("a text searched in a fixed one")
    return item in container


def _call(self: Any, context: Any, called: Any, *arguments: Any, **named: Any) -> Any:
    keeps = isinstance(called, (Macro, type)) or isinstance(getattr(called, "__self__", None), TracedText)
    # In loops Jinja passes its own variables.
    passed = [value for name, value in named.items() if name not in ("_loop_vars", "_block_vars")]
    if not keeps and (holds_text(arguments) or holds_text(passed)):
        raise UntraceableError("a text passed to a function")
    return type(self).call(self, context, called, *arguments, **named)


def _call_binop(self: Any, context: Any, operator: str, left: Any, right: Any) -> Any:
    if holds_text(left) or holds_text(right):
        raise UntraceableError(operator)
    return type(self).call_binop(self, context, operator, left, right)


def _refuse_texts(function: Any) -> Any:
    def refusing(value: Any, *arguments: Any, **named: Any) -> Any:
        if holds_text(value) or holds_text(arguments) or holds_text(named):
            raise UntraceableError(function.__name__)
        return function(value, *arguments, **named)

    return refusing


def _true_of_texts(test: Any) -> Any:
    return lambda value: isinstance(value, TracedText) or test(value)


class _Generator(CodeGenerator):
    """Compiles `~` and `in` to functions that record."""

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
            UntraceableError: The template uses filters, tests or functions that cannot be recorded.
        """
        # An overlay, because Transformers caches the compiled template.
        environment = template_environment(source).overlay()
        environment.concat = join
        tree = environment.parse(source)
        used = {node.name for node in tree.find_all(nodes.Filter)} - _FILTERS
        used |= {node.name for node in tree.find_all(nodes.Test)} - _TESTS
        # Their values change between calls.
        used |= {node.name for node in tree.find_all(nodes.Name)} & {"strftime_now", "lipsum", "cycler", "joiner"}
        if used:
            raise UntraceableError(f"filters, tests or functions: {', '.join(sorted(used))}")
        environment.code_generator_class = _Generator
        environment.contains = _contains
        environment.call = MethodType(_call, environment)
        environment.call_binop = MethodType(_call_binop, environment)
        environment.intercepted_binops = frozenset({"%"})
        environment.filters = {
            name: _refuse_texts(function) if name in ("tojson", "safe") else function
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
            UntraceableError: An operation on a text cannot be recorded.
        """
        from transformers.utils import chat_template_utils

        # Later releases pass the reasoning under several names.
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
