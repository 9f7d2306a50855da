"""A witness: looks at the machine's processes again and again, and remembers which trainers lived when."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.invariants import Sighting

LOOK_SECONDS = 0.05
# `python -m graft_worker.training …/work/<worker>/train/<job>-e<epoch>`
_TRAINER = re.compile(r"graft_worker\.training\0(?P<folder>/[^\0]*)/(?P<job>ftjob-\w+)-e(?P<epoch>\d+)\0")


@dataclass
class Witness:
    """Sees the trainers that work below a folder. The store cannot tell of them: what it keeps is fenced."""

    folder: Path
    looks: int = 0
    _seen: dict[tuple[str, int, int], tuple[float, float]] = field(default_factory=dict)
    _end: threading.Event = field(default_factory=threading.Event)

    def sightings(self) -> list[Sighting]:
        """All trainers that were seen so far."""
        return [
            Sighting(job_id=job_id, epoch=epoch, pid=pid, first_at=first_at, last_at=last_at)
            for (job_id, epoch, pid), (first_at, last_at) in list(self._seen.items())
        ]

    def look(self) -> None:
        """Look once."""
        at = time.monotonic()
        for trainer in self._trainers():
            first_at, _ = self._seen.get(trainer, (at, at))
            self._seen[trainer] = (first_at, at)
        self.looks += 1

    def watch(self) -> None:
        """Look until `leave`."""
        while not self._end.wait(LOOK_SECONDS):
            self.look()

    def leave(self) -> None:
        """End the watch."""
        self._end.set()

    def _trainers(self) -> list[tuple[str, int, int]]:
        """Job, epoch and process id of each; what a trainer forks has its command line too and is not one."""
        lines = {pid: line for pid in _pids() if (line := _commandline(pid)) and str(self.folder) in line}
        matches = {pid: match for pid, line in lines.items() if (match := _TRAINER.search(line))}
        forked = {pid for pid in matches if lines.get(_parent(pid)) == lines[pid]}
        return [(match["job"], int(match["epoch"]), pid) for pid, match in matches.items() if pid not in forked]


@contextmanager
def watching(folder: Path) -> Iterator[Witness]:
    """A witness that looks all the while."""
    witness = Witness(folder)
    thread = threading.Thread(target=witness.watch, name="witness", daemon=True)
    thread.start()
    try:
        yield witness
    finally:
        witness.leave()
        thread.join()


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _commandline(pid: int) -> str:
    """With NUL after each argument; empty for a process that has gone, or that is a zombie."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
