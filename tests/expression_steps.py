"""How much work a regular expression is: a matcher that goes the ways of Python's `re`, and counts its steps.

It takes the tree that `re` compiles from, tries alternatives in the same order, and gives up none sooner; `re` only
takes shortcuts beside it. So an expression whose steps grow in proportion to its text does so in `re` as well.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as constants
    from re import _parser as parser
else:
    import sre_constants as constants
    import sre_parse as parser

LETTERS = (("DIGIT", str.isdecimal), ("SPACE", str.isspace), ("WORD", lambda letter: letter.isalnum() or letter == "_"))


class Steps:
    """Counts the steps of one expression."""

    def __init__(self, pattern: str, flags: int = 0) -> None:
        self.tree = parser.parse(pattern, flags)
        self.flags = self.tree.state.flags
        self.count = 0

    def of(self, text: str, *, anywhere: bool) -> int:
        """The steps of finding every match in a text, or (`anywhere` False) of matching from its start."""
        self.count = 0
        start = 0
        while start <= len(text):
            end = next(self._ends(list(self.tree), text, start), None)
            if not anywhere:
                break
            start = end if end is not None and end > start else start + 1
        return self.count

    def end(self, text: str) -> int | None:
        """Where a match from the start of a text ends; None where there is none."""
        return next(self._ends(list(self.tree), text, 0), None)

    def _ends(self, nodes: list[Any], text: str, at: int) -> Iterator[int]:
        """Every place at which some nodes can end, in the order in which `re` tries them."""
        self.count += 1
        if not nodes:
            yield at
            return
        (kind, value), rest = nodes[0], nodes[1:]
        name = str(kind)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            if at < len(text) and self._takes(kind, value, text[at]):
                yield from self._ends(rest, text, at + 1)
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            yield from self._repeated(name, *value, rest, text, at)
        elif name == "SUBPATTERN":
            for end in self._ends(list(value[-1]), text, at):
                yield from self._ends(rest, text, end)
        elif name == "BRANCH":
            for branch in value[1]:
                yield from self._ends([*branch, *rest], text, at)
        elif name in ("ASSERT", "ASSERT_NOT"):
            if self._holds(value, text, at) == (name == "ASSERT"):
                yield from self._ends(rest, text, at)
        elif name == "AT":
            if self._is_at(str(value), text, at):
                yield from self._ends(rest, text, at)
        else:
            raise NotImplementedError(name)

    def _repeated(
        self, name: str, least: int, most: int, item: Any, rest: list[Any], text: str, at: int
    ) -> Iterator[int]:
        nodes = list(item)
        if len(nodes) == 1 and str(nodes[0][0]) in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            longest = at
            while longest < len(text) and longest - at < most and self._takes(*nodes[0], text[longest]):
                longest += 1
                self.count += 1
            places = range(at + least, longest + 1)
            for end in places if name == "MIN_REPEAT" else reversed(places):
                yield from self._ends(rest, text, end)
            return

        def further(done: int, here: int) -> Iterator[int]:
            self.count += 1
            if name == "MIN_REPEAT" and done >= least:
                yield here
            if done < most:
                for end in self._ends(nodes, text, here):
                    if end > here:
                        yield from further(done + 1, end)
            if name != "MIN_REPEAT" and done >= least:
                yield here

        for end in further(0, at):
            yield from self._ends(rest, text, end)

    def _takes(self, kind: Any, value: Any, letter: str) -> bool:
        self.count += 1
        name = str(kind)
        if name == "ANY":
            return bool(self.flags & re.DOTALL) or letter != "\n"
        if name != "IN":
            same = letter == chr(value) or (self.flags & re.IGNORECASE and letter.lower() == chr(value).lower())
            return bool(same) == (name == "LITERAL")
        is_in, negated = False, False
        for part, of in value:
            if str(part) == "NEGATE":
                negated = True
            elif str(part) == "LITERAL":
                is_in |= letter == chr(of)
            elif str(part) == "RANGE":
                is_in |= of[0] <= ord(letter) <= of[1]
            else:
                name = str(of).removeprefix("CATEGORY_")
                [holds] = [test for key, test in LETTERS if key == name.removeprefix("NOT_")]
                is_in |= holds(letter) != name.startswith("NOT_")
        return is_in != negated

    def _holds(self, value: Any, text: str, at: int) -> bool:
        direction, nodes = value
        if direction >= 0:
            return next(self._ends(list(nodes), text, at), None) is not None
        width = nodes.getwidth()[0]
        return at >= width and any(end == at for end in self._ends(list(nodes), text, at - width))

    def _is_at(self, where: str, text: str, at: int) -> bool:
        if where in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return at == 0 or (bool(self.flags & re.MULTILINE) and text[at - 1] == "\n")
        if where in ("AT_END", "AT_END_STRING"):
            return at == len(text) or (where == "AT_END" and text[at:] == "\n")
        is_word = LETTERS[2][1]
        border = (at > 0 and is_word(text[at - 1])) != (at < len(text) and is_word(text[at]))
        return border == (where == "AT_BOUNDARY")


def attacks(pattern: str, flags: int = 0) -> list[str]:
    """Beginnings of what an expression matches, to be repeated: where it comes far and fails late."""
    texts: list[str] = []
    for sample in _samples(list(parser.parse(pattern, flags))):
        texts += [sample, sample[:-1], sample[: len(sample) // 2], *sample]
    return list(dict.fromkeys(text for text in texts if text))


def _samples(nodes: list[Any]) -> list[str]:
    """A text for each way through the alternatives of some nodes, a class by its first letter; two of what repeats."""
    found = [""]
    for kind, value in nodes:
        name = str(kind)
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            found = [text + _letter(name, value) for text in found]
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least = max(value[0], min(2, value[1] if value[1] != constants.MAXREPEAT else 2))
            found = [text + piece * least for text in found for piece in _samples(list(value[2]))]
        elif name == "SUBPATTERN":
            found = [text + piece for text in found for piece in _samples(list(value[-1]))]
        elif name == "BRANCH":
            found = [text + piece for text in found for branch in value[1] for piece in _samples(list(branch))]
        elif name == "ASSERT" and value[0] < 0:
            found = [text + piece for text in found for piece in _samples(list(value[1]))]
    return found[:30]


def _letter(name: str, value: Any) -> str:
    if name == "LITERAL":
        return chr(value)
    if name in ("ANY", "NOT_LITERAL"):
        return "a"
    matcher = Steps("a")
    letters = "a1A-_ /\\:.~[f0\"'=\n\t"
    return next((letter for letter in letters if matcher._takes(constants.IN, value, letter)), "a")
