"""A small server that speaks enough of ModelScope's protocol for its real client to push repositories to it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

PRIVATE, PUBLIC = 1, 5


@dataclass
class Repository:
    """Files by branch and path, and tags by name."""

    visibility: int = PUBLIC
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"master": {}})
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class Fault:
    """The answer to the next requests that match; without a status the connection is cut."""

    pattern: str
    status: int | None
    times: int
    headers: dict[str, str]
    after: bool
    body: bytes | None


class State:
    """The server's repositories, the requests that it received, and its next faults."""

    def __init__(self, user: str, token: str) -> None:
        self.user, self.token = user, token
        self.address = ""
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        """`GET /path?query` and the body, in order."""
        self.faults: list[Fault] = []
        self.always_public = False
        self.held: tuple[str, Event] | None = None
        """A request that matches is not processed, and its arrival is reported: the test then kills the client."""
        self.lock = Lock()

    def fail(
        self,
        pattern: str,
        status: int | None,
        times: int = 1,
        *,
        after: bool = False,
        body: bytes | None = None,
        **headers: str,
    ) -> None:
        """Makes the next requests that match fail; with `after`, the server has processed them."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults.append(Fault(pattern, status, times, named, after, body))

    def asked(self, pattern: str) -> list[str]:
        """Returns the bodies of the requests that match."""
        return [body for line, body in self.requests if re.search(pattern, line)]

    def fault(self, line: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class RefusedError(Exception):
    """An answer that is not 200."""

    def __init__(self, status: int, message: str, code: int | str | None = None) -> None:
        self.status, self.body = status, {"Code": code or status, "Message": message, "Success": False}


@contextmanager
def serve(user: str = "alice", token: str = "ms-token") -> Iterator[State]:
    """Serves an empty hub to one account."""
    state = State(user, token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # head and body in one packet: else each answer waits for the client's late acknowledgement

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            line = f"{self.command} {self.path}"
            with state.lock:
                state.requests.append((line, body.decode("utf-8", "replace")))
            if state.held and re.search(state.held[0], line):
                arrived, state.held = state.held[1], None
                arrived.set()
                self.connection.recv(1)  # until the client is gone
                self.close_connection = True
                return
            fault = state.fault(line)
            if fault and not fault.after:
                self._break(fault)
                return
            try:
                if self.headers.get("Authorization") != f"Bearer {state.token}":
                    raise RefusedError(401, "token is invalid")
                with state.lock:
                    answer = _answer(state, self.command, self.path, body)
            except RefusedError as refused:
                self._send(refused.status, json.dumps(refused.body).encode(), {"Content-Type": "application/json"})
                return
            if fault:
                self._break(fault)
            elif isinstance(answer, bytes):
                self._send(200, answer, {"Content-Type": "application/octet-stream"})
            else:
                whole = {"Code": 200, "Success": True, "Data": answer}
                self._send(200, json.dumps(whole).encode(), {"Content-Type": "application/json"})

        do_POST = do_PUT = do_GET  # noqa: N815

        def _break(self, fault: Fault) -> None:
            if fault.status is None:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            told = {"Code": fault.status, "Message": f"refused by the test, for {state.token}"}
            body = json.dumps(told).encode() if fault.body is None else fault.body
            self._send(fault.status, body, {"Content-Type": "application/json", **fault.headers})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _answer(state: State, method: str, target: str, body: bytes) -> Any:
    address = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(address.query).items()}
    path = address.path
    sent = json.loads(body) if method == "POST" else {}
    if path == "/openapi/v1/users/me":
        return {"sub": "1", "name": state.user, "email": "alice@example.com"}
    if path == "/api/v1/models" and method == "POST":
        return _create(state, sent)
    if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
        assert hashlib.sha256(body).hexdigest() == match[1]
        state.blobs[match[1]] = body
        return {}
    match = re.fullmatch(r"/(openapi/v1|api/v1|api/v1/repos)/models/([\w.-]+/[\w.-]+)(/.*)?", path)
    if match is None:
        raise RefusedError(404, "not here")
    repository, rest = state.repositories.get(match[2]), match[3] or ""
    if repository is None:
        raise RefusedError(404, "no such model")
    if not rest:
        # As on the site: private repositories are seen by the older interface alone.
        if match[1] == "openapi/v1" and repository.visibility != PUBLIC:
            raise RefusedError(404, "no such model", "ResourceNotFound")
        owner, name = match[2].split("/")
        if match[1] == "openapi/v1":
            return {"id": match[2], "private": False}
        return {"Id": 7, "Path": owner, "Name": name, "Visibility": repository.visibility}
    if rest == "/repo/files":
        return {"Files": [_listed(*item) for item in _branch(repository, query["Revision"]).items()]}
    if rest == "/repo":
        files = _branch(repository, query["Revision"])
        if query["FilePath"] not in files:
            raise RefusedError(404, "no such file")
        return files[query["FilePath"]]
    if rest == "/revisions":
        branches = [{"Revision": name} for name in repository.branches]
        return {"RevisionMap": {"Branches": branches, "Tags": [{"Revision": name} for name in repository.tags]}}
    if rest == "/repo/tag":
        if sent["TagName"] in repository.tags:
            raise RefusedError(409, "the tag exists")
        repository.tags[sent["TagName"]] = sent["Ref"]
        return {}
    if rest == "/info/lfs/objects/batch":
        missing = [each["oid"] for each in sent["objects"] if each["oid"] not in state.blobs]
        return {"objects": [{"oid": o, "actions": {"upload": {"href": f"{state.address}/lfs/{o}"}}} for o in missing]}
    if match := re.fullmatch(r"/commit/(.+)", rest):
        files = _branch(repository, match[1])
        for action in sent["actions"]:
            if action["action"] == "delete":
                del files[action["path"]]
                continue
            lfs = action["type"] == "lfs"
            files[action["path"]] = state.blobs[action["sha256"]] if lfs else base64.b64decode(action["content"])
        return {"oid": "0" * 40}
    raise RefusedError(404, "not here")


def _create(state: State, sent: dict[str, Any]) -> dict[str, Any]:
    repo_id = f"{sent['Path']}/{sent['Name']}"
    if sent["Path"] != state.user:
        raise RefusedError(403, "no permission")
    if repo_id in state.repositories:
        raise RefusedError(400, "该名称已被注册使用，请重新命名", 10010101001)
    state.repositories[repo_id] = Repository(PUBLIC if state.always_public else sent["Visibility"])
    return {"ModelId": 7}


def _branch(repository: Repository, name: str) -> dict[str, bytes]:
    if name not in repository.branches:
        raise RefusedError(404, "no such revision")
    return repository.branches[name]


def _listed(path: str, data: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    return {"Path": path, "Name": path.rsplit("/", 1)[-1], "Type": "blob", "Size": len(data), "Sha256": digest}
