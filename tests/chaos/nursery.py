"""A process that has imported the whole service and forks its members: most of what a member's start costs is imports.

On two cores a kill every second would otherwise try how fast Python imports SQLAlchemy. What differs from production is
`exec` alone: a member has a session, an environment and a log of its own, and no descriptor besides.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from graft_worker.parent import die_with_parent
from tests.chaos import member
from tests.forked import end_after, stand_alone
from tests.waiting import wait_until

# Not `graft_worker.celery_app`: the memory that a worker shares with its pool would be shared by all workers.
_IMPORTED = (
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.prefork",
    "graft_api.app",
    "graft_shared.sweeper",
    "graft_shared.webhooks",
    "graft_worker.spans",
    "graft_worker.tasks",
    "graft_worker.trackers",
    "kombu.transport.redis",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
)


@dataclass(frozen=True)
class Member:
    """A forked process of the service, by a descriptor that stays its own when its id is another's."""

    pid: int
    _fd: int
    _ends: Path

    def has_ended(self) -> bool:
        """Whether it has."""
        poll = select.poll()  # select.select knows no descriptor above 1,023
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def wait(self, seconds: float) -> int:
        """Return its exit code, or the negative number of the signal that ended it; raises TimeoutError."""
        wait_until(lambda: bool(self._codes()), seconds=seconds, what=f"the end of process {self.pid}")
        return self._codes()[-1]

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, number)

    def kill_group(self) -> None:
        """End it and all that it forked; of one that has ended, what remains."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _codes(self) -> list[int]:
        ends = [line.split() for line in self._ends.read_text().splitlines()] if self.has_ended() else []
        return [int(code) for pid, code in ends if int(pid) == self.pid]


@dataclass
class Nursery:
    """Asks for members on the harness's side. They end with the nursery, and the nursery with its harness."""

    folder: Path
    _process: subprocess.Popen[str] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def _ends(self) -> Path:
        return self.folder / "ends.log"

    def open(self, environment: Mapping[str, str]) -> None:
        """Start it; it imports in this environment."""
        self._ends.touch()
        with (self.folder / "nursery.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.nursery", str(self._ends)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**environment, "GRAFT_PARENT_PID": str(os.getpid())},
                text=True,
            )

    def bear(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Member:
        """Return a new member of the service that runs this command, in this environment."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        wish = {"command": command, "environment": environment, "log": str(log)}
        with self._lock:
            self._process.stdin.write(json.dumps(wish) + "\n")
            self._process.stdin.flush()
            pid = int(self._process.stdout.readline())
        born = Member(pid, os.pidfd_open(pid), self._ends)
        weakref.finalize(born, os.close, born._fd)
        return born

    def close(self) -> None:
        """End it."""
        if self._process is not None:
            with self._process as process:
                process.kill()


def main() -> None:
    """Fork a member for each line of stdin and answer its id; write in a file who has ended, and how."""
    die_with_parent()
    ends = Path(sys.argv[1])
    for module in _IMPORTED:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, lambda *_: _note_ends(ends))
    for line in sys.stdin:
        print(_fork(**json.loads(line)), flush=True)


def _fork(command: list[str], environment: dict[str, str], log: str) -> int:
    nursery = os.getpid()
    with Path(log).open("ab") as lines:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            stand_alone(stdin=os.devnull, stdout=lines.fileno(), stderr=lines.fileno())
            os.environ.clear()
            os.environ.update(environment, GRAFT_PARENT_PID=str(nursery))
            die_with_parent()
            sys.argv = [member.__file__, *command]
            end_after(member.main)
    return pid


def _note_ends(ends: Path) -> None:
    with contextlib.suppress(ChildProcessError):  # none is left
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with ends.open("a") as log:
                log.write(f"{ended[0]} {os.waitstatus_to_exitcode(ended[1])}\n")


if __name__ == "__main__":
    main()
