"""The store against its model: hypothesis looks for a sequence of calls after which the two differ.

`HYPOTHESIS_PROFILE=deep` looks for a long time (`make test-model`); `first` stops at the first difference that it
finds, without looking for the shortest way to it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from datetime import timedelta
from typing import Any, TypeVar

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
from sqlalchemy import delete, select

from graft_shared import jobs as words
from graft_shared.errors import FileNotFound, GraftError, JobNotFound, LeaseLost
from graft_shared.jobs import REMEDIES, Checkpoint, Failure, FailureReason, JobStatus, Retry, Stage, StoredObject
from graft_shared.store import Database, Files, JobQuery, Jobs, Leases, Totals, Workers, tables
from tests.fakes.clock import FakeClock
from tests.invariants import TERMINAL_TYPES
from tests.replay import events_replay_to
from tests.store_factories import a_beat, a_new_job, a_placement
from tests.store_model import CHARGED, ENDED, LEASE_SECONDS, PRIORITIES, ModelJob, ModelWorker, StoreModel

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

Answer = TypeVar("Answer")
Rows = dict[str, dict[str, Any]]
Events = dict[str, list[dict[str, Any]]]

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
        with database.writing() as connection:
            for table in (tables.job_events, tables.jobs, tables.files, tables.workers):
                connection.execute(delete(table))
        self.database, self.clock, self.model = database, clock, StoreModel(clock)
        self.jobs, self.workers, self.totals = Jobs(database), Workers(database), Totals(database)
        self.leases = Leases(database, timedelta(seconds=LEASE_SECONDS))
        self.files, self.stored_files = Files(database), dict[str, str]()
        self.before: tuple[Rows, Events] = ({}, {})

    # Rules of tenants.

    @initialize(wanted=st.lists(st.tuples(tenants, st.sampled_from(CLASSES)), min_size=1, max_size=4))
    def some_jobs_wait_for_a_trainer(self, wanted: list[tuple[str, str]]) -> None:
        for tenant, gpu_class in wanted:
            self._submit(tenant, gpu_class=gpu_class)
        self.preparing_catches_up()

    @precondition(lambda self: len(self.model.jobs) < MANY_JOBS)
    @rule(
        tenant=tenants,
        gpu_class=st.sampled_from(CLASSES),
        priority=st.sampled_from(list(PRIORITIES)),
        max_attempts=st.integers(1, 3),
    )
    def a_job_is_submitted(self, tenant: str, gpu_class: str, priority: str, max_attempts: int) -> None:
        self._submit(tenant, gpu_class=gpu_class, priority=priority, max_attempts=max_attempts)

    @precondition(lambda self: len(self.model.jobs) < MANY_JOBS)
    @rule(tenant=tenants, key=st.sampled_from(["k", "l"]), sha=st.sampled_from(["x", "x", "y"]))
    def a_job_is_submitted_with_a_key(self, tenant: str, key: str, sha: str) -> None:
        self._submit(tenant, key=key, sha=sha)

    @rule(tenant=tenants, pick=picks)
    def a_tenant_cancels(self, tenant: str, pick: int) -> None:
        self._cancel(tenant, self._any_job(pick))

    @rule(tenant=tenants, pick=picks)
    def a_tenant_reads(self, tenant: str, pick: int) -> None:
        own = [job for job in self.model.jobs.values() if job.tenant == tenant]
        page, more = self.jobs.list(tenant, JobQuery(limit=100))
        assert ([job.id for job in page], more) == ([job.id for job in reversed(own)], False)
        assert [job.status.value for job in reversed(page)] == [job.status for job in own]
        for status in JobStatus:
            found, _ = self.jobs.list(tenant, JobQuery(status=status, limit=100))
            assert [job.id for job in reversed(found)] == [job.id for job in own if job.status == status.value]
        job_id = self._any_job(pick)
        if self.model.jobs[job_id].tenant != tenant:
            for read in (self.jobs.get, self.jobs.events):
                with pytest.raises(JobNotFound):
                    read(tenant, job_id)
            with pytest.raises(JobNotFound):
                self.jobs.list(tenant, JobQuery(after=job_id))
            return
        job, expected = self.jobs.get(tenant, job_id), self.model.jobs[job_id]
        assert self.jobs.queue_position(job) == self.model.queue_position(expected)
        until = self.jobs.waits_until(job)
        waits = expected.state == "queued" and expected.not_before > self.clock.now
        assert (until and until.timestamp()) == (pytest.approx(expected.not_before, abs=1e-3) if waits else None)

    @rule()
    def the_operator_counts(self) -> None:
        jobs = self.model.jobs.values()
        counts = {(status.value, gpu_class): count for (status, gpu_class), count in self.totals.jobs().items()}
        assert counts == Counter((job.status, job.gpu_class) for job in jobs)
        waiting = [job for job in jobs if job.state == "queued"]
        queues = Counter((job.stage, job.gpu_class if job.stage == "train" else None) for job in waiting)
        assert {(found.stage.value, found.gpu_class): found.length for found in self.totals.backlogs()} == queues

    @rule(tenant=tenants)
    def a_file_is_uploaded(self, tenant: str) -> None:
        file_id = f"file-{len(self.stored_files)}"
        stored = StoredObject(key=f"k/{file_id}", size=1, sha256="0" * 64)
        self.files.add(id=file_id, tenant=tenant, filename="rows.jsonl", object=stored, report={})
        self.stored_files[file_id] = tenant
        for reader in TENANTS:
            own = {file_id for file_id, owner in self.stored_files.items() if owner == reader}
            assert {file.id for file in self.files.list(reader, limit=100)[0]} == own
            if reader != tenant:
                with pytest.raises(FileNotFound):
                    self.files.get(reader, file_id)

    # Rules of workers.

    @rule(name=names)
    def a_worker_claims(self, name: str) -> None:
        self._claim(name)

    @rule()
    def preparing_catches_up(self) -> None:
        while (job := self._claim("p")) is not None:
            self._hand_over(job.id, job.epoch, {"report": {"rows": job.epoch}})
            self._mark_rung(job.id)

    @rule(
        times=st.integers(4, 6),
        end=st.sampled_from([FailureReason.WORKER_LOST, FailureReason.DRAINED, "expired"]),
        saves=st.sampled_from(["nothing", "the first step", "step by step"]),
    )
    def a_job_is_interrupted_again_and_again(self, times: int, end: FailureReason | str, saves: str) -> None:
        """What makes poison of a job, and what does not: so many in a row do not come by chance."""
        for job in self._runs_of_one(times):
            if saves != "nothing":
                self._commit(job.id, job.epoch, _step_of(job) + (saves == "step by step"))
            if isinstance(end, FailureReason):
                self._settle_failure(job.id, job.epoch, end, {})
            else:
                self.clock.now += LEASE_SECONDS + 1
                self.expired_leases_are_given_back()

    @rule(reason=st.sampled_from(sorted(CHARGED)), times=st.integers(2, 4))
    def a_job_fails_again_and_again(self, reason: str, times: int) -> None:
        """Up to its last attempt, and each time it is taken up after its delay, but not before."""
        for job in self._runs_of_one(times):
            self._settle_failure(job.id, job.epoch, FailureReason(reason), {})
            wait = max(0.0, job.not_before - self.clock.now)
            self.clock.now += wait / 2
            self._claim("large")
            self.clock.now += wait

    @precondition(lambda self: len(self.model.jobs) < MANY_JOBS)
    @rule(end=st.sampled_from(["succeeds", "fails"]))
    def two_tenants_compete(self, end: str) -> None:
        """Of two runs the later ends: its tenant was served last and has less that runs, and is next."""
        for tenant in TENANTS * 2:
            self._submit(tenant, priority="high")
        self.preparing_catches_up()
        runs = [self._claim("small"), self._claim("small")]
        last = runs[-1]
        if last is not None and end == "succeeds":
            self._succeed(last.id, last.epoch)
        elif last is not None:
            self._settle_failure(last.id, last.epoch, FailureReason.LOSS_NOT_FINITE, {})
        self._claim("small")

    @rule(
        pick=picks,
        stage=st.sampled_from(Stage),
        end=st.sampled_from(["done", "failed", "expired", "stopped"]),
        reason=reasons,
    )
    def a_cancelled_run_ends(self, pick: int, stage: Stage, end: str, reason: FailureReason) -> None:
        job_id, epoch = self._run(pick, stage)
        if job_id in self.model.jobs:
            self._cancel(self.model.jobs[job_id].tenant, job_id)
        match end:
            case "done" if stage is Stage.PREPARE:
                self._hand_over(job_id, epoch, {"report": {}})
            case "done":
                self._succeed(job_id, epoch)
            case "failed":
                self._settle_failure(job_id, epoch, reason, {})
            case "expired":
                self.clock.now += LEASE_SECONDS + 1
                self.expired_leases_are_given_back()
            case "stopped":
                self._stop(job_id, epoch)

    @rule(pick=picks)
    def a_run_asks_and_renews(self, pick: int) -> None:
        run = self._run(pick)
        for real, predict in (
            (lambda: self.leases.orders(*run), lambda: self.model.held(*run).cancel_requested),
            (lambda: self.leases.renew(*run), lambda: self.model.renew(*run)),
        ):
            answer = self._both(real, predict)
            assert answer is None or answer[0].cancel == answer[1]

    @rule(
        pick=picks, phase=st.sampled_from(words.Phase), step=st.integers(1, 100), code=st.sampled_from(["cut", "slow"])
    )
    def a_run_tells_of_itself(self, pick: int, phase: words.Phase, step: int, code: str) -> None:
        run, progress, metrics = self._run(pick), {"step": step}, {f"loss_{step % 3}": 1.0 / step}
        self._both(lambda: self.leases.record_phase(*run, phase), lambda: self.model.record_phase(*run, phase.value))
        self._both(
            lambda: self.leases.record_progress(*run, progress=progress, metrics=metrics, steps=[{"step": step}]),
            lambda: self.model.record_progress(*run, progress, metrics),
        )
        self._both(
            lambda: self.leases.record_warning(*run, code, f"It is {code}."),
            lambda: self.model.record_warning(*run, code, f"It is {code}."),
        )

    @rule(pick=picks, first=st.integers(0, 5), second=st.integers(-2, 2))
    def a_run_commits_checkpoints(self, pick: int, first: int, second: int) -> None:
        run = self._run(pick, Stage.TRAIN)
        for further in (first, second):
            job = self.model.jobs.get(run[0])
            self._commit(*run, max(0, (_step_of(job) if job else 0) + further))

    @rule(pick=picks)
    def a_run_hands_over(self, pick: int) -> None:
        job_id, epoch = self._run(pick, Stage.PREPARE)
        self._hand_over(job_id, epoch, {"report": {"rows": 3}})

    @rule(pick=picks)
    def a_run_succeeds(self, pick: int) -> None:
        self._succeed(*self._run(pick, Stage.TRAIN))

    @rule(pick=picks, reason=reasons, facts=st.sampled_from([{}, {"line": 3}, {"reason": "away", "attempt": 99}]))
    def a_run_fails(self, pick: int, reason: FailureReason, facts: dict[str, Any]) -> None:
        self._settle_failure(*self._run(pick), reason, facts)

    @rule(pick=picks, gpu_class=st.sampled_from(CLASSES))
    def a_run_is_replanned(self, pick: int, gpu_class: str) -> None:
        self._settle_failure(*self._run(pick, Stage.TRAIN), FailureReason.CUDA_OUT_OF_MEMORY, {}, gpu_class)

    @rule(pick=picks)
    def those_who_hold_nothing_call_every_door(self, pick: int) -> None:
        job_id, epoch = self._run(pick)
        resting = [job for job in self.model.jobs.values() if job.state != "running"]
        ended = [(job.id, job.epoch) for job in resting[pick % len(resting) :][:1]] if resting else []
        stored = self._raw()
        for run in [(job_id, epoch - 1), (job_id, epoch + 1), *ended]:
            for door in self._doors(run):
                with pytest.raises(LeaseLost):
                    door()
        assert self._raw() == stored, "a late call changes nothing"

    def _doors(self, run: tuple[str, int]) -> list[Callable[[], object]]:
        """A call of each door that is fenced."""
        saved = Checkpoint(step=10**6, epoch=run[1], object=StoredObject(key="late", size=1, sha256="f" * 64))
        failure = Failure(reason=FailureReason.CRASH, message="It broke")
        return [
            lambda: self.leases.renew(*run),
            lambda: self.leases.orders(*run),
            lambda: self.leases.record_phase(*run, words.Phase.TRAINING),
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
        self._both(
            lambda: self.workers.beat(**beat),
            lambda: self.model.beat(ModelWorker(**known, seen_at=self.clock.now)),
        )

    @rule(name=names, place=places)
    def a_worker_leaves(self, name: str, place: str) -> None:
        self._both(lambda: self.workers.leave(name, place), lambda: self.model.leave(name, place))

    @rule(name=names, lived=places, lives=places)
    def a_worker_begins_its_next_life(self, name: str, lived: str, lives: str) -> None:
        self.a_worker_beats(name, lived)
        self._claim(name)
        holder = self._holder(name)
        answer = self._both(lambda: self.leases.release_of(holder, lives), lambda: self.model.release_of(holder, lives))
        assert answer is not None
        assert {job.id for job in answer[0]} == answer[1]

    @rule()
    def expired_leases_are_given_back(self) -> None:
        answer = self._both(self.leases.release_expired, self.model.release_expired)
        assert answer is not None
        assert {job.id for job in answer[0]} == answer[1]

    @rule(older_than=st.sampled_from([0.0, 30.0]), alive=st.sets(names, max_size=3), busy=st.sets(names, max_size=1))
    def lost_bells_are_taken(self, older_than: float, alive: set[str], busy: set[str]) -> None:
        for name in sorted(alive):
            self.a_worker_beats(name, "here")
        for name in sorted(alive & busy):
            self._claim(name)
        self._both(self.workers.forget_dead, self.model.forget_dead)
        idle = self.workers.idle()
        assert [worker.name for worker in idle] == [worker.name for worker in self.model.idle()]
        answer = self._both(
            lambda: self.leases.take_lost_bells(timedelta(seconds=older_than), idle),
            lambda: self.model.take_lost_bells(older_than),
        )
        assert answer is not None
        assert [bell.job_id for bell in answer[0]] == answer[1]

    @rule(pick=picks)
    def a_bell_is_marked(self, pick: int) -> None:
        self._mark_rung(self._any_job(pick))

    @rule(seconds=st.sampled_from([1.0, 4.0, 31.0, 46.0, LEASE_SECONDS + 1, 700.0, 90_000.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    # What holds after every rule.

    @invariant()
    def everything_holds(self) -> None:
        stored = self._read()
        self._is_as_the_model_says(*stored)
        self._follows_from_what_was_before(*stored)
        self.before = stored

    def _is_as_the_model_says(self, rows: Rows, events: Events) -> None:
        assert rows.keys() == self.model.jobs.keys()
        for job_id, job in self.model.jobs.items():
            differs = {name: (value, known) for name, value, known in _compared(rows[job_id], job) if value != known}
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
                assert earlier["state"] not in ENDED or row == _but_for_its_bell(earlier, row), "what has ended stays"
            events_replay_to(row, told)

    # Both sides of a call.

    def _both(self, real: Callable[[], Answer], predict: Callable[[], Any]) -> tuple[Answer, Any] | None:
        """Make the same call of both and return both answers; where the model refuses it, so must the store."""
        self.clock.tick()
        try:
            expected = predict()
        except (GraftError, ValueError) as error:
            stored = self._raw()
            with pytest.raises(type(error)):
                real()
            assert self._raw() == stored, "what is refused changes nothing"
            return None
        return real(), expected

    def _submit(self, tenant: str, *, key: str | None = None, sha: str = "s", **facts: Any) -> None:
        spec = {"gpu_class": "16gb", "priority": "normal", "max_attempts": 2, **facts}
        job_id = f"ftjob-{len(self.model.jobs)}"
        new = replace(a_new_job(tenant=tenant, key=key, sha=sha, **spec), id=job_id)

        def predict() -> tuple[str, bool]:
            known = {"idempotency_key": key, "request_sha256": sha, "created_at": self.clock.now}
            known |= {name: spec[name] for name in ("gpu_class", "max_attempts")}
            known |= {"priority": PRIORITIES[spec["priority"]], "not_before": self.clock.now}
            return self.model.submit(ModelJob(id=job_id, tenant=tenant, **known))

        answer = self._both(lambda: self.jobs.submit(new), predict)
        assert answer is None or (answer[0][0].id, answer[0][1]) == answer[1]

    def _cancel(self, tenant: str, job_id: str) -> None:
        answer = self._both(lambda: self.jobs.cancel(tenant, job_id), lambda: self.model.cancel(tenant, job_id))
        assert answer is None or answer[0].status.value == answer[1].status

    def _claim(self, name: str) -> ModelJob | None:
        (stage, takes), holder = FLEET[name], self._holder(name)
        answer = self._both(
            lambda: self.leases.claim(holder, stage=stage, gpu_classes=takes),
            lambda: self.model.claim(holder, stage.value, takes),
        )
        assert answer is not None
        claimed, expected = answer
        assert (claimed and (claimed.id, claimed.epoch)) == (expected and (expected.id, expected.epoch))
        return expected if isinstance(expected, ModelJob) else None

    def _commit(self, job_id: str, epoch: int, step: int) -> None:
        saved = Checkpoint(step=step, epoch=epoch, object=StoredObject(key=f"c{step}", size=1, sha256=f"{step:064}"))
        self._both(
            lambda: self.leases.commit_checkpoint(job_id, epoch, saved),
            lambda: self.model.commit_checkpoint(job_id, epoch, asdict(saved)),
        )

    def _hand_over(self, job_id: str, epoch: int, prepared: dict[str, Any]) -> None:
        self._both(
            lambda: self.leases.hand_to_training(job_id, epoch, prepared),
            lambda: self.model.hand_to_training(job_id, epoch, prepared),
        )

    def _succeed(self, job_id: str, epoch: int) -> None:
        result: dict[str, Any] = {"adapter": {"epoch": epoch}, "metrics": {"train_loss": 0.5}, "memory": {"peak": 1}}
        self._both(
            lambda: self.leases.settle_success(job_id, epoch, **result),
            lambda: self.model.settle_success(job_id, epoch, **result),
        )

    def _stop(self, job_id: str, epoch: int) -> None:
        self._both(
            lambda: self.leases.settle_cancelled(job_id, epoch), lambda: self.model.settle_cancelled(job_id, epoch)
        )

    def _mark_rung(self, job_id: str) -> None:
        self._both(lambda: self.leases.mark_rung(job_id), lambda: self.model.mark_rung(job_id))

    def _settle_failure(
        self, job_id: str, epoch: int, reason: FailureReason, facts: dict[str, Any], gpu_class: str | None = None
    ) -> None:
        failure = Failure(reason=reason, message=f"It was {reason.value}", facts=facts)
        placed = a_placement(gpu_class) if gpu_class else None
        other_plan = (placed.gpu_class.name, placed.plan.to_dict(), placed.summary) if placed else None
        answer = self._both(
            lambda: self.leases.settle_failure(job_id, epoch, failure, replanned=placed),
            lambda: self.model.settle_failure(job_id, epoch, reason.value, other_plan),
        )
        assert answer is None or (answer[0].id, answer[0].state.value) == (answer[1].id, answer[1].state)

    # What a rule is about.

    def _any_job(self, pick: int) -> str:
        return list(self.model.jobs)[pick % len(self.model.jobs)]

    def _runs_of_one(self, times: int) -> Iterator[ModelJob]:
        """Claim until one job, the first, was claimed so often; others that come between are over at once."""
        if len(self.model.jobs) < MANY_JOBS:
            self._submit("a", priority="high", max_attempts=3)
            self.preparing_catches_up()
        first: ModelJob | None = None
        while times and (job := self._claim("large")) is not None:
            first = first or job
            if job is first:
                times -= 1
                yield job
            else:
                self._settle_failure(job.id, job.epoch, FailureReason.LOSS_NOT_FINITE, {})

    def _run(self, pick: int, stage: Stage | None = None) -> tuple[str, int]:
        """A job that runs in this stage, and its epoch; where there is none it is begun, or else a late call."""
        running = [job for job in self.model.jobs.values() if job.state == "running"]
        found = [job for job in running if stage is None or job.stage == stage.value]
        if not found:
            able = [name for name, (does, _) in FLEET.items() if stage in (None, does)]
            claimed = self._claim(able[pick % len(able)])
            found = [claimed] if claimed else [job for job in self.model.jobs.values() if job not in running]
        job = found[pick % len(found)] if found else None
        return (job.id, job.epoch) if job else ("ftjob-never", 1)

    def _holder(self, name: str) -> str:
        return f"{name}/{FLEET[name][0].value}"

    def _raw(self) -> list[Any]:
        """All that is stored, as the database hands it out: to be compared, not to be read."""
        with self.database.reading() as connection:
            return [
                sorted(connection.exec_driver_sql(f"select * from {table}").all(), key=str)
                for table in ("jobs", "job_events", "files", "workers")
            ]

    def _read(self) -> tuple[Rows, Events]:
        with self.database.reading() as connection:
            rows = connection.execute(select(tables.jobs)).mappings().all()
            told = connection.execute(select(tables.job_events).order_by(tables.job_events.c.id)).mappings().all()
        events: dict[str, list[dict[str, Any]]] = {row["id"]: [] for row in rows}
        for event in told:
            events[event["job_id"]].append(dict(event))
        return {row["id"]: dict(row) for row in rows}, events


def _step_of(job: ModelJob) -> int:
    return int(job.checkpoint["step"]) if job.checkpoint else 0


def _compared(row: dict[str, Any], job: ModelJob) -> list[tuple[str, Any, Any]]:
    """Each column with the value that is stored and the one that is expected; times are equal to a millisecond."""
    found = []
    for name in (field.name for field in fields(job) if field.name != "history"):
        stored, known = row[name], getattr(job, name)
        if name == "error":
            stored = stored and stored["code"]
        found.append((name, stored, pytest.approx(known, abs=1e-3) if isinstance(known, float) else known))
    return found


def _but_for_its_bell(earlier: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {**earlier, "bell_rung_at": row["bell_rung_at"]}  # the mark of a bell may come late


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


@pytest.mark.timeout(0 if PROFILE == "deep" else 300)
def test_the_store_does_what_its_model_says_on_sqlite() -> None:
    clock = FakeClock()
    database = clock.open_sqlite()
    run_state_machine_as_test(lambda: StoreMachine(database, clock), settings=_settings(50))
    database.close()


@pytest.mark.timeout(0 if PROFILE == "deep" else 300)
def test_the_store_does_what_its_model_says_on_postgres(postgres_url: str) -> None:
    clock = FakeClock()
    database = clock.open_postgres(postgres_url)
    run_state_machine_as_test(lambda: StoreMachine(database, clock), settings=_settings(8))
    database.close()
