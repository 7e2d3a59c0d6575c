"""The errors and the log of ModelScope's client: which errors are tried again, and what they mean for the user."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qwen_tune.errors import first_line

TITLE = "ModelScope"
TOKEN_VARIABLE = "MODELSCOPE_API_TOKEN"
LOG_IN = f"run `modelscope login`, or set {TOKEN_VARIABLE} to a token from https://modelscope.cn/my/myaccesstoken"

# The messages that it and urllib3 log before they wait.
_TRIES_AGAIN = re.compile(r"^Retrying (?!\()|^Incremented Retry|retry(ing)? in |honoring Retry-After")


def wait_of(error: Exception) -> float | None:
    from modelscope_hub import HubError
    from requests import exceptions

    if isinstance(error, (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError)):
        return 0.0
    if not (isinstance(error, HubError) and error.retryable):
        return None
    return float(getattr(error, "retry_after", None) or 0)


def meaning(error: BaseException) -> tuple[str, str]:
    """Returns what an error of the client means, and what the user can do about it."""
    from modelscope_hub import errors
    from requests import exceptions

    later = "run the same command later; files that have arrived are not sent again"
    cut = (errors.NetworkError, exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError)
    meanings: list[tuple[type[BaseException], str, str]] = [
        (errors.AuthenticationError, "the token is not accepted", LOG_IN),
        (errors.QuotaExceededError, "the account has no space left", "free some space, or ask ModelScope for more"),
        (
            errors.PermissionDeniedError,
            "the token does not allow that",
            "use a token that can write, and an owner that the account can write for",
        ),
        (errors.NotExistError, "it does not exist, or the account cannot see it", "check the name and the account"),
        (
            errors.AlreadyExistsError,
            "it already exists, or somebody else is changing it",
            "choose another name, or run the same command again",
        ),
        (errors.RateLimitError, "there were too many requests", later),
        *((kind, "the connection failed", f"check the network, and {later}") for kind in cut),
        (errors.ServerError, "the server failed", later),
    ]
    for kind, what, fix in meanings:
        if isinstance(error, kind):
            return what, fix
    return "its client gave up", later


def cause(error: BaseException, logged: list[BaseException]) -> BaseException:
    """Returns the cause of an error: a failed upload itself says only how many files failed."""
    if getattr(error, "status_code", None) or type(error).__name__ not in ("StorageError", "RuntimeError"):
        return error
    answers = [each for each in logged if getattr(each, "status_code", None)]
    return (answers or logged or [error])[-1]


@contextmanager
def capture_client_log(say: Callable[[str], None]) -> Iterator[list[BaseException]]:
    """Keeps the client's log off the terminal, except for a line each time that it waits and tries again.

    Yields:
        The errors in the log.
    """
    errors: list[BaseException] = []

    class CaptureHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            arguments = record.args if isinstance(record.args, tuple) else ()
            raised = [each for each in arguments if isinstance(each, BaseException)]
            if record.levelno >= logging.WARNING:
                errors.extend(raised)
            if _TRIES_AGAIN.search(record.getMessage()):
                reason = f" ({first_line(raised[-1])})" if raised else ""
                say(f"{TITLE} does not answer{reason}; trying again")

    loggers = [logging.getLogger(name) for name in ("modelscope_hub", "urllib3")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    handler = CaptureHandler()
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.DEBUG)
    try:
        yield errors
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
