"""A small hub on loopback: the part of the resolve API that `hf_hub_download` speaks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.fakes.loopback import OnLoopback

COMMIT = "c" * 40


@dataclass
class FakeHub(OnLoopback):
    """Repositories with a config.json; `errors` gives the hub's error code and status for a repository instead."""

    configs: dict[str, dict[str, Any]]
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)
    asked: int = 0

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def _answer(self, *, with_body: bool) -> None:
                hub.asked += 1
                hub.tokens.append(self.headers.get("authorization"))
                repo, _, rest = self.path.lstrip("/").partition("/resolve/")
                status, code = hub.errors.get(repo, (200, ""))
                if status == 200 and repo not in hub.configs:
                    status, code = 401, "RepoNotFound"
                elif status == 200 and not rest.startswith(("main/", COMMIT)):
                    status, code = 404, "RevisionNotFound"
                body = json.dumps(hub.configs[repo]).encode() if status == 200 else b""
                self.send_response(status)
                if code:
                    self.send_header("X-Error-Code", code)
                if status == 200:
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        return Handler
