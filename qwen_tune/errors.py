"""The errors that are the user's to fix, in one tree.

QwenTuneError                  the message is all that the user sees; the process ends with exit code 2
├── RecipeError                the recipe, or an override of it
├── DataError                  examples, files or data sets
├── ModelError                 the base checkpoint, its tokenizer, its template, or what this machine can run of it
├── RunError                   the run directory: in use, unfinished, of another recipe
├── TrainingError              the run itself: a loss that is not a number
├── MergeError                 an adapter and a base that do not make a model
│   └── NoRoomError            a disk that is full; what was written stays
├── PublishError               what cannot be pushed, or a hub that does not take it
└── LibraryError               an installed library lacks what this version is built on

ExampleError is what is wrong with a record whose place is not known yet; it becomes a `Problem`.

Interrupted, a KeyboardInterrupt, is not an error: a run that was asked to stop and has saved its work; exit code 130.

Anything else that is raised is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SHOWN_PROBLEMS = 20
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) != "\n"}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the user's input, and how to fix it.

    `where` is `file:line` (or as near to it as the input allows), `what` says what was found and, after a semicolon,
    what is expected. `fix` is a sentence without the word "Fix".
    """

    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}"
        if self.fix:
            text = f"{text}{'' if text.endswith(('.', '?', '!')) else '.'} Fix: {self.fix}"
        return visible(text)


class QwenTuneError(Exception):
    """Input that the user has to change.

    Holds every problem that was found, so that all of them are reported at once.
    """

    def __init__(self, problems: Problem | str | Iterable[Problem]) -> None:
        if isinstance(problems, str):
            problems = Problem(where="qwen-tune", what=problems)
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [str(problem) for problem in self.problems[:SHOWN_PROBLEMS]]
        if len(self.problems) > SHOWN_PROBLEMS:
            lines.append(f"… and {len(self.problems) - SHOWN_PROBLEMS} more")
        return "\n".join(lines)


class RecipeError(QwenTuneError):
    """The recipe or an override does not say what a recipe can say."""


class DataError(QwenTuneError):
    """A data file or an example in it cannot be trained on."""


class ModelError(QwenTuneError):
    """The base checkpoint is missing, unsuitable, or too much for this machine."""


class RunError(QwenTuneError):
    """The run directory cannot be used for what was asked."""


class TrainingError(QwenTuneError):
    """Training stopped for a reason that the user has to decide on.

    `met_by_all` says that every process of the run raises it, so that one is enough to tell it.
    """

    def __init__(self, problems: Problem | str | Iterable[Problem], *, met_by_all: bool = False) -> None:
        super().__init__(problems)
        self.met_by_all = met_by_all


class Interrupted(KeyboardInterrupt):
    """A run that was asked to stop and has saved its work; ends with exit code 130."""

    def __init__(self, step: int, command: str = "") -> None:
        self.step = step
        how = f"Resume with: {command}" if command else "The same command resumes from there"
        super().__init__(f"interrupted after step {step}, which is saved. {how}")


class MergeError(QwenTuneError):
    """Base and adapter do not make a complete model."""


class NoRoomError(MergeError):
    """A disk is full: what was written stays, and the command can resume after it."""


class PublishError(QwenTuneError):
    """Something may not leave this machine, or the other side does not take it."""


class LibraryError(QwenTuneError):
    """An installed library lacks something that this version is built on."""


def visible(text: str) -> str:
    """The text with its control characters, line breaks aside, as escapes: an example must not command the terminal."""
    return text.translate(_ESCAPES)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class ExampleError(ValueError):
    """An example that cannot be trained on; becomes a `Problem` with the example's file and line."""

    def __init__(self, what: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def at(self, where: str) -> Problem:
        """The problem with its place."""
        return Problem(where, self.what, self.fix)
