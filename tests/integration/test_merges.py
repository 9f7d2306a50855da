"""Merged models in the store: one for each adapter, made once, seen through the fine-tune alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from graft_shared.errors import AdapterNotReady, JobNotFound, MergedModelInUse, MergedModelNotFound
from graft_shared.ids import new_merge_id
from graft_shared.jobs import Failure, FailureReason, Job, JobState, JobStatus, Stage
from graft_shared.store import Database, JobQuery, Jobs, Leases, Merges, Outbox, Quotas, Sweeps, Tenants, Totals
from tests.store_factories import a_new_job

CLASSES = ("cpu",)


@pytest.fixture
def jobs(database: Database) -> Jobs:
    return Jobs(database)


@pytest.fixture
def leases(database: Database) -> Leases:
    return Leases(database, timedelta(minutes=1))


@pytest.fixture
def merges(database: Database) -> Merges:
    return Merges(database)


def a_tuned_job(jobs: Jobs, leases: Leases, tenant: str = "default") -> str:
    job, _ = jobs.submit(a_new_job(tenant=tenant, revision="main"))
    prepared = leases.claim("p", stage=Stage.PREPARE, gpu_classes=CLASSES)
    assert prepared is not None
    leases.hand_to_training(job.id, prepared.epoch, {"report": {}, "base_commit": "c" * 40})
    run = leases.claim("t", stage=Stage.TRAIN, gpu_classes=CLASSES)
    assert run is not None
    leases.settle_success(job.id, run.epoch, adapter={"epoch": run.epoch, "prefix": "a/"}, metrics={}, memory={})
    return job.id


def claimed(leases: Leases) -> Job:
    merge = leases.claim("m", stage=Stage.MERGE, gpu_classes=())
    assert merge is not None
    return merge


def test_a_merged_model_is_made_by_a_row_that_workers_of_its_stage_claim(
    jobs: Jobs, leases: Leases, merges: Merges
) -> None:
    tuned = a_tuned_job(jobs, leases)
    merge, is_new = merges.ask("default", tuned, id=new_merge_id())
    assert is_new and merge.status is JobStatus.QUEUED
    for stage in (Stage.PREPARE, Stage.TRAIN):
        assert leases.claim("w", stage=stage, gpu_classes=CLASSES) is None
    run = claimed(leases)
    assert (run.id, run.merges, run.spec["revision"]) == (merge.id, tuned, "c" * 40)
    leases.settle_success(run.id, run.epoch, adapter={"epoch": 1, "prefix": "m/"}, metrics={}, memory={})
    made = merges.get("default", tuned)
    assert (made.state, made.adapter) == (JobState.SUCCEEDED, {"epoch": 1, "prefix": "m/"})
    assert merges.ask("default", tuned, id=new_merge_id()) == (made, False)


def test_it_is_no_job_of_its_tenants(jobs: Jobs, leases: Leases, merges: Merges, database: Database) -> None:
    tuned = a_tuned_job(jobs, leases)
    merge, _ = merges.ask("default", tuned, id=new_merge_id())
    assert [job.id for job in jobs.list("default", JobQuery())[0]] == [tuned]
    for verb in (jobs.get, jobs.cancel, jobs.pause, jobs.delete, jobs.events):
        with pytest.raises(JobNotFound):
            verb("default", merge.id)
    with pytest.raises(JobNotFound):
        Outbox(database).of_job("default", merge.id)
    assert jobs.newest_events([("default", merge.id)]) == {}
    assert sum(Totals(database).jobs().values()) == 1
    assert Tenants(database, Quotas()).get("default").queued_jobs == 0


def test_one_that_failed_makes_room_for_another(jobs: Jobs, leases: Leases, merges: Merges) -> None:
    tuned = a_tuned_job(jobs, leases)
    merges.ask("default", tuned, id=new_merge_id())
    run = claimed(leases)
    leases.settle_failure(run.id, run.epoch, Failure(reason=FailureReason.UNSUPPORTED_BASE_MODEL, message="No"))
    assert merges.get("default", tuned).state is JobState.FAILED
    second, is_new = merges.ask("default", tuned, id=new_merge_id())
    assert is_new and second.id != run.id
    assert merges.get("default", tuned).id == second.id


def test_those_who_ask_at_once_are_given_the_same(jobs: Jobs, leases: Leases, merges: Merges) -> None:
    tuned = a_tuned_job(jobs, leases)
    with ThreadPoolExecutor(4) as threads:
        asked = list(threads.map(lambda _: merges.ask("default", tuned, id=new_merge_id()), range(8)))
    assert len({merge.id for merge, _ in asked}) == 1
    assert sum(is_new for _, is_new in asked) == 1


def test_only_what_has_an_adapter_can_be_merged_and_only_by_its_tenant(
    jobs: Jobs, leases: Leases, merges: Merges
) -> None:
    tuned = a_tuned_job(jobs, leases)
    waiting, _ = jobs.submit(a_new_job())
    with pytest.raises(AdapterNotReady):
        merges.ask("default", waiting.id, id=new_merge_id())
    with pytest.raises(MergedModelNotFound):
        merges.get("default", tuned)
    for verb in (merges.get, merges.delete):
        with pytest.raises(JobNotFound):
            verb("other", tuned)
    with pytest.raises(JobNotFound):
        merges.ask("other", tuned, id=new_merge_id())


def test_neither_it_nor_its_job_is_deleted_while_it_runs_and_both_go_together(
    jobs: Jobs, leases: Leases, merges: Merges, database: Database
) -> None:
    tuned = a_tuned_job(jobs, leases)
    merges.ask("default", tuned, id=new_merge_id())
    run = claimed(leases)
    for verb in (merges.delete, jobs.delete):
        with pytest.raises(MergedModelInUse):
            verb("default", tuned)
    leases.settle_success(run.id, run.epoch, adapter={"epoch": 1, "prefix": "m/"}, metrics={}, memory={})
    jobs.delete("default", tuned)
    assert {due.job_id for due in Sweeps(database).take(limit=9)} >= {tuned, run.id}


def test_one_that_waits_is_given_up_with_its_job(jobs: Jobs, leases: Leases, merges: Merges) -> None:
    tuned = a_tuned_job(jobs, leases)
    merge, _ = merges.ask("default", tuned, id=new_merge_id())
    jobs.delete("default", tuned)
    assert leases.claim("m", stage=Stage.MERGE, gpu_classes=()) is None
    given_up = leases.read(merge.id)
    assert given_up is not None and given_up.state is JobState.CANCELLED and given_up.deleted_at is not None
