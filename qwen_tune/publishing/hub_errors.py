"""What the Hub's client raises: whether another try is worth it, and what it means for the user."""

from __future__ import annotations

import json
from typing import Any

from qwen_tune.errors import first_line

_BUSY = (408, 425, 429, 500, 502, 503, 504)
_GO_ON = "run the same command again: it goes on with what is not there yet"
LOG_IN = (
    "make a token that can write at https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN"
)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def wait_of(error: Any) -> float | None:
    """Seconds after which the same request may go well, 0 where nobody says; None where it will not."""
    from huggingface_hub.errors import HTTPError

    error = _cause(error)
    status = _status(error)
    if status in _BUSY:
        after = error.response.headers.get("Retry-After", "")
        return float(after) if after.isdecimal() else 0.0
    is_hopeless = type(error).__name__ in ("UnsupportedProtocol", "InvalidURL")
    return 0.0 if isinstance(error, HTTPError) and status is None and not is_hopeless else None


def _cause(error: BaseException) -> BaseException:
    """What went wrong below: the client wraps failed uploads and downloads in errors that say less."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    is_wrapped = isinstance(error, LocalEntryNotFoundError) or type(error) is RuntimeError
    return error.__cause__ if is_wrapped and error.__cause__ is not None else error


def explained(error: BaseException) -> tuple[str, str]:
    """What happened, and what the user can do."""
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    error = _cause(error)
    status = _status(error)
    said = first_line(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub's client is told to stay offline (HF_HUB_OFFLINE)", "unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token on this machine", LOG_IN
    if isinstance(error, UnicodeEncodeError):
        return "the token has characters in it that no token has", LOG_IN
    if isinstance(error, json.JSONDecodeError):
        return "the answer is not the Hub's (a proxy may stand between)", "check HF_ENDPOINT and the network"
    if type(error).__name__ in ("UnsupportedProtocol", "InvalidURL"):
        return f"HF_ENDPOINT is no address ({said})", "write it with https://"
    if isinstance(error, ValueError) and "metadata" in said:
        return f"the Hub does not take the card's front matter ({said})", "check --license, --language and --base-id"
    if isinstance(error, HFValidationError):
        return f"this is no name of a repository ({said})", "give owner/name"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "the Hub does not accept the token", f"{LOG_IN} (HF_TOKEN goes before a saved login)"
    if status == 403:
        return f"the token may not do this ({said})", LOG_IN
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch", "check --revision"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or the token may not see it", "check the name and the token's permissions"
    if status in (409, 412):
        return f"somebody else is changing it ({said})", _GO_ON
    if status in _BUSY:
        return f"the Hub is busy or has a fault ({status})", f"wait a little, then {_GO_ON}"
    if isinstance(error, HTTPError) and status is None:
        return f"the connection to the Hub failed ({said})", _GO_ON
    return said, _GO_ON
