"""Where webhooks go: a receiver that now and then refuses, drops or keeps silent, and remembers what it took."""

from __future__ import annotations

import contextlib
import random
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import standardwebhooks

from graft_shared.webhooks import signing_secret

SECRET = "of the receiver in trouble"
HANG_SECONDS = 12.0  # longer than a sender waits


@dataclass(frozen=True)
class Taken:
    """A message that was answered, or would have been: what a receiver does is done before its answer is lost."""

    id: str
    job_id: str
    type: str


@dataclass
class Receiver:
    """Answers by draws from a seed until it is told to be well. A tenant's jobs name `url` and the tenant."""

    seed: int
    taken: list[Taken] = field(default_factory=list)
    turned_away: int = 0  # answered with an error, dropped, or kept waiting
    forged: int = 0  # whose signature was wrong
    _well: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._draw = random.Random(f"{self.seed}-receiver")
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a service that sends here."""
        return {"GRAFT_WEBHOOK_SECRET": SECRET, "GRAFT_WEBHOOK_HOSTS": "127.0.0.1"}

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def be_well(self) -> None:
        """From now on everything is taken, and what hangs is let go."""
        self._well.set()

    def stop(self) -> None:
        self.be_well()
        self._server.shutdown()
        self._server.server_close()

    def take(self, tenant: str, body: bytes, headers: dict[str, str]) -> int | None:
        """The status to answer with; None to answer with nothing. Only this tenant's secret makes a signature right."""
        with self._lock:
            luck = 1.0 if self._well.is_set() else self._draw.random()
        if luck < 0.2:
            return self._turn_away(503)
        if luck < 0.25:
            self._well.wait(HANG_SECONDS)
            return self._turn_away(None)
        try:
            message: dict[str, Any] = standardwebhooks.Webhook(signing_secret(SECRET, tenant)).verify(body, headers)
        except standardwebhooks.WebhookVerificationError:
            self.forged += 1
            return 401
        self.taken.append(Taken(headers["webhook-id"], message["data"]["id"], message["type"]))
        return self._turn_away(None) if luck < 0.35 else 204

    def _turn_away(self, status: int | None) -> int | None:
        self.turned_away += 1
        return status


def _handler_of(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # the sender was killed meanwhile
                body = self.rfile.read(int(self.headers["content-length"]))
                status = receiver.take(
                    self.path.removeprefix("/"), body, {name.lower(): value for name, value in self.headers.items()}
                )
                if status is not None:
                    self.send_response_only(status)
                    self.send_header("content-length", "0")
                    self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    return Handler
