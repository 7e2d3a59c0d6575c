"""A small server that speaks enough of the Hub's protocol for its real client to read repositories from it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(repositories: dict[str, Path]) -> Iterator[str]:
    """Serves folders as repositories: `models/owner/name` or `datasets/owner/name` to a folder. Yields the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer()

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer()

        def _answer(self) -> None:
            path = self.path.split("?")[0]
            if match := re.fullmatch(r"/api/((?:models|datasets)/[\w-]+/[\w-]+)(/.*)?", path):
                self._api(match[1], match[2] or "")
            elif match := re.fullmatch(r"/(datasets/)?([\w-]+/[\w-]+)/resolve/[^/]+/(.+)", path):
                self._file(f"{match[1] or 'models/'}{match[2]}", match[3])
            else:
                self._json(404, {"error": "not here"}, {"X-Error-Code": "EntryNotFound"})

        def _api(self, repository: str, rest: str) -> None:
            folder = repositories.get(repository)
            if folder is None:
                self._json(404, {"error": "no such repository"}, {"X-Error-Code": "RepoNotFound"})
                return
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            names = [str(file.relative_to(folder)) for file in files]
            if rest == "" or rest.startswith("/revision/"):
                siblings = [{"rfilename": name} for name in names]
                name = repository.split("/", 1)[1]
                self._json(200, {"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
            elif rest.startswith("/tree/") or rest.startswith("/paths-info/"):
                pairs = zip(names, files, strict=True)
                self._json(
                    200, [{"type": "file", "path": n, "size": f.stat().st_size, "oid": _oid(f)} for n, f in pairs]
                )
            else:
                self._json(404, {"error": "not here"}, {"X-Error-Code": "EntryNotFound"})

        def _file(self, repository: str, name: str) -> None:
            folder = repositories.get(repository)
            file = folder / name if folder else None
            if file is None or not file.is_file():
                code = "RepoNotFound" if folder is None else "EntryNotFound"
                self._json(404, {"error": "not here"}, {"X-Error-Code": code})
                return
            self._send(200, file.read_bytes(), {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": COMMIT})

        def _json(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            if __name__ == "__main__":
                super().log_message(*arguments)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
