"""What the Hub answers to each request of its client, from a `hub_store.Hub`."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, parse_qsl, unquote, urlsplit

from fakes.hub_store import Blob, Commit, Hub, HubError, Json, MovedError, PullRequest, Repository, User, now, sha1


@dataclass
class Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    method: str
    target: str  # as sent
    headers: Any
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query))

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Rules:
    """The size from which a file goes into LFS (None for a client with Xet), and of its parts if it has any."""

    lfs_bytes: int | None = 1_000_000
    part_bytes: int | None = None

    def takes_into_lfs(self, path: str, size: int) -> bool:
        return self.lfs_bytes is not None and (path.endswith(".safetensors") or size > self.lfs_bytes)


def json_answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


def answer(hub: Hub, rules: Rules, address: str, request: Request) -> Answer:
    """Returns the answer to a request, errors and redirections included."""
    try:
        return _Conversation(hub, rules, address, request).answer()
    except HubError as error:
        headers = {"X-Error-Message": error.message, **({"X-Error-Code": error.code} if error.code else {})}
        return json_answer({"error": error.message, **error.body}, error.status, headers)
    except MovedError as moved:
        return Answer(307, headers={"Location": request.target.replace(moved.old, moved.new, 1)})


class _Conversation:
    """Methods for one request. Those of a repository take it first, then the parts of the path in their route."""

    def __init__(self, hub: Hub, rules: Rules, address: str, request: Request) -> None:
        self.hub, self.rules, self.address, self.request = hub, rules, address, request
        self.user: User | None = None

    def answer(self) -> Answer:
        request = self.request
        if match := re.fullmatch(r"/lfs/(\w+)/([^/]+/[^/]+)/(\w{64})", request.path):
            return self.store(self.hub.repositories[match[1], match[2]], match[3])  # the address is the permission
        self.user = self._authenticate()
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match is None or method != ("GET" if request.method == "HEAD" else request.method):
                continue
            groups = {name: unquote(value) for name, value in match.groupdict().items() if value is not None}
            if "id" in groups:
                kind = groups.pop("kind", "models").rstrip("/")
                return action(self, self.hub.find(kind, groups.pop("id"), self.user), **groups)
            return action(self)
        raise HubError(404, "Sorry, we can't find the page you are looking for.")

    def _authenticate(self) -> User | None:
        given = self.request.headers.get("Authorization")
        if given is None:
            return None
        user = self.hub.users.get(given.removeprefix("Bearer "))
        if user is None and self.request.path == "/api/whoami-v2":
            raise HubError(401, "Invalid username or password.")
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def _signed_in(self) -> User:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def _writer(self, repository: Repository, ref: str | None = None) -> User:
        """Returns the user if they can write to the repository or are the author of the ref's pull request."""
        user = self._signed_in()
        if user.role == "read":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        own = any(request.ref == ref and request.author == user.name for request in repository.pull_requests)
        if not own and not user.may_write(repository.namespace, repository):
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return user

    def _discusser(self, repository: Repository) -> User:
        user = self._signed_in()
        if not user.may_discuss(repository):
            raise HubError(403, "Forbidden: your token may not open discussions")
        return user

    # Users and cards

    def whoami(self) -> Answer:
        return json_answer(self._signed_in().whoami())

    def validate_card(self) -> Answer:
        """Two of the real rules: front matter must exist, and a base model must be an id on the Hub."""
        match = re.match(r"---\n(.*?)\n?---", self.request.json()["content"], re.DOTALL)
        if match is None:
            warning = "empty or missing yaml metadata in repo card"
            return json_answer({"errors": [], "warnings": [{"message": warning}]})
        bases = re.search(r"^base_model:((?: *\S+)?(?:\n *- *\S+)*)$", match[1], re.MULTILINE)
        ids = re.findall(r"[^\s'\"]{2,}", bases[1]) if bases else []  # without the hyphens of a list
        wrong = [id for id in ids if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", id)]
        message = '"base_model" with value "{}" is not valid. Use a model id from https://hf.co/models.'
        errors = [{"message": message.format(id)} for id in wrong]
        return json_answer({"errors": errors, "warnings": []}, 400 if errors else 200)

    # Repositories

    def create_repository(self) -> Answer:
        user, wanted = self._signed_in(), self.request.json()
        namespace, kind = wanted.get("organization") or user.name, wanted.get("type", "model")
        if not user.may_write(namespace):
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
        id = f"{namespace}/{wanted['name']}"
        if existing := self.hub.repositories.get((f"{kind}s", id)):
            raise HubError(409, f"You already created this {kind} repo: {id}", url=self._url(existing), id=id)
        private = wanted.get("visibility", "public") == "private"
        repository = self.hub.create(f"{kind}s", id, private, author=user.name)
        return json_answer({"url": self._url(repository), "name": id, "id": sha1(id.encode())[:24]})

    def _url(self, repository: Repository) -> str:
        return f"{self.address}/{repository.prefix}{repository.id}"

    def information(self, repository: Repository, revision: str = "main") -> Answer:
        commit = repository.at(revision)
        siblings: list[Json] = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.request.query:
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling |= {"blobId": blob.oid, "size": len(blob.data)}
                if blob.lfs:
                    sibling["lfs"] = {**_lfs(blob), "sha256": blob.sha256}
        return json_answer(
            {
                **{"_id": sha1(repository.id.encode())[:24], "id": repository.id, "author": repository.namespace},
                **{"sha": commit.id, "private": repository.private, "gated": False, "disabled": False, "tags": []},
                **{"createdAt": repository.created, "lastModified": commit.date, "downloads": 0, "likes": 0},
                "siblings": siblings,
            }
        )

    def tree(self, repository: Repository, revision: str, path: str = "") -> Answer:
        files, start = repository.at(revision).files, f"{path}/" if path else ""
        below = {name: blob for name, blob in files.items() if name.startswith(start)}
        if path and not below:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        recursive = self.request.query.get("recursive", "").lower() == "true"
        folders = {
            start + "/".join(parts[:depth])
            for parts in (name.removeprefix(start).split("/") for name in below)
            for depth in (range(1, len(parts)) if recursive else range(1, min(2, len(parts))))
        }
        entries: list[Json] = [
            {"type": "directory", "path": folder, "oid": sha1(folder.encode()), "size": 0} for folder in sorted(folders)
        ]
        shown = sorted(name for name in below if recursive or "/" not in name.removeprefix(start))
        return json_answer(entries + [_entry(name, below[name]) for name in shown])

    def paths(self, repository: Repository, revision: str) -> Answer:
        files = repository.at(revision).files
        wanted = parse_qs(self.request.body.decode()).get("paths", [])
        return json_answer([_entry(path, files[path]) for path in wanted if path in files])

    def commits(self, repository: Repository, revision: str) -> Answer:
        history: list[Json] = []
        commit: Commit | None = repository.at(revision)
        while commit is not None:
            authors = [{"user": commit.author}]
            history.append(
                {"id": commit.id, "title": commit.title, "message": commit.message, "authors": authors}
                | {"date": commit.date}
            )
            commit = repository.commits[commit.parent] if commit.parent else None
        return json_answer(history)

    def refs(self, repository: Repository) -> Answer:
        def of(start: str) -> list[Json]:
            return [
                {"name": ref.removeprefix("refs/heads/").removeprefix("refs/tags/"), "ref": ref, "targetCommit": id}
                for ref, id in repository.refs.items()
                if ref.startswith(start)
            ]

        pull_requests = {"pullRequests": of("refs/pr/")} if "include_prs" in self.request.query else {}
        return json_answer({"branches": of("refs/heads/"), "converts": [], "tags": of("refs/tags/"), **pull_requests})

    def create_branch(self, repository: Repository, name: str) -> Answer:
        self._writer(repository)
        repository.point(f"refs/heads/{name}", self.request.json().get("startingPoint", "main"))
        return json_answer({})

    def create_tag(self, repository: Repository, revision: str) -> Answer:
        self._writer(repository)
        repository.point(f"refs/tags/{self.request.json()['tag']}", revision)
        return json_answer({})

    # Uploads

    def preupload(self, repository: Repository, revision: str) -> Answer:
        if "create_pr" in self.request.query:
            self._discusser(repository)
        else:
            self._writer(repository, revision)
        there = repository.at(revision).files
        files: list[Json] = []
        for file in self.request.json()["files"]:
            mode = "lfs" if self.rules.takes_into_lfs(file["path"], file["size"]) else "regular"
            known = {"oid": there[file["path"]].etag} if file["path"] in there else {}
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return json_answer({"files": files})

    def lfs_batch(self, repository: Repository) -> Answer:
        self._discusser(repository)
        objects: list[Json] = []
        for wanted in self.request.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            if oid in repository.lfs:
                objects.append({"oid": oid, "size": size})
                continue
            upload: Json = {"href": f"{self.address}/lfs/{repository.kind}/{repository.id}/{oid}"}
            if self.rules.part_bytes:
                count = -(-size // self.rules.part_bytes)
                parts = {str(part): f"{upload['href']}?part={part}" for part in range(1, count + 1)}
                upload["header"] = {"chunk_size": str(self.rules.part_bytes), **parts}
            verify = {"href": f"{self._url(repository)}.git/info/lfs/verify"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        transfer = "multipart" if self.rules.part_bytes else "basic"
        return json_answer({"transfer": transfer, "objects": objects})

    def store(self, repository: Repository, oid: str) -> Answer:
        """A whole LFS object, one part of it, or the request that puts the parts together."""
        body = self.request.body
        if self.request.method == "POST":
            parts = repository.parts.pop(oid)
            body = b"".join(parts[part["partNumber"]] for part in self.request.json()["parts"])
        elif "part" in self.request.query:
            repository.parts.setdefault(oid, {})[int(self.request.query["part"])] = body
            return Answer(200, headers={"ETag": f'"{sha1(body)}"'})
        if Blob(body).sha256 != oid:
            raise HubError(400, "The content does not have the announced sha256")
        repository.lfs[oid] = body
        return json_answer({})

    def lfs_verify(self, repository: Repository) -> Answer:
        self._signed_in()
        wanted = self.request.json()
        if len(repository.lfs.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "Object not found")
        return json_answer({})

    def commit(self, repository: Repository, revision: str) -> Answer:
        lines = [json.loads(line) for line in self.request.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if "create_pr" in self.request.query:
            user = self._discusser(repository)
            title, description = header["summary"], header.get("description", "")
            pull_request = repository.open_pull_request(title, description, user.name, status="open")
            ref, pr_url = pull_request.ref, f"{self._url(repository)}/discussions/{pull_request.num}"
        else:
            user, ref, pr_url = self._writer(repository, revision), repository.writable(revision), None
        if header.get("parentCommit", repository.refs[ref]) != repository.refs[ref]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.at(ref).files)
        for line in lines:
            self._apply(repository, files, line["key"], line["value"])
        commit = repository.commit(ref, header["summary"], files, user.name, header.get("description", ""))
        url = f"{self._url(repository)}/commit/{commit.id}"
        told = {"pullRequestUrl": pr_url} if pr_url else {}
        return json_answer({"success": True, "commitOid": commit.id, "commitUrl": url, "hookOutput": "", **told})

    def _apply(self, repository: Repository, files: dict[str, Blob], key: str, value: Json) -> None:
        path = value.get("path", "")
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repository.lfs:
                raise HubError(400, f"Your push was rejected: no LFS object {value['oid']} for {path}")
            files[path] = Blob(repository.lfs[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(path.rstrip("/") + "/")]
            if not gone:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in gone:
                del files[name]

    # Pull requests

    def discussions(self, repository: Repository) -> Answer:
        query, open_ones = self.request.query, ("draft", "open")
        found = [
            self._summary(repository, pull_request)
            for pull_request in repository.pull_requests
            if query.get("type", "all") in ("all", "pull_request")
            and query.get("author", pull_request.author) == pull_request.author
            and query.get("status", "all") in ("all", "open" if pull_request.status in open_ones else "closed")
        ]
        return json_answer({"discussions": found, "count": len(found), "start": 0})

    def discuss(self, repository: Repository) -> Answer:
        user, wanted = self._discusser(repository), self.request.json()
        if not wanted["pullRequest"]:
            raise HubError(501, "This server has pull requests only")
        pull_request = repository.open_pull_request(wanted["title"], wanted["description"], user.name, status="draft")
        return json_answer({"num": pull_request.num, "pullRequest": True})

    def discussion(self, repository: Repository, number: str) -> Answer:
        pull_request = repository.pull_request(number)
        details = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": "", "events": []}
        return json_answer(self._summary(repository, pull_request) | details | {"events": pull_request.events})

    def set_status(self, repository: Repository, number: str) -> Answer:
        pull_request = repository.pull_request(number)
        user, status = self._writer(repository, pull_request.ref), self.request.json()["status"]
        pull_request.status = status
        event = {"id": sha1(f"{number} {len(pull_request.events)}".encode())[:24], "type": "status-change"}
        event |= {"createdAt": now(), "author": {"name": user.name}, "data": {"status": status}}
        pull_request.events.append(event)
        return json_answer({"newStatus": event})

    def _summary(self, repository: Repository, pull_request: PullRequest) -> Json:
        return {
            **{"num": pull_request.num, "title": pull_request.title, "status": pull_request.status},
            **{"author": {"name": pull_request.author}, "isPullRequest": True, "createdAt": pull_request.created},
            "repo": {"name": repository.id, "type": repository.kind.removesuffix("s")},
        }

    # Downloads

    def file(self, repository: Repository, revision: str, path: str) -> Answer:
        commit = repository.at(revision)
        if path not in commit.files:
            raise HubError(404, f"Entry not found: {path}", "EntryNotFound")
        blob = commit.files[path]
        headers = {"ETag": f'"{blob.etag}"', "X-Repo-Commit": commit.id, "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.request.headers.get("Range", ""))
        if asked is None:
            return Answer(200, blob.data, headers)
        size = len(blob.data)
        start = int(asked[1]) if asked[1] else size - int(asked[2])
        end = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
        if start > end:
            raise HubError(416, "Range not satisfiable")
        return Answer(206, blob.data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


def _lfs(blob: Blob) -> Json:
    return {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}


def _entry(path: str, blob: Blob) -> Json:
    entry = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
    return entry | {"lfs": _lfs(blob)} if blob.lfs else entry


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<id>[^/]+/[^/]+)"
_WEB = r"/(?P<kind>datasets/|spaces/)?(?P<id>[^/]+/[^/]+?)"
ROUTES: list[tuple[str, str, Callable[..., Answer]]] = [
    ("GET", "/api/whoami-v2", _Conversation.whoami),
    ("POST", "/api/validate-yaml", _Conversation.validate_card),
    ("POST", "/api/repos/create", _Conversation.create_repository),
    ("GET", rf"{_API}(?:/revision/(?P<revision>[^/]+))?", _Conversation.information),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _Conversation.tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", _Conversation.paths),
    ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", _Conversation.commits),
    ("GET", rf"{_API}/refs", _Conversation.refs),
    ("POST", rf"{_API}/branch/(?P<name>[^/]+)", _Conversation.create_branch),
    ("POST", rf"{_API}/tag/(?P<revision>[^/]+)", _Conversation.create_tag),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", _Conversation.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", _Conversation.commit),
    ("GET", rf"{_API}/discussions", _Conversation.discussions),
    ("POST", rf"{_API}/discussions", _Conversation.discuss),
    ("GET", rf"{_API}/discussions/(?P<number>\d+)", _Conversation.discussion),
    ("POST", rf"{_API}/discussions/(?P<number>\d+)/status", _Conversation.set_status),
    ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", _Conversation.lfs_batch),
    ("POST", rf"{_WEB}\.git/info/lfs/verify", _Conversation.lfs_verify),
    ("GET", rf"{_WEB}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Conversation.file),
]
