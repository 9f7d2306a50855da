"""A doorbell that remembers who rang."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class FakeDoorbell:
    """Keeps the contract of `graft_shared.dispatch.Doorbell`."""

    works: bool = True
    rung: list[tuple[str, str]] = field(default_factory=list)

    def ring(self, job_id: str, queue: str) -> bool:
        """Remember the bell; tell whether it left."""
        if self.works:
            self.rung.append((job_id, queue))
        return self.works

    def ping(self) -> bool:
        """Tell whether the broker would answer."""
        return self.works
