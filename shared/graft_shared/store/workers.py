"""The live fleet: which workers were seen lately, and what each may take."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, insert, select, update

from graft_shared.jobs import JobState, Stage
from graft_shared.store.engine import Database, as_datetime, now
from graft_shared.store.tables import jobs, workers

ALIVE_FOR = timedelta(seconds=45)  # three missed beats of 15 s
REMEMBERED_FOR = timedelta(days=1)  # containers get a new name at every start


@dataclass(frozen=True, kw_only=True)
class LiveWorker:
    """One worker: a device and what it does with it."""

    name: str
    gpu_class: str
    device: str
    stages: tuple[Stage, ...]
    seen_at: datetime


class Workers:
    """Registration and heartbeat of workers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def beat(self, *, name: str, gpu_class: str, device: str, stages: tuple[Stage, ...]) -> None:
        """Say that this worker is alive; registers it the first time."""
        values = {
            "gpu_class": gpu_class,
            "device": device,
            "stages": [stage.value for stage in stages],
            "seen_at": now(),
        }
        with self._database.writing() as connection:
            known = connection.execute(update(workers).where(workers.c.name == name).values(**values)).rowcount
            if not known:
                connection.execute(insert(workers).values(name=name, started_at=now(), **values))

    def leave(self, name: str) -> None:
        """Say that this worker has ended."""
        with self._database.writing() as connection:
            connection.execute(delete(workers).where(workers.c.name == name))

    def forget_dead(self) -> None:
        """Drop those that were not seen for `REMEMBERED_FOR`."""
        with self._database.writing() as connection:
            connection.execute(delete(workers).where(workers.c.seen_at < now() - REMEMBERED_FOR.total_seconds()))

    def idle_count(self) -> int:
        """How many live workers hold no job; each has one slot."""
        alive = select(func.count()).where(workers.c.seen_at > now() - ALIVE_FOR.total_seconds()).scalar_subquery()
        running = select(func.count()).where(jobs.c.state == JobState.RUNNING.value).scalar_subquery()
        with self._database.reading() as connection:
            return max(0, int(connection.execute(select(alive - running)).scalar_one()))

    def alive(self) -> list[LiveWorker]:
        """Return the workers seen within `ALIVE_FOR`, by name."""
        query = select(workers).where(workers.c.seen_at > now() - ALIVE_FOR.total_seconds()).order_by(workers.c.name)
        with self._database.reading() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            LiveWorker(
                name=row["name"],
                gpu_class=row["gpu_class"],
                device=row["device"],
                stages=tuple(Stage(stage) for stage in row["stages"]),
                seen_at=as_datetime(row["seen_at"]),
            )
            for row in rows
        ]
