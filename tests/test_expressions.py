"""No regular expression takes work that grows faster than its text: examples and recipes are somebody else's."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

import pytest
from conftest import ROOT
from expression_steps import Steps, attacks

PACKAGE = ROOT / "qwen_tune"
ANYWHERE = ("search", "sub", "subn", "findall", "finditer", "split")
SHORT, LONG = 250, 500  # characters
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Expression:
    """One that the package uses, where it stands, and whether it is looked for anywhere in a text."""

    place: str
    pattern: str
    flags: int
    anywhere: bool


def expressions() -> list[Expression]:
    """Every `re.…("…")` and `re.compile("…")` of the package whose pattern can be read from the source."""
    found = []
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    for path, text in texts.items():
        tree = ast.parse(text)
        constants = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re"):
                continue
            pattern = pattern_of(node.args[0], constants)
            if pattern is None:
                continue
            method, flags = node.func.attr, flags_of(node)
            if method == "compile":
                name = next((name for name, value in constants.items() if value is node), None)
                uses = {match for text in texts.values() for match in re.findall(rf"\b{name}\.(\w+)\(", text)}
                anywhere = bool(uses & set(ANYWHERE)) or name is None
            else:
                anywhere = method in ANYWHERE
            found.append(Expression(f"{path.relative_to(PACKAGE)}:{node.lineno}", pattern, flags, anywhere))
    return found


def pattern_of(node: ast.expr, constants: dict[str, ast.expr]) -> str | None:
    """A literal, or an f-string of literals that stand in the same module."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name) and node.id in constants:
        return pattern_of(constants[node.id], {})
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [pattern_of(node.left, constants), pattern_of(node.right, constants)]
        return None if None in parts else "".join(map(str, parts))
    if isinstance(node, ast.JoinedStr):
        pieces = [
            pattern_of(value.value if isinstance(value, ast.FormattedValue) else value, constants)
            for value in node.values
        ]
        return None if None in pieces else "".join(map(str, pieces))
    return None


def flags_of(call: ast.Call) -> int:
    named = {node.attr for argument in call.args[1:] for node in ast.walk(argument) if isinstance(node, ast.Attribute)}
    return sum(int(getattr(re, name)) for name in named if isinstance(getattr(re, name, None), re.RegexFlag))


EXPRESSIONS = expressions()


def test_the_expressions_are_found():
    assert len(EXPRESSIONS) > 40
    places = {expression.place.split(":")[0] for expression in EXPRESSIONS}
    assert {"recipe/secret_values.py", "publishing/leaks.py", "publishing/card.py", "console.py"} - places <= {
        "console.py"
    }


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda expression: expression.place)
def test_work_grows_with_the_text_and_no_faster(expression):
    steps = Steps(expression.pattern, expression.flags)
    fast = re.compile(expression.pattern, expression.flags)
    for text in attacks(expression.pattern, expression.flags):
        for end in ("", "\0"):  # what nothing takes, so that the last of many tries fails
            short, long = (text * (size // len(text)) + end for size in (SHORT, LONG))
            few = steps.of(short, anywhere=expression.anywhere)
            many = steps.of(long, anywhere=expression.anywhere)
            assert many < 2.6 * few + 4000, (expression.pattern, text)
        full = text * (MEGABYTE // len(text)) + "\0"
        if expression.anywhere:
            sum(1 for _ in fast.finditer(full))
        else:
            fast.match(full)


@pytest.mark.parametrize(
    ("pattern", "text"), [(r"(a+)+$", "a"), (r"a+b", "a"), (r"a(?=.*\d)\w+", "a"), (r"(?:a|a)*b", "a")]
)
def test_the_counter_sees_work_that_explodes(pattern, text):
    steps = Steps(pattern)
    few, many = (steps.of(text * (size // len(text)) + "\0", anywhere=True) for size in (6, 12))
    assert many > 3 * few


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=lambda expression: expression.place)
def test_the_counter_goes_the_ways_of_re(expression):
    """Where it would find another match than `re`, its steps would be those of something else."""
    steps = Steps(expression.pattern, expression.flags)
    fast = re.compile(expression.pattern, expression.flags)
    for text in attacks(expression.pattern, expression.flags):
        for sample in (text, f"a {text} b", text * 3):
            end = steps.end(sample)
            match = fast.match(sample)
            assert end == (match.end() if match else None), (expression.pattern, sample)
