"""Whole services for end-to-end tests: `graft up` on one machine, or a cluster of processes; watched from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.servers import SWIFT_KEY, SWIFT_USER, PostgresServer, RedisServer, SwiftServer
from tests.waiting import free_port, wait_until
from tests.witness import folder_of, pids, trainers_below

TERMINAL = ("succeeded", "failed", "cancelled")
JOB_SECONDS = 180.0

ANIMALS = ("cat", "dog", "hen", "cow", "pig", "owl", "fox", "bee")
ROWS = [
    {"prompt": f"What does the {animal} say?", "completion": f"The {animal} says {animal} {animal}."}
    for animal in ANIMALS
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS * 8).encode()


class Service:
    """What a user does with a service, whatever it is made of."""

    url: str
    api_key: str | None = None

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(base_url=self.url, timeout=30, headers=headers)

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

    def deleted(self, job_id: str) -> bool:
        """Try to delete a job, and tell whether it is gone."""
        with self.client() as client:
            return client.delete(f"/jobs/{job_id}").status_code == 200

    def checkpoints(self, job_id: str) -> int:
        return sum(event["type"] == "checkpoint" for event in self.events(job_id))

    def wait(self, job_id: str, *, seconds: float = JOB_SECONDS) -> dict[str, Any]:
        """Return the job once it has ended."""
        wait_until(lambda: self.get(job_id)["status"] in TERMINAL, seconds=seconds, what=f"job {job_id}", every=0.3)
        return self.get(job_id)

    def fetch(self, url: str) -> bytes:
        """The bytes behind a presigned link, which needs no key."""
        return httpx.get(url, timeout=30).raise_for_status().content


def a_job(service: Service, **changes: Any) -> dict[str, Any]:
    """The body of a job that learns what animals say, within seconds."""
    training = {"max_steps": 40, "learning_rate": 5e-3, "max_length": 64, "save_steps": 10}
    return {
        "base_model": "graft/tiny",
        "dataset": {"file": service.upload(JSONL)},
        "validation": {"split": 0.1},
        "lora": {"r": 8, "target_modules": "all-linear"},
        "training": {**training, **changes.pop("training", {})},
        **changes,
    }


class OnThisMachine(Service):
    """A service of plain processes, all of which work on one folder."""

    state_dir: Path

    @property
    def models_dir(self) -> Path:
        return self.state_dir / "models"

    def processes(self, command_part: str = "") -> list[int]:
        """The living processes that work on this fleet's folder, by a part of their command line."""
        return [pid for pid in pids() if self._is_ours(pid) and command_part in _read(pid, "cmdline")]

    def trainers(self, job_id: str = "") -> list[int]:
        """The processes that train now, or those that train this job."""
        return [trainer.pid for trainer in trainers_below(self.state_dir) if job_id in trainer.job_id]

    def spare_trainers(self) -> list[int]:
        """The processes that wait to be a trainer."""
        return [pid for pid in self.processes("graft_worker.training") if folder_of(pid).endswith("/spare")]

    def log(self) -> str:
        """What the service's processes wrote last, for a failed test's message."""
        logs = sorted(self.state_dir.glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def logged(self, event: str) -> int:
        """How often the service's processes have written this event."""
        return sum(path.read_text(errors="replace").count(f'"{event}"') for path in self.state_dir.glob("*.log"))

    def _is_ours(self, pid: int) -> bool:
        folder = str(self.state_dir)
        traces = (_read(pid, "environ"), _read(pid, "cmdline"), folder_of(pid))  # Redis overwrites the first two
        return pid != os.getpid() and any(folder in trace for trace in traces)


@dataclass
class Fleet(OnThisMachine):
    """`graft up` on a folder of its own."""

    state_dir: Path
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:  # type: ignore[override]
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> Fleet:
        self.state_dir.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).parent / "graft"), "up"]
        command += ["--port", str(self.port), "--state-dir", str(self.state_dir)]
        log = (self.state_dir / "up.log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**_clean(), **self.environment})
        wait_until(self._ready, what=f"the service; its log is {self.state_dir / 'up.log'}")
        return self

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send the launcher a signal, as Ctrl-C would, and return its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        code = self.process.wait(timeout=90)
        self.process = None
        return code

    def _ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError((self.state_dir / "up.log").read_text())
        return _is_ready(self.url)


@dataclass
class Cluster(OnThisMachine):
    """A cluster on PostgreSQL, Redis and Swift: APIs, a reconciler, a preparing worker, and workers that train.

    Leases are scaled (8 s instead of 60, with the other times in proportion), so that a lost worker is noticed soon.
    """

    state_dir: Path
    postgres: PostgresServer
    redis: RedisServer
    swift: SwiftServer
    apis: int = 1
    trainers_wanted: int = 1
    preparers: int = 1
    worker_module: str = "graft_worker"
    api_key: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    ports: list[int] = field(default_factory=list)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _turn: int = 0

    @property
    def url(self) -> str:  # type: ignore[override]
        """Every request goes to the next API."""
        self._turn += 1
        return f"http://127.0.0.1:{self.ports[self._turn % len(self.ports)]}"

    def start(self) -> Cluster:
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self.environment = {
            "GRAFT_STATE_DIR": str(self.state_dir),
            "GRAFT_DATABASE_URL": self.postgres.new_database(f"cluster{self.redis.port}"),
            "GRAFT_BROKER_URL": self.redis.url,
            "GRAFT_S3_BUCKET": "graft",
            "GRAFT_S3_ENDPOINT_URL": self.swift.endpoint_url,
            "GRAFT_S3_ACCESS_KEY_ID": SWIFT_USER,
            "GRAFT_S3_SECRET_ACCESS_KEY": SWIFT_KEY,
            "GRAFT_LEASE_SECONDS": "8",
            "GRAFT_HEARTBEAT_SECONDS": "2",
            "GRAFT_RECONCILE_SECONDS": "1",
            "GRAFT_BELL_AGAIN_SECONDS": "4",
            "GRAFT_LOOK_SECONDS": "60",  # so that bells are what wakes, and the reconciler what repairs
            **self.environment,
        }
        subprocess.run(
            [sys.executable, "-m", "graft_shared.store.migrate"],
            env=self._environment(),
            check=True,
            capture_output=True,
        )
        for number in range(self.apis):
            self.ports.append(free_port())
            self._run(f"api-{number}", "graft_api", "--port", str(self.ports[-1]))
        self._run("reconciler", "graft_shared.reconciler")
        for number in range(self.preparers):
            self.start_worker(f"prepare-{number}", stage="prepare")
        for number in range(self.trainers_wanted):
            self.start_worker(f"train-{number}")
        wait_until(self._ready, what=f"the cluster; its logs are under {self.state_dir}")
        return self

    def start_worker(self, name: str, stage: str = "train") -> None:
        more = {"GRAFT_WORKER_NAME": name, "GRAFT_WORKER_DEVICE": "cpu", "GRAFT_WORKER_STAGE": stage}
        self._run(name, self.worker_module, **more)

    def kill_worker(self, name: str) -> None:
        """End a worker's whole process group at once, as a lost machine would."""
        process = self.running.pop(name)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop_worker(self, name: str) -> None:
        """Let a worker end as an operator would."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)

    def stop(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.running.clear()

    def _run(self, name: str, module: str, *arguments: str, **more: str) -> None:
        with (self.state_dir / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdout=log,
                stderr=log,
                env=self._environment() | more,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        return {**_clean(), **self.environment, "GRAFT_STATE_DIR": str(self.state_dir)}

    def _ready(self) -> bool:
        for name, process in self.running.items():
            if process.poll() is not None:
                raise AssertionError((self.state_dir / f"{name}.log").read_text())
        if not all(_is_ready(f"http://127.0.0.1:{port}") for port in self.ports):
            return False
        with self.client() as client:
            return len(client.get("/capacity").json()["workers"]) == self.trainers_wanted + self.preparers


@contextlib.contextmanager
def cluster(folder: Path, **wanted: Any) -> Iterator[Cluster]:
    """A running cluster with neighbours of its own, which a test may kill."""
    with contextlib.ExitStack() as ended:
        postgres, redis, swift = (
            kind(folder / name)
            for kind, name in ((PostgresServer, "pg"), (RedisServer, "redis"), (SwiftServer, "swift"))
        )
        for server in (postgres, redis, swift):
            ended.callback(server.stop)
            server.start()
        made = Cluster(folder / "state", postgres, redis, swift, **wanted)
        ended.callback(made.stop)
        yield made.start()


def _clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}


def _is_ready(url: str) -> bool:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5)
    except httpx.TransportError:
        return False
    return answer.status_code == 200 and answer.json()["status"] == "ready"


def _read(pid: int, name: str) -> str:
    """One file of a process; empty for a process that has gone or is a zombie."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    """The parent of a living process."""
    return int(_read(pid, "stat").rpartition(")")[2].split()[1])
