"""Clocks: which one a decision may use.

Leases are judged by the database's clock alone. A process measures its own waiting with `boottime`, which goes on
while a machine is suspended, so that a thawed process knows how long it was away.
"""

from __future__ import annotations

import time


def boottime() -> float:
    """Seconds since boot, suspension included; comparable between processes of one machine only."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
