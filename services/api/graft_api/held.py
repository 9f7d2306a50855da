"""What was read lately, so that not each of a thousand requests reads it again."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


@dataclass
class Held(Generic[Key, Value]):
    """What `read` tells of each key, asked again after so many seconds, by one thread for all that wait.

    Whoever waited for a read that failed gets its error: asked by one after the other, a store that is away would
    hold up the last of them for as long as all of these took.
    """

    read: Callable[[Key], Value]
    seconds: float
    _found: dict[Key, tuple[float, Value]] = field(default_factory=dict)
    _failed: dict[Key, tuple[float, Exception]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Key) -> Value:
        """The value, as some read told it that began no longer ago than that; raises what `read` does."""
        asked = monotonic()
        with self._lock:
            if key in self._found and asked - self._found[key][0] <= self.seconds:
                return self._found[key][1]
            failed_at, error = self._failed.get(key, (-math.inf, None))
            if error is not None and asked < failed_at:
                raise error
            began = monotonic()
            try:
                value = self.read(key)
            except Exception as error:
                self._failed[key] = monotonic(), error
                raise
            self._failed.pop(key, None)
            self._found[key] = began, value
            return value
