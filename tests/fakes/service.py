"""A stand-in for the HTTP service behind httpx's transport: a few jobs, an adapter, and answers queued by the test."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
from collections.abc import Callable
from typing import Any

import httpx

Answer = httpx.Response | Exception

ADAPTER = {"adapter_config.json": b'{"r": 16}', "adapter_model.safetensors": b"weights" * 1000}
STORE = "http://store.test"


class FakeService:
    """Keeps every request; `answers` of a route come first, then what the service would say by itself."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.answers: dict[str, list[Answer]] = {}
        self.jobs: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.uploads: list[dict[str, Any]] = []
        self.by_key: dict[str, dict[str, Any]] = {}
        self.files = dict(ADAPTER)  # what the store holds
        self.link_generation = itertools.count(1)
        self.valid_links: set[str] = set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        queued = self.answers.get(f"{request.method} {request.url.path}", [])
        if queued:
            answer = queued.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        if request.url.host == "store.test":
            return self._stored(request)
        return self._route(request)

    def heard(self, method: str, path: str) -> list[httpx.Request]:
        return [request for request in self.requests if (request.method, request.url.path) == (method, path)]

    def _route(self, request: httpx.Request) -> httpx.Response:
        path = request.url.path
        if (request.method, path) == ("POST", "/jobs"):
            return self._accept(request)
        routes: dict[str, Callable[[], Any]] = {
            "/jobs": lambda: _page(self.jobs, request),
            "/files": lambda: _page(self.uploads, request),
            "/jobs/ftjob-1": lambda: self.jobs[0],
            "/jobs/ftjob-1/events": lambda: _page(self.events, request),
            "/jobs/ftjob-1/adapter": self.manifest,
        }
        if path == "/jobs/ftjob-1/adapter/archive":
            return httpx.Response(200, content=self._archive())
        if path in routes:
            return httpx.Response(200, json=routes[path]())
        return error(404, "job_not_found", f"There is nothing at {path}.")

    def _accept(self, request: httpx.Request) -> httpx.Response:
        key = request.headers["idempotency-key"]
        job = self.by_key.setdefault(key, {"id": f"ftjob-{len(self.by_key) + 1}", "status": "queued"})
        return httpx.Response(202, json=job)

    def manifest(self) -> dict[str, Any]:
        generation = next(self.link_generation)
        self.valid_links = {f"{STORE}/{generation}/{name}" for name in ADAPTER}
        files = [
            {
                "name": name,
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "url": f"{STORE}/{generation}/{name}",
            }
            for name, content in ADAPTER.items()
        ]
        return {"job_id": "ftjob-1", "files": files}

    def _archive(self) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, content in {"../evil": b"evil", **self.files}.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return out.getvalue()

    def _stored(self, request: httpx.Request) -> httpx.Response:
        if str(request.url) not in self.valid_links:
            return httpx.Response(403, content=b"<Error>expired</Error>")
        return httpx.Response(200, content=self.files[request.url.path.rsplit("/", 1)[1]])


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    body = {"error": {"code": code, "message": message, "type": "x", "param": None, **more}}
    return httpx.Response(status, json=body, headers={"x-request-id": "req-1", **(headers or {})})


def _page(rows: list[dict[str, Any]], request: httpx.Request) -> dict[str, Any]:
    after, limit = request.url.params.get("after"), int(request.url.params["limit"])
    ids = [str(row["id"]) for row in rows]
    start = ids.index(after) + 1 if after else 0
    data = rows[start : start + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": start + limit < len(rows),
    }
