"""A slot: the right to run one job of one stage on this device, held by one process or thread at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graft_shared.jobs import Stage


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What a worker can do once at a time."""

    worker: str
    stage: Stage

    @property
    def holder(self) -> str:
        """The name under which this slot holds leases."""
        return f"{self.worker}/{self.stage.value}"


@contextmanager
def taken(slot: Slot, lock_dir: Path) -> Iterator[bool]:
    """Take the slot if it is free, and tell. The kernel gives it back when its holder dies."""
    lock_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(lock_dir / f"{slot.worker}-{slot.stage.value}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a process forked meanwhile has this descriptor too: closing is not enough
    finally:
        os.close(fd)
