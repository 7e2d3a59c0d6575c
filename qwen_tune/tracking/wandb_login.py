"""W&B's mode and login, as its environment, netrc and settings have them, without importing W&B."""

from __future__ import annotations

import configparser
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from qwen_tune.disk import path_fault

WANDB_BASE_URL = "https://api.forge.coreweave.com"


def wandb_mode() -> str:
    """`online`, `offline` or `disabled`, as W&B's environment and settings say; without a login offline."""
    mode = os.environ.get("WANDB_MODE") or _wandb_settings().get("mode", "")
    if mode in ("offline", "dryrun"):
        return "offline"
    if mode == "disabled":
        return "disabled"
    return "online" if has_wandb_login() else "offline"


def has_wandb_login() -> bool:
    """Whether W&B will find a key, where it looks for one: environment, netrc, settings."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        entries = netrc.netrc(_place("NETRC", "~/.netrc"))
    except (OSError, UnicodeError, netrc.NetrcParseError):
        return bool(_wandb_settings().get("api_key"))
    host = wandb_host()
    # W&B's cloud moved to another name, under which it still accepts the old entry.
    hosts = [host, "api.wandb.ai"] if host.endswith("forge.coreweave.com") else [host]
    return any(entries.authenticators(name) for name in hosts) or bool(_wandb_settings().get("api_key"))


def wandb_host() -> str:
    """The host that runs are sent to, and that a login is for."""
    address = os.environ.get("WANDB_BASE_URL") or _wandb_settings().get("base_url") or WANDB_BASE_URL
    return urlsplit(address).netloc


def _place(variable: str, usual: str) -> Path:
    """The path that the environment gives, or the usual one; where neither can be, one at which nothing is."""
    text = os.environ.get(variable) or usual
    return Path(os.devnull, "none") if path_fault(text) else Path(text).expanduser()


def _wandb_settings() -> dict[str, str]:
    """What `wandb login`, `wandb offline` and the like wrote: for the user, and over that for this directory."""
    local = _place("WANDB_DIR", ".")
    files = (
        _place("WANDB_CONFIG_DIR", "~/.config/wandb") / "settings",
        local / (".wandb" if (local / ".wandb").exists() else "wandb") / "settings",
    )
    settings: dict[str, str] = {}
    for file in files:
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file, encoding="utf-8")
            settings.update(parser["default"])
        except (OSError, UnicodeError, KeyError, configparser.Error):
            continue  # not there, or W&B will complain of it
    return settings
