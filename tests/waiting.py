"""Ports, and waiting for what must become true."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

START_SECONDS = 60.0


def free_port() -> int:
    """A port of loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_ports_in_a_row(length: int) -> int:
    """The first of so many ports of loopback on which nobody listens at the moment."""
    while True:
        first = free_port()
        if not any(listens(port) for port in range(first, first + length)) and first + length < 65_536:
            return first


def wait_until(
    condition: Callable[[], bool], *, seconds: float = START_SECONDS, what: str, every: float = 0.05
) -> None:
    """Ask `condition` until it holds; raises TimeoutError that says what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(every)


def listens(port: int) -> bool:
    """Tell whether something accepts connections on this port of loopback."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
