"""What surrounds every exchange: its request id, its log line, and the answer when something unforeseen happens."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import quote

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from graft_api.errors import InternalError, answer
from graft_shared.ids import new_request_id
from graft_shared.logs import log_event

REQUEST_ID_HEADER = "x-request-id"
_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_QUIET = ("/healthz", "/readyz", "/metrics")  # asked every few seconds; worth a line only when they fail

logger = logging.getLogger(__name__)


class Exchanges:
    """ASGI middleware around the whole app. Logs the path alone: queries may hold signatures."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        scope.setdefault("state", {})["request_id"] = exchange.request_id
        try:
            await self._app(scope, exchange.receiving(receive), exchange.send)
        except ClientDisconnect:
            exchange.log("request_abandoned")
            return
        except Exception:
            logger.exception("request_crashed", extra={"facts": {"request_id": exchange.request_id}})
            if exchange.status is not None:
                raise  # half an answer is out: the broken connection tells the client
            await answer(InternalError(request_id=exchange.request_id))(scope, receive, exchange.send)


class _Exchange:
    def __init__(self, scope: Scope, send: Send) -> None:
        given = dict(scope["headers"]).get(REQUEST_ID_HEADER.encode(), b"")
        self.request_id = given.decode() if _SANE_ID.fullmatch(given) else new_request_id()
        self.status: int | None = None
        self._method, self._path = scope["method"], quote(scope["path"])  # a path may hold line breaks and escapes
        self._send = send
        self._is_coming = _has_body(scope)  # the body, or the rest of it
        self._started = time.monotonic()

    def receiving(self, receive: Receive) -> Receive:
        """The same messages, while it is noted whether the body has come whole."""

        async def noted() -> MutableMapping[str, Any]:
            message = await receive()
            self._is_coming = self._is_coming and message.get("more_body", False)
            return message

        return noted

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Pass a message on, the head of the answer with the request id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (REQUEST_ID_HEADER.encode(), self.request_id.encode())]
            if self._is_coming:  # refused before its end: a client that goes on sending would be listened to for ever
                message["headers"].append((b"connection", b"close"))
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.log("request_answered")  # here: what runs after the answer is not waited for

    def log(self, event: str) -> None:
        """Write the exchange's line."""
        if self._path in _QUIET and self.status == 200:
            return
        seconds = round(time.monotonic() - self._started, 4)
        facts = {"method": self._method, "path": self._path, "status": self.status, "seconds": seconds}
        log_event(logger, event, request_id=self.request_id, **facts)


def _has_body(scope: Scope) -> bool:
    headers = dict(scope["headers"])
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
