"""Processes made by forking one that has done its imports: starting Python takes longer than most trials compute.

A worker's children are forked too. What differs from production is `exec` alone: a child has a session, an
environment, a folder and pipes of its own, no descriptor besides, and dies with its parent.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO

from graft_worker.parent import die_with_parent
from graft_worker.supervisor import child as supervised
from tests.fakes import child as toy
from tests.forked import end_after, stand_alone


def fork(act: Callable[[], object], log: Path) -> int:
    """Run `act` in a process of its own, which dies with this one and writes to `log`; returns its id.

    Whoever forks must have no connection open: neither SQLite's locks nor PostgreSQL's sockets survive being shared.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        lines = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        stand_alone(stdin=os.devnull, stdout=lines, stderr=lines)
        os.environ["GRAFT_PARENT_PID"] = str(parent)
        die_with_parent()
        end_after(act)
    return pid


def fork_children() -> None:
    """Have every supervisor of this process, and of those that it forks, fork toy children instead of starting them."""
    supervised.subprocess = SimpleNamespace(Popen=ForkedChild, PIPE=-1, DEVNULL=-3)  # type: ignore[assignment]


class ForkedChild:
    """As much of `subprocess.Popen` as a supervisor uses; the program is `tests.fakes.child`, whatever it asks for."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: IO[bytes],
        cwd: Path,
        env: dict[str, str],
        start_new_session: bool,
    ) -> None:
        read_end, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            stand_alone(stdin=os.devnull, stdout=write_end, stderr=stderr.fileno())
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(env)
            sys.argv = [toy.__file__, command[-1]]
            end_after(toy.main)
        os.close(write_end)
        self.stdout = os.fdopen(read_end, "rb")
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Its exit code, or the negative number of the signal that ended it."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode
