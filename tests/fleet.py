"""A whole service for end-to-end tests, started as a user would start it, and watched from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.waiting import free_port, wait_until

TERMINAL = ("succeeded", "failed", "cancelled")
JOB_SECONDS = 180.0


@dataclass
class Fleet:
    """`graft up` on a folder of its own."""

    state_dir: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def models_dir(self) -> Path:
        return self.state_dir / "models"

    def start(self) -> Fleet:
        self.state_dir.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).parent / "graft"), "up"]
        command += ["--port", str(self.port), "--state-dir", str(self.state_dir)]
        log = (self.state_dir / "up.log").open("ab")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**clean, **self.environment})
        wait_until(self._ready, what=f"the service; its log is {self.state_dir / 'up.log'}")
        return self

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send the launcher a signal, as Ctrl-C would, and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(timeout=90)
        self.process = None
        return code

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30)

    def upload(self, content: bytes, name: str = "rows.jsonl") -> str:
        with self.client() as client:
            answer = client.post("/files", files={"file": (name, content)})
        assert answer.status_code < 300, answer.text
        return str(answer.json()["id"])

    def post(self, spec: dict[str, Any], **headers: str) -> dict[str, Any]:
        with self.client() as client:
            answer = client.post("/jobs", json=spec, headers=headers)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def get(self, job_id: str) -> dict[str, Any]:
        with self.client() as client:
            answer = client.get(f"/jobs/{job_id}")
        assert answer.status_code == 200, answer.text
        job: dict[str, Any] = answer.json()
        return job

    def events(self, job_id: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        with self.client() as client:
            while True:
                after = events[-1]["id"] if events else 0
                page = client.get(f"/jobs/{job_id}/events", params={"after": after, "limit": 100}).json()
                events += page["data"]
                if not page["has_more"]:
                    return events

    def wait(self, job_id: str, *, seconds: float = JOB_SECONDS) -> dict[str, Any]:
        """Return the job once it has ended."""
        wait_until(lambda: self.get(job_id)["status"] in TERMINAL, seconds=seconds, what=f"job {job_id}", every=0.3)
        return self.get(job_id)

    def processes(self, command_part: str = "") -> list[int]:
        """The living processes that work on this fleet's folder, by a part of their command line."""
        return [pid for pid in _all_pids() if self._is_ours(pid) and command_part in _read(pid, "cmdline")]

    def _is_ours(self, pid: int) -> bool:
        folder = str(self.state_dir)
        traces = (_read(pid, "environ"), _read(pid, "cmdline"), _folder_of(pid))  # Redis overwrites the first two
        return pid != os.getpid() and any(folder in trace for trace in traces)

    def _ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError((self.state_dir / "up.log").read_text())
        try:
            answer = httpx.get(f"{self.url}/readyz", timeout=5)
        except httpx.TransportError:
            return False
        return answer.status_code == 200 and answer.json()["status"] == "ready"


def _all_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, name: str) -> str:
    """One file of a process; empty for a process that has gone or is a zombie."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def _folder_of(pid: int) -> str:
    """Where a process stands; empty for one that has gone."""
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return ""
