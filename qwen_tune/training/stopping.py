"""A run that is asked to stop: it finishes its step, saves, and ends."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from qwen_tune.console import tell
from qwen_tune.machine import started_at

# A launcher passes one Ctrl-C on several times within a moment; a person presses it again after reading.
SECONDS_OF_ONE_REQUEST = 1.0


class StopRequest:
    """Whether SIGINT or SIGTERM has asked this process to stop, or its time is up.

    Args:
        max_hours: Hours after the start of this process, or None for no limit.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self._signalled = False
        self._first = 0.0
        self._end = math.inf if max_hours is None else started_at() + max_hours * 3600

    @property
    def requested(self) -> bool:
        """Whether the step that runs is the last."""
        return self._signalled or time.time() >= self._end

    @contextmanager
    def listening(self, *, quiet: bool = False) -> Iterator[None]:
        """Turns signals into a request for as long as this lasts; a second Ctrl-C ends the process at once.

        Args:
            quiet: Whether to say nothing when one comes (processes beside the first).
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread alone
            return

        def on_signal(number: int, frame: FrameType | None) -> None:
            now = time.monotonic()
            if not self._signalled:
                self._signalled, self._first = True, now
                if not quiet:
                    tell("\nstopping after this step; Ctrl-C again stops without saving")
            elif number == signal.SIGINT and now - self._first > SECONDS_OF_ONE_REQUEST:
                raise KeyboardInterrupt

        with on_stop_signals(on_signal):
            yield


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Lets a handler answer SIGINT and SIGTERM for as long as this lasts. For the main thread."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
