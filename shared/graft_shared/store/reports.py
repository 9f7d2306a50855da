"""Reports on files: asked for by their tenants, made by workers under a lease of a few minutes at most, and kept."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, insert, or_, select, update
from sqlalchemy.engine import Connection, RowMapping

from graft_shared.errors import FileNotFound, LeaseLost, TooManyReports
from graft_shared.jobs import REMEDIES, Failure, FailureReason, Fault
from graft_shared.store.engine import Database, now, one_at_a_time
from graft_shared.store.leases import Orders
from graft_shared.store.tables import files, reports

MAX_ATTEMPTS = 3  # workers that may die over one report before it counts as poison
MOST_WAITING = 20  # of one tenant
AGAIN_SECONDS = 5  # after which some of them may be made
KEPT_FOR_A_FILE = 50  # each holds some thousand characters of the file's rows
LIFE = timedelta(days=7)  # a base's tokenizer may have changed by then
TRIED_AGAIN_AFTER = timedelta(minutes=1)


class ReportState(StrEnum):
    """How far a report is."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Report:
    """One row: what was asked of a file, and what came of it."""

    id: str
    tenant: str
    file_id: str
    spec: dict[str, Any]
    state: ReportState
    epoch: int
    report: dict[str, Any] | None
    error: dict[str, Any] | None


class Reports:
    """Reports as tenants and workers see them. A file that is deleted takes its reports along, whatever their state."""

    def __init__(self, database: Database, lease: timedelta) -> None:
        self._database = database
        self._lease = lease.total_seconds()

    def ask(self, id: str, tenant: str, file_id: str, spec: dict[str, Any]) -> Report:
        """Return this report on a file; one that nobody has asked for is put in the queue under the given id.

        Raises:
            FileNotFound: No such file, or another tenant's.
            TooManyReports: `MOST_WAITING` of the tenant's are in the queue.
        """
        spec_sha256 = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        this = and_(reports.c.tenant == tenant, reports.c.file_id == file_id, reports.c.spec_sha256 == spec_sha256)
        with self._database.reading() as connection:
            row = connection.execute(select(reports).where(this, ~_is_stale())).mappings().one_or_none()
        if row is not None:
            return _report_from(row)
        with self._database.writing() as connection:
            one_at_a_time(connection, f"reports of {tenant}")
            connection.execute(delete(reports).where(this, _is_stale()))
            row = connection.execute(select(reports).where(this)).mappings().one_or_none()
            if row is None:
                _require_room(connection, tenant, file_id)
                values = {"id": id, "tenant": tenant, "file_id": file_id, "spec_sha256": spec_sha256, "spec": spec}
                row = _insert(connection, values)
            return _report_from(row)

    def claim(self) -> Report | None:
        """Take the report that waits for longest, of the tenant that was served longest ago; None if none waits.

        One whose worker was lost is taken again, up to `MAX_ATTEMPTS`; then it has failed.
        """
        with self._database.writing() as connection:
            while (row := connection.execute(_next_waiting()).mappings().one_or_none()) is not None:
                counts = {"epoch": row["epoch"] + 1, "attempt": row["attempt"] + 1}
                if row["attempt"] < MAX_ATTEMPTS:
                    taken = {"state": ReportState.RUNNING.value, "claimed_at": now(), **counts}
                    return _report_from(_change(connection, row, **taken, lease_expires_at=now() + self._lease))
                message = f"Each of {MAX_ATTEMPTS} workers was lost over it"
                lost = Failure(reason=FailureReason.WORKER_LOST, message=message)
                _change(connection, row, epoch=counts["epoch"], **_failed(lost))
            return None

    def renew(self, report_id: str, epoch: int) -> Orders:
        """Hold the lease for another full length from now.

        Raises:
            LeaseLost: Another worker has it, or its file was deleted.
        """
        with self._database.writing() as connection:
            _change(connection, {"id": report_id, "epoch": epoch}, lease_expires_at=now() + self._lease)
        return Orders(cancel=False, pause=False)

    def orders(self, report_id: str, epoch: int) -> Orders:
        """Look, without renewing, whether the report is still this worker's to make.

        Raises:
            LeaseLost: Another worker has it, or its file was deleted.
        """
        query = select(reports.c.id).where(reports.c.id == report_id, reports.c.epoch == epoch)
        with self._database.reading() as connection:
            if connection.execute(query).one_or_none() is None:
                raise LeaseLost(job_id=report_id, epoch=epoch)
        return Orders(cancel=False, pause=False)

    def settle(self, report_id: str, epoch: int, report: dict[str, Any]) -> None:
        """Keep what was made.

        Raises:
            LeaseLost: Another worker has it, or its file was deleted.
        """
        made = {"state": ReportState.DONE.value, "report": report, "finished_at": now(), "lease_expires_at": None}
        with self._database.writing() as connection:
            _change(connection, {"id": report_id, "epoch": epoch}, **made)

    def fail(self, report_id: str, epoch: int, failure: Failure) -> None:
        """Say why there is none. A failure that is not the user's is forgotten when somebody asks a minute later.

        Raises:
            LeaseLost: Another worker has it, or its file was deleted.
        """
        with self._database.writing() as connection:
            _change(connection, {"id": report_id, "epoch": epoch}, **_failed(failure))

    def give_back(self, report_id: str, epoch: int) -> None:
        """Put a report back into the queue whose worker has to leave; that counts as no loss.

        Raises:
            LeaseLost: Another worker has it, or its file was deleted.
        """
        back = {"state": ReportState.QUEUED.value, "lease_expires_at": None, "attempt": reports.c.attempt - 1}
        with self._database.writing() as connection:
            _change(connection, {"id": report_id, "epoch": epoch}, **back)


