"""Patience: trying again while a neighbour is away, as long as the lease holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from graft_shared.clock import boottime
from graft_shared.errors import NeighbourUnavailable
from graft_shared.logs import log_event

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


def patiently(
    action: Callable[[], Answer], *, patience_seconds: float, give_up: Callable[[], bool] = lambda: False
) -> Answer:
    """Call `action` until its neighbour answers.

    Args:
        action: Safe to repeat: it writes whole objects or fenced rows.
        patience_seconds: How long to go on trying.
        give_up: Asked between tries; True ends the patience early.

    Raises:
        NeighbourUnavailable: It was still away when the patience ended.
    """
    until, pause = boottime() + patience_seconds, FIRST_PAUSE_SECONDS
    while True:
        try:
            return action()
        except NeighbourUnavailable as error:
            if boottime() + pause > until or give_up():
                raise
            log_event(logger, "neighbour_waited_for", level=logging.WARNING, reason=error.message, pause_seconds=pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
