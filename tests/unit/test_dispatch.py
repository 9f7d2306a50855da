"""The doorbell where nobody listens."""

from __future__ import annotations

import time

from graft_shared.dispatch import CeleryDoorbell
from tests.waiting import free_port

SOON_SECONDS = 3.0  # half of what kombu's own retries take; it is done within a tenth of a second


def test_a_bell_that_the_broker_refuses_holds_up_nobody() -> None:
    doorbell = CeleryDoorbell(f"redis://127.0.0.1:{free_port()}/0")
    began = time.monotonic()
    assert not doorbell.ring("ftjob-1", "cpu")
    assert time.monotonic() - began < SOON_SECONDS
