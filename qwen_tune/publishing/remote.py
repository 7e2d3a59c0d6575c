"""What a place that models are pushed to can do; `hub` and `modelscope` are such places."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from qwen_tune.console import report
from qwen_tune.errors import first_line


@dataclass(frozen=True)
class Account:
    """Whose token it is, and the owners or single repositories that it may write to; None where nobody tells."""

    name: str
    owners: frozenset[str] | None


@dataclass(frozen=True)
class Repository:
    """A repository by the name that it has now, which may not be the one it was asked for by."""

    id: str
    private: bool
    url: str


class Remote(Protocol):
    """A place for models. Every call raises PublishError with what the user can do about it.

    What may succeed the next time (a busy server, a cut connection) is tried again first.
    """

    title: str
    """Its name in a sentence: `the Hub`."""

    site: str
    """`hub` or `modelscope`, for the card."""

    @property
    def token(self) -> str | None:
        """The account's token, so that it is found in whatever is sent; None without one."""

    def account(self) -> Account:
        """Who the token belongs to; it can write."""

    def find(self, repo_id: str) -> Repository | None:
        """The repository, if there is one that the account may see."""

    def create(self, repo_id: str, *, private: bool) -> Repository:
        """Makes a repository."""

    def read_card(self, repo_id: str, revision: str | None = None) -> str | None:
        """README.md of any model; None where there is none."""

    def check_target(self, repository: Repository | None, revision: str | None, *, create_pr: bool) -> None:
        """Whether a branch takes a push, or the repository a pull request; None for one that is yet to be made."""

    def files(self, repository: Repository, revision: str | None) -> set[str]:
        """The names of all files; those of the default branch where the branch is yet to be made."""

    def upload(
        self,
        repository: Repository,
        folder: Path,
        *,
        revision: str | None,
        create_pr: bool,
        title: str,
        delete: Sequence[str] = (),
    ) -> str:
        """Sends a folder's files (links are followed), and deletes some; what is there already is not sent again.

        Returns:
            Where to look at it.
        """

    def tag(self, repository: Repository, name: str, revision: str | None) -> None:
        """Gives what was uploaded a name that lasts."""


T = TypeVar("T")

BACK_OFF_S = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT_S = 300.0
"""A server that asks for more patience than this is left to the user."""


def retrying(
    call: Callable[[], T],
    wait_of: Callable[[Exception], float | None],
    *,
    title: str,
    say: Callable[[str], None] = report,
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
