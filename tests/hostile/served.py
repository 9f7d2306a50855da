"""A real API process for what is hostile: its answers, its log, and the most memory that it ever held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from graft_shared.store import open_database
from graft_shared.store.migrate import migrate
from tests.waiting import free_port, wait_until


@dataclass
class ServedApi:
    """A served API, its state and its process."""

    http: httpx.Client
    state_dir: Path
    process: subprocess.Popen[bytes]

    @property
    def peak_rss_bytes(self) -> int:
        """By the kernel's account."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def crashes(self) -> int:
        return (self.state_dir / "api.log").read_text().count("request_crashed")


@contextmanager
def served_api(folder: Path, **settings: str) -> Iterator[ServedApi]:
    """Serve the API on SQLite and a directory, without a broker, until the block ends."""
    port = free_port()
    database = open_database(f"sqlite:///{folder / 'graft.db'}")
    migrate(database)
    database.close()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    environment |= {
        "GRAFT_STATE_DIR": str(folder),
        "GRAFT_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0",
        **settings,
    }
    with (folder / "api.log").open("wb") as log:
        arguments = [sys.executable, "-m", "graft_api", "--port", str(port)]
        process = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600) as http:
            wait_until(lambda: _answers(http), what="the API")
            yield ServedApi(http, folder, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False
