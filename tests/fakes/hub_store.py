"""The Hub's repositories, users and rights in memory: what `hub_write_server` answers from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

Json = dict[str, Any]
Role = Literal["read", "write", "fineGrained"]

GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"  # the Hub puts such a file in every repository


class HubError(Exception):
    """An answer other than success. `body` are further keys of its JSON, `code` the header X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class MovedError(Exception):
    """The repository has another name now: 307 to the same place under `new`."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(f"{old} is {new} now")
        self.old, self.new = old, new


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The pointer that git stores for a file in LFS."""
        lines = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return lines.encode()

    @cached_property
    def oid(self) -> str:
        """git's own id of the blob, or of the pointer to it."""
        content = self.pointer if self.lfs else self.data
        return sha1(b"blob %d\0" % len(content), content)

    @property
    def etag(self) -> str:
        """The id of the content in preupload and downloads: sha256 in LFS, git's id otherwise."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    files: dict[str, Blob]
    date: str


@dataclass
class PullRequest:
    num: int
    title: str
    description: str
    author: str
    status: str  # draft, open, closed
    created: str
    events: list[Json] = field(default_factory=list)

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"


class Repository:
    """Commits, refs by their full name (refs/heads/main, refs/tags/v1, refs/pr/1), pull requests, and LFS objects."""

    def __init__(self, kind: str, id: str, private: bool, author: str) -> None:
        self.kind, self.id, self.private, self.author = kind, id, private, author  # kind: models, datasets, spaces
        self.created = now()
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.pull_requests: list[PullRequest] = []
        self.lfs: dict[str, bytes] = {}  # by sha256, as sent; a commit refers to them
        self.parts: dict[str, dict[int, bytes]] = {}  # of multipart uploads under way
        self.commit("refs/heads/main", "initial commit", {".gitattributes": Blob(GITATTRIBUTES)}, author)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def prefix(self) -> str:
        """The prefix of the id in addresses outside of the API."""
        return "" if self.kind == "models" else f"{self.kind}/"

    @property
    def branches(self) -> dict[str, dict[str, Blob]]:
        heads = {ref: id for ref, id in self.refs.items() if ref.startswith("refs/heads/")}
        return {ref.removeprefix("refs/heads/"): self.commits[id].files for ref, id in heads.items()}

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: blob.data for path, blob in self.at(revision).files.items()}

    def at(self, revision: str) -> Commit:
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision in self.commits:
            return self.commits[revision]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def writable(self, revision: str) -> str:
        """Returns the full name of a branch or pull request; other refs take no commits."""
        name = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if name not in self.refs or name.startswith("refs/tags/"):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name

    def commit(self, ref: str, title: str, files: dict[str, Blob], author: str, message: str = "") -> Commit:
        parent = self.refs.get(ref)
        names = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(files.items()))
        id = sha1(f"{self.id} {ref} {parent} {title} {len(self.commits)}\n{names}".encode())
        self.commits[id] = Commit(id, parent, title, message, author, dict(files), now())
        self.refs[ref] = id
        return self.commits[id]

    def point(self, ref: str, revision: str) -> None:
        """Creates a branch or a tag."""
        if ref in self.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        self.refs[ref] = self.at(revision).id

    def open_pull_request(self, title: str, description: str, author: str, status: str) -> PullRequest:
        pull_request = PullRequest(len(self.pull_requests) + 1, title, description, author, status, now())
        self.pull_requests.append(pull_request)
        self.refs[pull_request.ref] = self.at("main").id
        return pull_request

    def pull_request(self, number: int | str) -> PullRequest:
        for pull_request in self.pull_requests:
            if pull_request.num == int(number):
                return pull_request
        raise HubError(404, "Discussion not found")


@dataclass
class User:
    """A token and its owner. `orgs`: role in each organization (read, contributor, write, admin)."""

    name: str
    token: str
    role: Role = "write"
    orgs: dict[str, str] = field(default_factory=dict)
    scoped: dict[str, list[str]] = field(default_factory=dict)  # of a fineGrained token: user, org or repository
    everywhere: list[str] = field(default_factory=list)  # its global permissions, such as discussion.write

    def allowed(self, permission: str, namespace: str, id: str | None = None) -> bool:
        """Whether a fine-grained token holds a permission for a namespace or one repository in it."""
        names = {namespace, id}
        held = [granted for name, granted in self.scoped.items() if name in names]
        return permission in self.everywhere or any(permission in granted for granted in held)

    def may_see(self, repository: Repository) -> bool:
        if not repository.private:
            return True
        if repository.namespace != self.name and repository.namespace not in self.orgs:
            return False
        rights = ("repo.content.read", "repo.write")
        return self.role != "fineGrained" or any(
            self.allowed(right, repository.namespace, repository.id) for right in rights
        )

    def may_write(self, namespace: str, repository: Repository | None = None) -> bool:
        """Whether the user can write to a repository, or create one in a namespace if none is given."""
        if self.role == "read":
            return False
        if self.role == "fineGrained" and not self.allowed("repo.write", namespace, repository and repository.id):
            return False
        own = repository is None or repository.author == self.name
        role = self.orgs.get(namespace)
        return namespace == self.name or role in ("write", "admin") or (role == "contributor" and own)

    def may_discuss(self, repository: Repository) -> bool:
        fine = any(
            self.allowed(right, repository.namespace, repository.id) for right in ("discussion.write", "repo.write")
        )
        return self.role == "write" or (self.role == "fineGrained" and fine)

    def whoami(self) -> Json:
        token: Json = {"displayName": "test", "role": self.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        if self.role == "fineGrained":
            token["fineGrained"] = {
                "canReadGatedRepos": True,
                "global": self.everywhere,
                "scoped": [{"entity": self._entity(name), "permissions": held} for name, held in self.scoped.items()],
            }
        answer: Json = {
            **{"type": "user", "id": sha1(self.name.encode())[:24], "name": self.name, "fullname": self.name},
            **{"canPay": False, "periodEnd": None, "isPro": False, "avatarUrl": "/avatars/0.svg"},
            "orgs": [
                {**self._entity(name), "id": sha1(name.encode())[:24], "fullname": name, "roleInOrg": role}
                for name, role in self.orgs.items()
            ],
            "auth": {"type": "access_token", "accessToken": token},
        }
        # A fine-grained token shows the address only with a permission of its own.
        return answer if self.role == "fineGrained" else {**answer, "email": "me@example.com", "emailVerified": True}

    def _entity(self, name: str) -> Json:
        kind = "model" if "/" in name else "user" if name == self.name else "org"
        return {"_id": sha1(name.encode())[:24], "type": kind, "name": name}


@dataclass
class Hub:
    """Repositories by kind and id ("models", "me/tiny"), users by token."""

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    renamed: dict[tuple[str, str], str] = field(default_factory=dict)
    users: dict[str, User] = field(default_factory=dict)

    def add_user(self, name: str, token: str, role: Role = "write", **rights: Any) -> User:
        self.users[token] = User(name, token, role, **rights)
        return self.users[token]

    def add_folder(self, id: str, folder: Path, *, private: bool = False, kind: str = "models") -> Repository:
        """Publishes a folder as a repository of its namespace, large files as LFS does."""
        repository = self.create(kind, id, private, author=id.split("/")[0])
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {
            path.relative_to(folder).as_posix(): Blob(path.read_bytes(), path.suffix == ".safetensors")
            for path in paths
        }
        repository.commit("refs/heads/main", "Add files", {**repository.at("main").files, **files}, id.split("/")[0])
        return repository

    def repository(self, id: str, kind: str = "models") -> Repository:
        """Returns a repository for a test to inspect."""
        return self.repositories[kind, id]

    def rename(self, old: str, new: str, kind: str = "models") -> None:
        repository = self.repositories.pop((kind, old))
        repository.id = new
        self.repositories[kind, new] = repository
        self.renamed[kind, old] = new

    def create(self, kind: str, id: str, private: bool, author: str) -> Repository:
        self.renamed.pop((kind, id), None)  # a new repository takes the name away from the redirection
        self.repositories[kind, id] = Repository(kind, id, private, author)
        return self.repositories[kind, id]

    def find(self, kind: str, id: str, user: User | None) -> Repository:
        """Returns the repository if the user can see it. For others a private repository does not exist."""
        if (kind, id) in self.renamed:
            raise MovedError(id, self.renamed[kind, id])
        repository = self.repositories.get((kind, id))
        visible = repository is not None and (user.may_see(repository) if user else not repository.private)
        if repository is None or not visible:
            if user is None:
                # The Hub leaves the code out here; its client then goes by an address that starts with https.
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository


def sha1(*parts: bytes) -> str:
    return hashlib.sha1(b"".join(parts), usedforsecurity=False).hexdigest()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
