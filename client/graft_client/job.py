"""A job in one's hand: its document as the service gave it last, and what can be done with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graft_client.client import GraftClient, Update

TERMINAL_STATUSES = frozenset({"succeeded", "failed", "cancelled"})


class Job(dict[str, Any]):
    """The document of the HTTP contract; its methods ask the service, and what they return is newer than this."""

    def __init__(self, document: dict[str, Any], client: GraftClient) -> None:
        super().__init__(document)
        self._client = client

    @property
    def id(self) -> str:
        """`ftjob-…`."""
        return str(self["id"])

    @property
    def status(self) -> str:
        """One of OpenAI's words, or `paused`, `pausing`, `cancelling`; as it was when this was read."""
        return str(self["status"])

    @property
    def has_ended(self) -> bool:
        """Whether nothing can change any more."""
        return self.status in TERMINAL_STATUSES

    def refresh(self) -> Job:
        """Return the job as it is now."""
        return self._client.get(self.id)

    def wait(self, *, timeout_seconds: float | None = None, poll_seconds: float = 1.0) -> Job:
        """Return the job once it has ended; raises WaitedTooLong."""
        return self._client.wait(self.id, timeout_seconds=timeout_seconds, poll_seconds=poll_seconds)

    def updates(self, *, poll_seconds: float = 1.0) -> Iterator[Update]:
        """Follow it to its end."""
        return self._client.updates(self.id, poll_seconds=poll_seconds)

    def events(self) -> Iterator[dict[str, Any]]:
        """Go through what has happened, oldest first."""
        return self._client.events(self.id)

    def measures(self, *, poll_seconds: float = 1.0) -> Iterator[dict[str, Any]]:
        """Go through what was measured, a step at a time, live until the job has ended."""
        return self._client.measures(self.id, poll_seconds=poll_seconds)

    def logs(self) -> str:
        """Return the log of the last run."""
        return self._client.logs(self.id)

    def follow_logs(self, *, poll_seconds: float = 1.0) -> Iterator[str]:
        """Go through the log, live until the job has ended, in pieces as they come."""
        return self._client.follow_logs(self.id, poll_seconds=poll_seconds)

    def cancel(self) -> Job:
        """End it before its time."""
        return self._client.cancel(self.id)

    def pause(self) -> Job:
        """Have it save what it has learnt and leave its worker."""
        return self._client.pause(self.id)

    def resume(self) -> Job:
        """Let it go on."""
        return self._client.resume(self.id)

    def download(self, to: str | Path) -> Path:
        """Bring its adapter home, every byte checked."""
        return self._client.download(self.id, to)

    def delete(self) -> None:
        """Remove it with its history and its artifacts, once it has ended."""
        self._client.delete(self.id)
