"""What a child says, on a disk that has no room for its log."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SAYS = """
from graft_worker.protocol import EventWriter, PhaseEvent
from graft_shared.jobs import Phase

events = EventWriter()
events.log("training begins")
events.emit(PhaseEvent(phase=Phase.TRAINING))
"""


def test_a_line_that_finds_no_room_ends_no_run() -> None:
    with Path("/dev/full").open("wb") as full:
        ran = subprocess.run([sys.executable, "-c", SAYS], stdout=subprocess.PIPE, stderr=full, check=False)
    assert ran.returncode == 0
    assert b"training" in ran.stdout


def test_a_line_stands_in_the_log() -> None:
    ran = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True)
    assert ran.stderr.endswith(" training begins\n")
