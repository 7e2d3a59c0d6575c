"""A server that speaks enough of the Hub's protocol for its real client to publish to it: in memory, with faults.

with serve_hub(token="hf_test") as hub:  # the user "me"; hub.add_user, hub.add_folder for more
    hub.fail("POST .*/commit/", status=503, headers={"Retry-After": "0"})
    ...  # a process with HF_ENDPOINT=hub.address
    assert hub.received("lfs") == ["model.safetensors"]
"""

from __future__ import annotations

import base64
import json
import re
import select
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, RLock, Thread
from typing import Any, Literal
from urllib.parse import unquote

from fakes.hub_answers import Answer, Request, Rules, answer, json_answer
from fakes.hub_store import Hub

HOLD_SECONDS = 60.0  # so that a test that never releases a request ends


@dataclass
class Fault:
    """A fault in the next requests whose `METHOD path` contains a pattern."""

    pattern: str
    times: float = 1
    answer: Answer | None = None
    """Sent instead of the real answer; the request is not processed."""
    cut_after_bytes: int | None = None
    """The connection is dropped after this many bytes of the body; the request is not processed."""
    lost: bool = False
    """The request is processed, and the connection is dropped instead of an answer."""
    seconds: float = 0.0
    held: tuple[Event, Event] | None = None
    """(arrived, go): the request waits for `go`; before it is processed, or after that if `done` is set."""
    done: bool = False


NO_FAULT = Fault("")


@dataclass
class Traffic:
    method: str
    path: str  # unquoted, with the query
    body: bytes

    def files(self) -> Iterator[tuple[Literal["regular", "lfs", "sample", "named"], str, bytes]]:
        """Yields the files in the request: kind, path (for an LFS object its sha256), content.

        "sample" is the first 512 bytes, "named" a commit's reference to an LFS object, which is its content here.
        """
        path = self.path.split("?")[0]
        if self.method == "PUT":
            yield "lfs", path.rsplit("/", 1)[1], self.body
        elif "/preupload/" in path:
            for file in _json(self.body).get("files", []):
                yield "sample", file["path"], base64.b64decode(file["sample"])
        elif self.method == "POST" and "/commit/" in path:
            for line in map(_json, self.body.splitlines()):
                if line.get("key") == "file":
                    yield "regular", line["value"]["path"], base64.b64decode(line["value"]["content"])
                elif line.get("key") == "lfsFile":
                    yield "named", line["value"]["path"], line["value"]["oid"].encode()


