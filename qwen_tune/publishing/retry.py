"""Another try for what may succeed the next time: a busy server, a cut connection."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from qwen_tune.console import tell
from qwen_tune.errors import first_line

T = TypeVar("T")

BACK_OFF_S = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT_S = 300.0
"""A server that asks for more patience than this is left to the user."""


def retrying(
    call: Callable[[], T],
    wait_of: Callable[[Exception], float | None],
    *,
    title: str,
    say: Callable[[str], None] = tell,
) -> T:
    """What `call` returns, in at most five tries; the last try's error is raised as it is.

    `wait_of` says of an error how many seconds the server asked to wait (0: it did not say), or None if another try is
    no use. `title` is who does not answer, at the start of a sentence.
    """
    for pause in BACK_OFF_S:
        try:
            return call()
        except Exception as error:
            asked = wait_of(error)
            if asked is None or asked > LONGEST_WAIT_S:
                raise
            wait = asked or pause
            say(f"{title} does not answer ({first_line(error)}); trying again in {wait:g} s")
            time.sleep(wait)
    return call()
