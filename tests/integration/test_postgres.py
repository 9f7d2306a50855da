"""What those who share a PostgreSQL lose by a machine that is lost, and by a server that is silent."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from sqlalchemy import make_url, text, update

from graft_shared.errors import StoreUnavailable
from graft_shared.jobs import Job, Stage
from graft_shared.store import Database, Jobs, Leases, open_database, postgres
from graft_shared.store.engine import now, one_at_a_time
from graft_shared.store.migrate import migrate
from graft_shared.store.quotas import count_run
from graft_shared.store.tables import jobs as jobs_table
from tests.faultproxy import FaultProxy, Mode
from tests.servers import PostgresServer
from tests.store_factories import a_new_job
from tests.waiting import wait_until

LEASE = timedelta(seconds=60)


@pytest.fixture
def database(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setattr("graft_shared.store.postgres.STILL_SECONDS", 3)
    opened = open_database(postgres_url)
    migrate(opened)
    yield opened
    opened.close()


def preparing(database: Database, tenant: str) -> Job:
    """A job of the tenant, claimed by a worker whose lease has run out."""
    submitted, _ = Jobs(database).submit(a_new_job(tenant=tenant))
    job = Leases(database, LEASE).claim("w/prepare", stage=Stage.PREPARE, gpu_classes=[])
    assert job is not None and job.id == submitted.id
    with database.writing() as connection:
        connection.execute(update(jobs_table).where(jobs_table.c.id == job.id).values(lease_expires_at=now() - 1))
    return job


def test_a_machine_lost_in_mid_transaction_holds_up_its_own_job_and_account_and_those_for_seconds(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    leases = Leases(database, LEASE)
    settling, of_its_tenant, of_another = (preparing(database, tenant) for tenant in ("a", "a", "b"))
    lost = database.engine.connect()
    lost.begin()
    one_at_a_time(lost, "training of a")
    count_run(lost, settling.id, settling.epoch)
    assert [job.id for job in leases.release_expired()] == [of_another.id]
    assert "lease_not_given_back" in caplog.messages, "for its tenant's account is held"
    with database.writing() as connection:
        one_at_a_time(connection, "training of a")
    released: set[str] = set()
    wait_until(
        lambda: released.update(job.id for job in leases.release_expired()) or len(released) == 2,
        seconds=20,
        what="what the lost machine held",
    )
    assert released == {settling.id, of_its_tenant.id}
    lost.invalidate()


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[FaultProxy]:
    made = FaultProxy(postgres.port).start()
    yield made
    made.stop()


def test_a_server_that_is_silent_is_given_up_in_time_and_asked_over_another_connection(
    proxy: FaultProxy, postgres_url: str
) -> None:
    url = make_url(postgres_url).set(port=proxy.port).render_as_string()
    database = open_database(url, answers_within=timedelta(seconds=1))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="no answer within 1 s"), database.writing() as connection:
        connection.execute(text("select 1"))
        proxy.switch(Mode.HALF_OPEN)
        connection.execute(text("select 1"))
    proxy.trap(b"COMMIT", Mode.HALF_OPEN)
    with pytest.raises(StoreUnavailable, match="no answer") as caught, database.writing() as connection:
        connection.execute(text("select 1"))
    assert caught.value.facts["in_commit"], "nobody can tell"
    with database.writing() as connection:
        connection.execute(text("select 1"))
    proxy.switch(Mode.HALF_OPEN)
    time.sleep(postgres.TRUSTED_SECONDS)
    with database.reading() as connection:
        assert connection.execute(text("select 1")).scalar_one() == 1, "the pool's connection was found silent"
    assert time.monotonic() - began < 15
    database.close()


def test_a_session_that_ended_right_after_its_answer_fails_no_question(database: Database) -> None:
    def session() -> int:
        with database.reading() as connection:
            return int(connection.execute(text("select pg_backend_pid()")).scalar_one())

    other = database.engine.connect()
    for _ in range(10):
        ended = session()
        other.execute(text("select pg_terminate_backend(:pid, 5000)"), {"pid": ended})
        assert session() != ended
    other.close()


def test_a_connection_that_goes_on_answering_is_not_asked_whether_it_is_there(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(database.engine.dialect, "do_ping", asked.append)
    for _ in range(3):
        with database.reading() as connection:
            connection.execute(text("select 1"))
    assert len(asked) <= 1, "the first may be long silent"
    time.sleep(postgres.TRUSTED_SECONDS)
    with database.reading() as connection:
        connection.execute(text("select 1"))
    assert asked


def test_a_server_that_hangs_up_on_new_connections_too_is_away_and_no_fault_of_ours(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hung_up(_connection: object) -> None:
        raise psycopg.OperationalError("server closed the connection unexpectedly")

    database.now()
    with monkeypatch.context() as context:
        context.setattr(postgres.Connection, "is_surely_there", lambda _connection: False)
        context.setattr(database.engine.dialect, "do_ping", hung_up)
        with pytest.raises(StoreUnavailable):
            database.now()
        with pytest.raises(StoreUnavailable), database.writing():
            pytest.fail("nobody answers")
    database.now()


def test_a_server_that_has_vanished_is_given_up_by_the_kernel_whatever_a_statement_may_take(postgres_url: str) -> None:
    database = open_database(postgres_url, answers_within=None)
    with database.reading() as connection:
        connection.execute(text("select 1"))
        driver = connection.connection.driver_connection
        assert driver is not None
        link = socket.socket(fileno=socket.dup(driver.fileno()))
    with link:
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
        assert link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert link.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
    database.close()