def _is_stale() -> ColumnElement[bool]:
    """Too old, or failed for no fault of its tenant's and worth another try."""
    servers = reports.c.error["category"].as_string() == Fault.SERVER.value
    failed = and_(reports.c.state == ReportState.FAILED.value, servers)
    return or_(
        reports.c.finished_at < now() - LIFE.total_seconds(),
        and_(failed, reports.c.finished_at < now() - TRIED_AGAIN_AFTER.total_seconds()),
    )


def _require_room(connection: Connection, tenant: str, file_id: str) -> None:
    """Refuse to fill the queue, and forget the oldest of a file's many reports."""
    unfinished = reports.c.state.in_([ReportState.QUEUED.value, ReportState.RUNNING.value])
    waiting = select(func.count()).where(reports.c.tenant == tenant, unfinished)
    if connection.execute(waiting).scalar_one() >= MOST_WAITING:
        raise TooManyReports(limit=MOST_WAITING, retry_after_seconds=AGAIN_SECONDS)
    newest = select(reports.c.id).where(reports.c.file_id == file_id).order_by(reports.c.created_at.desc())
    kept = connection.execute(newest.limit(KEPT_FOR_A_FILE - 1)).scalars().all()
    others = and_(reports.c.file_id == file_id, reports.c.id.not_in(kept), ~unfinished)
    connection.execute(delete(reports).where(others))


def _insert(connection: Connection, values: dict[str, Any]) -> RowMapping:
    validation = (values["spec"].get("validation") or {}).get("file")
    named = {values["file_id"], *([validation] if validation else [])}
    there = select(files.c.id).where(files.c.tenant == values["tenant"], files.c.id.in_(named))
    for missing in sorted(named - set(connection.execute(there.with_for_update(read=True)).scalars())):
        raise FileNotFound(file_id=missing)
    queued = {"validation_file_id": validation, "state": ReportState.QUEUED.value, "epoch": 0, "attempt": 0}
    values |= {**queued, "created_at": now()}
    return connection.execute(insert(reports).values(**values).returning(reports)).mappings().one()


def _next_waiting() -> Any:
    served = reports.alias("served")
    last_served = (
        select(func.coalesce(func.max(served.c.claimed_at), 0.0))
        .where(served.c.tenant == reports.c.tenant)
        .scalar_subquery()
    )
    lost = and_(reports.c.state == ReportState.RUNNING.value, reports.c.lease_expires_at < now())
    waiting = select(reports).where(or_(reports.c.state == ReportState.QUEUED.value, lost))
    waiting = waiting.order_by(last_served, reports.c.created_at, reports.c.id).limit(1)
    return waiting.with_for_update(skip_locked=True, of=reports)


def _change(connection: Connection, row: RowMapping | dict[str, Any], **values: Any) -> RowMapping:
    """Change a row that still has this epoch."""
    this = and_(reports.c.id == row["id"], reports.c.epoch == row["epoch"])
    changed = connection.execute(update(reports).where(this).values(**values).returning(reports))
    found = changed.mappings().one_or_none()
    if found is None:
        raise LeaseLost(job_id=row["id"], epoch=row["epoch"])
    return found


def _failed(failure: Failure) -> dict[str, Any]:
    error = {"category": REMEDIES[failure.reason].fault.value, **asdict(failure), "reason": failure.reason.value}
    return {"state": ReportState.FAILED.value, "error": error, "finished_at": now(), "lease_expires_at": None}


def _report_from(row: RowMapping) -> Report:
    return Report(
        id=row["id"],
        tenant=row["tenant"],
        file_id=row["file_id"],
        spec=row["spec"],
        state=ReportState(row["state"]),
        epoch=row["epoch"],
        report=row["report"],
        error=row["error"],
    )
