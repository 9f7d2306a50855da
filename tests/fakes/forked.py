"""A process that was forked at an awkward moment, and has a copy of every descriptor that was open then."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


def forked_process() -> AbstractContextManager[None]:
    """Fork now; the process lives until the end of the block that is entered with what this returns."""
    ready, done = os.pipe(), os.pipe()
    if (pid := os.fork()) == 0:
        os.write(ready[1], b".")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    return _ended_after(pid, done[1])


@contextmanager
def _ended_after(pid: int, done: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.write(done, b".")
        os.waitpid(pid, 0)
