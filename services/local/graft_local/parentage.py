"""What the Linux kernel does for a family of processes: children that die with their parent, orphans that come home."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_ON_LINUX = sys.platform == "linux"
_libc = ctypes.CDLL(None)


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent dies, so that none can slip away."""
    if _ON_LINUX:
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def dies_with_us() -> Callable[[], None]:
    """Return a `preexec_fn` after which the kernel kills the child when this process ends, however it ends.

    The signal belongs to the thread that forks: call `Popen` from the main thread.
    """
    parent = os.getpid()

    def tie() -> None:
        if _ON_LINUX:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died before the tie was made
                os._exit(1)

    return tie


def children_of(parent: int) -> set[int]:
    """The living direct children of a process, from /proc; empty where there is no /proc."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (comm) state ppid …: comm may hold blanks and brackets, so count from the last one
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended while we looked
        if int(ppid) == parent and state != "Z":
            found.add(int(stat.parent.name))
    return found
