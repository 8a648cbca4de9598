"""A model hub on this machine: the endpoints that huggingface_hub's snapshot_download asks, over real HTTP."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"


class Hub:
    """Serves directories under hub ids. `gated` ids list their files and refuse them; `requests` is what was asked."""

    def __init__(self, repositories: dict[str, Path], gated: tuple[str, ...] = ()):
        self.repositories = repositories
        self.gated = gated
        self.requests: list[tuple[str, str]] = []
        self.cut_after: int | None = None  # bytes of a file, then the connection closes
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {path.split(f"/resolve/{COMMIT}/")[1] for verb, path in self.requests if verb == "GET" and "/resolve/" in path}

    def answer(self, request: BaseHTTPRequestHandler):
        path = unquote(urlsplit(request.path).path)
        self.requests.append((request.command, path))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) > 4:
            repository, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repository, rest = "/".join(parts[:2]), parts[2:]
        directory = self.repositories.get(repository)
        if directory is None:
            return self.refuse(request, 401, "RepoNotFound")
        if rest[0] == "revision":
            return self.send(request, json.dumps({"id": repository, "sha": COMMIT, "siblings": []}).encode())
        if rest[0] == "tree":
            files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
            return self.send(request, json.dumps([self.entry(directory, file) for file in files]).encode())
        if repository in self.gated:
            return self.refuse(request, 403, "GatedRepo")
        file = directory / "/".join(rest[2:])
        if rest[:2] != ["resolve", COMMIT] or not file.is_file():
            return self.refuse(request, 404, "EntryNotFound")
        data = file.read_bytes()
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send(request, data[start:], {"ETag": f'"{self.entry(directory, file)["oid"]}"'})

    @staticmethod
    def entry(directory: Path, file: Path) -> dict:
        data = file.read_bytes()
        return {"type": "file", "path": str(file.relative_to(directory)), "size": len(data),
                "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}

    def send(self, request, body: bytes, headers: dict | None = None):
        request.send_response(206 if request.headers.get("Range") else 200)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        if self.cut_after is not None and len(body) > self.cut_after:
            request.wfile.write(body[: self.cut_after])
            request.close_connection = True
        else:
            request.wfile.write(body)

    @staticmethod
    def refuse(request, status: int, code: str):
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()