@dataclass
class ServedHub(Hub):
    """A Hub with an address. Repositories, users and renaming are `hub_store.Hub`'s."""

    rules: Rules = field(default_factory=Rules)
    address: str = ""
    traffic: list[Traffic] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    lock: Any = field(default_factory=RLock)  # one request at a time is done, others arrive meanwhile

    def fail(
        self,
        pattern: str,
        status: int,
        headers: dict[str, str] | None = None,
        times: float = 1,
        body: Any = None,
    ) -> None:
        """Answers the next requests with a status. `times` may be `math.inf`, `body` JSON or the bytes of a page."""
        message = body if body is not None else {"error": f"injected {status}"}
        given = Answer(status, message) if isinstance(message, bytes) else json_answer(message, status)
        given.headers |= headers or {}
        self.faults.append(Fault(pattern, times, answer=given))

    def cut(self, pattern: str, after_bytes: int = 0, times: float = 1) -> None:
        self.faults.append(Fault(pattern, times, cut_after_bytes=after_bytes))

    def lose(self, pattern: str, times: float = 1) -> None:
        self.faults.append(Fault(pattern, times, lost=True))

    def slow(self, pattern: str, seconds: float, times: float = 1) -> None:
        self.faults.append(Fault(pattern, times, seconds=seconds))

    def hold(self, pattern: str, *, done: bool = False) -> tuple[Event, Event]:
        """Stops the next such request: `arrived` is set by the server, which then waits for `go`.

        What its client has left by then is not done, unless it is `done` before the wait.
        """
        events = (Event(), Event())
        self.faults.append(Fault(pattern, held=events, done=done))
        return events

    def clear(self) -> None:
        """Clears repositories, faults and the record; users stay."""
        with self.lock:
            self.repositories.clear()
            self.renamed.clear()
            self.faults.clear()
            self.traffic.clear()

    def next_fault(self, line: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return NO_FAULT

    @property
    def requests(self) -> list[tuple[str, str, int]]:
        """Method, path (unquoted, with the query) and number of bytes received."""
        return [(request.method, request.path, len(request.body)) for request in self.traffic]

    @property
    def bodies(self) -> bytes:
        """All request bodies, as sent and with their base64 decoded, without headers."""
        decoded = [content for request in self.traffic for _, _, content in request.files()]
        return b"\n".join([request.body for request in self.traffic] + decoded)

    def received(self, kind: Literal["regular", "lfs", "sample"]) -> list[str]:
        """The paths whose bytes arrived, in order, once for each time: in a commit, as LFS objects, as samples.

        An LFS object that no commit has named is its sha256.
        """
        files = [file for request in list(self.traffic) for file in request.files()]
        names = {content.decode(): path for sort, path, content in files if sort == "named"}
        return [names.get(path, path) for sort, path, _ in files if sort == kind]

    def forget(self) -> None:
        """Clears the record."""
        self.traffic.clear()


class _DroppedError(Exception):
    """Ends the connection without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body that follows its headers would wait 40 ms for the client's word
    server: _Server

    def _answer(self) -> None:
        hub = self.server.hub
        shown = unquote(self.path)
        fault = hub.next_fault(f"{self.command} {shown}")
        try:
            body = self._read(fault.cut_after_bytes)
            hub.traffic.append(Traffic(self.command, shown, body))
            if fault.cut_after_bytes is not None:
                raise _DroppedError
            time.sleep(fault.seconds)
            if fault.held and not fault.done:
                self._wait(*fault.held)
                if self._left():
                    raise _DroppedError
            request = Request(self.command, self.path, self.headers, body)
            with hub.lock:
                given = fault.answer or answer(hub, hub.rules, hub.address, request)
            if fault.held and fault.done:
                self._wait(*fault.held)
            if fault.lost:
                raise _DroppedError
            self._send(given)
        except (_DroppedError, ConnectionError):
            self._drop()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815

    def _read(self, limit: int | None) -> bytes:
        """Reads the body, or that many bytes of it; the rest stays in the connection."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = b""
            while limit is None or len(chunks) < limit:
                size = int(self.rfile.readline(), 16)
                chunks += self.rfile.read(size)
                self.rfile.readline()
                if not size:
                    break
            return chunks[:limit]
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length if limit is None else min(limit, length))
        if limit is None and len(body) < length:
            raise ConnectionError("the client left")
        return body

    def _wait(self, arrived: Event, go: Event) -> None:
        arrived.set()
        go.wait(HOLD_SECONDS)

    def _left(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _drop(self) -> None:
        self.close_connection = True
        with self.server.hub.lock:
            try:
                self.connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # the client was first

    def _send(self, given: Answer) -> None:
        self.send_response(given.status)
        request_id = {"X-Request-Id": f"Root=1-{len(self.server.hub.traffic):08x}"}
        for name, value in {**request_id, **given.headers, "Content-Length": str(len(given.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(given.body)

    def log_message(self, *arguments: Any) -> None:
        """Logs nothing: tests read the record."""


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: ServedHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.errors.append(error)


@contextmanager
def serve_hub(
    token: str = "hf_test", *, user: str = "me", lfs: bool = True, part_bytes: int | None = None
) -> Iterator[ServedHub]:
    """Serves until the end of the block, which fails if the server itself has failed.

    Without `lfs` every file is `regular`, as a client with Xet needs it here: there is no Xet storage. With
    `part_bytes`, LFS objects are sent in parts.
    """
    hub = ServedHub(rules=Rules(part_bytes=part_bytes) if lfs else Rules(lfs_bytes=None))
    hub.add_user(user, token)
    server = _Server(hub)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        for fault in hub.faults:
            if fault.held:
                fault.held[1].set()
        server.shutdown()
        server.server_close()
        thread.join()
    if hub.errors:
        raise AssertionError(f"the server failed: {hub.errors}") from hub.errors[0]


def _json(text: bytes) -> dict[str, Any]:
    """Returns a JSON object, or an empty one if a cut connection left only a part of it."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
