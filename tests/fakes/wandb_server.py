"""A small server that speaks enough of W&B's protocol for its real client, and a reader of the client's files."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Received:
    """All requests as they were sent, and the lines of the run's files."""

    def __init__(self) -> None:
        self.address = ""
        self.requests: list[tuple[str, str, str]] = []
        self.lines: dict[str, list[Any]] = {}
        self.finished: list[Any] = []

    def operations(self) -> list[str]:
        """The names of the GraphQL operations, in order."""
        return [_operation(json.loads(body)) for _, path, body in self.requests if path == "/graphql"]


@contextmanager
def serve() -> Iterator[Received]:
    """Serves W&B's address for one run and yields what it receives."""
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._take()
            self._json({})

        do_PUT = do_GET  # noqa: N815

        def do_POST(self) -> None:
            body = self._take()
            if self.path == "/graphql":
                self._json({"data": _graphql(json.loads(body), received)})
            elif self.path.endswith("/file_stream"):
                sent = json.loads(body)
                for name, chunk in (sent.get("files") or {}).items():
                    received.lines.setdefault(name, []).extend(json.loads(line) for line in chunk["content"])
                if sent.get("complete"):
                    received.finished.append(sent.get("exitcode"))
                self._json({"limits": {}})
            else:
                self._json({})

        def _take(self) -> str:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            body = data.decode("utf-8", "replace")
            received.requests.append((str(self.headers), self.path, body))
            return body

        def _json(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def wandb_records(data: bytes) -> Iterator[Any]:
    """Yields the records of a small .wandb file: 7 bytes, then for each a checksum, a length, a type and the record."""
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B"
    assert len(data) < 32768, "longer files have blocks"
    position = 7
    while position < len(data):
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        assert data[position + 6] == 1, "a record in one piece"
        yield Record.FromString(data[position + 7 : position + 7 + length])
        position += 7 + length


def _operation(request: dict[str, Any]) -> str:
    match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
    return match[1] if match else ""


def _graphql(request: dict[str, Any], received: Received) -> dict[str, Any]:
    operation, variables = _operation(request), request.get("variables") or {}
    project = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": "team"}}
    if operation == "RunResumeStatus":
        return {"model": {**project, "bucket": _resumed(variables, received)}}
    if operation == "CreateRunFiles":
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
    if operation == "UpsertBucket":
        bucket = {
            "id": "b",
            "name": variables["name"],
            "displayName": variables["displayName"],
            "description": "",
            "config": variables["config"],
            "sweepName": None,
            "historyLineCount": 0,
            "project": project,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    return {}


def _resumed(variables: dict[str, Any], received: Received) -> dict[str, Any] | None:
    """Returns the only run of the server, which a client can resume."""
    history = received.lines.get("wandb-history.jsonl")
    if not history:
        return None
    return {
        "id": "b",
        "name": variables["name"],
        "displayName": "n",
        "summaryMetrics": json.dumps(received.lines["wandb-summary.json"][-1]),
        "logLineCount": 0,
        "historyLineCount": len(history),
        "eventsLineCount": 0,
        "historyTail": json.dumps([json.dumps(history[-1])]),
        "eventsTail": "[]",
        "config": "{}",
        "tags": [],
        "notes": "",
        "wandbConfig": json.dumps({"t": {}}),
    }
