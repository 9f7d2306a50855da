"""The queues as they were a moment ago: every look at a job that waits asks for its place."""

from __future__ import annotations

from graft_api.held import Held
from graft_shared.jobs import Job
from graft_shared.store import Jobs, Line, QueueName, queue_of

LINES_HELD_SECONDS = 1.0


class HeldLines:
    """Places in them are those of a second ago, or of longer where very much waits; a newer job stands at the end."""

    def __init__(self, jobs: Jobs) -> None:
        self._held = Held[QueueName, Line](jobs.line, LINES_HELD_SECONDS)

    def of(self, job: Job) -> Line:
        """The queue in which this job waits."""
        name = queue_of(job)
        line = self._held.get(name)
        if line.knows(job.tenant):
            return line
        self._held.forget(name)  # it is its tenant's first
        return self._held.get(name)
