"""A few words of S3 on loopback, for what our real server cannot be made to say: regions, and keys with few rights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeS3:
    """One bucket.

    Args:
        head: The status of HEAD; 404 until the bucket is made.
        listing_error: What listing is refused with.
        creation_errors: What creation is refused with, by whether the request names a region.
    """

    head: int = 404
    listing_error: str = "AccessDenied"
    creation_errors: dict[bool, str] = field(default_factory=dict)
    created_with: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    url: str = ""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Status and body of a request; `path` is /bucket or /bucket/key."""
        _, _, key = path.partition("?")[0].strip("/").partition("/")
        if method == "HEAD":
            return self.head, b""
        if method == "GET":
            return 403, _error(self.listing_error)
        if key:
            self.objects[key] = body
            return 200, b""
        refusal = self.creation_errors.get(b"LocationConstraint" in body)
        if refusal:
            return 400, _error(refusal)
        self.created_with.append(body.decode())
        return 200, b""


@contextmanager
def fake_s3(fake: FakeS3) -> Iterator[FakeS3]:
    """Serve it for a while."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            sent = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, body = fake.answer(self.command, self.path, sent)
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET = do_PUT = handle_one  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()


def _error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
