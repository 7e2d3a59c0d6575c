"""What a place that models are pushed to can do; `hub` and `modelscope` are such places."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qwen_tune.errors import Problem, PublishError


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


def stale_weights(repo_id: str, ours: set[str], there: set[str]) -> list[str]:
    """Weight files of an earlier push, of which this one has none by that name: they would be loaded, too.

    Args:
        repo_id: The repository, for messages.
        ours: Names of the files that are pushed.
        there: Names of those that lie in the repository.

    Raises:
        PublishError: An adapter lies where a model is to be; Transformers would load both.
    """
    places = {name.rpartition("/")[0] for name in ours}
    beside = {name for name in there if name.rpartition("/")[0] in places} - ours
    config = {f"{place}/config.json".lstrip("/") for place in places} & ours
    if config and any(name.rpartition("/")[2] == "adapter_config.json" for name in beside):
        what = "it holds an adapter where the full model is to be; Transformers would load both"
        raise PublishError(Problem(repo_id, what, "give the model a repository of its own"))
    return sorted(name for name in beside if name.endswith((".safetensors", ".safetensors.index.json")))


class Remote(Protocol):
    """A place for models. Every call raises PublishError with what the user can do about it.

    What may succeed the next time (a busy server, a cut connection) is tried again first.
    """

    title: str
    """Its name in a sentence: `the Hub`."""

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

    def upload(self, repository: Repository, folder: Path, *, revision: str | None, create_pr: bool, title: str) -> str:
        """Sends a folder's files (links are followed); what is there already is not sent again.

        Returns:
            Where to look at it.
        """

    def tag(self, repository: Repository, name: str, revision: str | None) -> None:
        """Gives what was uploaded a name that lasts."""
