"""The store and its model side by side: every call is made of both, and must be answered alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from sqlalchemy import delete, select

from graft_shared.errors import GraftError
from graft_shared.jobs import Checkpoint, Failure, FailureReason, Stage, StoredObject
from graft_shared.store import Database, Files, Jobs, Leases, Quotas, Sending, Tenants, Workers, tables
from tests.fakes.clock import FakeClock
from tests.store_factories import a_new_job, a_placement
from tests.store_model import LEASE_SECONDS, PRIORITIES, ModelJob, StoreModel

MANY_JOBS = 7
TENANTS = ("a", "b")
# Name, stage and what it takes, its own class first: as workers of one fleet are.
FLEET: dict[str, tuple[Stage, list[str]]] = {
    "p": (Stage.PREPARE, []),
    "small": (Stage.TRAIN, ["16gb"]),
    "middle": (Stage.TRAIN, ["24gb", "16gb"]),
    "large": (Stage.TRAIN, ["80gb", "24gb", "16gb"]),
}
CLASSES = ("16gb", "24gb", "80gb")
QUOTAS = Quotas(queued_jobs=12, running_jobs=5, gpu_hours=30.1, stored_bytes=20)  # where the operator says nothing
TABLES = ("jobs", "job_events", "files", "uploads", "workers", "tenants", "worker_time")

_LEASE = timedelta(seconds=LEASE_SECONDS)
Answer = TypeVar("Answer")
Rows = dict[str, dict[str, Any]]
Events = dict[str, list[dict[str, Any]]]


class BothSides:
    """An empty store and an empty model, over one clock."""

    def __init__(self, database: Database, clock: FakeClock) -> None:
        with database.writing() as connection:
            for table in TABLES:
                connection.execute(delete(tables.metadata.tables[table]))
        self.database, self.clock, self.model = database, clock, StoreModel(clock, asdict(QUOTAS))
        self.jobs, self.files, self.workers = Jobs(database, QUOTAS), Files(database, QUOTAS), Workers(database)
        self.leases, self.tenants = Leases(database, _LEASE, QUOTAS), Tenants(database, QUOTAS)
        self.places: dict[str, str | None] = {}  # where the worker lived that claimed a job last

    def call(self, real: Callable[[], Answer], predict: Callable[[], Any]) -> tuple[Answer, Any] | None:
        """Make the same call of both and return both answers; where the model refuses it, so must the store."""
        self.clock.tick()
        try:
            expected = predict()
        except (GraftError, ValueError) as error:
            stored = self.raw()
            with pytest.raises(type(error)):
                real()
            assert self.raw() == stored, "what is refused changes nothing"
            return None
        return real(), expected

    def submit(
        self,
        tenant: str,
        *,
        key: str | None = None,
        sha: str = "s",
        sent: tuple[int, float] | None = None,
        **facts: Any,
    ) -> None:
        """`sent`: how often its client has sent it before, and how many seconds ago first."""
        spec = {"gpu_class": "16gb", "priority": "normal", "max_attempts": 2, **facts}
        job_id = f"ftjob-{len(self.model.jobs)}"
        sent_before, first_at = (sent[0], self.clock.now - sent[1]) if sent else (None, None)
        new = replace(a_new_job(tenant=tenant, key=key, sha=sha, **spec), id=job_id)
        if sent:
            sending = Sending(sent_before=sent[0], first_at=datetime.fromtimestamp(self.clock.now - sent[1], UTC))
            new = replace(new, sending=sending)

        def predict() -> tuple[str, bool]:
            known = {"idempotency_key": key, "request_sha256": sha, "created_at": self.clock.now}
            known |= {name: spec[name] for name in ("gpu_class", "max_attempts")}
            known |= {"priority": PRIORITIES[spec["priority"]], "not_before": self.clock.now, "plan": new.plan}
            return self.model.submit(ModelJob(id=job_id, tenant=tenant, sent_before=sent_before, **known), first_at)

        answer = self.call(lambda: self.jobs.submit(new), predict)
        assert answer is None or (answer[0][0].id, answer[0][1]) == answer[1]

    def cancel(self, tenant: str, job_id: str) -> None:
        answer = self.call(lambda: self.jobs.cancel(tenant, job_id), lambda: self.model.cancel(tenant, job_id))
        assert answer is None or answer[0].status.value == answer[1].status

    def pause(self, tenant: str, job_id: str) -> None:
        answer = self.call(lambda: self.jobs.pause(tenant, job_id), lambda: self.model.pause(tenant, job_id))
        assert answer is None or answer[0].status.value == answer[1].status

    def resume(self, tenant: str, job_id: str) -> None:
        answer = self.call(lambda: self.jobs.resume(tenant, job_id), lambda: self.model.resume(tenant, job_id))
        assert answer is None or answer[0].status.value == answer[1].status

    def delete(self, tenant: str, job_id: str) -> None:
        self.call(lambda: self.jobs.delete(tenant, job_id), lambda: self.model.delete(tenant, job_id))

    def upload(self, tenant: str, size: int) -> None:
        file_id = f"file-{len(self.model.files)}"
        stored = StoredObject(key=f"k/{file_id}", size=size, sha256="0" * 64)
        self.files.announce(stored.key)
        whole = {"id": file_id, "tenant": tenant, "filename": "rows.jsonl", "object": stored, "report": {}}
        added = self.call(lambda: self.files.add(**whole), lambda: self.model.add_file(file_id, tenant, size))
        if added is None:
            self.files.give_up(stored.key)
            assert self.files.lost_uploads(limit=100) == [stored.key], "its bytes are swept soon"
            self.files.forget_upload(stored.key)

    def say_of_tenant(self, tenant: str, changes: dict[str, float | None]) -> None:
        used = self.tenants.set(tenant, changes)
        self.model.said[tenant] = self.model.said.get(tenant, {}) | changes
        counted = (used.share, used.queued_jobs, used.running_jobs, used.stored_bytes)
        model = self.model
        assert counted == (
            model.share(tenant),
            model.waiting(tenant),
            model.training(tenant),
            model.stored_bytes(tenant),
        )
        assert used.gpu_hours == pytest.approx(model.gpu_seconds(tenant) / 3600, abs=1e-6)

    def claim(self, name: str) -> ModelJob | None:
        (stage, takes), holder = FLEET[name], self.holder(name)
        self.clock.tick()
        claimed = self.leases.claim(holder, stage=stage, gpu_classes=takes)
        expected = self.model.claim(holder, stage.value, takes, claimed and claimed.id)
        assert (claimed and (claimed.id, claimed.epoch)) == (expected and (expected.id, expected.epoch))
        if expected is not None:
            self.places[expected.id] = self.model.workers[name].place if name in self.model.workers else None
        return expected

    def prepare_all(self) -> None:
        """Take all that waits for it through preparation, and ring, as workers do."""
        while (job := self.claim("p")) is not None:
            self.hand_over(job.id, job.epoch, {"report": {"rows": job.epoch}})
            self.mark_rung(job.id)

    def commit(self, job_id: str, epoch: int, step: int) -> None:
        saved = Checkpoint(step=step, epoch=epoch, object=StoredObject(key=f"c{step}", size=1, sha256=f"{step:064}"))
        self.call(
            lambda: self.leases.commit_checkpoint(job_id, epoch, saved),
            lambda: self.model.commit_checkpoint(job_id, epoch, asdict(saved)),
        )

    def hand_over(self, job_id: str, epoch: int, prepared: dict[str, Any]) -> None:
        self.call(
            lambda: self.leases.hand_to_training(job_id, epoch, prepared),
            lambda: self.model.hand_to_training(job_id, epoch, prepared),
        )

    def succeed(self, job_id: str, epoch: int) -> None:
        result: dict[str, Any] = {"adapter": {"epoch": epoch}, "metrics": {"train_loss": 0.5}, "memory": {"peak": 1}}
        self.call(
            lambda: self.leases.settle_success(job_id, epoch, **result),
            lambda: self.model.settle_success(job_id, epoch, **result),
        )

    def stop(self, job_id: str, epoch: int) -> None:
        self.call(
            lambda: self.leases.settle_cancelled(job_id, epoch), lambda: self.model.settle_cancelled(job_id, epoch)
        )

    def mark_rung(self, job_id: str) -> None:
        self.call(lambda: self.leases.mark_rung(job_id), lambda: self.model.mark_rung(job_id))

    def settle_failure(
        self, job_id: str, epoch: int, reason: FailureReason, facts: dict[str, Any], gpu_class: str | None = None
    ) -> None:
        failure = Failure(reason=reason, message=f"It was {reason.value}", facts=facts)
        placed = a_placement(gpu_class) if gpu_class else None
        other_plan = (placed.gpu_class.name, placed.plan.to_dict(), placed.summary) if placed else None
        answer = self.call(
            lambda: self.leases.settle_failure(job_id, epoch, failure, replanned=placed),
            lambda: self.model.settle_failure(job_id, epoch, reason.value, other_plan),
        )
        assert answer is None or (answer[0].id, answer[0].state.value) == (answer[1].id, answer[1].state)

    def any_job(self, pick: int) -> str:
        return list(self.model.jobs)[pick % len(self.model.jobs)]

    def runs_of_one(self, times: int) -> Iterator[ModelJob]:
        """Claim until one job, the first, was claimed so often; others that come between are over at once."""
        if len(self.model.jobs) < MANY_JOBS:
            self.submit("a", priority="high", max_attempts=3)
            self.prepare_all()
        first: ModelJob | None = None
        while times and (job := self.claim("large")) is not None:
            first = first or job
            if job is first:
                times -= 1
                yield job
            else:
                self.settle_failure(job.id, job.epoch, FailureReason.LOSS_NOT_FINITE, {})

    def run(self, pick: int, stage: Stage | None = None) -> tuple[str, int]:
        """A job that runs in this stage, and its epoch; where there is none it is begun, or else a late call."""
        running = [job for job in self.model.jobs.values() if job.state == "running"]
        found = [job for job in running if stage is None or job.stage == stage.value]
        if not found:
            able = [name for name, (does, _) in FLEET.items() if stage in (None, does)]
            claimed = self.claim(able[pick % len(able)])
            found = [claimed] if claimed else [job for job in self.model.jobs.values() if job not in running]
        job = found[pick % len(found)] if found else None
        return (job.id, job.epoch) if job else ("ftjob-never", 1)

    def holder(self, name: str) -> str:
        return f"{name}/{FLEET[name][0].value}"

    def raw(self) -> list[Any]:
        """All that is stored, as the database hands it out: to be compared, not to be read."""
        with self.database.reading() as connection:
            return [sorted(connection.exec_driver_sql(f"select * from {table}").all(), key=str) for table in TABLES]

    def read(self) -> tuple[Rows, Events]:
        with self.database.reading() as connection:
            rows = connection.execute(select(tables.jobs)).mappings().all()
            told = connection.execute(select(tables.job_events).order_by(tables.job_events.c.id)).mappings().all()
        events: dict[str, list[dict[str, Any]]] = {row["id"]: [] for row in rows}
        for event in told:
            events[event["job_id"]].append(dict(event))
        return {row["id"]: dict(row) for row in rows}, events


def step_of(job: ModelJob) -> int:
    """The step of the job's last checkpoint, 0 without one."""
    return int(job.checkpoint["step"]) if job.checkpoint else 0


def compared(row: dict[str, Any], job: ModelJob) -> list[tuple[str, Any, Any]]:
    """Each column with the value that is stored and the one that is expected; times are equal to a millisecond."""
    found = []
    for name in (field.name for field in fields(job) if field.name != "history"):
        stored, known = row[name], getattr(job, name)
        if name == "error":
            stored = stored and stored["code"]
        found.append((name, stored, pytest.approx(known, abs=1e-3) if isinstance(known, float) else known))
    return found
