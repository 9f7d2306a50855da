"""How a process that has SQLite databases open forks: between its transactions, and with nothing open.

SQLite notes in the process's memory which locks it has on a file, since the system forgets them all when any descriptor
of the file is closed. A fork copies the notes, and not the locks: in the new process the locks of a transaction that
was under way count as held for ever, and whoever commits waits for them (https://sqlite.org/howtocorrupt.html, 2.6). A
Celery worker forks whenever its pool process was killed, while its threads tell that it is alive and look for work.

There is one gate for all databases of a process, since a thread may be inside two. Whoever is inside may not wait for
another thread that wants in; a fork from inside is not held up, and its process must leave the database alone.
"""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 (hooks run last come, first served: its lock is taken after our wait)
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from graft_shared.logs import log_event

LONG_SECONDS = 5.0  # that a fork waits without a word; a transaction may wait much longer for another process's

logger = logging.getLogger(__name__)


class ForkGate:
    """Lets transactions through, and forks only between them."""

    def __init__(self) -> None:
        self._engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._inside: Counter[int] = Counter()  # by thread: one that is inside may come in again
        self._changed = threading.Condition()
        self._forker: int | None = None

    def guard(self, engine: Engine) -> None:
        """Close what this one keeps before each fork."""
        with self._changed:
            self._engines.add(engine)

    @contextmanager
    def passage(self) -> Iterator[None]:
        """Hold off forks; waits for one that is under way."""
        me = threading.get_ident()
        with self._changed:
            self._changed.wait_for(lambda: self._forker in (None, me) or me in self._inside)
            self._inside[me] += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Wait until nobody is inside, and close what is kept."""
        me = threading.get_ident()
        with self._changed:
            if me in self._inside:
                return
            self._wait(lambda: self._forker is None)
            self._forker = me
            self._wait(lambda: not self._inside)
            for engine in self._engines:
                engine.dispose()

    def after_fork_in_parent(self) -> None:
        """Let all in again."""
        with self._changed:
            if self._forker == threading.get_ident():
                self._forker = None
                self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Be alone: other threads may have had our lock, or have been inside, and are not here."""
        me = threading.get_ident()
        self._changed, self._forker = threading.Condition(), None
        self._inside = Counter({me: self._inside[me]} if me in self._inside else {})

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Whatever a signal's handler raises here Python would drop, and fork at once."""
        while not condition():
            try:
                if not self._changed.wait_for(condition, LONG_SECONDS):
                    log_event(logger, "fork_waits", level=logging.WARNING, threads_inside=len(self._inside))
            except BaseException:
                logger.exception("fork_goes_on_waiting")


GATE = ForkGate()
os.register_at_fork(
    before=GATE.before_fork, after_in_parent=GATE.after_fork_in_parent, after_in_child=GATE.after_fork_in_child
)
