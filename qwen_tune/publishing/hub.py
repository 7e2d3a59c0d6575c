"""The Hugging Face Hub, through its own client."""

from __future__ import annotations

import glob
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwen_tune.compat import hub_client_factory
from qwen_tune.console import report
from qwen_tune.errors import Problem, PublishError, first_line
from qwen_tune.publishing.remote import Account, Repository, retrying
from qwen_tune.recipe.secret_values import Secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_BUSY = (408, 425, 429, 500, 502, 503, 504)
_RESUME = "run the same command again: it resumes the upload"
LOG_IN = (
    "make a token that can write at https://huggingface.co/settings/tokens, then run `hf auth login` or set HF_TOKEN"
)


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def wait_of(error: Any) -> float | None:
    """Seconds after which the same request may succeed, 0 if the Hub does not say; None if it will not succeed."""
    from huggingface_hub.errors import HTTPError

    error = _cause(error)
    status = _status(error)
    if status in _BUSY:
        after = error.response.headers.get("Retry-After", "")
        return float(after) if after.isdecimal() else 0.0
    is_hopeless = type(error).__name__ in ("UnsupportedProtocol", "InvalidURL")
    return 0.0 if isinstance(error, HTTPError) and status is None and not is_hopeless else None


def _cause(error: BaseException) -> BaseException:
    """Unwraps the errors of failed uploads and downloads, which say less than their cause."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    is_wrapped = isinstance(error, LocalEntryNotFoundError) or type(error) is RuntimeError
    return error.__cause__ if is_wrapped and error.__cause__ is not None else error


def explain(error: BaseException) -> tuple[str, str]:
    """Returns what happened, and what the user can do about it."""
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
        return "the Hub's client is set to offline mode (HF_HUB_OFFLINE)", "unset it"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token on this machine", LOG_IN
    if isinstance(error, UnicodeDecodeError):
        return "its README.md is not UTF-8 and would be lost", "save it as UTF-8"
    if isinstance(error, UnicodeEncodeError):
        return "the token has invalid characters", LOG_IN
    if isinstance(error, json.JSONDecodeError):
        return "the answer is not from the Hub (there may be a proxy)", "check HF_ENDPOINT and the network"
    if type(error).__name__ in ("UnsupportedProtocol", "InvalidURL"):
        return f"HF_ENDPOINT is not an address ({said})", "write it with https://"
    if isinstance(error, ValueError) and "metadata" in said:
        return f"the Hub does not accept the card's front matter ({said})", "check --license, --language and --base-id"
    if isinstance(error, HFValidationError):
        return f"this is not a name of a repository ({said})", "give owner/name"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "the Hub does not accept the token", f"{LOG_IN} (HF_TOKEN takes precedence over a saved login)"
    if status == 403:
        return f"the token does not allow this ({said})", LOG_IN
    if isinstance(error, RevisionNotFoundError):
        return "there is no such branch", "check --revision"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or the token cannot see it", "check the name and the token's permissions"
    if status in (409, 412):
        return f"somebody else is changing it ({said})", _RESUME
    if status in _BUSY:
        return f"the Hub is busy or has an error ({status})", f"wait a little, then {_RESUME}"
    if isinstance(error, HTTPError) and status is None:
        return f"the connection to the Hub failed ({said})", _RESUME
    return said, _RESUME


T = TypeVar("T")

TIMEOUT_S, SHORT_TIMEOUT_S = 300, 10
"""For one answer, without and with `patient=False`. The client has no limit of its own."""

_WRITERS = ("admin", "write", "contributor")


class HuggingFace:
    title = "the Hub"
    site = "hub"

    def __init__(self, *, patient: bool = True) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the client is imported
        from huggingface_hub import HfApi, get_token, set_client_factory
        from huggingface_hub.utils import disable_progress_bars, logging

        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            disable_progress_bars()

        def client() -> Any:
            made = default_client()
            made.timeout = TIMEOUT_S if patient else SHORT_TIMEOUT_S
            return made

        default_client = hub_client_factory()
        set_client_factory(client)
        self._api: HfApi = HfApi()
        self.token: str | None = get_token()
        self._patient = patient
        self._name: str | None = None
        self._secrets = Secrets()
        self._secrets.add(self.token)

    def close(self) -> None:
        """Restores the client's own time limits: the same process downloads the base."""
        from huggingface_hub import set_client_factory

        set_client_factory(hub_client_factory())

    def account(self) -> Account:
        if self.token is None or not self.token.strip():
            raise PublishError(Problem("the Hub", "there is no token on this machine", LOG_IN))
        answer = self._call("the Hub", self._api.whoami)
        if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
            raise PublishError(Problem("the Hub", "does not name the owner of the token", "check HF_ENDPOINT"))
        self._name = name = answer["name"]
        token = (answer.get("auth") or {}).get("accessToken") or {}
        role = token.get("role")
        organizations = answer.get("orgs") or []
        owners = {name} | {str(org.get("name")) for org in organizations if org.get("roleInOrg", "write") in _WRITERS}
        if role == "read":
            what = f"the token of {name} can only read"
            raise PublishError(Problem("the Hub", what, f"{LOG_IN} (HF_TOKEN takes precedence over a saved login)"))
        if role == "fineGrained":
            owners = _may_write(token.get("fineGrained") or {}, owners)
            if not owners:
                raise PublishError(Problem("the Hub", f"the token of {name} cannot write to any repository", LOG_IN))
        return Account(name, frozenset(owners))

    def find(self, repo_id: str) -> Repository | None:
        from huggingface_hub.errors import RepositoryNotFoundError

        def look() -> Any:
            try:
                return self._api.model_info(repo_id)
            except RepositoryNotFoundError:
                return None

        info = self._call(repo_id, look)
        return Repository(str(info.id), bool(info.private), f"{self._api.endpoint}/{info.id}") if info else None

    def create(self, repo_id: str, *, private: bool) -> None:
        self._call(repo_id, lambda: self._api.create_repo(repo_id, private=private, exist_ok=True))

    def read_card(self, repo_id: str, revision: str | None = None) -> str | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        def read(revision: str | None) -> str | None:
            # Not from the cache: if the Hub does not answer, that would return an old card as the newest.
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
                except RevisionNotFoundError:
                    return read(None) if revision else None
                except (EntryNotFoundError, RepositoryNotFoundError) as error:
                    if isinstance(error, FileNotFoundError):  # the Hub did not answer
                        raise
                    return None
                return Path(path).read_text(encoding="utf-8")

        return self._call(repo_id, lambda: read(revision))

    def check_target(self, repository: Repository | None, revision: str | None, *, create_pr: bool) -> None:
        """Always possible: branches are created, and everyone who sees a repository may open a pull request."""

    def files(self, repository: Repository, revision: str | None) -> set[str]:
        from huggingface_hub.errors import RevisionNotFoundError

        def names() -> set[str]:
            try:
                return set(self._api.list_repo_files(repository.id, revision=revision))
            except RevisionNotFoundError:
                return set(self._api.list_repo_files(repository.id))

        return self._call(repository.id, names)

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
        id = repository.id
        number = self._draft(id, title) if create_pr else None
        target = f"refs/pr/{number}" if number else revision
        if revision and not revision.startswith("refs/") and revision != "main":
            self._call(id, lambda: self._api.create_branch(id, branch=revision, exist_ok=True))
        self._call(
            id,
            lambda: self._api.upload_folder(
                repo_id=id,
                folder_path=folder,
                revision=target,
                commit_message=title,
                delete_patterns=[glob.escape(name) for name in delete] or None,
            ),
        )
        if number:
            self._call(id, lambda: self._api.change_discussion_status(id, number, "open"))
            return f"{repository.url}/discussions/{number}"
        return repository.url if target in (None, "main") else f"{repository.url}/tree/{target}"

    def tag(self, repository: Repository, name: str, revision: str | None) -> None:
        self._call(
            repository.id, lambda: self._api.create_tag(repository.id, tag=name, revision=revision, exist_ok=True)
        )

    def _draft(self, repo_id: str, title: str) -> int:
        """Returns the number of a pull request: one that an earlier push left as a draft, or a new one."""

        def found_or_made() -> int:
            for one in self._api.get_repo_discussions(repo_id, discussion_type="pull_request"):
                if (one.title, one.status, one.author) == (title, "draft", self._name):
                    return int(one.num)
            return int(self._api.create_pull_request(repo_id, title).num)

        return self._call(repo_id, found_or_made)

    def _call(self, where: str, call: Callable[[], T]) -> T:
        try:
            if not self._patient:
                return call()
            return retrying(call, wait_of, title="the Hub", say=lambda line: report(self._secrets.redact(line)))
        except Exception as error:  # of the client, the HTTP library or the transfer library
            what, fix = explain(error)
            raise PublishError(Problem(where, self._secrets.redact(what), fix)) from None


def _may_write(permissions: Mapping[str, Any], owners: set[str]) -> set[str]:
    """Returns the owners and single repositories that a fine-grained token can write to."""
    allowed: set[str] = set()
    for scope in permissions.get("scoped", []):
        entity = scope.get("entity", {})
        if "repo.write" in scope.get("permissions", []):
            allowed.add(str(entity.get("name")))
    return {entity for entity in allowed if entity in owners or "/" in entity}
