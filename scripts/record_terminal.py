"""Runs commands in a pseudo-terminal and draws what the terminal shows at the end as an SVG.

scripts/record_terminal.py docs/images/quickstart.svg "qwen-tune train recipes/quickstart.yaml --overwrite"

Each argument after the picture is one command line. It runs in the working directory and appears after a `$`. The
exit code is that of the first command that fails; no picture is written then.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])")
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
NORMAL = [(72, 79, 88), (255, 123, 114), (63, 185, 80), (210, 153, 34)]
NORMAL += [(88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)]
BRIGHT = [(110, 118, 129), (255, 161, 152), (86, 211, 100), (227, 179, 65)]
BRIGHT += [(121, 192, 255), (210, 168, 255), (86, 212, 221), (255, 255, 255)]
THEME = TerminalTheme((13, 17, 23), (230, 237, 243), NORMAL, BRIGHT)


class Screen:
    """What of a terminal our output uses: a cursor, colours, and lines that are written again or erased.

    Other escape sequences (a hidden cursor, say) change nothing that can be seen in a picture.
    """

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[list[tuple[str, str]]] = [[]]  # cells of (colours, character)
        self.row = self.column = 0
        self.colours = ""  # the sequences since the last reset

    def write(self, output: str) -> None:
        """Takes everything that a program wrote."""
        place = 0
        while place < len(output):
            if found := SEQUENCE.match(output, place):
                self._obey(found[1], found[2])
                place = found.end()
            else:
                self._put(output[place])
                place += 1

    def text(self) -> Text:
        """The lines with their colours."""
        return Text("\n").join(
            Text.from_ansi("".join(f"{colours}{character}\x1b[0m" for colours, character in line))
            for line in self.lines
        )

    def _put(self, character: str) -> None:
        if character == "\n":
            self.row += 1
        elif character == "\r":
            self.column = 0
        elif character.isprintable():
            if self.column == self.columns:
                self.row, self.column = self.row + 1, 0
            self._extend()
            line = self.lines[self.row]
            line.extend([("", " ")] * (self.column - len(line)))
            line[self.column : self.column + 1] = [(self.colours, character)]
            self.column += 1
        self._extend()

    def _obey(self, numbers: str, command: str) -> None:
        if command == "m":
            self.colours = "" if numbers in ("", "0") else f"{self.colours}\x1b[{numbers}m"
        elif command == "A":
            self.row = max(0, self.row - int(numbers or 1))
        elif command == "K":
            del self.lines[self.row][0 if numbers == "2" else self.column :]

    def _extend(self) -> None:
        self.lines.extend([] for _ in range(self.row + 1 - len(self.lines)))


def run(command: str, columns: int) -> str:
    """Everything that a command writes to a terminal of this width, both streams."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(shlex.split(command), stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # EIO: no process holds the other end any more
            break
        if not part:
            break
        output += part
    os.close(ours)
    if code := process.wait():
        print(output.decode(errors="replace"), file=sys.stderr)
        sys.exit(code)
    return output.decode()


def main() -> None:
    """Runs the commands and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("picture", type=Path, metavar="FILE.svg")
    parser.add_argument("commands", nargs="+", metavar="COMMAND")
    parser.add_argument("--columns", type=int, default=100)
    options = parser.parse_args()

    screen = Screen(options.columns)
    for number, command in enumerate(options.commands):
        screen.write(("\r\n" if number else "") + f"\x1b[1;32m$\x1b[0m \x1b[1m{command}\x1b[0m\r\n")
        screen.write(run(command, options.columns))
    text = screen.text()
    text.rstrip()
    for private in (str(Path.cwd()), os.uname().nodename):
        assert private not in text.plain, f"the picture would show {private}"

    console = Console(record=True, width=options.columns, file=io.StringIO(), force_terminal=True)
    console.print(text, "\n", highlight=False, soft_wrap=True)  # an empty line, or the last one is cut off
    # Viewers of pictures load nothing from the network, so the fonts are those of the reader's machine.
    style = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)
    style = re.sub(r"font-family: Fira Code, monospace", f"font-family: {FONTS}", style)
    svg = console.export_svg(title="qwen-tune", theme=THEME, code_format=style)
    options.picture.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
