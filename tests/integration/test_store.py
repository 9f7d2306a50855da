"""The store's contract, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, event, text, update
from sqlalchemy.exc import OperationalError

from graft_shared.errors import (
    FileNotFound,
    IdempotencyConflict,
    JobCancelling,
    JobFinished,
    JobNotFound,
    LeaseLost,
    StoreUnavailable,
    WorkerNameTaken,
)
from graft_shared.jobs import (
    MAX_RUNS_WITHOUT_PROGRESS,
    Checkpoint,
    Failure,
    FailureReason,
    Job,
    JobState,
    JobStatus,
    Phase,
    Stage,
    StoredObject,
)
from graft_shared.store import Database, Files, JobQuery, Jobs, Leases, Quotas, Tenants, Totals, Workers, open_database
from graft_shared.store.engine import journal_mode, now
from graft_shared.store.migrate import migrate
from graft_shared.store.tables import jobs as jobs_table
from graft_shared.store.tables import metadata
from graft_shared.store.tables import workers as workers_table
from graft_shared.store.workers import ALIVE_FOR
from tests.store_factories import a_beat, a_new_job, a_placement

CRASH = Failure(reason=FailureReason.CRASH, message="It broke")
PAUSED = Failure(reason=FailureReason.PAUSED, message="The job was paused")
LOST = Failure(reason=FailureReason.WORKER_LOST, message="It was lost")
TRAIN = {"stage": Stage.TRAIN, "gpu_classes": ["cpu"]}


@pytest.fixture
def jobs(database: Database) -> Jobs:
    return Jobs(database)


@pytest.fixture
def leases(database: Database) -> Leases:
    return Leases(database, timedelta(seconds=60))


def prepared(jobs: Jobs, leases: Leases, **facts: object) -> Job:
    """Submit a job and take it through preparation: it waits for a trainer."""
    submitted, _ = jobs.submit(a_new_job(**facts))  # type: ignore[arg-type]
    claimed = leases.claim("preparer", stage=Stage.PREPARE, gpu_classes=[])
    assert claimed is not None
    assert claimed.id == submitted.id
    return leases.hand_to_training(claimed.id, claimed.epoch, {"report": {}})


def running(jobs: Jobs, leases: Leases, **facts: object) -> Job:
    prepared(jobs, leases, **facts)
    claimed = leases.claim("trainer", **TRAIN)
    assert claimed is not None
    return claimed


def checkpoint(job: Job, step: int) -> Checkpoint:
    return Checkpoint(step=step, epoch=job.epoch, object=StoredObject(key=f"c{step}", size=1, sha256="0" * 64))


def expire(database: Database, job: Job, *, ago: float = 1.0) -> None:
    """Let a lease run out without waiting for it."""
    with database.writing() as connection:
        connection.execute(update(jobs_table).where(jobs_table.c.id == job.id).values(lease_expires_at=now() - ago))


def let_run(database: Database, job: Job, seconds: float) -> None:
    """Let a claim, and its worker's start, be so long ago without waiting for it."""
    with database.writing() as connection:
        connection.execute(update(workers_table).values(started_at=workers_table.c.started_at - seconds))
        earlier = {"claimed_at": jobs_table.c.claimed_at - seconds, "not_before": 0.0}
        connection.execute(update(jobs_table).where(jobs_table.c.id == job.id).values(**earlier))


def seconds(expected: float) -> object:
    """Equal but for what the test itself took."""
    return pytest.approx(expected, abs=60)


def position(jobs: Jobs, job: Job) -> int | None:
    place = jobs.place_in_line(job)
    assert place is not None
    return place.position


def event_types(jobs: Jobs, job: Job) -> list[str]:
    return [event.type for event in jobs.events(job.tenant, job.id)[0]]


def test_the_migrations_build_exactly_the_tables(database: Database) -> None:
    with database.reading() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), metadata)
    assert differences == []


def test_migrating_twice_changes_nothing(database: Database) -> None:
    migrate(database)
    database.ping()


def test_a_job_goes_through_preparation_and_training_to_success(jobs: Jobs, leases: Leases) -> None:
    submitted, created = jobs.submit(a_new_job())
    assert created
    assert submitted.status is JobStatus.VALIDATING_FILES
    first = leases.claim("preparer", stage=Stage.PREPARE, gpu_classes=[])
    assert first is not None
    waiting = leases.hand_to_training(first.id, first.epoch, {"report": {"rows": 3}})
    assert (waiting.status, waiting.attempt) == (JobStatus.QUEUED, 0)
    second = leases.claim("trainer", **TRAIN)
    assert second is not None
    assert (second.epoch, second.attempt, second.status) == (2, 1, JobStatus.RUNNING)
    leases.record_phase(second.id, second.epoch, Phase.TRAINING)
    leases.settle_success(second.id, second.epoch, adapter={"epoch": 2}, metrics={"train_loss": 1.0}, memory={})
    ended = jobs.get("default", second.id)
    assert (ended.status, ended.adapter, ended.phase) == (JobStatus.SUCCEEDED, {"epoch": 2}, None)
    assert event_types(jobs, ended) == ["submitted", "claimed", "prepared", "claimed", "phase", "succeeded"]


