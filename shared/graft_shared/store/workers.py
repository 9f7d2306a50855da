"""The live fleet: which workers were seen lately, and what each may take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Select, Text, and_, case, cast, delete, func, insert, or_, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

from graft_shared.errors import WorkerNameTaken
from graft_shared.jobs import JobState, Stage
from graft_shared.store.engine import Database, as_datetime, now, now_once
from graft_shared.store.tables import jobs, workers

ALIVE_FOR = timedelta(seconds=45)  # three missed beats of 15 s
REMEMBERED_FOR = timedelta(days=1)  # containers get a new name at every start


@dataclass(frozen=True, kw_only=True)
class LiveWorker:
    """One worker: a device and what it does with it."""

    name: str
    place: str | None
    gpu_class: str
    device: str
    stages: tuple[Stage, ...]
    takes_classes: tuple[str, ...]
    seen_at: datetime

    def takes(self, stage: Stage, gpu_class: str) -> bool:
        """Whether it may claim such a job; only training needs a GPU, so elsewhere classes do not count."""
        return stage in self.stages and (stage is not Stage.TRAIN or gpu_class in self.takes_classes)


@dataclass(frozen=True, kw_only=True)
class Crew:
    """Live workers of one class that do the same."""

    gpu_class: str
    stages: tuple[Stage, ...]
    size: int


@dataclass(frozen=True, kw_only=True)
class Busy:
    """A worker that trains."""

    worker: str
    seconds: float  # since it claimed the job
    eta_seconds: float | None  # until it is done, as its trainer told last


class Workers:
    """Registration and heartbeat of workers. A name is one worker's, for as long as that worker is heard of."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def beat(
        self,
        *,
        name: str,
        place: str,
        gpu_class: str,
        device: str,
        stages: tuple[Stage, ...],
        takes_classes: tuple[str, ...],
    ) -> None:
        """Say that this worker is alive; registers it the first time.

        Args:
            place: Where it lives. No two live workers of one name can be at one place: whoever beats from there is
                the worker that beat before, or its next life.

        Raises:
            WorkerNameTaken: A worker of this name at another place was seen within `ALIVE_FOR`.
        """
        values = {
            "place": place,
            "gpu_class": gpu_class,
            "device": device,
            "stages": [stage.value for stage in stages],
            "takes_classes": list(takes_classes),
            "seen_at": now(),
        }
        at_this_place = case((workers.c.place == place, workers.c.started_at), else_=now())
        ours = or_(workers.c.place == place, workers.c.seen_at < now() - ALIVE_FOR.total_seconds())
        try:
            with self._database.writing() as connection:
                renewed = update(workers).where(workers.c.name == name, ours).values(**values, started_at=at_this_place)
                if not connection.execute(renewed).rowcount:
                    connection.execute(insert(workers).values(name=name, started_at=now(), **values))
        except IntegrityError as error:
            raise WorkerNameTaken(name=name) from error

    def seen_at(self, name: str) -> datetime | None:
        """When a worker of this name was seen last; None when there is none."""
        with self._database.reading() as connection:
            seen = connection.execute(select(workers.c.seen_at).where(workers.c.name == name)).scalar_one_or_none()
        return as_datetime(seen) if seen is not None else None

    def leave(self, name: str, place: str) -> None:
        """Say that this worker has ended."""
        with self._database.writing() as connection:
            connection.execute(delete(workers).where(workers.c.name == name, workers.c.place == place))

    def forget_dead(self) -> None:
        """Drop those that were not seen for `REMEMBERED_FOR`."""
        with self._database.writing() as connection:
            connection.execute(delete(workers).where(workers.c.seen_at < now() - REMEMBERED_FOR.total_seconds()))

    def alive(self) -> list[LiveWorker]:
        """Return the workers seen within `ALIVE_FOR`, by name."""
        with self._database.reading() as connection:
            return _those(connection, _ALIVE)

    def crews(self) -> list[Crew]:
        """Count the live workers by what they do: all that a waiting job's user is told of them."""
        with self._database.reading() as connection:
            found = connection.execute(_CREWS).all()
        return [
            Crew(gpu_class=gpu_class, stages=tuple(Stage(stage) for stage in json.loads(stages)), size=size)
            for gpu_class, stages, size in found
        ]

    def idle(self) -> list[LiveWorker]:
        """Return the live workers that hold no job; each has one slot."""
        with self._database.reading() as connection:
            return _those(connection, _IDLE)

    def busy(self) -> list[Busy]:
        """Return who trains, and for how long still."""
        trains = and_(jobs.c.state == JobState.RUNNING.value, jobs.c.stage == Stage.TRAIN.value)
        query = select(jobs.c.worker, (now() - jobs.c.claimed_at).label("seconds"), jobs.c.progress).where(trains)
        with self._database.reading() as connection:
            rows = connection.execute(query).all()
        return [
            Busy(worker=name_of(holder), seconds=seconds, eta_seconds=progress.get("eta_seconds"))
            for holder, seconds, progress in rows
        ]


def name_of(holder: str) -> str:
    """The name of the worker under whose slot (`name/stage`) a lease is held."""
    return holder.partition("/")[0]


class name_in(GenericFunction[str]):  # noqa: N801
    """What `name_of` tells, in a statement."""

    type = Text()
    inherit_cache = True
    name = "graft_name_in"


@compiles(name_in, "sqlite")
def _name_in_sqlite(element: GenericFunction[str], compiler: Any, **kw: Any) -> str:
    holder = compiler.process(element.clauses, **kw)
    return f"substr({holder}, 1, instr({holder} || '/', '/') - 1)"


@compiles(name_in, "postgresql")
def _name_in_postgresql(element: GenericFunction[str], compiler: Any, **kw: Any) -> str:
    return f"split_part({compiler.process(element.clauses, **kw)}, '/', 1)"


_SEEN_LATELY = workers.c.seen_at > now_once() - ALIVE_FOR.total_seconds()
_STAGES = cast(workers.c.stages, Text)  # PostgreSQL groups by no JSON
_CREWS = select(workers.c.gpu_class, _STAGES, func.count()).where(_SEEN_LATELY).group_by(workers.c.gpu_class, _STAGES)
_ALIVE = select(workers).where(_SEEN_LATELY).order_by(workers.c.name)
_HOLDERS = select(name_in(jobs.c.worker)).where(jobs.c.state == JobState.RUNNING.value, jobs.c.worker.is_not(None))
_IDLE = _ALIVE.where(workers.c.name.not_in(_HOLDERS))  # there: a busy fleet is looked at ten times a second


def _those(connection: Connection, query: Select[Any]) -> list[LiveWorker]:
    return [
        LiveWorker(
            name=row["name"],
            place=row["place"],
            gpu_class=row["gpu_class"],
            device=row["device"],
            stages=tuple(Stage(stage) for stage in row["stages"]),
            takes_classes=tuple(row["takes_classes"] or ()),
            seen_at=as_datetime(row["seen_at"]),
        )
        for row in connection.execute(query).mappings()
    ]
