"""Who is told how a run goes: figures, traces, trackers. They can change nothing of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from graft_shared.jobs import FailureReason, Job, Phase
from graft_worker.protocol import Event

DONE, CANCELLED, LEASE_LOST, LEFT = "done", "cancelled", "lease_lost", "left_to_reconciler"
OUTCOMES = (DONE, CANCELLED, LEASE_LOST, LEFT, *(reason.value for reason in FailureReason))
"""How a run may end: with its result, without being settled, or by the reason of its failure."""


class Listener(Protocol):
    """Somebody who is told of one run, from its claim to its settle; may wait for others only at its end, seconds."""

    def began(self, phase: Phase) -> None:
        """The run is busy with something else now."""

    def heard(self, event: Event) -> None:
        """The child has said something other than a phase."""

    def ended(self, outcome: str) -> None:
        """The run is over, by one of `OUTCOMES`."""


Invite = Callable[[Job], Sequence[Listener]]
"""Who is told of the run of a job."""

logger = logging.getLogger(__name__)


def nobody(_job: Job) -> Sequence[Listener]:
    """A run that nobody is told of."""
    return ()


class Audience:
    """All who are told of one run. One that fails is told no more, and the run goes on."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self._listeners = list(listeners)

    def began(self, phase: Phase) -> None:
        """Tell all of a phase."""
        self._tell(lambda listener: listener.began(phase))

    def heard(self, event: Event) -> None:
        """Tell all what the child said."""
        self._tell(lambda listener: listener.heard(event))

    def ended(self, outcome: str) -> None:
        """Tell all that the run is over."""
        self._tell(lambda listener: listener.ended(outcome))

    def _tell(self, tell: Callable[[Listener], None]) -> None:
        for listener in tuple(self._listeners):
            try:
                tell(listener)
            except Exception:
                self._listeners.remove(listener)
                logger.exception("listener_failed", extra={"facts": {"listener": type(listener).__name__}})
