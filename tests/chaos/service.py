"""A service of plain processes that are started again whenever they end, as systemd or Docker would do it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.chaos.nursery import Member, Nursery
from tests.chaos.scale import scaled_environment
from tests.factories import make_tiny_base
from tests.fleet import OnThisMachine
from tests.servers import PostgresServer, RedisServer
from tests.waiting import free_port, wait_until
from tests.witness import Trainer, trainers_below

ROOT = Path(__file__).parents[2]
LOOK_SECONDS = 0.1
PAUSE_SECONDS = 0.2  # between the end of a process and its next life


@dataclass
class ServiceInTrouble(OnThisMachine):
    """An API, two reconcilers, workers that prepare and workers that train; SQLite or PostgreSQL, Redis and a folder.

    Args:
        postgres: The database's server; None for SQLite.
        lease_seconds: How long a lease lasts; all other times keep their ratio to it.
        trainers_wanted: How many workers train.
        environment: Settings beside those that all of it needs, or instead of them.
        tenants: Who has a key, which is in `keys` then; without any, nobody needs one.
    """

    state_dir: Path
    redis: RedisServer
    postgres: PostgresServer | None
    lease_seconds: float
    trainers_wanted: int
    preparers: int = 2
    port: int = field(default_factory=free_port)
    environment: dict[str, str] = field(default_factory=dict)
    tenants: tuple[str, ...] = ()
    keys: dict[str, str] = field(default_factory=dict)
    running: dict[str, Member] = field(default_factory=dict)
    restarts: int = 0
    _nursery: Nursery = field(init=False)
    _commands: dict[str, list[str]] = field(default_factory=dict)
    _not_before: dict[str, float] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _end: threading.Event = field(default_factory=threading.Event)
    _keeper: threading.Thread | None = None

    def __post_init__(self) -> None:
        self._nursery = Nursery(self.state_dir)

    @property
    def url(self) -> str:  # type: ignore[override]
        return f"http://127.0.0.1:{self.port}"

    @property
    def database_url(self) -> str:
        return self.environment["GRAFT_DATABASE_URL"]

    @property
    def training_workers(self) -> list[str]:
        return [f"train-{number}" for number in range(self.trainers_wanted)]

    def start(self) -> ServiceInTrouble:
        """Start all of it, and keep it running."""
        make_tiny_base(self.state_dir / "models" / "graft" / "tiny")
        sqlite = f"sqlite:///{self.state_dir / 'graft.db'}"
        self.environment = {
            "PYTHONPATH": str(ROOT),
            "GRAFT_STATE_DIR": str(self.state_dir),
            "GRAFT_DATABASE_URL": self.postgres.new_database("chaos") if self.postgres else sqlite,
            "GRAFT_BROKER_URL": self.redis.url,
            **scaled_environment(self.lease_seconds),
            **self.environment,
        }
        migrate = [sys.executable, "-m", "graft_shared.store.migrate"]
        subprocess.run(migrate, env=self._environment(), check=True, capture_output=True)
        self.keys = {tenant: self._new_key(tenant) for tenant in self.tenants}
        self.api_key = next(iter(self.keys.values()), None)
        self._commands = {
            "api": ["graft_api", "--port", str(self.port)],
            "reconciler-0": ["graft_shared.reconciler"],
            "reconciler-1": ["graft_shared.reconciler"],
            **{f"prepare-{number}": ["graft_worker"] for number in range(self.preparers)},
            **{name: ["graft_worker"] for name in self.training_workers},
        }
        self._nursery.open(self._environment())
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()
        wait_until(self._ready, seconds=120, what=f"the service; its logs are under {self.state_dir}")
        return self

    def _new_key(self, tenant: str) -> str:
        self.environment.setdefault("GRAFT_KEY_PEPPER", secrets.token_hex(24))
        command = [sys.executable, "-m", "graft_api.keys", "create", tenant]
        made = subprocess.run(command, env=self._environment(), check=True, capture_output=True, text=True)
        return made.stdout.strip()

    def stop(self) -> None:
        """End all of it."""
        self._end.set()
        if self._keeper is not None:
            self._keeper.join()
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            with contextlib.suppress(TimeoutError):
                process.wait(30)
            process.kill_group()
        self._nursery.close()

    def trainers_of(self, worker: str) -> list[Trainer]:
        """What trains under this worker now."""
        return trainers_below(self.state_dir / "work" / worker)

    def kill(self, name: str, *, away_seconds: float = 0.0) -> bool:
        """End a process and all that it forked at once, if it runs; it comes back, if wanted after a while."""
        with self._lock:
            process = self.running.get(name)
            if process is None or process.has_ended():
                return False
            self._not_before[name] = time.monotonic() + max(away_seconds, PAUSE_SECONDS)
            process.kill_group()
            return True

    def terminate(self, name: str) -> bool:
        """Ask a process to leave, if it runs, as an operator would."""
        with self._lock:
            process = self.running.get(name)
            if process is None or process.has_ended():
                return False
            process.send_signal(signal.SIGTERM)
            return True

    def _keep(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            with self._lock:
                for name in self._commands:
                    self._start_if_ended(name)

    def _start_if_ended(self, name: str) -> None:
        process = self.running.get(name)
        if process is not None:
            if not process.has_ended():
                return
            self._not_before.setdefault(name, time.monotonic() + PAUSE_SECONDS)
            del self.running[name]
            self.restarts += 1
        if time.monotonic() >= self._not_before.get(name, 0.0):
            self._not_before.pop(name, None)
            self.running[name] = self._spawn(name)

    def _spawn(self, name: str) -> Member:
        kind = name.rpartition("-")[0]
        more = {"GRAFT_WORKER_NAME": name, "GRAFT_WORKER_DEVICE": "cpu", "GRAFT_WORKER_STAGE": kind}
        environment = self._environment() | (more if kind in ("train", "prepare") else {})
        return self._nursery.bear(self._commands[name], environment, self.state_dir / f"{name}.log")

    def _environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        return {**clean, **self.environment}

    def _ready(self) -> bool:
        try:
            with self.client() as http:
                return len(http.get("/capacity").json()["workers"]) == len(self._commands) - 3
        except (httpx.TransportError, KeyError, ValueError):
            return False


@contextlib.contextmanager
def service_in_trouble(
    folder: Path,
    *,
    database: str,
    lease_seconds: float,
    trainers: int,
    tenants: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[ServiceInTrouble]:
    """A running service with neighbours of its own, and with these settings beside those that it needs."""
    with contextlib.ExitStack() as ended:
        redis = RedisServer(folder / "redis").start()
        ended.callback(redis.stop)
        postgres = None
        if database == "postgres":
            postgres = PostgresServer(folder / "postgres").start()
            ended.callback(postgres.stop)
        state_dir = folder / "state"
        state_dir.mkdir(parents=True)
        made = ServiceInTrouble(
            state_dir, redis, postgres, lease_seconds, trainers, tenants=tenants, environment=dict(environment or {})
        )
        ended.callback(made.stop)
        yield made.start()
