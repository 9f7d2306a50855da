"""How a process that has a SQLite database open forks: with nothing open of it.

SQLite notes in the process's memory which locks it has on a file, since the system forgets them all when any descriptor
of the file is closed. A fork copies the notes, and not the locks: in the new process the locks of a transaction that
was under way count as held for ever, and whoever commits waits for them (https://sqlite.org/howtocorrupt.html, 2.6). A
Celery worker forks whenever its pool process was killed, while its threads tell that it is alive and look for work.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_gates: weakref.WeakSet[ForkGate] = weakref.WeakSet()
_one_fork = threading.Lock()  # and for as long nothing is added to the gates


class ForkGate:
    """Lets transactions through, and a fork only between them.

    Args:
        close: Closes every connection that is kept, once none is in use.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close
        self._inside: Counter[int] = Counter()  # by thread: one that is inside may come in again
        self._changed = threading.Condition()
        self._forking = False
        with _one_fork:
            _gates.add(self)

    @contextmanager
    def passage(self) -> Iterator[None]:
        """Hold off forks; waits for one that is under way."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: not self._forking or me in self._inside)
            self._inside[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                self._changed.notify_all()

    def shut(self) -> None:
        """Wait until no other thread is inside, and close what is kept; a fork inside its own passage keeps that."""
        me = {threading.get_ident()}
        with self._changed:
            self._forking = True
            self._changed.wait_for(lambda: self._inside.keys() <= me)
            if not self._inside:
                self._close()

    def reopen(self) -> None:
        """The fork is over."""
        with self._changed:
            self._forking = False
            self._changed.notify_all()

    def begin_anew(self) -> None:
        """In the forked process: another thread may have had our lock, and is not here to give it back."""
        self._changed, self._forking = threading.Condition(), False


def _before_fork() -> None:
    _one_fork.acquire()
    for gate in _gates:
        gate.shut()


def _after_fork_in_parent() -> None:
    for gate in _gates:
        gate.reopen()
    _one_fork.release()


def _after_fork_in_child() -> None:
    for gate in _gates:
        gate.begin_anew()
    _one_fork.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
