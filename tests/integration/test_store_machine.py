"""The store against its model: hypothesis looks for a sequence of calls after which the two differ.

`HYPOTHESIS_PROFILE=deep` looks for a long time (`make test-model`); `first` stops at the first difference that it
finds, without looking for the shortest way to it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from graft_shared import jobs as words
from graft_shared.errors import FileNotFound, JobNotFound, LeaseLost
from graft_shared.jobs import REMEDIES, Checkpoint, Failure, FailureReason, JobStatus, Retry, Stage, StoredObject
from graft_shared.store import Database, JobQuery, Totals
from tests.fakes.clock import FakeClock
from tests.invariants import TERMINAL_TYPES
from tests.replay import events_replay_to
from tests.store_factories import a_beat
from tests.store_model import ALIVE_SECONDS, CHARGED, ENDED, LEASE_SECONDS, PRIORITIES, ModelWorker
from tests.store_sides import CLASSES, FLEET, MANY_JOBS, TENANTS, BothSides, Events, Rows, compared, step_of

tenants = st.sampled_from(TENANTS)
picks = st.integers(0, 1000)
names = st.sampled_from(list(FLEET))
places = st.sampled_from(["here", "here", "elsewhere"])
# Each kind of remedy as often as the others.
reasons = st.one_of(
    *(st.sampled_from([reason for reason in FailureReason if REMEDIES[reason].retry is retry]) for retry in Retry)
)


class StoreMachine(RuleBasedStateMachine):
    """Every rule calls a door and the model; after it all rows and events are compared."""

    def __init__(self, database: Database, clock: FakeClock) -> None:
        super().__init__()
        self.both = BothSides(database, clock)
        self.clock, self.model = clock, self.both.model
        self.jobs, self.leases, self.workers = self.both.jobs, self.both.leases, self.both.workers
        self.totals, self.files = Totals(database), self.both.files
        self.before: tuple[Rows, Events] = ({}, {})

    # Rules of tenants.

    @initialize(wanted=st.lists(st.tuples(tenants, st.sampled_from(CLASSES)), min_size=1, max_size=4))
    def some_jobs_wait_for_a_trainer(self, wanted: list[tuple[str, str]]) -> None:
        for tenant, gpu_class in wanted:
            self.both.submit(tenant, gpu_class=gpu_class)
        self.preparing_catches_up()

    @precondition(lambda self: len(self.model.jobs) < MANY_JOBS)
    @rule(
        tenant=tenants,
        gpu_class=st.sampled_from(CLASSES),
        priority=st.sampled_from(list(PRIORITIES)),
        max_attempts=st.integers(1, 3),
    )
    def a_job_is_submitted(self, tenant: str, gpu_class: str, priority: str, max_attempts: int) -> None:
        self.both.submit(tenant, gpu_class=gpu_class, priority=priority, max_attempts=max_attempts)

    @precondition(lambda self: len(self.model.jobs) < MANY_JOBS)
    @rule(tenant=tenants, key=st.sampled_from(["k", "l"]), sha=st.sampled_from(["x", "x", "y"]))
    def a_job_is_submitted_with_a_key(self, tenant: str, key: str, sha: str) -> None:
        self.both.submit(tenant, key=key, sha=sha)

    @precondition(lambda self: len(self.model.jobs) < MANY_JOBS)
    @rule(
        tenant=tenants,
        sha=st.sampled_from(["again", "once more"]),
        counts=st.permutations([0, 0, 1, 2]),
        before=st.sampled_from(["nothing", "it is deleted", "time passes"]),
    )
    def a_request_is_sent_again_and_again(self, tenant: str, sha: str, counts: list[int], before: str) -> None:
        """In any order and slowly, by both tenants; and once what it made is gone, or was made long ago."""
        job_id = f"ftjob-{len(self.model.jobs)}"
        for count in counts[:2]:
            self.both.submit(tenant, sha=sha, sent=(count, 10.0 + 30.0 * count))
        if before == "it is deleted" and job_id in self.model.jobs:
            self.both.cancel(tenant, job_id)
            self.both.delete(tenant, job_id)
        elif before == "time passes":
            self.clock.now += 100.0
        for sender in TENANTS:
            self.both.submit(sender, sha=sha, sent=(counts[2], 10.0 + 30.0 * counts[2]))

    @rule(tenant=tenants, pick=picks, sha=st.sampled_from(["x", "y"]))
    def a_tenant_deletes(self, tenant: str, pick: int, sha: str) -> None:
        """Any job; and one whose key is free again then, though it was another body's."""
        self.both.delete(tenant, self.both.any_job(pick))
        job_id = f"ftjob-{len(self.model.jobs)}"
        if len(self.model.jobs) < MANY_JOBS:
            self.both.submit(tenant, key="deleted", sha="x")
        if job_id in self.model.jobs:
            self.both.cancel(tenant, job_id)
            self.both.delete(tenant, job_id)
            self.both.cancel(tenant, job_id)
            self.both.submit(tenant, key="deleted", sha=sha)

    @rule(
        tenant=tenants,
        quota=st.sampled_from(["running_jobs", "gpu_hours", "queued_jobs", "stored_bytes"]),
        left=st.integers(0, 2),
        shares=st.tuples(*[st.sampled_from([0.5, 1.0, 2.0])] * 2),
    )
    def a_tenant_comes_to_a_limit(self, tenant: str, quota: str, left: int, shares: tuple[float, ...]) -> None:
        for each, share in zip(TENANTS, shares, strict=True):
            self.both.say_of_tenant(each, {"share": share})
        match quota:
            case "running_jobs":
                self._runs_as_much_as_it_may(tenant, max(1, left))
            case "gpu_hours":
                self._uses_up_its_hours(tenant)
            case "queued_jobs":
                self._fills_its_queue(tenant, left)
            case "stored_bytes":
                self._fills_its_room(tenant, left)
        self.both.say_of_tenant(tenant, {quota: None})

    def _runs_as_much_as_it_may(self, tenant: str, most: int) -> None:
        self._both_wait()
        self.both.claim("large")
        self.both.say_of_tenant(tenant, {"running_jobs": most})
        for _ in range(2):
            self._all_ask_for_their_place()
            self.both.claim("large")

    def _uses_up_its_hours(self, tenant: str) -> None:
        self._both_wait()
        self.both.say_of_tenant(tenant, {"gpu_hours": self.model.gpu_seconds(tenant) / 3600 + 0.01})
        for seconds in (0.0, 40.0, 0.0):
            self.both.claim("large")
            self.clock.now += seconds
        self.both.submit(tenant)
        self._all_ask_for_their_place()

    def _fills_its_queue(self, tenant: str, left: int) -> None:
        if len(self.model.jobs) >= 2 * MANY_JOBS:
            return
        self.both.submit(tenant, priority="high")
        self.both.claim("p")
        self.both.say_of_tenant(tenant, {"queued_jobs": self.model.waiting(tenant) + left % 2})
        for _ in range(2):
            self.both.submit(tenant)

    def _fills_its_room(self, tenant: str, left: int) -> None:
        self.both.say_of_tenant(tenant, {"stored_bytes": self.model.stored_bytes(tenant) + left})
        for size in (2, 1):
            self.both.upload(tenant, size)

    @rule(tenant=tenants, pick=picks)
    def a_tenant_cancels(self, tenant: str, pick: int) -> None:
        self.both.cancel(tenant, self.both.any_job(pick))

    @rule(tenant=tenants, pick=picks)
    def a_tenant_pauses(self, tenant: str, pick: int) -> None:
        self.both.pause(tenant, self.both.any_job(pick))

    @rule(tenant=tenants)
    def a_tenant_resumes_all(self, tenant: str) -> None:
        for job_id in [job.id for job in self.model.jobs.values() if job.tenant == tenant]:
            self.both.resume(tenant, job_id)

    @rule(tenant=tenants, pick=picks)
    def a_tenant_reads(self, tenant: str, pick: int) -> None:
        own = [job for job in self.model.jobs.values() if job.tenant == tenant and job.deleted_at is None]
        page, more = self.jobs.list(tenant, JobQuery(limit=100))
        assert ([job.id for job in page], more) == ([job.id for job in reversed(own)], False)
        assert [job.status.value for job in reversed(page)] == [job.status for job in own]
        for status in JobStatus:
            found, _ = self.jobs.list(tenant, JobQuery(status=status, limit=100))
            assert [job.id for job in reversed(found)] == [job.id for job in own if job.status == status.value]
        job_id = self.both.any_job(pick)
        if self.model.jobs[job_id] not in own:
            for read in (self.jobs.get, self.jobs.events, self.jobs.pause, self.jobs.resume, self.jobs.delete):
                with pytest.raises(JobNotFound):
                    read(tenant, job_id)
            with pytest.raises(JobNotFound):
                self.jobs.list(tenant, JobQuery(after=job_id))
            return
        job, expected = self.jobs.get(tenant, job_id), self.model.jobs[job_id]
        self._asks_for_its_place(job_id)
        until = self.jobs.waits_until(job)
        waits = expected.state == "queued" and expected.not_before > self.clock.now
        assert (until and until.timestamp()) == (pytest.approx(expected.not_before, abs=1e-3) if waits else None)

    def _both_wait(self) -> None:
        """Each tenant has jobs in one queue, of one priority."""
        if len(self.model.jobs) < 2 * MANY_JOBS:
            for tenant in TENANTS * 2:
                self.both.submit(tenant)
        self.preparing_catches_up()

    def _all_ask_for_their_place(self) -> None:
        for job in list(self.model.jobs.values()):
            if job.deleted_at is None:
                self._asks_for_its_place(job.id)

    def _asks_for_its_place(self, job_id: str) -> None:
        expected = self.model.jobs[job_id]
        if self.model.can_tell_who_is_next(expected.stage):
            place = self.jobs.place_in_line(self.jobs.get(expected.tenant, job_id))
            stands = place and (place.position, place.held_by and place.held_by.quota.value)
            assert stands == self.model.place_in_line(expected)
            others = [self.jobs.get(one.tenant, one.id) for one in self.model.jobs.values() if one.deleted_at is None]
            assert self.jobs.places_in_line(others).get(job_id) == place

    @rule()
    def the_operator_counts(self) -> None:
        jobs = self.model.jobs.values()
        counts = {(status.value, gpu_class): count for (status, gpu_class), count in self.totals.jobs().items()}
        assert counts == Counter((job.status, job.gpu_class) for job in jobs)
        waiting = [job for job in jobs if job.waits]
        queues = Counter((job.stage, job.gpu_class if job.stage == "train" else None) for job in waiting)
        assert {(found.stage.value, found.gpu_class): found.length for found in self.totals.backlogs()} == queues

    @rule(tenant=tenants, size=st.integers(1, 3))
    def a_file_is_uploaded(self, tenant: str, size: int) -> None:
        self.both.upload(tenant, size)
        for reader in TENANTS:
            own = {file_id for file_id, (owner, _) in self.model.files.items() if owner == reader}
            assert {file.id for file in self.files.list(reader, limit=100)[0]} == own
            for file_id in self.model.files.keys() - own:
                with pytest.raises(FileNotFound):
                    self.files.get(reader, file_id)

    # Rules of workers.

    @rule(name=names)
    def a_worker_claims(self, name: str) -> None:
        self.both.claim(name)

    @rule()
    def preparing_catches_up(self) -> None:
        self.both.prepare_all()

    @rule(
        times=st.integers(4, 6),
        end=st.sampled_from([FailureReason.WORKER_LOST, FailureReason.DRAINED, "expired"]),
        saves=st.sampled_from(["nothing", "nothing yet", "once", "in every run"]),
    )
    def a_job_is_interrupted_again_and_again(self, times: int, end: FailureReason | str, saves: str) -> None:
        """What makes poison of a job, and what does not: so many in a row do not come by chance."""
        for number, job in enumerate(self.both.runs_of_one(times)):
            if saves == "in every run" or (saves == "once" and number == 0):
                self.both.commit(job.id, job.epoch, step_of(job) + 1)
            if saves == "nothing yet":  # the checkpoint before the first step
                self.both.commit(job.id, job.epoch, step_of(job))
            if isinstance(end, FailureReason):
                self.both.settle_failure(job.id, job.epoch, end, {})
            else:
                self.clock.now += LEASE_SECONDS + 1
                self.expired_leases_are_given_back()

    @rule(reason=st.sampled_from(sorted(CHARGED)), times=st.integers(2, 4))
    def a_job_fails_again_and_again(self, reason: str, times: int) -> None:
        """Up to its last attempt, and each time it is taken up after its delay, but not before."""
        for job in self.both.runs_of_one(times):
            self.both.settle_failure(job.id, job.epoch, FailureReason(reason), {})
            wait = max(0.0, job.not_before - self.clock.now)
            self.clock.now += wait / 2
            self.both.claim("large")
            self.clock.now += wait

    @precondition(lambda self: len(self.model.jobs) < MANY_JOBS)
    @rule(end=st.sampled_from(["succeeds", "fails"]))
    def two_tenants_compete(self, end: str) -> None:
        """Of two runs the later ends: its tenant was served last and has less that runs, and is next."""
        for tenant in TENANTS * 2:
            self.both.submit(tenant, priority="high")
        self.preparing_catches_up()
        runs = [self.both.claim("small"), self.both.claim("small")]
        last = runs[-1]
        if last is not None and end == "succeeds":
            self.both.succeed(last.id, last.epoch)
        elif last is not None:
            self.both.settle_failure(last.id, last.epoch, FailureReason.LOSS_NOT_FINITE, {})
        self.both.claim("small")

    @rule(
        pick=picks,
        stage=st.sampled_from([Stage.PREPARE, Stage.TRAIN]),
        end=st.sampled_from(["done", "failed", "expired", "stopped"]),
        reason=reasons,
    )
    def a_cancelled_run_ends(self, pick: int, stage: Stage, end: str, reason: FailureReason) -> None:
        job_id, epoch = self.both.run(pick, stage)
        if job_id in self.model.jobs:
            self.both.cancel(self.model.jobs[job_id].tenant, job_id)
        match end:
            case "done" if stage is Stage.PREPARE:
                self.both.hand_over(job_id, epoch, {"report": {}})
            case "done":
                self.both.succeed(job_id, epoch)
            case "failed":
                self.both.settle_failure(job_id, epoch, reason, {})
            case "expired":
                self.clock.now += LEASE_SECONDS + 1
                self.expired_leases_are_given_back()
            case "stopped":
                self.both.stop(job_id, epoch)

    @rule(
        pick=picks,
        stage=st.sampled_from([Stage.PREPARE, Stage.TRAIN]),
        saves=st.booleans(),
        resumed=st.sampled_from(["never", "before it has left", "afterwards"]),
        end=st.sampled_from(["obeys", "done", "failed", "expired"]),
        reason=reasons,
    )
    def a_run_is_paused(
        self, pick: int, stage: Stage, saves: bool, resumed: str, end: str, reason: FailureReason
    ) -> None:
        """However it ends: a pause is obeyed, comes too late, or is overtaken by its own end."""
        job_id, epoch = self.both.run(pick, stage)
        job = self.model.jobs.get(job_id)
        if job is None:
            return
        self.both.pause(job.tenant, job_id)
        if saves and stage is Stage.TRAIN:
            self.both.commit(job_id, epoch, step_of(job) + 1)
        if resumed == "before it has left":
            self.both.resume(job.tenant, job_id)
        match end:
            case "obeys":
                self.both.settle_failure(job_id, epoch, FailureReason.PAUSED, {})
            case "done" if stage is Stage.PREPARE:
                self.both.hand_over(job_id, epoch, {"report": {}})
            case "done":
                self.both.succeed(job_id, epoch)
            case "failed":
                self.both.settle_failure(job_id, epoch, reason, {})
            case "expired":
                self.clock.now += LEASE_SECONDS + 1
                self.expired_leases_are_given_back()
        self.both.claim("large")
        if resumed == "afterwards":
            self.both.resume(job.tenant, job_id)

    @rule(pick=picks)
    def a_run_asks_and_renews(self, pick: int) -> None:
        run = self.both.run(pick)
        for real, predict in (
            (lambda: self.leases.orders(*run), lambda: self.model.orders(*run)),
            (lambda: self.leases.renew(*run), lambda: self.model.renew(*run)),
        ):
            answer = self.both.call(real, predict)
            assert answer is None or (answer[0].cancel, answer[0].pause) == answer[1]

    @rule(
        pick=picks, phase=st.sampled_from(words.Phase), step=st.integers(1, 100), code=st.sampled_from(["cut", "slow"])
    )
    def a_run_tells_of_itself(self, pick: int, phase: words.Phase, step: int, code: str) -> None:
        run, progress, metrics = self.both.run(pick), {"step": step}, {f"loss_{step % 3}": 1.0 / step}
        self.both.call(
            lambda: self.leases.record_phase(*run, phase), lambda: self.model.record_phase(*run, phase.value)
        )
        self.both.call(
            lambda: self.leases.record_progress(*run, progress=progress, metrics=metrics, steps=[{"step": step}]),
            lambda: self.model.record_progress(*run, progress, metrics),
        )
        self.both.call(
            lambda: self.leases.record_warning(*run, code, f"It is {code}."),
            lambda: self.model.record_warning(*run, code, f"It is {code}."),
        )

    @rule(pick=picks, first=st.integers(0, 5), second=st.integers(-2, 2))
    def a_run_commits_checkpoints(self, pick: int, first: int, second: int) -> None:
        run = self.both.run(pick, Stage.TRAIN)
        for further in (first, second):
            job = self.model.jobs.get(run[0])
            self.both.commit(*run, max(0, (step_of(job) if job else 0) + further))

    @rule(pick=picks)
    def a_run_hands_over(self, pick: int) -> None:
        job_id, epoch = self.both.run(pick, Stage.PREPARE)
        self.both.hand_over(job_id, epoch, {"report": {"rows": 3}})

    @rule(pick=picks)
    def a_run_succeeds(self, pick: int) -> None:
        self.both.succeed(*self.both.run(pick, Stage.TRAIN))

    @rule(pick=picks, reason=reasons, facts=st.sampled_from([{}, {"line": 3}, {"reason": "away", "attempt": 99}]))
    def a_run_fails(self, pick: int, reason: FailureReason, facts: dict[str, Any]) -> None:
        self.both.settle_failure(*self.both.run(pick), reason, facts)

    @rule(pick=picks, gpu_class=st.sampled_from(CLASSES))
    def a_run_is_replanned(self, pick: int, gpu_class: str) -> None:
        self.both.settle_failure(*self.both.run(pick, Stage.TRAIN), FailureReason.CUDA_OUT_OF_MEMORY, {}, gpu_class)

    @rule(pick=picks)
    def those_who_hold_nothing_call_every_door(self, pick: int) -> None:
        job_id, epoch = self.both.run(pick)
        resting = [job for job in self.model.jobs.values() if job.state != "running"]
        ended = [(job.id, job.epoch) for job in resting[pick % len(resting) :][:1]] if resting else []
        stored = self.both.raw()
        for run in [(job_id, epoch - 1), (job_id, epoch + 1), *ended]:
            for door in self._doors(run):
                with pytest.raises(LeaseLost):
                    door()
        assert self.both.raw() == stored, "a late call changes nothing"

    def _doors(self, run: tuple[str, int]) -> list[Callable[[], object]]:
        """A call of each door that is fenced."""
        saved = Checkpoint(step=10**6, epoch=run[1], object=StoredObject(key="late", size=1, sha256="f" * 64))
        failure = Failure(reason=FailureReason.CRASH, message="It broke")
        return [
            lambda: self.leases.renew(*run),
            lambda: self.leases.orders(*run),
            lambda: self.leases.record_phase(*run, words.Phase.TRAINING),
            lambda: self.leases.record_note(*run, "It is so."),
            lambda: self.leases.record_progress(*run, progress={"late": 1}, metrics={"late": 1}, steps=[{"step": 1}]),
            lambda: self.leases.record_warning(*run, "late", "It is late."),
            lambda: self.leases.commit_checkpoint(*run, saved),
            lambda: self.leases.hand_to_training(*run, {"report": {"late": 1}}),
            lambda: self.leases.settle_success(*run, adapter={"late": 1}, metrics={"late": 1}, memory={"late": 1}),
            lambda: self.leases.settle_failure(*run, failure),
            lambda: self.leases.settle_cancelled(*run),
        ]

    # Rules of the fleet, the reconciler and the clock.

    @rule(name=names, place=places)
    def a_worker_beats(self, name: str, place: str) -> None:
        stage, takes = FLEET[name]
        beat = a_beat(name, place=place, gpu_class=(takes or ["cpu"])[0], stages=(stage,), takes_classes=tuple(takes))
        known = {"name": name, "place": place, "stages": (stage.value,), "takes_classes": tuple(takes)}
        self.both.call(
            lambda: self.workers.beat(**beat),
            lambda: self.model.beat(ModelWorker(**known, seen_at=self.clock.now)),
        )

    @rule(name=names, place=places)
    def a_worker_leaves(self, name: str, place: str) -> None:
        self.both.call(lambda: self.workers.leave(name, place), lambda: self.model.leave(name, place))

    @rule(name=names, lived=places, silent=st.sampled_from([1.0, ALIVE_SECONDS + 1]), lives=places)
    def a_worker_begins_its_next_life(self, name: str, lived: str, silent: float, lives: str) -> None:
        """At once, and once the one before was not heard of for a while."""
        self.a_worker_beats(name, lived)
        self.both.claim(name)
        for seconds in (0.0, silent):
            self.clock.now += seconds
            self.a_worker_beats(name, lives)
            self._takes_its_leases_off(name, lives)

    def _takes_its_leases_off(self, name: str, lives: str) -> None:
        last = {job.id: job.lease_expires_at for job in self.model.jobs.values() if job.lease_expires_at}
        holder = self.both.holder(name)
        answer = self.both.call(
            lambda: self.leases.release_of(holder, lives), lambda: self.model.release_of(holder, lives)
        )
        assert answer is not None
        assert {job.id for job in answer[0]} == answer[1]
        for job_id in answer[1]:
            assert last[job_id] < self.clock.now or self.both.places[job_id] == lives, "who has a lease may train"

    @rule()
    def expired_leases_are_given_back(self) -> None:
        answer = self.both.call(self.leases.release_expired, self.model.release_expired)
        assert answer is not None
        assert {job.id for job in answer[0]} == answer[1]

    @rule(older_than=st.sampled_from([0.0, 30.0]), alive=st.sets(names, max_size=3), busy=st.sets(names, max_size=1))
    def lost_bells_are_taken(self, older_than: float, alive: set[str], busy: set[str]) -> None:
        for name in sorted(alive):
            self.a_worker_beats(name, "here")
        for name in sorted(alive & busy):
            self.both.claim(name)
        self.both.call(self.workers.forget_dead, self.model.forget_dead)
        idle = self.workers.idle()
        assert [worker.name for worker in idle] == [worker.name for worker in self.model.idle()]
        answer = self.both.call(
            lambda: self.leases.take_lost_bells(timedelta(seconds=older_than), idle),
            lambda: self.model.take_lost_bells(older_than),
        )
        assert answer is not None
        assert [bell.job_id for bell in answer[0]] == answer[1]

    @rule(pick=picks)
    def a_bell_is_marked(self, pick: int) -> None:
        self.both.mark_rung(self.both.any_job(pick))

    @rule(seconds=st.sampled_from([1.0, 4.0, 31.0, 46.0, LEASE_SECONDS + 1, 700.0, 90_000.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    # What holds after every rule.

    @invariant()
    def everything_holds(self) -> None:
        stored = self.both.read()
        self._is_as_the_model_says(*stored)
        self._follows_from_what_was_before(*stored)
        self.before = stored

    def _is_as_the_model_says(self, rows: Rows, events: Events) -> None:
        assert rows.keys() == self.model.jobs.keys()
        for job_id, job in self.model.jobs.items():
            differs = {name: (value, known) for name, value, known in compared(rows[job_id], job) if value != known}
            assert not differs, f"{job_id}: stored and expected differ in {differs}"
            assert [(event["type"], event["epoch"]) for event in events[job_id]] == job.history

    def _follows_from_what_was_before(self, rows: Rows, events: Events) -> None:
        earlier_rows, earlier_events = self.before
        for job_id, row in rows.items():
            told, earlier = events[job_id], earlier_rows.get(job_id)
            assert [event["id"] for event in told] == list(range(1, row["next_event"] + 1))
            assert told[: len(earlier_events.get(job_id, []))] == earlier_events.get(job_id, []), "what was told stays"
            assert [event["type"] in TERMINAL_TYPES for event in told[:-1]] == [False] * (len(told) - 1)
            assert (row["state"] in ENDED) == (told[-1]["type"] in TERMINAL_TYPES)
            assert (row["state"] == "running") == (row["lease_expires_at"] is not None) == (row["worker"] is not None)
            epochs = [event["epoch"] for event in told if event["type"] == "claimed"]
            assert epochs == sorted(set(epochs))
            assert row["state"] != "running" or row["epoch"] == epochs[-1], "the epoch that runs is the last claimed"
            if earlier is not None:
                assert row["epoch"] >= earlier["epoch"]
                assert earlier["state"] not in ENDED or row == _as_it_may_be(earlier, row), "what has ended stays"
            events_replay_to(row, told)


def _as_it_may_be(earlier: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row that had ended, with what may still come: the late mark of a bell, and that it is deleted."""
    came = ["bell_rung_at"]
    if earlier["deleted_at"] is None and row["deleted_at"] is not None:
        came += ["deleted_at", "sweep_at", "idempotency_key"]
    return {**earlier, **{name: row[name] for name in came}}


PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "gate")
USUAL: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "report_multiple_bugs": False,
}


def _settings(examples: int) -> settings:
    """The same examples every time; `deep` draws new ones, and many more."""
    if PROFILE == "deep":
        return settings(**USUAL, max_examples=15 * examples, stateful_step_count=100, print_blob=True)
    phases = [Phase.generate] if PROFILE == "first" else [Phase.generate, Phase.shrink]
    return settings(**USUAL, max_examples=examples, stateful_step_count=25, derandomize=True, phases=phases)


@pytest.mark.timeout(0 if PROFILE == "deep" else 600)
def test_the_store_does_what_its_model_says_on_sqlite() -> None:
    clock = FakeClock()
    database = clock.open_sqlite()
    run_state_machine_as_test(lambda: StoreMachine(database, clock), settings=_settings(50))
    database.close()


@pytest.mark.timeout(0 if PROFILE == "deep" else 600)
def test_the_store_does_what_its_model_says_on_postgres(postgres_url: str) -> None:
    clock = FakeClock()
    database = clock.open_postgres(postgres_url)
    run_state_machine_as_test(lambda: StoreMachine(database, clock), settings=_settings(6))
    database.close()
