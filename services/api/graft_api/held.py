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
    """What `read` tells of each key, read again after so many seconds, by one thread for all that wait."""

    read: Callable[[Key], Value]
    seconds: float
    found: dict[Key, tuple[float, Value]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, key: Key) -> Value:
        """The value, no older than that."""
        with self.lock:
            at, value = self.found.get(key, (-math.inf, None))
            if value is None or monotonic() - at > self.seconds:
                value = self.read(key)
                self.found[key] = monotonic(), value
            return value