def test_the_same_key_and_body_give_the_same_job(jobs: Jobs) -> None:
    first, created = jobs.submit(a_new_job(key="k", sha="a"))
    second, created_again = jobs.submit(a_new_job(key="k", sha="a"))
    assert (created, created_again) == (True, False)
    assert second.id == first.id
    assert event_types(jobs, first) == ["submitted"]


def test_the_same_key_with_another_body_is_refused(jobs: Jobs) -> None:
    jobs.submit(a_new_job(key="k", sha="a"))
    with pytest.raises(IdempotencyConflict):
        jobs.submit(a_new_job(key="k", sha="b"))


def test_two_tenants_may_use_the_same_key(jobs: Jobs) -> None:
    first, _ = jobs.submit(a_new_job(tenant="a", key="k", sha="a"))
    second, created = jobs.submit(a_new_job(tenant="b", key="k", sha="b"))
    assert created
    assert first.id != second.id


def test_many_at_once_with_one_key_make_one_job(jobs: Jobs) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: jobs.submit(a_new_job(key="k", sha="a")), range(8)))
    assert len({job.id for job, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1


def test_another_tenants_job_is_as_unknown_as_none(jobs: Jobs) -> None:
    mine, _ = jobs.submit(a_new_job(tenant="mine"))
    for read in (jobs.get, jobs.events, jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(JobNotFound) as foreign:
            read("theirs", mine.id)
        with pytest.raises(JobNotFound) as unknown:
            read("theirs", "ftjob-never")
        assert foreign.value.message.replace(mine.id, "X") == unknown.value.message.replace("ftjob-never", "X")


def test_one_job_is_claimed_by_one_worker_only(jobs: Jobs, leases: Leases) -> None:
    for _ in range(5):
        jobs.submit(a_new_job())
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda n: leases.claim(f"w{n}", stage=Stage.PREPARE, gpu_classes=[]), range(12)))
    taken = [job.id for job in claims if job is not None]
    assert len(taken) == len(set(taken)) == 5


def test_a_worker_takes_its_own_class_first_then_smaller_ones_and_never_larger(jobs: Jobs, leases: Leases) -> None:
    small = prepared(jobs, leases, gpu_class="16gb", priority="high")
    own = prepared(jobs, leases, gpu_class="24gb", priority="low")
    large = prepared(jobs, leases, gpu_class="80gb")
    claims = [leases.claim("w", stage=Stage.TRAIN, gpu_classes=["24gb", "16gb"]) for _ in range(3)]
    assert [job and job.id for job in claims] == [own.id, small.id, None]
    assert jobs.get("default", large.id).state is JobState.QUEUED


def test_higher_priority_goes_first_then_the_oldest(jobs: Jobs, leases: Leases) -> None:
    old, low, high = (prepared(jobs, leases, priority=priority) for priority in ("normal", "low", "high"))
    young = prepared(jobs, leases)
    claims = [leases.claim("w", **TRAIN) for _ in range(4)]
    assert [job and job.id for job in claims] == [high.id, old.id, young.id, low.id]


def test_a_worker_that_comes_back_late_can_change_nothing(database: Database, jobs: Jobs, leases: Leases) -> None:
    late = running(jobs, leases)
    expire(database, late)
    (released,) = leases.release_expired()
    assert (released.state, released.epoch, released.attempt) == (JobState.QUEUED, late.epoch + 1, 0)
    for write in (
        lambda: leases.renew(late.id, late.epoch),
        lambda: leases.orders(late.id, late.epoch),
        lambda: leases.record_phase(late.id, late.epoch, Phase.TRAINING),
        lambda: leases.record_warning(late.id, late.epoch, "w", "w"),
        lambda: leases.record_note(late.id, late.epoch, "n"),
        lambda: leases.record_progress(late.id, late.epoch, progress={}, metrics={}, steps=[]),
        lambda: leases.commit_checkpoint(late.id, late.epoch, checkpoint(late, 9)),
        lambda: leases.settle_success(late.id, late.epoch, adapter={}, metrics={}, memory={}),
        lambda: leases.settle_failure(late.id, late.epoch, CRASH),
        lambda: leases.settle_cancelled(late.id, late.epoch),
        lambda: leases.hand_to_training(late.id, late.epoch, {"report": {}}),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert jobs.get("default", late.id).checkpoint is None


def test_a_renewed_lease_does_not_expire(database: Database, jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    expire(database, job)
    leases.renew(job.id, job.epoch)
    assert leases.release_expired() == []


def test_many_reconcilers_release_an_expired_lease_once(database: Database, jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    expire(database, job)
    with ThreadPoolExecutor(6) as pool:
        released = list(pool.map(lambda _: leases.release_expired(), range(6)))
    assert sum(len(some) for some in released) == 1
    assert jobs.get("default", job.id).epoch == job.epoch + 1


def test_a_restarted_worker_releases_its_own_old_leases_at_once(database: Database, jobs: Jobs, leases: Leases) -> None:
    for name in ("trainer", "someone-else"):
        Workers(database).beat(**a_beat(name))
    job = running(jobs, leases)
    Workers(database).beat(**a_beat("trainer"))
    assert leases.release_of("someone-else", "here") == []
    assert [released.id for released in leases.release_of("trainer", "here")] == [job.id]


def test_a_worker_elsewhere_releases_nothing_that_one_of_its_name_may_still_train(
    database: Database, jobs: Jobs, leases: Leases
) -> None:
    workers = Workers(database)
    workers.beat(**a_beat("trainer"))
    job = running(jobs, leases)
    with pytest.raises(WorkerNameTaken):
        workers.beat(**a_beat("trainer", place="elsewhere"))
    assert leases.release_of("trainer", "elsewhere") == []
    with database.writing() as connection:
        connection.execute(update(workers_table).values(seen_at=now() - ALIVE_FOR.total_seconds() - 1))
    workers.beat(**a_beat("trainer", place="elsewhere"))
    assert leases.release_of("trainer", "here") == []
    assert leases.release_of("trainer", "elsewhere") == [], "it was cut off, and its lease has not run out"
    with pytest.raises(WorkerNameTaken):
        workers.beat(**a_beat("trainer"))
    expire(database, job)
    assert [released.id for released in leases.release_expired()] == [job.id]
    again = leases.claim("trainer", **TRAIN)
    assert again is not None
    assert [released.id for released in leases.release_of("trainer", "elsewhere")] == [job.id]


def test_a_crash_is_charged_and_ends_the_job_at_max_attempts(database: Database, jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases, max_attempts=2)
    again = leases.settle_failure(job.id, job.epoch, CRASH)
    assert (again.state, again.attempt) == (JobState.QUEUED, 1)
    assert leases.claim("w", **TRAIN) is None, "a charged retry waits a little"
    with database.writing() as connection:
        connection.execute(update(jobs_table).values(not_before=0.0))
    second = leases.claim("w", **TRAIN)
    assert second is not None
    ended = leases.settle_failure(second.id, second.epoch, CRASH)
    assert ended.state is JobState.FAILED
    assert ended.error is not None
    assert ended.error["code"] == "crash"
    assert ended.error["category"] == "server"


@pytest.mark.parametrize(
    "reason",
    [FailureReason.ARTIFACT_UPLOAD_FAILED, FailureReason.BASE_MODEL_UNAVAILABLE, FailureReason.DISK_FULL],
)
def test_attempts_that_fail_at_once_outlast_a_neighbour_that_is_away_for_four_minutes(
    database: Database, jobs: Jobs, leases: Leases, reason: FailureReason
) -> None:
    job, waited = running(jobs, leases, max_attempts=3), 0.0
    for _ in range(2):
        before = datetime.now(UTC)
        again = leases.settle_failure(job.id, job.epoch, Failure(reason=reason, message="away"))
        until = jobs.waits_until(again)
        assert until is not None
        assert jobs.last_failure(again) is reason
        waited += (until - before).total_seconds()
        with database.writing() as connection:
            connection.execute(update(jobs_table).values(not_before=0.0))
        claimed = leases.claim("w", **TRAIN)
        assert claimed is not None
        job = claimed
    assert waited > 240


def test_a_users_error_is_never_tried_again(jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    failure = Failure(
        reason=FailureReason.INVALID_TRAINING_FILE, message="Line 3: no", param="dataset", facts={"line": 3}
    )
    ended = leases.settle_failure(job.id, job.epoch, failure)
    assert ended.state is JobState.FAILED
    assert ended.error == {
        "code": "invalid_training_file",
        "message": "Line 3: no. Correct the file and post the job again.",
        "category": "user",
        "param": "dataset",
        "facts": {"line": 3},
    }


def test_lost_workers_cost_no_attempt_while_checkpoints_advance_and_poison_ends(jobs: Jobs, leases: Leases) -> None:
    prepared(jobs, leases)
    for round in range(1, 3 * MAX_RUNS_WITHOUT_PROGRESS):
        job = leases.claim("w", **TRAIN)
        assert job is not None
        assert job.attempt == 1
        leases.commit_checkpoint(job.id, job.epoch, checkpoint(job, round))
        leases.settle_failure(job.id, job.epoch, LOST)
    for _ in range(MAX_RUNS_WITHOUT_PROGRESS):
        job = leases.claim("w", **TRAIN)
        assert job is not None
        ended = leases.settle_failure(job.id, job.epoch, LOST)
    assert ended.state is JobState.FAILED
    assert ended.checkpoint is not None
    assert ended.checkpoint.step == 3 * MAX_RUNS_WITHOUT_PROGRESS - 1


def test_lost_workers_are_counted_from_the_last_run_that_saved_something_however_it_ended(
    database: Database, jobs: Jobs, leases: Leases
) -> None:
    prepared(jobs, leases)
    for end in [*[LOST] * (MAX_RUNS_WITHOUT_PROGRESS - 1), CRASH, LOST]:
        job = leases.claim("w", **TRAIN)
        assert job is not None
        if end is CRASH:
            leases.commit_checkpoint(job.id, job.epoch, checkpoint(job, 500))
        ended = leases.settle_failure(job.id, job.epoch, end)
        with database.writing() as connection:
            connection.execute(update(jobs_table).values(not_before=0.0))
    assert (ended.state, ended.runs_without_progress) == (JobState.QUEUED, 1)


def test_a_checkpoint_never_falls_behind_the_committed_one(jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    leases.commit_checkpoint(job.id, job.epoch, checkpoint(job, 20))
    with pytest.raises(ValueError, match="behind the committed step 20"):
        leases.commit_checkpoint(job.id, job.epoch, checkpoint(job, 10))
    kept = jobs.get("default", job.id).checkpoint
    assert kept is not None
    assert kept.step == 20


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_when_its_worker_has_stopped(
    jobs: Jobs, leases: Leases
) -> None:
    queued, _ = jobs.submit(a_new_job())
    assert jobs.cancel("default", queued.id).status is JobStatus.CANCELLED
    job = running(jobs, leases)
    assert jobs.cancel("default", job.id).status is JobStatus.CANCELLING
    assert jobs.cancel("default", job.id).status is JobStatus.CANCELLING
    assert leases.renew(job.id, job.epoch).cancel
    assert leases.orders(job.id, job.epoch).cancel
    assert leases.settle_cancelled(job.id, job.epoch).status is JobStatus.CANCELLED
    assert event_types(jobs, job).count("cancel_requested") == 1


def test_a_cancelled_job_is_not_brought_back_by_any_failure(database: Database, jobs: Jobs, leases: Leases) -> None:
    crashed, lost = running(jobs, leases), running(jobs, leases)
    for job in (crashed, lost):
        jobs.cancel("default", job.id)
    assert leases.settle_failure(crashed.id, crashed.epoch, CRASH).state is JobState.CANCELLED
    expire(database, lost)
    assert [job.state for job in leases.release_expired()] == [JobState.CANCELLED]


def test_a_cancel_during_preparation_ends_the_job_when_it_is_handed_over(jobs: Jobs, leases: Leases) -> None:
    jobs.submit(a_new_job())
    job = leases.claim("preparer", stage=Stage.PREPARE, gpu_classes=[])
    assert job is not None
    jobs.cancel("default", job.id)
    assert leases.hand_to_training(job.id, job.epoch, {"report": {}}).state is JobState.CANCELLED


def test_a_paused_job_is_not_claimed_and_keeps_its_place(jobs: Jobs, leases: Leases) -> None:
    first, second = prepared(jobs, leases), prepared(jobs, leases)
    assert jobs.pause("default", first.id).status is JobStatus.PAUSED
    assert jobs.pause("default", first.id).status is JobStatus.PAUSED
    assert jobs.place_in_line(jobs.get("default", first.id)) is None
    assert position(jobs, second) == 1
    assert jobs.resume("default", first.id).status is JobStatus.QUEUED
    assert jobs.resume("default", first.id).status is JobStatus.QUEUED
    assert [position(jobs, job) for job in (first, second)] == [1, 2]
    jobs.pause("default", first.id)
    claimed = leases.claim("w", **TRAIN)
    assert claimed is not None
    assert (claimed.id, leases.claim("w", **TRAIN)) == (second.id, None)
    assert event_types(jobs, first)[3:] == ["paused", "resumed", "paused"]


def test_a_running_job_is_paused_once_its_worker_has_left_and_goes_on_when_resumed(jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    for _ in range(2):
        assert jobs.pause("default", job.id).status is JobStatus.PAUSING
    assert leases.renew(job.id, job.epoch).pause
    assert leases.orders(job.id, job.epoch).pause
    leases.commit_checkpoint(job.id, job.epoch, checkpoint(job, 7))
    paused = leases.settle_failure(job.id, job.epoch, PAUSED)
    assert (paused.status, paused.attempt, paused.runs_without_progress) == (JobStatus.PAUSED, 0, 0)
    assert (leases.claim("w", **TRAIN), paused.worker) == (None, None)
    assert jobs.resume("default", job.id).status is JobStatus.QUEUED
    again = leases.claim("w", **TRAIN)
    assert again is not None
    assert (again.id, again.checkpoint, again.attempt) == (job.id, checkpoint(job, 7), 1)
    assert event_types(jobs, job)[4:] == ["pause_requested", "checkpoint", "paused", "resumed", "claimed"]


def test_a_job_can_be_paused_any_number_of_times_without_progress(jobs: Jobs, leases: Leases) -> None:
    prepared(jobs, leases)
    for _ in range(MAX_RUNS_WITHOUT_PROGRESS + 1):
        job = leases.claim("w", **TRAIN)
        assert job is not None
        jobs.pause("default", job.id)
        assert leases.settle_failure(job.id, job.epoch, PAUSED).status is JobStatus.PAUSED
        jobs.resume("default", job.id)


def test_of_resume_and_the_workers_leaving_the_first_commit_wins(jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    jobs.pause("default", job.id)
    assert jobs.resume("default", job.id).status is JobStatus.RUNNING
    orders = leases.orders(job.id, job.epoch)
    assert (orders.pause, orders.cancel) == (False, False)
    left = leases.settle_failure(job.id, job.epoch, PAUSED)
    assert (left.status, left.attempt, left.runs_without_progress) == (JobStatus.QUEUED, 0, 0)
    assert leases.claim("w", **TRAIN) is not None, "it is taken up again at once"
    assert event_types(jobs, job)[4:] == ["pause_requested", "resumed", "requeued", "claimed"]


def test_a_job_whose_worker_is_lost_or_fails_while_it_pauses_is_paused(
    database: Database, jobs: Jobs, leases: Leases
) -> None:
    lost, crashed = running(jobs, leases), running(jobs, leases)
    for job in (lost, crashed):
        jobs.pause("default", job.id)
    expire(database, lost)
    (released,) = leases.release_expired()
    assert (released.status, released.runs_without_progress) == (JobStatus.PAUSED, 1)
    after = leases.settle_failure(crashed.id, crashed.epoch, CRASH)
    assert (after.status, after.attempt) == (JobStatus.PAUSED, 1)
    for job in (lost, crashed):
        assert event_types(jobs, job)[-2:] == ["requeued", "paused"]


def test_a_pause_while_data_is_prepared_holds_before_training_or_before_preparing_again(
    jobs: Jobs, leases: Leases
) -> None:
    handed, stopped = (jobs.submit(a_new_job())[0] for _ in range(2))
    for job in (handed, stopped):
        assert leases.claim("p", stage=Stage.PREPARE, gpu_classes=[]) is not None
        assert jobs.pause("default", job.id).status is JobStatus.PAUSING
    assert leases.hand_to_training(handed.id, 1, {"report": {}}).status is JobStatus.PAUSED
    assert leases.settle_failure(stopped.id, 1, PAUSED).status is JobStatus.PAUSED
    assert leases.claim("w", **TRAIN) is None
    assert leases.claim("p", stage=Stage.PREPARE, gpu_classes=[]) is None
    assert jobs.resume("default", handed.id).status is JobStatus.QUEUED
    assert jobs.resume("default", stopped.id).status is JobStatus.VALIDATING_FILES


def test_a_paused_job_is_cancelled_at_once_and_a_pausing_one_is_cancelled_rather_than_paused(
    jobs: Jobs, leases: Leases
) -> None:
    pausing = running(jobs, leases)
    paused = prepared(jobs, leases)
    for job in (paused, pausing):
        jobs.pause("default", job.id)
    assert jobs.cancel("default", paused.id).status is JobStatus.CANCELLED
    assert jobs.cancel("default", pausing.id).status is JobStatus.CANCELLING
    for verb in (jobs.pause, jobs.resume):
        with pytest.raises(JobFinished):
            verb("default", paused.id)
        with pytest.raises(JobCancelling):
            verb("default", pausing.id)
    assert leases.settle_failure(pausing.id, pausing.epoch, PAUSED).status is JobStatus.CANCELLED


def test_a_job_that_succeeds_while_it_is_asked_to_pause_has_succeeded(jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    jobs.pause("default", job.id)
    _succeeds(leases, job)
    assert jobs.get("default", job.id).status is JobStatus.SUCCEEDED
    with pytest.raises(LeaseLost):
        leases.settle_failure(job.id, job.epoch, PAUSED)


def test_nobody_rings_for_a_paused_job_and_it_waits_for_no_worker(
    database: Database, jobs: Jobs, leases: Leases
) -> None:
    job, _ = jobs.submit(a_new_job())
    Workers(database).beat(**a_beat("p", stages=(Stage.PREPARE,)))
    leases.mark_rung(job.id)
    jobs.pause("default", job.id)
    idle, totals = Workers(database).idle(), Totals(database)
    assert leases.take_lost_bells(timedelta(0), idle) == []
    assert totals.backlogs() == []
    assert totals.jobs() == {(JobStatus.PAUSED, "cpu"): 1}
    jobs.resume("default", job.id)
    assert [bell.job_id for bell in leases.take_lost_bells(timedelta(seconds=30), idle)] == [job.id]


def _succeeds(leases: Leases, job: Job) -> None:
    leases.settle_success(job.id, job.epoch, adapter={"epoch": job.epoch}, metrics={}, memory={})


def _is_cancelled(leases: Leases, job: Job) -> None:
    leases.settle_cancelled(job.id, job.epoch)


def _crashes(leases: Leases, job: Job) -> None:
    leases.settle_failure(job.id, job.epoch, CRASH)


def _is_refused(leases: Leases, job: Job) -> None:
    leases.settle_failure(job.id, job.epoch, Failure(reason=FailureReason.LOSS_NOT_FINITE, message="No number"))


def _is_paused(leases: Leases, job: Job) -> None:
    leases.settle_failure(job.id, job.epoch, PAUSED)


def _is_replanned(leases: Leases, job: Job) -> None:
    failure = Failure(reason=FailureReason.CUDA_OUT_OF_MEMORY, message="It was too much")
    leases.settle_failure(job.id, job.epoch, failure, replanned=a_placement())


def _expires(leases: Leases, job: Job) -> None:
    assert [released.id for released in leases.release_expired()] == [job.id]


def _is_released(leases: Leases, job: Job) -> None:
    assert [released.id for released in leases.release_of("trainer", "here")] == [job.id]


ENDS = [_succeeds, _is_cancelled, _crashes, _is_refused, _is_paused, _is_replanned, _expires, _is_released]


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_however_a_run_ends_its_time_on_the_gpu_is_added_once(
    database: Database, jobs: Jobs, leases: Leases, end: Callable[[Leases, Job], None], cancelled: bool
) -> None:
    Workers(database).beat(**a_beat("trainer"))
    job = running(jobs, leases)
    assert (job.is_training, job.gpu_seconds) == (True, 0.0)
    if cancelled:
        jobs.cancel("default", job.id)
    let_run(database, job, 1000)
    if end is _expires:
        expire(database, job)
    end(leases, job)
    ended = jobs.get("default", job.id)
    assert (ended.is_training, ended.gpu_seconds) == (False, seconds(1000))
    assert ended.gpu_seconds_until(database.now() + timedelta(hours=1)) == ended.gpu_seconds, "waiting costs nothing"


def test_time_on_the_gpu_adds_up_over_runs_and_the_present_one_counts(
    database: Database, jobs: Jobs, leases: Leases
) -> None:
    job = running(jobs, leases)
    for end in (_crashes, _expires, _is_replanned):
        let_run(database, job, 1000)
        if end is _expires:
            expire(database, job)
        end(leases, job)
        let_run(database, job, 0)
        job = leases.claim("trainer", **TRAIN)  # type: ignore[assignment]
        assert job is not None
    let_run(database, job, 500)
    present = jobs.get("default", job.id)
    assert present.gpu_seconds == seconds(3000)
    assert present.gpu_seconds_until(database.now()) == seconds(3500)
    _succeeds(leases, job)
    assert jobs.get("default", job.id).gpu_seconds == seconds(3500)


def test_preparing_data_holds_no_gpu_however_it_ends(database: Database, jobs: Jobs, leases: Leases) -> None:
    def preparing() -> Job:
        jobs.submit(a_new_job())
        job = leases.claim("preparer", stage=Stage.PREPARE, gpu_classes=[])
        assert job is not None
        let_run(database, job, 1000)
        return job

    handed, crashed, cancelled, lost = (preparing() for _ in range(4))
    leases.hand_to_training(handed.id, handed.epoch, {"report": {}})
    _crashes(leases, crashed)
    _is_cancelled(leases, cancelled)
    expire(database, lost)
    _expires(leases, lost)
    for job in (handed, crashed, cancelled, lost):
        assert jobs.get("default", job.id).gpu_seconds_until(database.now()) == 0.0


def test_a_late_worker_adds_no_time(database: Database, jobs: Jobs, leases: Leases) -> None:
    late = running(jobs, leases)
    let_run(database, late, 1000)
    expire(database, late)
    _expires(leases, late)
    for end in (_succeeds, _is_cancelled, _crashes):
        with pytest.raises(LeaseLost):
            end(leases, late)
    assert jobs.get("default", late.id).gpu_seconds == seconds(1000)


def test_a_lost_worker_is_counted_to_its_leases_end_however_late_that_is_noticed(
    database: Database, jobs: Jobs, leases: Leases
) -> None:
    def counted() -> tuple[float, float]:
        by_job = jobs.get("default", job.id).gpu_seconds_until(database.now())
        return by_job, Tenants(database, Quotas()).get("default").gpu_hours * 3600

    job, away = running(jobs, leases), 8 * 3600.0
    let_run(database, job, away + 600)
    expire(database, job, ago=away)
    assert counted() == (seconds(600), seconds(600)), "before anybody has noticed"
    _expires(leases, job)
    assert counted() == (seconds(600), seconds(600))


def test_of_finish_and_cancel_the_first_commit_wins(jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    jobs.cancel("default", job.id)
    leases.settle_success(job.id, job.epoch, adapter={"epoch": job.epoch}, metrics={}, memory={})
    with pytest.raises(LeaseLost):
        leases.settle_cancelled(job.id, job.epoch)
    with pytest.raises(JobFinished):
        jobs.cancel("default", job.id)
    assert event_types(jobs, job)[-1] == "succeeded"


def test_a_bell_is_rung_again_only_when_it_is_old_and_by_one_reconciler(
    database: Database, jobs: Jobs, leases: Leases
) -> None:
    job, _ = jobs.submit(a_new_job())
    for number in range(10):
        Workers(database).beat(**a_beat(f"p{number}", stages=(Stage.PREPARE,)))
    idle = Workers(database).idle()
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: leases.take_lost_bells(timedelta(seconds=30), idle), range(4)))
    assert [bell.job_id for some in taken for bell in some] == [job.id]
    assert leases.take_lost_bells(timedelta(seconds=30), idle) == []
    assert [bell.job_id for bell in leases.take_lost_bells(timedelta(0), idle)] == [job.id]


def test_pages_of_jobs_hold_every_job_once_newest_first(jobs: Jobs) -> None:
    submitted = [jobs.submit(a_new_job())[0].id for _ in range(7)]
    seen, after, more = [], None, True
    while more:
        page, more = jobs.list("default", JobQuery(after=after, limit=3))
        seen += [job.id for job in page]
        after = seen[-1]
    assert sorted(seen) == sorted(submitted)
    assert seen[0] == submitted[-1]


def test_jobs_are_filtered_by_status_base_model_and_metadata(jobs: Jobs, leases: Leases) -> None:
    done = running(jobs, leases)
    leases.settle_success(done.id, done.epoch, adapter={"epoch": 1}, metrics={}, memory={})
    pausing = running(jobs, leases)
    tagged, _ = jobs.submit(a_new_job(base_model="org/other", metadata={"team": "search"}))
    paused, _ = jobs.submit(a_new_job())
    for job in (pausing, paused):
        jobs.pause("default", job.id)
    assert [job.id for job in jobs.list("default", JobQuery(status=JobStatus.PAUSING))[0]] == [pausing.id]
    assert [job.id for job in jobs.list("default", JobQuery(status=JobStatus.PAUSED))[0]] == [paused.id]
    for status in JobStatus:
        page, _ = jobs.list("default", JobQuery(status=status))
        assert all(job.status is status for job in page)
    assert [job.id for job in jobs.list("default", JobQuery(status=JobStatus.SUCCEEDED))[0]] == [done.id]
    assert [job.id for job in jobs.list("default", JobQuery(base_model="org/other"))[0]] == [tagged.id]
    assert [job.id for job in jobs.list("default", JobQuery(metadata={"team": "search"}))[0]] == [tagged.id]
    assert jobs.list("default", JobQuery(metadata={"team": "ads"}))[0] == []


@pytest.mark.parametrize("key", ["größe", 'a"b', "\\", "a.b", "0", "$"])
def test_metadata_is_found_by_any_key(jobs: Jobs, key: str) -> None:
    tagged, _ = jobs.submit(a_new_job(metadata={key: "7b", "team": "größe"}))
    jobs.submit(a_new_job(metadata={"other": "7b"}))
    assert [job.id for job in jobs.list("default", JobQuery(metadata={key: "7b", "team": "größe"}))[0]] == [tagged.id]
    assert jobs.list("default", JobQuery(metadata={key: "8b"}))[0] == []


def test_a_page_after_a_foreign_job_is_refused(jobs: Jobs) -> None:
    foreign, _ = jobs.submit(a_new_job(tenant="other"))
    with pytest.raises(JobNotFound):
        jobs.list("default", JobQuery(after=foreign.id))


def test_queue_positions_and_backlogs_count_the_same_jobs(database: Database, jobs: Jobs, leases: Leases) -> None:
    first, second, high = prepared(jobs, leases), prepared(jobs, leases), prepared(jobs, leases, priority="high")
    other_class = prepared(jobs, leases, gpu_class="80gb")
    jobs.submit(a_new_job())  # waits in another queue: to be prepared
    positions = [position(jobs, job) for job in (first, second, high, other_class)]
    assert positions == [2, 3, 1, 1]
    lengths = {(backlog.stage, backlog.gpu_class): backlog.length for backlog in Totals(database).backlogs()}
    assert lengths == {(Stage.TRAIN, "cpu"): 3, (Stage.TRAIN, "80gb"): 1, (Stage.PREPARE, None): 1}


def test_events_are_numbered_without_gaps_and_paged(jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    steps = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    leases.record_progress(job.id, job.epoch, progress={"step": 5}, metrics={"train_loss": 1.0}, steps=steps)
    page, more = jobs.events("default", job.id, limit=4)
    rest, no_more = jobs.events("default", job.id, after=page[-1].id, limit=100)
    assert (more, no_more) == (True, False)
    assert [event.id for event in [*page, *rest]] == list(range(1, len(page) + len(rest) + 1))
    assert [event.data["step"] for event in rest if event.type == "metrics"] == [1, 2, 3, 4, 5]


def test_a_warning_is_told_once(jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    for _ in range(2):
        leases.record_warning(job.id, job.epoch, "truncated", "2 rows were cut.")
    assert jobs.get("default", job.id).warnings == [{"code": "truncated", "message": "2 rows were cut."}]
    assert event_types(jobs, job).count("warning") == 1


def test_a_note_stands_in_the_history_and_is_no_warning(jobs: Jobs, leases: Leases) -> None:
    job = running(jobs, leases)
    leases.record_note(job.id, job.epoch, "It runs unpaged.")
    events, _ = jobs.events("default", job.id, after=0, limit=100)
    assert (events[-1].type, events[-1].message, events[-1].level) == ("note", "It runs unpaged.", "info")
    assert jobs.get("default", job.id).warnings == []


def test_files_belong_to_their_tenant_and_are_paged(database: Database) -> None:
    files = Files(database)
    for number in range(5):
        stored = StoredObject(key=f"k{number}", size=number, sha256="0" * 64)
        files.announce(stored.key)
        files.add(id=f"file-{number}", tenant="a", filename="rows.jsonl", object=stored, report={"rows": number})
    assert files.get("a", "file-3").object.size == 3
    with pytest.raises(FileNotFound):
        files.get("b", "file-3")
    page, more = files.list("a", limit=3)
    rest, no_more = files.list("a", after=page[-1].id, limit=3)
    assert (more, no_more) == (True, False)
    assert sorted(file.id for file in [*page, *rest]) == [f"file-{number}" for number in range(5)]


def test_a_worker_is_alive_while_it_beats(database: Database) -> None:
    workers = Workers(database)
    for _ in range(2):
        workers.beat(**a_beat("w", gpu_class="24gb"))
    (worker,) = workers.alive()
    assert (worker.name, worker.gpu_class, worker.stages) == ("w", "24gb", (Stage.TRAIN,))
    workers.leave("w", "elsewhere")
    assert workers.alive() == [worker]
    workers.leave("w", "here")
    assert workers.alive() == []


@pytest.mark.parametrize(
    ("version", "mode"),
    [
        ((3, 40, 1), "DELETE"),
        ((3, 44, 6), "WAL"),
        ((3, 45, 0), "DELETE"),
        ((3, 50, 6), "DELETE"),
        ((3, 50, 7), "WAL"),
        ((3, 51, 2), "DELETE"),
        ((3, 51, 3), "WAL"),
    ],
)
def test_wal_is_used_only_where_sqlite_keeps_its_word(version: tuple[int, int, int], mode: str) -> None:
    assert journal_mode(version) == mode


def test_a_commit_that_fails_keeps_nothing_and_locks_nobody_out(empty_database: Database) -> None:
    url = empty_database.engine.url.render_as_string(hide_password=False)
    with empty_database.writing() as connection:
        connection.execute(text("create table scratch (id integer primary key)"))

    def away(_connection: Connection) -> None:
        raise OperationalError("commit", {}, Exception("away"))

    event.listen(empty_database.engine, "commit", away)
    with pytest.raises(StoreUnavailable, match="away") as caught, empty_database.writing() as connection:
        connection.execute(text("insert into scratch values (1)"))
    assert caught.value.facts["in_commit"]
    event.remove(empty_database.engine, "commit", away)
    other = open_database(url)
    for database in (other, empty_database):
        with database.writing() as connection:
            patience = "pragma busy_timeout = 1000" if url.startswith("sqlite") else "set local lock_timeout = '1s'"
            connection.execute(text(patience))
            connection.execute(text("delete from scratch"))
            connection.execute(text("insert into scratch values (1)"))
    other.close()


def test_the_newest_events_of_many_jobs_are_one_look(database: Database) -> None:
    jobs = Jobs(database)
    (one, _), (two, _) = jobs.submit(a_new_job()), jobs.submit(a_new_job(tenant="other"))
    jobs.cancel("default", one.id)
    asked = {("default", one.id), ("other", two.id), ("default", two.id), ("default", "ftjob-none")}
    assert jobs.newest_events(asked) == {("default", one.id): 2, ("other", two.id): 1}
    jobs.delete("default", one.id)
    assert jobs.newest_events(asked) == {("other", two.id): 1}
    assert jobs.newest_events(set()) == {}
