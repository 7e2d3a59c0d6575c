"""Paths that a person wrote: in a recipe, on the command line, in the environment."""

from __future__ import annotations

import io
import stat
from pathlib import Path

from qwen_tune.errors import first_line

TEXT_LIMIT_BYTES = 16 << 20
"""Largest file that is read whole because a person named it: a template, a list of tools."""


class UnreadableError(Exception):
    """A file that cannot be read as text; the message says why."""


def path_fault(text: str) -> str | None:
    """Why no file can ever be at a path, in words; None where one could be, whether it is there or not."""
    try:
        Path(text).expanduser().stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:  # too long, a loop of links
        return (error.strerror or str(error)).lower()
    except ValueError:
        return "it holds a character that no path can hold"
    except RuntimeError:
        return "there is no such user, or no home folder"
    return None


def read_text_file(text: str) -> str:
    """The text of a file that a person named.

    Raises:
        UnreadableError: It is not there, no regular file (reading a pipe may wait for ever, and a device may have no
            end), larger than `TEXT_LIMIT_BYTES`, or not UTF-8.
    """
    if fault := path_fault(text):
        raise UnreadableError(fault)
    path = Path(text).expanduser()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnreadableError("it is no regular file")
        with path.open("rb") as file:
            content = file.read(TEXT_LIMIT_BYTES + 1)
        if len(content) > TEXT_LIMIT_BYTES:
            raise UnreadableError(f"it is larger than {TEXT_LIMIT_BYTES >> 20} MiB")
        return io.TextIOWrapper(io.BytesIO(content), "utf-8").read()  # every line ends in \n
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableError(first_line(error)) from None
