"""A disk is full at a write: the bucket's, the worker's, or the one that everything lies on. Root only: it mounts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.jobs import JobState
from tests.chaos.clients import SAVE_STEPS
from tests.chaos.judge import gather
from tests.chaos.service import ServiceInTrouble
from tests.outages.bucket import missing_objects
from tests.outages.stream import post_stubbornly
from tests.outages.wanted import Played, Wanted, come_to_rest, neighbours, running, verdict_of
from tests.waiting import wait_until
from tests.witness import steps_made

STEPS = 2 * SAVE_STEPS + 2
STEP_SECONDS = 1.5  # a disk is filled between two steps, with half a GiB of zeros
REACHED_SECONDS = 300.0
SIDE_BY_SIDE = 2
FILL_EVERY_SECONDS = 0.02
DISK_BYTES = 512 * 1024**2
# What lies on the disk, below the folder of the service.
DISKS = {"whole_service": ("",), "worker": ("work",), "bucket": ("bucket",)}


@dataclass(frozen=True)
class Moment:
    """When a disk gets full, and how much of it stays free: what is written next may fit, and the write after not."""

    disk: str
    before: str  # the write that comes next
    pages_left: int = 0


MOMENTS = (
    *(Moment(disk, write) for disk in ("whole_service", "bucket") for write in ("file", "prepared_data")),
    Moment("worker", "prepared_data"),
    *(Moment(disk, write) for disk in DISKS for write in ("checkpoint", "adapter")),
    # The log takes the page of its predecessor and the adapter this one; the manifest has none. Two would be enough.
    Moment("bucket", "adapter", pages_left=1),
)


def full(folder: Path, wanted: Wanted) -> Played:
    """A disk is full from just before a write on, for a while; one service for each, some side by side."""
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        played = list(pool.map(lambda moment: _at(moment, folder, wanted), MOMENTS))
    named = {f"{m.disk}, {m.before}, {m.pages_left} pages left": p for m, p in zip(MOMENTS, played, strict=True)}
    return Played(
        figures={"writes": {name: one.figures for name, one in named.items()}},
        violations={
            f"{name}: {promise}": found for name, one in named.items() for promise, found in one.violations.items()
        },
    )


@dataclass
class SmallDisk:
    """A tmpfs that can be filled up, and stays full whatever is removed from it."""

    path: Path
    _pages_left: int = 0
    _end: threading.Event = field(default_factory=threading.Event)
    _filler: threading.Thread | None = None

    def fill(self, *, pages_left: int) -> None:
        """Leave so many pages, and never more; one that was taken does not come back. Returns when it is so."""
        self._pages_left = pages_left
        self._fill()
        self._filler = threading.Thread(target=self._keep_full, daemon=True)
        self._filler.start()

    def free(self) -> None:
        """Give the space back."""
        self._end.set()
        if self._filler is not None:
            self._filler.join()
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.path / "ballast"

    def _keep_full(self) -> None:
        while not self._end.wait(FILL_EVERY_SECONDS):
            self._fill()

    def _fill(self) -> None:
        fd = os.open(self._ballast, os.O_WRONLY | os.O_CREAT)
        try:
            space = os.statvfs(self.path)
            self._pages_left = min(self._pages_left, space.f_bavail)
            too_many = space.f_bavail - self._pages_left
            if too_many > 0:
                with contextlib.suppress(OSError):  # somebody was quicker
                    os.posix_fallocate(fd, os.fstat(fd).st_size, too_many * space.f_frsize)
        finally:
            os.close(fd)


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[SmallDisk]:
    """Mount one there."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", path], check=True)
    disk = SmallDisk(path)
    try:
        yield disk
    finally:
        disk.free()
        subprocess.run(["umount", "--lazy", path], check=True)


def _at(moment: Moment, folder: Path, wanted: Wanted) -> Played:
    own = folder / f"{moment.disk}-{moment.before}-{moment.pages_left}"
    with contextlib.ExitStack() as ended:
        redis, _ = ended.enter_context(neighbours(own, wanted))
        state_dir = own / "state"
        (mounted,) = DISKS[moment.disk]
        disk = ended.enter_context(small_disk(state_dir / mounted))
        (own / "steps.log").touch()
        (state_dir / "steps.log").symlink_to(own / "steps.log")  # a witness has a disk of its own
        service = ServiceInTrouble(state_dir, redis, None, wanted.lease_seconds, 1, preparers=1)
        ended.enter_context(running(service))
        with ThreadPoolExecutor(1) as user:
            if moment.before == "file":
                disk.fill(pages_left=moment.pages_left)
            posting = user.submit(post_stubbornly, service, steps=STEPS, step_seconds=str(STEP_SECONDS))
            if moment.before != "file":
                posting.result()
                _wait_for(moment.before, own)
                disk.fill(pages_left=moment.pages_left)
            time.sleep(wanted.seconds)
            free_since = datetime.now(UTC)
            disk.free()
            job = posting.result()
        seconds = come_to_rest(service)
        service.stop()
        evidence = gather(service, [job], [], away=True)
        (job_id,) = job.ids
        row, events = evidence.jobs[job_id], evidence.events[job_id]
        violations = verdict_of(evidence)
        violations["what the row names is there"] = list(missing_objects(row, DirectoryBucket(state_dir / "bucket")))
        figures = {
            "seconds_from_its_end_to_the_job's": round(seconds, 1),
            "claims": sum(event["type"] == "claimed" for event in events),
            "attempt": row.attempt,
            "failures": [e["data"]["reason"] for e in events if e["type"] in ("requeued", "failed")],
            "waited_for_the_bucket": service.logged("neighbour_waited_for"),
            "workers_started_again": service.restarts,
        }
    undisturbed = row.finished_at is not None and row.finished_at < free_since and not figures["failures"]
    violations["something fails, or waits until there is space"] = [f"{moment}"] if undisturbed else []
    succeeded = row.state is JobState.SUCCEEDED
    violations["the job succeeds once there is space"] = [] if succeeded else [f"{row.state}: {row.error}"]
    return Played(figures={"state": row.state.value, **figures}, violations=violations)


def _wait_for(write: str, folder: Path) -> None:
    """Return when this write is the next one that matters."""
    step = {"prepared_data": 0, "checkpoint": 1, "adapter": STEPS - 1}[write]
    wait_until(
        lambda: max((made.number for made in steps_made(folder)), default=0) >= step,
        seconds=REACHED_SECONDS,
        what=f"step {step}",
    )
