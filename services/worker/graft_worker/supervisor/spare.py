"""A trainer that has done its imports before its job is there: importing takes longer than loading a 7B."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from pathlib import Path

from graft_shared.jobs import Stage
from graft_shared.logs import log_event
from graft_worker.device import Device
from graft_worker.supervisor.child import Child, child_environment

logger = logging.getLogger(__name__)


class SpareTrainer:
    """At most one process that waits to be a job's trainer; it holds some of the host's memory and none of the GPU's.

    It has never seen a job: nothing of one reaches another. It dies with the supervisor that started it.
    """

    def __init__(self, *, wanted: bool | None, device: Device, cache_dir: Path) -> None:
        self._wanted = device.stage is Stage.TRAIN and (device.kind == "cuda" if wanted is None else wanted)
        self._device = device
        self._cache_dir = cache_dir
        self._waiting: subprocess.Popen[bytes] | None = None

    @property
    def waiting_pid(self) -> int | None:
        """The process that waits for a job."""
        return self._waiting.pid if self._waiting is not None else None

    def prepare(self, module: str) -> None:
        """Start `python -m <module>`, unless one was started since the last was taken, or none is wanted."""
        if not self._wanted or self._waiting is not None:
            return
        home = self._cache_dir / "spare"
        home.mkdir(parents=True, exist_ok=True)
        self._waiting = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=home,
            env=child_environment(home, device=self._device, cache_dir=self._cache_dir),
            start_new_session=True,
        )

    def take(self, workdir: Path) -> Child | None:
        """Hand the waiting process its job; None if there is none, or it has died."""
        process, self._waiting = self._waiting, None
        if process is None or process.stdin is None:
            return None
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(f"{workdir}\n".encode())
        if process.poll() is not None:
            log_event(logger, "spare_trainer_died", level=logging.WARNING, exit_code=process.returncode)
            return None
        return Child(process)

    def dismiss(self) -> None:
        """End the process that waits."""
        if self._waiting is not None:
            self._waiting.kill()
            self._waiting.communicate()
            self._waiting = None
