"""Output for a person: where it goes, how wide it is, and how paths are shown.

Output never makes a command fail: a character that a stream cannot encode is replaced, and a reader that closes the
pipe ends a command that only shows something, with exit code 0, while any other finishes in silence.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwen_tune.errors import Problem, QwenTuneError, visible

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from rich.console import Console
    from rich.text import Text

UNLIMITED_WIDTH = 100_000
"""Columns where there is no terminal: lines in a log file are never wrapped."""

RULE_WIDTH = 80
"""Columns of a horizontal rule where there is no terminal."""

NAME_WIDTH = 7
"""Minimum columns of the names in `print_pairs`."""

_REPLACEMENTS = str.maketrans(
    {"⟦": "[[", "⟧": "]]", "↵": "\\n", "…": "...", "─": "-", "━": "-", "█": "#", "░": ".", "→": "->", "×": "x"}
)
"""Written for our own characters where a stream cannot encode them; anything else becomes `?`."""


class ReaderGoneError(Exception):
    """Nobody reads the output any more, and the command has nothing else to do."""


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(_REPLACEMENTS)
    return text.encode("ascii", "replace").decode("ascii"), error.end


codecs.register_error("qwen-tune", _replace)


class _Output(io.FileIO):
    """Standard output (1) or standard error (2), which survives the end of its reader.

    With `ends_with_reader`, writing raises ReaderGoneError when the reader has gone.
    """

    def __init__(self, descriptor: int, *, ends_with_reader: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.ends_with_reader = ends_with_reader

    def write(self, data: ReadableBuffer) -> int:
        try:
            return super().write(data) or 0
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):
                # From here on all output is discarded, that of native libraries and of the interpreter's exit too.
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)
                if self.ends_with_reader:
                    raise ReaderGoneError from None
            elif self.ends_with_reader:
                self.ends_with_reader = False  # buffered output must not raise again when the process ends
                what = f"it cannot be written: {error.strerror}"
                raise QwenTuneError(Problem("standard output", what, "free some space, or send it elsewhere")) from None
            # A full disk under a log must not end hours of training; that output is lost.
            return memoryview(data).nbytes


def prepare_streams(*, shows_only: bool = False) -> None:
    """Makes standard output and standard error survive text that they cannot encode and readers that close them.

    Args:
        shows_only: Whether the command is of no use once nobody reads its output.
    """
    sys.stdout = _prepared(sys.stdout, 1, shows_only)
    sys.stderr = _prepared(sys.stderr, 2, False)


def _prepared(stream: TextIO | None, descriptor: int, shows_only: bool) -> TextIO:
    if stream is None:  # closed by the shell: `>&-`
        return Path(os.devnull).open("w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    raw: Any = stream.buffer
    raw = getattr(raw, "raw", raw)  # under `python -u` nothing is buffered
    if isinstance(raw, _Output):
        raw.ends_with_reader = shows_only
    elif isinstance(raw, io.FileIO) and raw.fileno() == descriptor:
        stream.flush()
        output = _Output(descriptor, ends_with_reader=shows_only)
        is_buffered = raw is not stream.buffer
        stream = io.TextIOWrapper(
            io.BufferedWriter(output) if is_buffered else output,
            encoding=stream.encoding,
            line_buffering=stream.line_buffering,
            write_through=not is_buffered,
        )
    # Paths hold undecodable bytes as lone surrogates, and data may hold such characters as well.
    stream.reconfigure(errors="qwen-tune")
    return stream


def show(text: str) -> None:
    """Prints on standard output; in a terminal lines break between words."""
    print(_fitted(relative_paths(text), sys.stdout), flush=True)


def print_once(text: str) -> None:
    """Prints on standard output, once for all processes of a run."""
    if int(os.environ.get("RANK", "0")) == 0:
        show(text)


def report(message: object) -> None:
    """Prints on standard error: warnings, errors, and notices to a waiting user."""
    print(_fitted(relative_paths(visible(str(message))), sys.stderr), file=sys.stderr, flush=True)


def can_encode(text: str) -> bool:
    """Whether standard output can encode a text."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A rich console as wide as the terminal, or of unlimited width where there is none."""
    from rich.console import Console

    console = Console(stderr=stderr, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNLIMITED_WIDTH
    return console


def print_rule(console: Console, title: Text | str = "") -> None:
    from rich.rule import Rule

    rule = Rule(title, align="left", characters="─", style="dim")
    console.print(rule, width=console.width if console.is_terminal else min(RULE_WIDTH, console.width))


def print_pairs(console: Console, pairs: Iterable[tuple[str, str]], *, style: str = "dim", indent: int = 2) -> None:
    """Prints names (in `style`) and texts in two columns, each wrapped by itself in a terminal.

    Neither is read as markup; `indent` is the number of columns before the names.
    """
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    pairs = list(pairs)
    if not console.is_terminal:  # a table would pad every line to the longest
        width = max([NAME_WIDTH, *(len(name) for name, _ in pairs)])
        for name, text in pairs:
            for number, line in enumerate(text.split("\n")):
                line = f"{'' if number else name:{width}}  {line}"
                console.print(" " * indent + line, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=NAME_WIDTH)
    for name, text in pairs:
        table.add_row(Text(name, style), Text(text))
    console.print(Padding(table, (0, 0, 0, indent), expand=False), highlight=False)


def shown_path(path: Path | str) -> str:
    """A path for a person: relative if it is below the working directory."""
    try:
        relative = Path(path).absolute().relative_to(Path.cwd())
    except (OSError, ValueError):
        return str(path)
    return str(relative)


def relative_paths(text: str) -> str:
    """A text with every path below the working directory made relative."""
    try:
        here = str(Path.cwd())
    except OSError:
        return text
    if here == "/" or here not in text:
        return text
    return re.sub(rf"(?<![\w./~-]){re.escape(here)}/(?=[^\s/])", "", text)


def _fitted(text: str, stream: TextIO) -> str:
    if not stream.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, 20)
    return "\n".join(
        line
        if len(line) <= width
        else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
        for line in text.split("\n")
    )


def quiet_libraries() -> None:
    """Silences the libraries, on the terminal and on the network."""
    import logging
    import warnings

    from qwen_tune.machine import import_without_gc

    # TRL reports model family, device and world size to the Hub at every start; nobody asked for that.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Deprecations among the libraries concern us, not the user.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|accelerate|torch)\b")
    # On a CPU with AVX512-BF16, importing bitsandbytes warns that a package for its own 4-bit inference is missing,
    # even if nothing is quantized; our layers do not use it (`model.quantized_layers`).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # It casts the inputs of its 8-bit product to float16, and says so at every layer and step.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    import_without_gc("transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
