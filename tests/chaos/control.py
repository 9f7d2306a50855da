"""`python -m tests.chaos.control`: such faults against plain Celery, so that one sees what the design buys."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.chaos.clients import SAVE_STEPS, STEP_SECONDS
from tests.fleet import parent_of
from tests.invariants import nobody_steps_after_a_newer_epoch
from tests.servers import RedisServer
from tests.witness import pids, steps_made

ROOT = Path(__file__).parents[2]
UNSCALED_LEASE_SECONDS = 60.0
SETTLE_PARTS = 20.0  # of a visibility timeout, waited after the last fault beside the whole one
FAULTS = {"kill_pool_process": 40, "kill_worker": 30, "freeze_worker": 6, "kill_redis": 6}


class PlainCelery:
    """Workers with one process each, started again whenever they end."""

    def __init__(self, folder: Path, redis: RedisServer, scale: float, workers: int) -> None:
        self.redis = redis
        self._names = [f"worker-{number}" for number in range(workers)]
        self._folder = folder
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CONTROL_FOLDER": str(folder),
            "CONTROL_BROKER": redis.url,
            "CONTROL_TIME_SCALE": str(scale),
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._end = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> PlainCelery:
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._keeper.join()
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def worker(self, rank: float) -> subprocess.Popen[bytes]:
        """One of those that run."""
        running = sorted(self._running.items())
        return running[int(rank * len(running))][1]

    def _keep(self) -> None:
        while not self._end.wait(0.2):
            for name in self._names:
                if name not in self._running or self._running[name].poll() is not None:
                    self._running[name] = self._spawn(name)

    def _spawn(self, name: str) -> subprocess.Popen[bytes]:
        arguments = ["--pool=prefork", "--concurrency=1", f"--hostname={name}@%h"]
        command = [sys.executable, "-m", "celery", "--app", "tests.chaos.control_app", "--quiet", "worker", *arguments]
        with (self._folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment, cwd=ROOT, start_new_session=True
            )


def main() -> None:
    """Submit, disturb, wait for a visibility timeout and more, and count."""
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="graft-control-"))
    with contextlib.ExitStack() as ended:
        redis = RedisServer(folder / "redis").start()
        ended.callback(redis.stop)
        report = _run(folder, redis, arguments)
    print(json.dumps(report, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


def _run(folder: Path, redis: RedisServer, wanted: argparse.Namespace) -> dict[str, Any]:
    scale = wanted.lease_seconds / UNSCALED_LEASE_SECONDS
    os.environ |= {"CONTROL_FOLDER": str(folder), "CONTROL_BROKER": redis.url, "CONTROL_TIME_SCALE": str(scale)}
    from tests.chaos.control_app import VISIBILITY_TIMEOUT_SECONDS, train

    draw = random.Random(f"{wanted.seed}-jobs")
    sent: Counter[str] = Counter()
    with PlainCelery(folder, redis, scale, wanted.workers) as service:
        steps = [draw.randint(40, 200) for _ in range(wanted.jobs)]
        ids = [str(train.delay(count, STEP_SECONDS, SAVE_STEPS).id) for count in steps]
        for fault, rank in _schedule(wanted.seed, wanted.faults, wanted.gap_seconds):
            if len(_done(folder)) == wanted.jobs:
                break
            sent[fault] += _do(service, fault, rank, frozen_seconds=2 * wanted.lease_seconds)
        at_rest = len(_done(folder))
        _wait(folder, wanted.jobs, seconds=VISIBILITY_TIMEOUT_SECONDS * (1 + 1 / SETTLE_PARTS))
    done, made = Counter(_done(folder)), steps_made(folder)
    return {
        "command": f"python -m tests.chaos.control {' '.join(sys.argv[1:])}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "lease_seconds_of_the_other_run": wanted.lease_seconds,
        "visibility_timeout_seconds": VISIBILITY_TIMEOUT_SECONDS,
        "workers": wanted.workers,
        "faults": dict(sent),
        "jobs": wanted.jobs,
        "finished_after_the_last_fault": at_rest,
        "finished_a_visibility_timeout_later": len(done),
        "never_finished": len(set(ids) - set(done)),
        "finished_twice": sum(count > 1 for count in done.values()),
        "steps_of_a_job_that_another_process_had_taken_over": len(nobody_steps_after_a_newer_epoch(made)),
        "steps": {"made": len(made), "needed": sum(steps)},
    }


def _schedule(seed: int, count: int, gap_seconds: float) -> Iterator[tuple[str, float]]:
    draw = random.Random(f"{seed}-faults")
    for _ in range(count):
        time.sleep(draw.expovariate(1 / gap_seconds))
        yield draw.choices(list(FAULTS), list(FAULTS.values()))[0], draw.random()


def _do(service: PlainCelery, fault: str, rank: float, *, frozen_seconds: float) -> bool:
    if fault == "kill_redis":
        service.redis.stop(signal.SIGKILL)
        service.redis.start()
        return True
    worker = service.worker(rank)
    family = [worker.pid, *(pid for pid in pids() if _parent(pid) == worker.pid)]
    with contextlib.suppress(ProcessLookupError):
        if fault == "kill_pool_process":
            os.kill(family[-1], signal.SIGKILL)
        elif fault == "kill_worker":
            os.killpg(worker.pid, signal.SIGKILL)
        else:
            os.killpg(worker.pid, signal.SIGSTOP)
            threading.Timer(frozen_seconds, _thaw, [worker]).start()
        return True
    return False


def _thaw(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGCONT)


def _parent(pid: int) -> int:
    try:
        return parent_of(pid)
    except (IndexError, ValueError):
        return 0


def _done(folder: Path) -> list[str]:
    log = folder / "done.log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def _wait(folder: Path, wanted: int, *, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and len(set(_done(folder))) < wanted:
        time.sleep(0.5)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.control", description=__doc__)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--faults", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--lease-seconds", type=float, default=4.0, help="sets the scale: the visibility timeout is 60 of them"
    )
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--gap-seconds", type=float, default=0.7)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
