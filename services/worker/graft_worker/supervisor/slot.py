"""A slot: the right to run one job on this device, held by one process or thread at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from graft_shared.jobs import Stage
from graft_worker.supervisor.locks import locked, locked_if_free


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

    @property
    def lock(self) -> Path:
        """The file whose lock is the slot."""
        return self.lock_dir / f"{self.worker}-{self.stage.value}.lock"


@contextmanager
def taken(slot: Slot) -> Iterator[None]:
    """Wait for the slot, and take it."""
    with locked(slot.lock):
        yield


@contextmanager
def taken_if_free(slot: Slot) -> Iterator[bool]:
    """Take the slot if it is free, and tell."""
    with locked_if_free(slot.lock) as is_free:
        yield is_free
