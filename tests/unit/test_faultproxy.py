"""What a client sees of each mode of the fault proxy."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faultproxy import FaultProxy, Mode

WAIT_SECONDS = 0.15


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1000):
            self.request.sendall(data.upper())


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    """A proxy in front of a server that shouts back."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        made = FaultProxy(server.server_address[1], delay_seconds=0.3).start()
        yield made
        made.stop()
        server.shutdown()


def connected(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def ask(client: socket.socket, words: bytes = b"hello", *, seconds: float = 5.0) -> bytes | None:
    """What comes back; None for nothing within the time."""
    client.sendall(words)
    client.settimeout(seconds)
    try:
        return client.recv(1000)
    except TimeoutError:
        return None


def test_it_passes_what_is_said_and_the_end(proxy: FaultProxy) -> None:
    with connected(proxy) as client:
        assert ask(client) == b"HELLO"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1000) == b"", "the server's end arrives too"


def test_refusing_resets_connections_and_takes_no_new_ones_until_it_ends(proxy: FaultProxy) -> None:
    with connected(proxy) as client:
        assert ask(client) == b"HELLO"
        proxy.switch(Mode.REFUSE)
        with pytest.raises(ConnectionResetError):
            client.recv(1000)
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
    proxy.switch(Mode.PASS)
    with connected(proxy) as client:
        assert ask(client) == b"HELLO"


def test_a_black_hole_accepts_and_answers_nothing_until_it_ends(proxy: FaultProxy) -> None:
    with connected(proxy) as old:
        assert ask(old) == b"HELLO"
        proxy.switch(Mode.BLACK_HOLE)
        with connected(proxy) as new:
            assert ask(old, b"old", seconds=WAIT_SECONDS) is None
            assert ask(new, b"new", seconds=WAIT_SECONDS) is None
            proxy.switch(Mode.PASS)
            old.settimeout(5)
            new.settimeout(5)
            assert (old.recv(1000), new.recv(1000)) == (b"OLD", b"NEW")


def test_half_open_connections_stay_silent_for_good_and_new_ones_pass(proxy: FaultProxy) -> None:
    with connected(proxy) as old:
        assert ask(old) == b"HELLO"
        proxy.switch(Mode.HALF_OPEN)
        assert ask(old, seconds=WAIT_SECONDS) is None
        with connected(proxy) as new:
            assert ask(new) == b"HELLO"
        proxy.switch(Mode.PASS)
        assert ask(old, seconds=WAIT_SECONDS) is None


def test_what_is_delayed_arrives_later(proxy: FaultProxy) -> None:
    proxy.switch(Mode.DELAY)
    with connected(proxy) as client:
        began = time.monotonic()
        assert ask(client) == b"HELLO"
        assert time.monotonic() - began >= 2 * proxy.delay_seconds, "on the way there and back"


def test_a_trap_changes_the_mode_when_its_words_are_said_and_swallows_them(proxy: FaultProxy) -> None:
    proxy.trap(b"PUT /secret", Mode.REFUSE)
    with connected(proxy) as client:
        assert ask(client) == b"HELLO"
        client.sendall(b"PUT /secret HTTP/1.1")
        with pytest.raises(ConnectionResetError):
            client.recv(1000)
    assert proxy.tripped.is_set()
    with pytest.raises(ConnectionRefusedError):
        connected(proxy)
