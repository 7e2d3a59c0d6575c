"""A real browser, headless: what a page becomes once its scripts have run, and what it looks like."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the page: no GPU, no network of the browser's own, no first-run pages. As root there is no sandbox.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--virtual-time-budget=3000",
)  # fmt: skip


def find() -> str:
    """The browser's path; where there is none the test is skipped, and the summary says so."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed (apt-get install chromium)")
    return found


def dom(page: Path, profile: Path, *flags: str) -> str:
    """The document as HTML after its scripts have run."""
    return _run(page, profile, "--dump-dom", *flags)


def screenshot(page: Path, profile: Path, image: Path, *, width: int, height: int, dark: bool = False) -> Path:
    """A picture (PNG) of the top of the page."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    _run(page, profile, f"--screenshot={image}", f"--window-size={width},{height}", *scheme)
    return image


def _run(page: Path, profile: Path, *flags: str) -> str:
    command = [find(), *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout
