"""Where a worker lives, and its name there: what tells its own earlier life from a live worker of the same name.

A worker that was killed must take its job back at once, and two of one name must not take each other's. So a name is
held in the folder of the locks by a lock that dies with the process: who gets it knows that no earlier life at this
place is left. A worker elsewhere is told by its place, and proves that it lives by its next beat.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from graft_shared.errors import StoreUnavailable, WorkerNameTaken
from graft_shared.logs import log_event
from graft_shared.store import Workers
from graft_worker.supervisor.locks import locked

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # another one on each machine, and after each start of it

logger = logging.getLogger(__name__)


def place_of(lock_dir: Path) -> str:
    """One word for this folder on this machine: a copy of the folder elsewhere is another place."""
    path = lock_dir / "place"
    with locked(path.with_suffix(".lock")):
        if not _read(path):
            new = path.with_name(f"place.{uuid4().hex}")
            new.write_text(uuid4().hex)
            new.replace(path)
    return hashlib.sha256(f"{path.read_text()} {_read(_BOOT_ID)}".encode()).hexdigest()[:32]


def hold_name(name: str, lock_dir: Path) -> None:
    """Hold this name at this place for as long as this process lives.

    It is a record lock, which unlike `flock` a forked process does not share: what is left of a killed worker's pool
    does not keep the name.

    Raises:
        WorkerNameTaken: A living process holds it.
    """
    lock_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(lock_dir / f"{name}.life", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise WorkerNameTaken(name=name) from error


def register(name: str, workers: Workers, beat: Callable[[], None], pause: Callable[[], None]) -> None:
    """Beat for the first time, before anything is claimed under this name.

    A worker of this name that was seen lately at another place may be alive, or be ours before it lost its folder or
    its machine was started anew. It is waited for: until it is seen again, or not for so long that the name is free.

    Raises:
        WorkerNameTaken: It was seen again.
    """
    seen_before: datetime | None = None
    while True:
        try:
            beat()
            return
        except WorkerNameTaken:
            seen = _when_seen(name, workers)
            if seen and seen_before and seen > seen_before:
                raise
            if seen_before is None:
                log_event(logger, "name_waited_for", level=logging.WARNING, worker=name)
            seen_before = seen_before or seen
        except StoreUnavailable as error:
            log_event(logger, "registration_postponed", level=logging.WARNING, reason=error.message)
        pause()


def _when_seen(name: str, workers: Workers) -> datetime | None:
    try:
        return workers.seen_at(name)
    except StoreUnavailable:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
