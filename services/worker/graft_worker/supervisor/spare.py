"""A trainer that has done its imports before its job is there: importing takes longer than loading a 7B."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

from graft_shared.jobs import Stage
from graft_shared.logs import log_event
from graft_worker.device import Device
from graft_worker.protocol import LOG_NAME
from graft_worker.supervisor.child import Child, child_environment, heard

LAST_WORDS_BYTES = 500  # of a spare trainer's log, for the worker's

logger = logging.getLogger(__name__)


class SpareTrainer:
    """At most one process that waits to be a job's trainer; it holds some of the host's memory and none of the GPU's.

    It has never seen a job: nothing of one reaches another. It dies with the supervisor that started it. A job never
    depends on it: without one, or with one that died, the trainer is started as ever.
    """

    def __init__(self, *, wanted: bool | None, device: Device, home: Path, cache_dir: Path) -> None:
        """Keep one if `wanted`, by default where jobs train on a GPU; `home` is its own and of no other worker."""
        self._wanted = device.stage is Stage.TRAIN and (device.kind == "cuda" if wanted is None else wanted)
        self._device = device
        self._home = home
        self._cache_dir = cache_dir
        self._is_due = True
        self._waiting: subprocess.Popen[bytes] | None = None

    @property
    def waiting_pid(self) -> int | None:
        """The process that waits for a job."""
        return self._waiting.pid if self._waiting is not None else None

    def prepare(self, module: str) -> None:
        """Start `python -m <module>`, unless that was tried since the last was taken, or none is wanted."""
        if not self._wanted or not self._is_due:
            return
        self._is_due = False
        try:
            self._waiting = self._start(module)
        except OSError as error:  # a full disk or process table: no reason to end the job that runs
            log_event(logger, "spare_trainer_not_started", level=logging.WARNING, reason=str(error))

    def take(self, workdir: Path) -> Child | None:
        """Hand the waiting process its job; None if there is none, or it has died."""
        process, self._waiting, self._is_due = self._waiting, None, True
        if process is None or process.stdin is None:
            return None
        try:
            with process.stdin as stdin:  # raises OSError when the process has died
                stdin.write(os.fsencode(workdir) + b"\n")
            (self._home / LOG_NAME).rename(workdir / LOG_NAME)
        except OSError as error:
            _end(process)
            facts = {"exit_code": process.returncode, "reason": str(error), "last_words": self._last_words()}
            log_event(logger, "spare_trainer_lost", level=logging.WARNING, **facts)
            return None
        return heard(process)

    def dismiss(self) -> None:
        """End the process that waits."""
        if self._waiting is not None:
            _end(self._waiting)
            self._waiting = None

    def _start(self, module: str) -> subprocess.Popen[bytes]:
        shutil.rmtree(self._home, ignore_errors=True)
        self._home.mkdir(parents=True)
        with (self._home / LOG_NAME).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._home,
                env=child_environment(self._home, device=self._device, cache_dir=self._cache_dir),
                start_new_session=True,
            )

    def _last_words(self) -> str:
        try:
            return (self._home / LOG_NAME).read_text(errors="replace")[-LAST_WORDS_BYTES:]
        except OSError:
            return ""


def _end(process: subprocess.Popen[bytes]) -> None:
    with process:  # waits for its end, and closes its pipes
        process.kill()
