"""A run that several test files resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_workspace
from resuming import run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory) -> Path:
    """A run that finished without interruption."""
    folder = make_workspace(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        return run(folder, patch)
