"""What was read lately, so that not each of a thousand requests reads it again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, TypeVar

HELD_TIMES = 20  # as long as reading took
SLOW_HELD_SECONDS = 10.0  # at most for that: it may have been slow for a lock, once

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass
class Held(Generic[Key, Value]):
    """What `read` tells of each key, asked again after so many seconds, by one thread for all that wait.

    What takes long to read is held a little longer, so that reading takes no more than a twentieth of anybody's time.

    Whoever waited for a read that failed gets its error: asked by one after the other, a store that is away would
    hold up the last of them for as long as all of these took.
    """

    read: Callable[[Key], Value]
    seconds: float
    _found: dict[Key, tuple[float, Value]] = field(default_factory=dict)  # with when it is too old
    _failed: dict[Key, tuple[float, Exception]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Key) -> Value:
        """The value, as a read of late told it; raises what `read` does."""
        asked = monotonic()
        with self._lock:
            if key in self._found and asked < self._found[key][0]:
                return self._found[key][1]
            failed_at, error = self._failed.get(key, (-math.inf, None))
            if error is not None and asked < failed_at:
                raise error.with_traceback(None)  # each that raises it would add to what it holds
            began = monotonic()
            try:
                value = self.read(key)
            except Exception as error:
                self._failed[key] = monotonic(), error
                raise
            self._failed.pop(key, None)
            slow = min(SLOW_HELD_SECONDS, HELD_TIMES * (monotonic() - began))
            self._found[key] = began + max(self.seconds, slow), value
            return value

    def forget(self, key: Key) -> None:
        """Read it anew when it is asked for next."""
        with self._lock:
            self._found.pop(key, None)
