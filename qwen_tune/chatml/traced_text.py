"""Texts that stand for those of a row and keep a record of what a template asks of them."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, NoReturn

from jinja2.utils import Namespace

MARK = "\ue0f7"  # a private-use character that stands around every stand-in, so that none gets lost unseen


class UntraceableError(BaseException):  # Jinja takes any Exception of a test for an answer
    """The template does something with a text that cannot be told without the text."""


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
    """A text that stands for a field of a row, or for such texts put together, and records what it is asked."""

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
