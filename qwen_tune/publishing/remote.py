"""The interface of a site that models are pushed to, which `hub` and `modelscope` implement, and its retries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from qwen_tune.console import report
from qwen_tune.errors import Problem, PublishError, first_line


@dataclass(frozen=True)
class Account:
    """The owner of a token, and the owners or single repositories that it can write to; None if that is not known."""

    name: str
    owners: frozenset[str] | None


@dataclass(frozen=True)
class Repository:
    """A repository by its present name, which differs from the requested one if it was renamed."""

    id: str
    private: bool
    url: str


class Remote(Protocol):
    """A site for models. Busy servers and broken connections are tried again; other failures are a PublishError."""

    title: str
    """Its name in a sentence: `the Hub`."""

    site: str
    """`hub` or `modelscope`, for the card."""

    @property
    def token(self) -> str | None:
        """The account's token, so that no file with it is sent."""

    def account(self) -> Account:
        """Returns the owner of the token; raises PublishError if the token cannot write."""

    def find(self, repo_id: str) -> Repository | None:
        """Returns the repository; None if it does not exist or the account cannot see it."""

    def create(self, repo_id: str, *, private: bool) -> None:
        """Creates a repository; see `create_repository`, which checks the result."""

    def read_card(self, repo_id: str, revision: str | None = None) -> str | None:
        """Returns README.md of any model; None if it has none."""

    def check_target(self, repository: Repository | None, revision: str | None, *, create_pr: bool) -> None:
        """Raises PublishError if a push to a branch, or a pull request, is not possible.

        `repository` is None if it does not exist yet.
        """

    def files(self, repository: Repository, revision: str | None) -> set[str]:
        """Returns the names of all files; those of the default branch if the branch does not exist yet."""

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
        """Sends the files of a folder, through links, and deletes others; files that are there are not sent again.

        Returns:
            The address of the result.
        """

    def tag(self, repository: Repository, name: str, revision: str | None) -> None:
        """Tags the commit of the upload. A tag that exists is not moved."""


def create_repository(remote: Remote, repo_id: str, *, private: bool) -> Repository:
    """Creates a repository.

    Raises:
        PublishError: The site refuses, or the visibility of the new repository is not the one that was asked for.
    """
    remote.create(repo_id, private=private)
    created = remote.find(repo_id)
    if created is None:
        raise PublishError(Problem(repo_id, "it was created but cannot be found", "run the same command again"))
    if created.private != private:
        asked, found = ("private", "public") if private else ("public", "private")
        what = f"it was to be created as a {asked} repository, and it is {found}; nothing was uploaded"
        fix = f"change its visibility at {created.url}, or delete it, and run the same command again"
        raise PublishError(Problem(repo_id, what, fix))
    return created


T = TypeVar("T")

BACK_OFF_S = (1.0, 2.0, 4.0, 8.0)
LONGEST_WAIT_S = 300.0
"""If a server asks for a longer wait, its error is raised."""


def retrying(
    call: Callable[[], T],
    wait_of: Callable[[Exception], float | None],
    *,
    title: str,
    say: Callable[[str], None] = report,
) -> T:
    """Calls up to five times and returns the result, or raises the last error.

    Args:
        call: The request.
        wait_of: Returns for an error how many seconds the server asks to wait, 0 if it does not say, or None if
            another try is useless.
        title: The server's name at the start of a message.
        say: Takes the message about each wait.
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
