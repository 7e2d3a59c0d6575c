"""ModelScope, through its own client (`modelscope`; most of it is in the package `modelscope_hub`)."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from qwen_tune.console import report
from qwen_tune.disk import sha256
from qwen_tune.errors import Problem, PublishError, first_line
from qwen_tune.publishing.content import Content
from qwen_tune.publishing.modelscope_errors import (
    LOG_IN,
    TITLE,
    TOKEN_VARIABLE,
    capture_client_log,
    cause,
    meaning,
    wait_of,
)
from qwen_tune.publishing.remote import Account, Repository, retrying

T = TypeVar("T")

DEFAULT_BRANCH = "master"
PRIVATE = 1
"""The number of private repositories in ModelScope's API; 3 is internal and 5 public."""

_LONGEST_REASON = 200


class ModelScope:
    title = TITLE
    site = "modelscope"

    def __init__(self) -> None:
        try:
            import modelscope_hub  # noqa: F401
        except ImportError:
            fix = "pip install 'qwen-tune[modelscope]'"
            raise PublishError(Problem(TITLE, "its client is not installed", fix)) from None

    @property
    def token(self) -> str | None:
        try:
            return self._token
        except PublishError:  # `account` reports why
            return None

    def account(self) -> Account:
        # Neither ModelScope's API nor its client lists the organizations that an account can write for.
        name = self._ask("find the owner of the token", self._hub.whoami).username
        if not name:
            raise PublishError(Problem(TITLE, "does not name the owner of the token", LOG_IN))
        return Account(name, None)

    def find(self, repo_id: str) -> Repository | None:
        from modelscope_hub import NotExistError

        def look() -> Any:
            try:
                return self._hub.get_repo(repo_id, "model")
            except NotExistError:
                return None

        found = self._ask(f"look for {repo_id}", look)
        if found is None:
            return None
        if not isinstance(found.visibility, int):
            what = f"does not say whether {repo_id} is private"
            raise PublishError(Problem(TITLE, what, f"look at {self._url(repo_id)}"))
        # Only one of its two interfaces puts owner and name into the id.
        name = found.id if "/" in str(found.id) else f"{found.owner}/{found.name}"
        return Repository(name, found.visibility == PRIVATE, self._url(name))

    def create(self, repo_id: str, *, private: bool) -> None:
        from modelscope_hub.errors import AlreadyExistsError

        tries = 0

        def make() -> None:
            nonlocal tries
            tries += 1
            try:
                # Without a license its client claims Apache-2.0. The card says the real one.
                visibility = "private" if private else "public"
                self._hub.create_repo(repo_id, "model", visibility=visibility, license="Other")
            except AlreadyExistsError:
                if tries == 1:
                    raise
                # An earlier try succeeded; its answer was lost.

        self._ask(f"create {repo_id}", lambda: self._retried(make))

    def read_card(self, repo_id: str, revision: str | None = None) -> str | None:
        from modelscope_hub import NotExistError

        def read() -> str | None:
            # Its `download_file` always shows progress, and leaves locks and a copy in its cache.
            legacy = self._hub.legacy
            try:
                answer = legacy.download_stream(repo_id, "model", "README.md", revision=revision or DEFAULT_BRANCH)
            except NotExistError:
                return None
            return str(answer.content.decode("utf-8"))

        return self._ask(f"read the card of {repo_id}", lambda: self._retried(read))

    def check_target(self, repository: Repository | None, revision: str | None, *, create_pr: bool) -> None:
        # Its client creates no branches and opens no pull requests.
        if create_pr:
            what = "its client cannot open pull requests"
            raise PublishError(Problem(TITLE, what, "push without --create-pr, or to a branch"))
        if revision in (None, DEFAULT_BRANCH):
            return
        if repository is None or revision not in self._revisions(repository.id):
            where = repository.url if repository else "the website"
            what = f"there is no branch {revision}, and ModelScope's client cannot create one"
            fix = f"create the branch at {where}, or push to {DEFAULT_BRANCH}"
            raise PublishError(Problem(f"{TITLE}: {repository.id}" if repository else TITLE, what, fix))

    def files(self, repository: Repository, revision: str | None) -> set[str]:
        return set(self._files(repository.id, revision or DEFAULT_BRANCH))

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
        self.check_target(repository, revision, create_pr=create_pr)
        branch = revision or DEFAULT_BRANCH
        there, ours = self._files(repository.id, branch), _files_of(folder)
        changed = {name: file for name, file in ours.items() if not _is_same(file, there.get(name))}
        if changed:
            self._send(repository.id, changed, branch, title)
        if gone := sorted(set(delete) & there.keys()):
            self._ask(
                f"delete old weights of {repository.id}",
                lambda: self._hub.delete_files(
                    repository.id, "model", gone, commit_message="Remove weights of an earlier push", revision=branch
                ),
            )
        return repository.url

    def tag(self, repository: Repository, name: str, revision: str | None) -> None:
        from modelscope_hub.errors import AlreadyExistsError

        def make() -> None:
            with suppress(AlreadyExistsError):  # created by a try whose answer was lost
                self._hub.create_repo_tag(repository.id, "model", name, revision=revision)

        if name not in self._revisions(repository.id):
            self._ask(f"tag {repository.id} as {name}", lambda: self._retried(make))

    def _revisions(self, repo_id: str) -> set[str]:
        """Returns the names of branches and tags."""
        listed = self._ask(f"list the branches of {repo_id}", lambda: self._hub.list_repo_revisions(repo_id, "model"))
        return {str(each.get("Revision")) for each in listed}

    def _files(self, repo_id: str, branch: str) -> dict[str, tuple[int, str | None]]:
        """Returns size and sha256 of each file in the repository, by path."""
        from modelscope_hub import NotExistError

        def list_files() -> Any:
            try:
                return self._hub.list_repo_files(repo_id, "model", revision=branch)
            except NotExistError:
                return []  # a branch without a commit

        listed = self._ask(f"list the files of {repo_id}", list_files)
        return {file.path: (file.size, file.sha256) for file in listed if not file.is_dir}

    def _send(self, repo_id: str, files: dict[str, Path], branch: str, title: str) -> None:
        hub = self._open()

        def refuse(*arguments: Any, **options: Any) -> None:
            from modelscope_hub import NotSupportedError

            raise NotSupportedError("repositories are created by create()")

        # Its upload first creates the repository, a public one, and ignores any error in that
        # (modelscope_hub 0.5.1, `HubApi._create_repo_exist_ok`).
        hub.create_repo = refuse
        with TemporaryDirectory(prefix="qwen-tune-") as scratch:
            # A folder of links to the files: its client skips linked folders, and its tracker would be written into the
            # folder of the upload.
            staging = Path(scratch, "files")
            Content({**files}).write(staging)

            def send() -> None:
                with redirect_stdout(io.StringIO()):  # its report
                    hub.upload_folder(
                        repo_id,
                        "model",
                        staging,
                        commit_message=title,
                        revision=branch,
                        tracker_path=Path(scratch, "tracker.json"),
                        disable_tqdm=not sys.stderr.isatty(),
                    )

            self._ask(f"upload to {repo_id}", send)

    @cached_property
    def _hub(self) -> Any:
        return self._open()

    def _open(self) -> Any:
        # A client of our own: the package's default client keeps the environment of its first use.
        from modelscope_hub import HubApi, HubConfig

        return HubApi(HubConfig(token=self._token))

    @cached_property
    def _token(self) -> str:
        """The token from the environment or from `modelscope login`."""
        from modelscope_hub import HubConfig

        token = os.environ.get(TOKEN_VARIABLE, "").strip()
        if not token:
            try:
                token = (HubConfig(token="").load_token() or "").strip()
            except Exception as error:  # the login is a pickle, and a damaged one can raise anything
                what = f"the saved login cannot be read ({type(error).__name__})"
                raise PublishError(Problem(TITLE, what, LOG_IN)) from None
        if not token:
            raise PublishError(Problem(TITLE, "there is no token", LOG_IN))
        if not re.fullmatch(r"[!-~]+", token):  # the error about an invalid header would quote it
            raise PublishError(Problem(TITLE, "the token has invalid characters", LOG_IN))
        return token

    def _url(self, repo_id: str) -> str:
        return f"{self._hub.legacy.endpoint}/models/{repo_id}"

    def _ask(self, doing: str, call: Callable[[], T]) -> T:
        """Calls the client; its errors become a PublishError without the token."""
        from modelscope_hub import HubError
        from requests import RequestException

        with capture_client_log(self._say) as logged:
            try:
                return call()
            # An answer that is not JSON is a ValueError, and failed batches are a RuntimeError.
            except (HubError, RequestException, OSError, ValueError, RuntimeError) as error:
                raise self._refusal(doing, cause(error, logged)) from None

    def _retried(self, call: Callable[[], T]) -> T:
        """Retries what the client does not retry: a POST, a stream."""
        return retrying(call, wait_of, title=TITLE, say=self._say)

    def _refusal(self, doing: str, error: BaseException) -> PublishError:
        what, fix = meaning(error)
        status = getattr(error, "status_code", None)
        said = first_line(Exception(getattr(error, "message", None) or str(error) or type(error).__name__))
        said = self._clean(said)[:_LONGEST_REASON]
        said = f"HTTP {status}: {said}" if status else said
        return PublishError(Problem(TITLE, f"cannot {doing}; {what} ({said})", fix))

    def _say(self, line: str) -> None:
        report(self._clean(line))

    def _clean(self, text: str) -> str:
        return text.replace(self._token, "***")


def _is_same(file: Path, there: tuple[int, str | None] | None) -> bool:
    if there is None or file.stat().st_size != there[0]:
        return False
    return sha256(file) == there[1]


def _files_of(folder: Path) -> dict[str, Path]:
    """Returns a folder's files, through links, by their paths in the repository."""
    found = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            file = Path(parent, name)
            if not file.is_file():
                raise PublishError(Problem(str(file), "is a broken link, or not a file", "remove it from the folder"))
            found[file.relative_to(folder).as_posix()] = file
    return dict(sorted(found.items()))
