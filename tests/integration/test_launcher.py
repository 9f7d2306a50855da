"""The `graft up` command itself: real migrations, real broker, real reconciler; API and workers are stand-ins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import free_port, wait_until

API = """
import http.server, signal, sys, threading
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()
host, port = sys.argv[sys.argv.index("--host") + 1], int(sys.argv[sys.argv.index("--port") + 1])
server = http.server.HTTPServer((host, port), Ready)
signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
server.serve_forever()
print("api has left", flush=True)
"""

WORKER = """
import os, signal, redis
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
heard = redis.Redis.from_url(os.environ["GRAFT_BROKER_URL"]).ping()
print("works on", os.environ["GRAFT_WORKER_DEVICE"], "as", os.environ["GRAFT_WORKER_NAME"], heard, flush=True)
signal.sigwait({signal.SIGTERM})
print("worker has left", flush=True)
"""

NVIDIA_SMI = """#!/bin/sh
echo "GPU 0: NVIDIA L4 (UUID: GPU-11)"
echo "GPU 1: NVIDIA L4 (UUID: GPU-22)"
"""


class Up:
    """One running `graft up`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.port = free_port()
        for package, main in {"graft_api": API, "graft_worker": WORKER}.items():
            (folder / "code" / package).mkdir(parents=True)
            (folder / "code" / package / "__init__.py").touch()
            (folder / "code" / package / "__main__.py").write_text(main)
        (folder / "bin").mkdir()
        (folder / "bin" / "nvidia-smi").write_text(NVIDIA_SMI)
        (folder / "bin" / "nvidia-smi").chmod(0o755)
        self.process = self.start(self.port, "log")
        wait_until(lambda: "Ctrl-C stops everything" in self.log, seconds=60, what="the service")

    def start(self, port: int, log: str) -> subprocess.Popen[bytes]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("GRAFT_", "CUDA_"))}
        paths = {"PYTHONPATH": str(self.folder / "code"), "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}
        command = [sys.executable, "-m", "graft_client", "up", "--port", str(port), "--state-dir", str(self.state)]
        with (self.folder / log).open("wb") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, env=clean | paths)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def processes(self) -> list[str]:
        """The command lines of the living processes that know our state folder."""
        return [_read(path / "cmdline") for path in Path("/proc").glob("[0-9]*") if str(self.state) in _all_of(path)]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    running = Up(tmp_path)
    yield running
    running.process.kill()
    running.process.wait()


def test_up_starts_the_service_tells_when_it_is_ready_and_leaves_no_process(up: Up) -> None:
    assert (
        f"ready at http://127.0.0.1:{up.port}; workers that are starting: prepare, merge, cpu, gpu-0, gpu-1" in up.log
    )
    wait_until(lambda: up.log.count("works on") == 5, seconds=60, what="five workers")
    for line in (
        "works on cuda:0 as gpu-0 True",
        "works on cuda:1 as gpu-1 True",
        "works on cpu as cpu True",
        "works on cpu as prepare True",
        "works on cpu as merge True",
    ):
        assert line in up.log
    assert (up.state / "graft.db").exists()
    wait_until(lambda: "reconciler_started" in up.log, seconds=60, what="the reconciler")
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=60) == 0
    assert up.log.count("worker has left") == 5
    order = ["worker has left", "reconciler_stopped", "api has left", "bye bye"]
    assert sorted(order, key=up.log.index) == order
    assert up.processes() == []


def test_a_second_up_is_refused_while_the_first_goes_on(up: Up) -> None:
    assert up.start(free_port(), "second").wait(timeout=60) == 2
    assert f"process {up.process.pid}" in (up.folder / "second").read_text()
    assert up.process.poll() is None


def test_an_up_that_was_killed_leaves_nothing_and_can_be_started_again(up: Up) -> None:
    up.process.kill()
    up.process.wait()
    wait_until(lambda: up.processes() == [], seconds=60, what="the end of every process")
    up.process = up.start(up.port, "log")
    wait_until(lambda: "Ctrl-C stops everything" in up.log, seconds=60, what="the service again")


def _all_of(process: Path) -> str:
    return _read(process / "cmdline") + _read(process / "environ")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""
