"""Ports, and waiting for what must become true."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

START_SECONDS = 60.0
_LOWEST_PORT = 10_100  # browsers refuse to open some below


def free_port() -> int:
    """A port of loopback that is free at the moment."""
    return free_ports_in_a_row(1)


def free_ports_in_a_row(length: int) -> int:
    """The first of so many ports of loopback that are free at the moment.

    Where that leaves enough of them, the system gives none of these to an outgoing connection, which would take it
    before a server does.
    """
    below = range(_LOWEST_PORT, _first_port_of_outgoing_connections() - length)
    candidates = below if len(below) > 1000 else range(_LOWEST_PORT, 65_536 - length)
    while True:
        first = random.SystemRandom().choice(candidates)
        if all(_is_free(port) for port in range(first, first + length)):
            return first


def _first_port_of_outgoing_connections() -> int:
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        return 0


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


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
