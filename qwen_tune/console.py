"""Everything that is said to a person: on streams that take any character, in lines that only a terminal wraps."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_tune.machine import is_main_process, local_rank

if TYPE_CHECKING:
    from rich.console import Console

UNWRAPPED = 10_000  # columns of a stream that is no terminal
RULE = 80  # columns of a line across in such a stream
NAMES = 7  # columns, at least, of the names in `print_pairs`


def prepare_streams() -> None:
    """Makes standard output and standard error write `?` for what they cannot encode, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def outlive_reader() -> None:
    """Lets standard output be lost once its reader is gone: hours of training do not end with `| head`."""
    stream = sys.stdout
    if stream is not sys.__stdout__ or not isinstance(stream, io.TextIOWrapper) or stream.isatty():
        return
    stream.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_OutlivingFile(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=True,
    )


class _OutlivingFile(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            leave_pipe()
            return len(data)


def leave_pipe() -> None:
    """Points standard output at nothing, so that the end of the process does not fail on a reader that is gone."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def make_console(*, errors: bool = False, quiet: bool = False) -> Console:
    """A console that wraps at a terminal's width, and nowhere else but where COLUMNS says so.

    Args:
        errors: For standard error instead of standard output.
        quiet: Print nothing.
    """
    from rich.console import Console

    class PipedConsole(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich itself would end the process with exit code 1

    console = PipedConsole(stderr=errors, quiet=quiet)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = UNWRAPPED
    return console


def print_pairs(console: Console, pairs: Iterable[tuple[str, str]], *, style: str = "dim", indent: int = 2) -> None:
    """Prints names, and beside each its text: in two columns that a terminal wraps one by one.

    Args:
        console: Where to.
        pairs: Names and texts; neither is read as markup.
        style: Of the names.
        indent: Columns before the names.
    """
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    pairs = list(pairs)
    if not console.is_terminal:
        width = max([NAMES, *(len(name) for name, _ in pairs)])
        for name, text in pairs:
            first, *others = text.split("\n")
            lines = [f"{name:{width}}  {first}", *(f"{'':{width}}  {line}" for line in others)]
            for line in lines:
                console.print(" " * indent + line, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=NAMES)
    for name, text in pairs:
        table.add_row(Text(name, style), Text(text))
    console.print(Padding(table, (0, 0, 0, indent)), highlight=False)


def shown_path(path: str | Path) -> str:
    """A path as somebody in the working directory would write it: relative where it lies under that directory."""
    path = Path(path)
    try:
        return str(path.relative_to(Path.cwd())) if path.is_absolute() else str(path)
    except (ValueError, OSError):
        return str(path)


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_main_process():
        print(text, flush=True)


def tell(message: object) -> None:
    """Prints a message that ends the process, once on a machine: its processes would all say the same."""
    if local_rank() == 0:
        print(message, file=sys.stderr, flush=True)
