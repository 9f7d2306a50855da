"""What surrounds every exchange: its request id, its log line, and the answer where no route gives one."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from graft_api.errors import (
    REQUEST_ID_HEADER,
    AddressTooLong,
    AmbiguousLength,
    HeadersTooLarge,
    InternalError,
    RepeatedHeader,
    answer,
)
from graft_api.traffic import count_request, route_of
from graft_shared.errors import GraftError
from graft_shared.ids import new_request_id
from graft_shared.logs import about, log_event
from graft_shared.tracing import Tracing

LONGEST_ADDRESS_BYTES = 16_384  # a page of jobs by sixteen pairs of metadata fits
MOST_HEADER_BYTES = 32_768
# What a proxy and this process must read alike: of two, each of them might heed another.
_ONCE = (b"authorization", b"content-encoding", b"content-type", b"idempotency-key", b"last-event-id")
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_QUIET = ("/healthz", "/readyz", "/metrics")  # asked every few seconds; worth a line only when they fail

logger = logging.getLogger(__name__)


class Exchanges:
    """ASGI middleware around the whole app. Logs the path alone: queries may hold signatures."""

    def __init__(self, app: ASGIApp, tracing: Tracing | None = None) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        with about(request_id=exchange.request_id), self._traced(exchange, scope):
            await self._serve(exchange, scope, receive)

    @contextmanager
    def _traced(self, exchange: _Exchange, scope: Scope) -> Iterator[None]:
        if self._tracing is None or scope["path"] in _QUIET:
            yield
            return
        given = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1")
        with self._tracing.request(given or None, http__request__method=scope["method"]) as span:
            yield
            route = route_of(scope)
            span.tell(f"{scope['method']} {route}", http__route=route, http__response__status_code=exchange.status)

    async def _serve(self, exchange: _Exchange, scope: Scope, receive: Receive) -> None:
        refusal = _refusal_of(scope)
        if refusal is not None:
            response = answer(refusal)
            response.headers["connection"] = "close"  # what follows may be anything
            await response(scope, receive, exchange.send)
            return
        try:
            await self._app(scope, exchange.receiving(receive), exchange.send)
        except ClientDisconnect:
            exchange.end("request_abandoned")
            return
        except Exception:
            logger.exception("request_crashed")
            if exchange.status is not None:
                raise  # half an answer is out: the broken connection tells the client
            await answer(InternalError(request_id=exchange.request_id))(scope, receive, exchange.send)


def _refusal_of(scope: Scope) -> GraftError | None:
    """What is wrong with the head of a request, whatever it asks for."""
    if len(scope["raw_path"]) + len(scope["query_string"]) > LONGEST_ADDRESS_BYTES:
        return AddressTooLong(limit_bytes=LONGEST_ADDRESS_BYTES)
    if sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
        return HeadersTooLarge(limit_bytes=MOST_HEADER_BYTES)
    names = [name for name, _ in scope["headers"]]
    if b"content-length" in names and b"transfer-encoding" in names:
        return AmbiguousLength()
    repeated = next((name for name in _ONCE if names.count(name) > 1), None)
    return RepeatedHeader(header=repeated.decode()) if repeated is not None else None


class _Exchange:
    def __init__(self, scope: Scope, send: Send) -> None:
        given = dict(scope["headers"]).get(REQUEST_ID_HEADER.encode(), b"")
        self.request_id = given.decode() if _SANE_ID.fullmatch(given) else new_request_id()
        self.status: int | None = None
        self._scope = scope
        self._method, self._path = scope["method"], quote(scope["path"])  # a path may hold line breaks and escapes
        self._send = send
        self._is_coming = _has_body(scope)  # the body, or the rest of it
        self._started = time.monotonic()
        self._state = scope.setdefault("state", {})
        self._state["request_id"] = self.request_id

    def receiving(self, receive: Receive) -> Receive:
        """The same messages, while it is noted whether the body has come whole."""

        async def noted() -> MutableMapping[str, Any]:
            message = await receive()
            self._is_coming = self._is_coming and message.get("more_body", False)
            return message

        return noted

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a message on, the head of the answer with the request id and what the tenant's rate left word of."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = {REQUEST_ID_HEADER: self.request_id, **self._state.get("headers", {})}
            added = [(name.encode(), value.encode()) for name, value in own.items()]
            message["headers"] = [*message.get("headers", []), *added]
            if self._is_coming:  # refused before its end: a client that goes on sending would be listened to for ever
                message["headers"].append((b"connection", b"close"))
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.end("request_answered")  # here: what runs after the answer is not waited for

    def end(self, event: str) -> None:
        """Count the exchange and write its line."""
        seconds = time.monotonic() - self._started
        count_request(self._scope, self.status if event == "request_answered" else None, seconds)
        if self._path in _QUIET and self.status == 200:
            return
        facts = {"method": self._method, "path": self._path, "status": self.status, "seconds": round(seconds, 4)}
        log_event(logger, event, **facts)


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
