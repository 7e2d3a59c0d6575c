"""Detects secrets, so that a recipe that contains one is refused without showing it.

The patterns cover formats that services document (Hugging Face, GitHub, OpenAI, AWS, Slack) and URLs with a password.
Their lookaheads are bounded, so that a search takes linear time.
"""

from __future__ import annotations

import re

HIDDEN = "…"

_VALUE = re.compile(
    r"""
    \bhf_[A-Za-z0-9]{20,}
    | \bapi_org_[A-Za-z0-9]{20,}
    | \bsk-(?=[\w-]{0,200}\d)[\w-]{16,}
    | \bgh[pousr]_[A-Za-z0-9]{20,}
    | \bgithub_pat_\w{20,}
    | \bglpat-[\w-]{16,}
    | \bxox[abprs]-[\w-]{10,}
    | \bAKIA[0-9A-Z]{16}\b
    | \bwandb_v\d_\w{16,}
    | \bBearer\s{1,20}(?=\S{0,20}\d|\S{20})[\w.~+/=-]{8,}
    | (?<=://)[^/\s:@]*:[^/\s@]+(?=@)
    """,
    re.VERBOSE,
)
_KEY = re.compile(
    r"(?:^|_)(?:api_?key|access_?key(?:_id)?|secret(?:s|_?key)?|private_?key|pass(?:words?|wd|phrase)|credentials?)$"
    r"|(?:^|_)(?:access|api|auth|bearer|git(?:hub|lab)|hf|hub|hugging_?face(?:_hub)?|modelscope|openai|refresh|session"
    r"|wandb)_?token$"
    r"|^tokens?$"
)
_HEX_KEY = re.compile(r"[0-9a-fA-F]{32,}")


def is_secret_key(key: str) -> bool:
    """Whether a key's name indicates a secret; `eos_token` and similar names do not."""
    return _KEY.search(_snake_case(key)) is not None


def is_secret_value(value: str, key: str = "") -> bool:
    """Whether a text contains something like a secret; under a key like `api_key`, long hex digits count too."""
    if _VALUE.search(value):
        return True
    return "key" in _snake_case(key) and _HEX_KEY.fullmatch(value.strip()) is not None


def _snake_case(key: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_")


class Secrets:
    """Secrets found so far, which every message must leave out."""

    def __init__(self) -> None:
        self._found: set[str] = set()

    def add(self, value: object) -> None:
        # A flag such as `use_auth_token: true` is refused too, but hiding every "true" would only garble messages.
        if value is not None and not isinstance(value, bool) and str(value).strip():
            self._found.add(str(value).strip())

    def redact(self, text: str) -> str:
        """Replaces every secret in a message with an ellipsis."""
        for secret in sorted(self._found, key=len, reverse=True):
            # Short ones only as whole words: not the "7" in "4706".
            pattern = re.escape(secret) if len(secret) > 3 else rf"(?<!\w){re.escape(secret)}(?!\w)"
            text = re.sub(pattern, HIDDEN, text)
        return _VALUE.sub(HIDDEN, text)
