"""A doorbell of files, for processes without a broker: each bell is heard by one of those that listen."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FolderBell:
    """Keeps the contract of `graft_shared.dispatch.Doorbell`."""

    folder: Path

    def ring(self, job_id: str, queue: str) -> bool:
        """Leave a bell in the queue's folder."""
        (self.folder / queue).mkdir(parents=True, exist_ok=True)
        (self.folder / queue / f"{job_id}.{uuid.uuid4().hex}").touch()
        return True

    def ping(self) -> bool:
        """Files are always there."""
        return True

    def heard(self, queue: str) -> str | None:
        """Take a bell of this queue and return its job's id; None when there is none."""
        folder = self.folder / queue
        for bell in sorted(folder.iterdir()) if folder.is_dir() else ():
            try:
                bell.unlink()
            except FileNotFoundError:  # another has heard it
                continue
            return bell.name.partition(".")[0]
        return None
