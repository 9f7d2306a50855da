"""Requests without a key that are sent again: of one request's sendings the first commit wins, in any order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

from graft_shared.errors import FileInUse, InvalidParameter, JobInUse
from graft_shared.jobs import Stage, StoredObject
from graft_shared.store import Database, Files, JobQuery, Jobs, Leases, NewJob, Sending
from tests.store_factories import a_new_job

PATIENCE = timedelta(minutes=10)


def sent(database: Database, count: int, sha: str = "s", **more: str) -> NewJob:
    """A request that arrives now, and that its client has sent so often before."""
    sending = Sending(sent_before=count, first_at=database.now() - count * PATIENCE)
    return replace(a_new_job(sha=sha, **more), sending=sending)


def test_a_slow_first_sending_is_given_the_job_of_the_repetition_that_overtook_it(database: Database) -> None:
    jobs = Jobs(database)
    first = sent(database, 0)
    made, is_new = jobs.submit(sent(database, 1))
    assert is_new
    assert [(job.id, new) for job, new in [jobs.submit(first)]] == [(made.id, False)]
    later, is_new = jobs.submit(sent(database, 0))
    assert is_new and later.id != made.id, "the next equal request is another one"


def test_two_first_sendings_are_two_requests(database: Database) -> None:
    jobs = Jobs(database)
    twins = [sent(database, 0), sent(database, 0)]
    assert [jobs.submit(twin)[1] for twin in twins] == [True, True]


def test_other_tenants_other_bodies_and_clients_that_do_not_count_are_not_meant(database: Database) -> None:
    jobs = Jobs(database)
    jobs.submit(a_new_job())
    jobs.submit(a_new_job(key="k"))
    jobs.submit(sent(database, 0, tenant="other"))
    jobs.submit(sent(database, 0, sha="other"))
    assert jobs.submit(sent(database, 1))[1]


def test_sendings_that_arrive_together_make_one_job(database: Database) -> None:
    jobs = Jobs(database)
    for number in range(10):
        sha = f"s{number}"
        sendings = [sent(database, count, sha) for count in (0, 1, 2)]
        made = at_once([lambda sending=sending: jobs.submit(sending)[0].id for sending in sendings])
        assert len(set(made)) == 1, number
    assert len(jobs.list("default", JobQuery(limit=100))[0]) == 10


def test_a_repetition_whose_job_was_deleted_makes_another(database: Database) -> None:
    jobs = Jobs(database)
    first_at = database.now()
    new = replace(a_new_job(), sending=Sending(sent_before=0, first_at=first_at))
    made, _ = jobs.submit(new)
    again = replace(a_new_job(), sending=Sending(sent_before=1, first_at=first_at))
    assert jobs.submit(again)[0].id == made.id
    jobs.cancel("default", made.id)
    jobs.delete("default", made.id)
    assert jobs.submit(again)[0].id == again.id


def test_a_file_is_not_deleted_under_a_job_that_is_being_submitted(database: Database) -> None:
    jobs, files = Jobs(database), Files(database)
    for number in range(10):
        file_id = f"file-{number}"
        stored = StoredObject(key=f"k/{file_id}", size=1, sha256="0" * 64)
        files.announce(stored.key)
        files.add(id=file_id, tenant="default", filename="rows.jsonl", object=stored, report={})
        new = replace(a_new_job(dataset={"file": file_id}), files={"dataset.file": file_id})

        def submit(new: NewJob = new) -> str:
            try:
                jobs.submit(new)
            except InvalidParameter as error:
                return f"refused {error.param}"
            return "submitted"

        def delete(file_id: str = file_id) -> str:
            try:
                files.delete("default", file_id)
            except FileInUse:
                return "in use"
            return "deleted"

        outcome = at_once([submit, delete])
        assert outcome in (["submitted", "in use"], ["refused dataset.file", "deleted"]), number


def test_a_job_is_not_deleted_under_one_that_goes_on_from_its_adapter(database: Database) -> None:
    jobs, leases = Jobs(database), Leases(database, lease=timedelta(minutes=1))
    for number in range(10):
        earlier, _ = jobs.submit(a_new_job(sha=f"earlier {number}"))
        jobs.cancel("default", earlier.id)  # an end is an end; what it left does not matter to the store
        new = replace(a_new_job(adapter={"job": earlier.id}), adapter_of=earlier.id)

        def submit(new: NewJob = new) -> str:
            try:
                return f"submitted {jobs.submit(new)[0].id}"
            except InvalidParameter as error:
                return f"refused {error.param}"

        def delete(job_id: str = earlier.id) -> str:
            try:
                jobs.delete("default", job_id)
            except JobInUse as error:
                return f"in use by {error.facts['reader_id']}"
            return "deleted"

        outcome = at_once([submit, delete])
        assert outcome in ([f"submitted {new.id}", f"in use by {new.id}"], ["refused adapter.job", "deleted"]), number
        if outcome[1] != "deleted":
            claimed = leases.claim("w", stage=Stage.PREPARE, gpu_classes=())
            assert claimed is not None
            leases.hand_to_training(claimed.id, claimed.epoch, {"report": {}})
            assert delete() == "deleted", "it has a copy of its own by now"


def at_once(calls: list[Callable[[], str]]) -> list[str]:
    """Make these calls side by side, begun as nearly together as threads can; returns their answers in order."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], str]) -> str:
        barrier.wait(timeout=30)
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(begin, calls))
