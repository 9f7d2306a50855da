"""The API as a process of its own, and the same neighbours opened beside it: what a client sees, and what is behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from graft_api.settings import ApiSettings
from graft_shared.buckets import open_bucket
from graft_shared.store import open_database
from tests.api_service import ApiService
from tests.fakes.doorbell import FakeDoorbell
from tests.waiting import free_port, wait_until


class ApiProcess:
    """`python -m graft_api` with an environment of its own."""

    def __init__(self, state_dir: Path, *, name: str = "api", **environment: str) -> None:
        self.state_dir = state_dir
        self.port = free_port()
        broker = {"GRAFT_BROKER_URL": f"redis://127.0.0.1:{free_port()}/0"}
        self.own = {"GRAFT_STATE_DIR": str(state_dir), **broker, **environment}
        self.log_path = state_dir / f"{name}.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self.child.pid

    def start(self) -> ApiProcess:
        self.spawn()
        self.wait()
        return self

    def spawn(self) -> None:
        """Start it without waiting for it."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        command = [sys.executable, "-m", "graft_api", "--port", str(self.port)]
        with self.log_path.open("ab") as log:
            self.child = subprocess.Popen(command, env={**clean, **self.own}, stdout=log, stderr=log)

    def wait(self) -> None:
        """Wait until it answers."""
        wait_until(self._answers, what=f"the API; its log is {self.log_path}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.child.send_signal(number)
        return self.child.wait(timeout=30)

    def peak_memory_mib(self) -> float:
        """The most memory that it has held so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024

    def worked_seconds(self) -> float:
        """How long it has been on a core so far."""
        times = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")

    def service(self, key: str | None = None) -> ApiService:
        """What a tenant with this key does with it, and the neighbours behind its back."""
        settings = ApiSettings.model_validate(
            {name.removeprefix("GRAFT_").lower(): value for name, value in self.own.items()}
        )
        headers = {"authorization": f"Bearer {key}"} if key is not None else {}
        return ApiService(
            http=httpx.Client(base_url=self.url, timeout=30, headers=headers),
            settings=settings,
            database=open_database(settings.database),
            bucket=open_bucket(settings),
            doorbell=FakeDoorbell(),
        )

    def _answers(self) -> bool:
        assert self.child.poll() is None, self.log_path.read_text()
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False
