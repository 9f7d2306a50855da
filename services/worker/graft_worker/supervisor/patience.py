"""Patience: trying again while a neighbour is away, as long as the run may go on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from graft_shared.clock import boottime
from graft_shared.errors import BaseModelUnavailable, NeighbourUnavailable
from graft_shared.logs import log_event

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0
_ASK_EVERY_SECONDS = 0.5

Answer = TypeVar("Answer")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a run waits for a neighbour.

    Args:
        seconds: How long one action is tried again.
        gave_up: Asked while waiting; True ends the patience early: the run was told to stop.
    """

    seconds: float
    gave_up: Callable[[], bool]

    def wait_for(self, action: Callable[[], Answer], *, at_most_seconds: float | None = None) -> Answer:
        """Call `action` until its neighbour answers. It must be safe to repeat: whole objects, fenced rows.

        Raises:
            NeighbourUnavailable: It was still away when the patience ended.
            BaseModelUnavailable: At once. A hub that is away is so for minutes, and one that is there was waited for.
        """
        seconds = self.seconds if at_most_seconds is None else min(self.seconds, at_most_seconds)
        until, pause = boottime() + seconds, FIRST_PAUSE_SECONDS
        while True:
            try:
                return action()
            except BaseModelUnavailable:
                raise
            except NeighbourUnavailable as error:
                if boottime() + pause > until or not self._waited(pause):
                    raise
                facts = {"reason": error.message, "pause_seconds": pause}
                log_event(logger, "neighbour_waited_for", level=logging.WARNING, **facts)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _waited(self, seconds: float) -> bool:
        """Wait, and tell whether to go on."""
        until = boottime() + seconds
        while not self.gave_up():
            left = until - boottime()
            if left <= 0:
                return True
            time.sleep(min(left, _ASK_EVERY_SECONDS))
        return False
