"""A slot: the right to run one job on this device, held by one process or thread at a time."""

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
    """What a worker can do once at a time. The kernel gives it back when its holder dies."""

    worker: str
    stage: Stage
    lock_dir: Path

    @property
    def holder(self) -> str:
        """The name under which this slot holds leases."""
        return f"{self.worker}/{self.stage.value}"


@contextmanager
def taken(slot: Slot) -> Iterator[None]:
    """Wait for the slot, and take it."""
    with _opened(slot) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            _give_back(fd)


@contextmanager
def taken_if_free(slot: Slot) -> Iterator[bool]:
    """Take the slot if it is free, and tell."""
    with _opened(slot) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            _give_back(fd)


@contextmanager
def _opened(slot: Slot) -> Iterator[int]:
    slot.lock_dir.mkdir(parents=True, exist_ok=True)
    path = slot.lock_dir / f"{slot.worker}-{slot.stage.value}.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _give_back(fd: int) -> None:
    """Unlock; a process forked meanwhile has this descriptor too, so that closing it would not be enough."""
    fcntl.flock(fd, fcntl.LOCK_UN)
