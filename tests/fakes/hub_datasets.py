"""A small hub of datasets on loopback: the part of its API that `datasets` speaks, over files held in memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.fakes.loopback import OnLoopback

COMMITS = {"main": "a" * 40, "old": "b" * 40}


@dataclass
class FakeDatasetHub(OnLoopback):
    """Repositories by name: their files at each branch.

    Args:
        errors: The hub's error code and status for a repository instead.
        paths: What was asked for, to be looked at by tests.
    """

    repositories: dict[str, dict[str, dict[str, bytes]]]
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)

    def answer(self, path: str, body: bytes) -> tuple[int, str, bytes]:
        """Status, error code and body."""
        self.paths.append(path)
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        is_api = parts[0] == "api"
        _, *parts = parts[1:] if is_api else parts
        name, rest = "/".join(parts[:2]), parts[2:]
        if name in self.errors:
            return (*self.errors[name], b"")
        if name not in self.repositories:
            return 401, "RepoNotFound", b""
        revision = rest[1] if len(rest) > 1 else "main"
        branch = next((branch for branch, commit in COMMITS.items() if revision in (branch, commit)), None)
        files = self.repositories[name].get(branch or "")
        if files is None:
            return 404, "RevisionNotFound", b""
        if is_api:
            return 200, "", json.dumps(self._described(name, rest, COMMITS[str(branch)], files, body)).encode()
        file = "/".join(rest[2:])
        return (200, "", files[file]) if file in files else (404, "EntryNotFound", b"")

    def _described(self, name: str, rest: list[str], commit: str, files: dict[str, bytes], body: bytes) -> Any:
        if rest[:1] in (["tree"], ["paths-info"]):
            below = "".join(f"{part}/" for part in rest[2:])
            wanted = json.loads(body)["paths"] if rest[0] == "paths-info" else None
            folders = {path.rpartition("/")[0] for path in files} - {""}
            entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
            for path, data in files.items():
                entries.append({"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
            if wanted is not None:
                return [entry for entry in entries if entry["path"] in wanted]
            here = [entry for entry in entries if str(entry["path"]).startswith(below)]
            return [entry for entry in here if "/" not in str(entry["path"]).removeprefix(below)]
        siblings = [{"rfilename": path} for path in files]
        return {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                sent = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, code, body = hub.answer(self.path, sent)
                total, start = len(body), 0
                if status == 200 and (asked := self.headers.get("range")) is not None:
                    first, _, last = asked.removeprefix("bytes=").partition("-")
                    start, end = int(first), min(int(last or total), total - 1)
                    status, body = 206, body[start : end + 1]
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                if status == 206:
                    self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{total}")
                self.send_header("X-Repo-Commit", COMMITS["main"] if "/old/" not in self.path else COMMITS["old"])
                self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.send_header("Content-Type", "application/json" if "/api/" in self.path else "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET = do_POST = handle_one  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        return Handler
