"""Locks between the processes of a host, on files that stay. The kernel gives a lock back when its holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Wait for the lock on this file, and hold it; several may hold it `shared` at once."""
    with _opened(path) as fd:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            _give_back(fd)


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Take the lock on this file alone if nobody holds it, and tell."""
    with _opened(path) as fd:
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
def _opened(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _give_back(fd: int) -> None:
    """Unlock; a process forked meanwhile has this descriptor too, so that closing it would not be enough."""
    fcntl.flock(fd, fcntl.LOCK_UN)
