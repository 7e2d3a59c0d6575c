"""What a chat template does with the texts it is given, found out by rendering texts that keep a record.

Rendering a conversation with Jinja costs more than tokenizing it. But most of a template's work depends on the
conversation's shape alone (roles, which turns reason), and what it asks of the texts themselves is little: does this
one start with `<tool_response>`, is that one empty. `TracedTemplate` renders stand-ins that write down every such
question with its answer. Where all answers are the same for the texts of another conversation of that shape, so is
the rendering, with these texts in the places of the stand-ins. `rendering.py` builds on that.

Nothing is assumed of the template: a question that cannot be written down (a length, a slice, a text turned into JSON)
raises `UntraceableError`, and such conversations are rendered by Jinja every time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.runtime import Macro

from qwen_tune.chatml.traced_text import TracedText, UntraceableError, holds_text, join

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
