"""One trial: a job, the processes around it, a strike at one point, and the verdict when all of it is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from graft_shared.artifacts import job_prefix
from graft_shared.clock import boottime
from graft_shared.errors import StoreUnavailable
from graft_shared.jobs import TERMINAL_STATES, Job, JobState, StoredObject
from graft_shared.store import Database, Files, JobQuery, Jobs
from tests.factories import EMPTY_WEIGHTS
from tests.failpoints.actors import GPU_CLASS, Arms, Site, run_api, run_reconciler, run_worker
from tests.failpoints.arm import Strike, struck_in
from tests.failpoints.cases import Aftermath, Case, Verdict, verdict_on
from tests.failpoints.forked import fork
from tests.failpoints.judge import Evidence, recovery_seconds, steps_late, violations
from tests.failpoints.points import Actor, Fault, Interruption
from tests.failpoints.scale import LEASE_SECONDS
from tests.store_factories import a_new_job
from tests.witness import steps_made

Answer = TypeVar("Answer")

TENANT = "default"
FROZEN_SECONDS = 2 * LEASE_SECONDS
KEPT_WITHIN_SECONDS = 2 * LEASE_SECONDS  # a frozen supervisor has lost the job after one; another for a busy machine
LOOK_SECONDS = 0.05
TRIAL_SECONDS = 45.0  # until a trial counts as one whose job never ended
STRIKE_SECONDS = 3.0  # after the job's end, for points that lie behind it
LATE_SECONDS = 0.3  # that processes are given, after all is over, to do what they should not
TIDY_SECONDS = 4.0  # until nothing of the job is left in the work folders
CLIENT_SECONDS = 3.0  # a client waits so long for an answer, and asks another API
STEPS_BEFORE_INTERRUPTION = 4
ROWS = b'{"text": "a"}\n'
BASE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
    "max_position_embeddings": 512,
}  # fmt: skip


def try_case(case: Case, site: Site) -> Verdict:
    """Carry a case out and judge it; the site holds an empty, migrated database."""
    verdict = verdict_on(case)
    began = time.monotonic()
    trial = _Trial(case, site)
    try:
        trial.run(verdict)
    except TimeoutError as error:
        verdict.violations.append(f"it_ends: {error}")
    finally:
        trial.end()
    verdict.seconds = round(time.monotonic() - began, 2)
    verdict.runnable_per_core = round(fmean(trial.runnable or [0]) / (os.cpu_count() or 1), 1)
    return verdict


class _Trial:
    def __init__(self, case: Case, site: Site) -> None:
        self._case, self._site = case, site
        self._point, self._scenario = case.point, case.point.scenario
        self._arms = Arms(point=case.point, fault=case.fault)
        self._deadline = time.monotonic() + TRIAL_SECONDS
        self._living: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._thawed = False
        self.runnable: list[int] = []
        self._database: Database = site.open_database()
        self._jobs = Jobs(self._database)

    def run(self, verdict: Verdict) -> None:
        self._furnish()
        job_id = self._begin()
        self._interrupt(job_id)
        self._until(lambda: self._has_ended(job_id), f"the end of {job_id}")
        self._until(lambda: self._strike_is_over, "the strike", seconds=STRIKE_SECONDS + FROZEN_SECONDS)
        self._carry_on_for(LATE_SECONDS)
        if self._case.aftermath is Aftermath.ALONE:
            self._do_another_job(verdict)
        self._judge(job_id, verdict)

    def end(self) -> None:
        """Leave no process, whatever state it is in."""
        for pid in self._living.values():
            for number in (signal.SIGKILL, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            os.waitpid(pid, 0)
        self._living.clear()
        self._database.close()

    def _furnish(self) -> None:
        base = self._site.folder / "models" / "graft" / "tiny"
        base.mkdir(parents=True)
        (base / "config.json").write_text(json.dumps(BASE))
        (base / "model.safetensors").write_bytes(EMPTY_WEIGHTS)
        files, key = Files(self._database), f"tenants/{TENANT}/files/file-rows"
        files.announce(key)
        stored = self._site.bucket.put_bytes(key, ROWS)
        known = StoredObject(key=stored.key, size=stored.size, sha256=stored.sha256)
        files.add(
            id="file-rows", tenant=TENANT, filename="r.jsonl", object=known, report={"rows": 1, "bytes": len(ROWS)}
        )

    def _begin(self) -> str:
        """Start everybody and submit the job, in the order that the point needs."""
        on_bells_alone = not self._scenario.looks
        if self._point.actor is not Actor.RECONCILER:
            self._start_reconciler("r1")
        if on_bells_alone:
            self._start_worker("a")
            self._until((self._site.folder / "a.looked").exists, "the first look")
            if self._point.actor is Actor.RECONCILER:
                self._start_reconciler("r1")
        job_id = self._submit()
        if not on_bells_alone:
            self._start_worker("a")
        return job_id

    def _submit(self) -> str:
        metadata = {
            "witness": str(self._site.folder),
            "steps": str(self._scenario.steps),
            "save_steps": str(self._scenario.save_steps),
            "step_seconds": str(self._scenario.step_seconds),
            "behaviour": self._scenario.behaviour,
        }
        if self._point.actor is Actor.API and self._scenario.interruption is Interruption.NONE:
            spec = {"base_model": "graft/tiny", "dataset": {"file": "file-rows"}, "gpu": {"class": GPU_CLASS}}
            request = {"method": "POST", "url": "/jobs", "headers": {"idempotency-key": "once"}}
            return str(self._ask({**request, "json": {**spec, "metadata": metadata}}, wanted=202)["id"])
        new = a_new_job(metadata=metadata, max_attempts=self._case.max_attempts)
        return self._insist(lambda: self._jobs.submit(new))[0].id

    def _interrupt(self, job_id: str) -> None:
        """Do to the job what the scenario says, in the middle of its training."""
        interruption = self._scenario.interruption
        if interruption is Interruption.NONE:
            return
        self._until(lambda: len(steps_made(self._site.folder)) >= STEPS_BEFORE_INTERRUPTION, "training")
        if interruption is Interruption.CANCEL:
            self._cancel(job_id)
        elif interruption is Interruption.DRAIN:
            os.kill(self._living["a"], signal.SIGTERM)
        else:
            os.kill(self._living["a"], signal.SIGKILL)
            self._until(lambda: "a" not in self._living, "the worker's end")
            if self._point.actor is Actor.RECONCILER:
                self._start_worker("b")
                self._start_reconciler("r1")
            else:
                self._start_worker("a")

    def _cancel(self, job_id: str) -> None:
        if self._point.actor is Actor.API:
            self._ask({"method": "POST", "url": f"/jobs/{job_id}/cancel"}, wanted=200)
        else:
            self._insist(lambda: self._jobs.cancel(TENANT, job_id))

    def _ask(self, request: dict[str, Any], *, wanted: int) -> dict[str, Any]:
        """Ask an API as a client does: another one, if an answer is long in coming or says that it is their fault."""
        answers: list[Path] = []
        while time.monotonic() < self._deadline:
            name = f"api-{len(answers)}"
            answers.append(self._site.folder / f"{name}.json")
            self._start(name, lambda to=answers[-1]: run_api(self._site, request, to, arms=self._arms))
            until = time.monotonic() + CLIENT_SECONDS * len(answers)
            while name in self._living and not answers[-1].exists() and time.monotonic() < until:
                self._look_after_all()
            said = [json.loads(answer.read_text()) for answer in answers if answer.exists()]
            for answer in said:
                if answer["status"] < 500:
                    assert answer["status"] == wanted, answer
                    body: dict[str, Any] = answer["body"]
                    return body
        raise TimeoutError("no API answered")

    def _do_another_job(self, verdict: Verdict) -> None:
        """Whoever was struck is as good as new."""
        metadata = {"witness": str(self._site.folder / "another"), "steps": "2"}
        (self._site.folder / "another").mkdir()
        new = a_new_job(metadata=metadata)
        job, _ = self._insist(lambda: self._jobs.submit(new))
        self._until(lambda: self._has_ended(job.id), "the end of another job")
        ended = self._jobs.get(TENANT, job.id)
        if ended.state is not JobState.SUCCEEDED:
            verdict.violations.append(f"another_job_is_done: {ended.state}; {ended.error}")

    def _insist(self, action: Callable[[], Answer]) -> Answer:
        """Do what needs the store, which may be locked by somebody who is frozen."""
        done: list[Answer] = []

        def is_done() -> bool:
            try:
                done.append(action())
            except StoreUnavailable:
                return False
            return True

        self._until(is_done, "the store")
        return done[0]

    # What goes on all the while.

    def _until(self, holds: Callable[[], bool], what: str, *, seconds: float | None = None) -> None:
        until = self._deadline if seconds is None else min(self._deadline, time.monotonic() + seconds)
        while not holds():
            if time.monotonic() > until:
                if seconds is not None:
                    return
                raise TimeoutError(f"waited for {what}; alive: {sorted(self._living)}; ended: {self._ended}")
            self._look_after_all()

    def _carry_on_for(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._until(lambda: time.monotonic() >= until, "a while")

    def _look_after_all(self) -> None:
        time.sleep(LOOK_SECONDS)
        self.runnable.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]))
        died = self._reap()
        strike = self._strike
        if strike is None:
            if "a" in died and self._scenario.interruption is Interruption.DRAIN:
                self._start_worker("a")
            return
        self._thaw(strike)
        if self._case.aftermath is Aftermath.BESIDE:
            self._start_others()
        else:
            self._start_again()

    def _start_others(self) -> None:
        if "b" not in self._living and self._point.actor in (Actor.WORKER, Actor.CHILD):
            self._start_worker("b")
        if "r2" not in self._living and self._point.actor is Actor.RECONCILER:
            self._start_reconciler("r2")

    def _start_again(self) -> None:
        if "a" in self._ended and self._point.actor in (Actor.WORKER, Actor.CHILD):
            self._start_worker("a")
        if "r1" in self._ended:
            self._start_reconciler("r1")

    def _thaw(self, strike: Strike) -> None:
        if self._thawed or self._case.fault not in (Fault.FREEZE, Fault.SUSPEND):
            return
        if time.time() >= strike.at + FROZEN_SECONDS:
            for pid in reversed(strike.pids):  # the child first: it must not be saved by a supervisor that comes first
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self._thawed = True

    @property
    def _strike(self) -> Strike | None:
        return struck_in(self._site.folder)

    @property
    def _strike_is_over(self) -> bool:
        freezes = self._case.fault in (Fault.FREEZE, Fault.SUSPEND)
        return self._strike is not None and (self._thawed or not freezes)

    def _has_ended(self, job_id: str) -> bool:
        try:
            return self._jobs.get(TENANT, job_id).state in TERMINAL_STATES
        except StoreUnavailable:
            return False

    # Processes.

    def _start_worker(self, name: str) -> None:
        arms = self._arms if self._point.actor in (Actor.WORKER, Actor.CHILD) and name == "a" else None
        if self._scenario.interruption is Interruption.KILL and "a" not in self._ended:
            arms = None  # it is its next life that is struck
        self._start(name, lambda: run_worker(self._site, name, looks=self._scenario.looks, arms=arms))

    def _start_reconciler(self, name: str) -> None:
        arms = self._arms if self._point.actor is Actor.RECONCILER and name == "r1" else None
        self._start(name, lambda: run_reconciler(self._site, arms=arms))

    def _start(self, name: str, act: Callable[[], object]) -> None:
        self._database.close()  # no connection may be shared with who is forked
        self._ended.pop(name, None)
        self._living[name] = fork(act, self._site.folder / f"{name}.log")

    def _reap(self) -> set[str]:
        died = set()
        for name, pid in list(self._living.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del self._living[name]
                self._ended[name] = os.waitstatus_to_exitcode(status)
                died.add(name)
        return died

    # The verdict.

    def _judge(self, job_id: str, verdict: Verdict) -> None:
        job, events = self._insist(lambda: (self._jobs.get(TENANT, job_id), self._events(job_id)))
        since_boot = time.time() - boottime()
        made = steps_made(self._site.folder)
        evidence = Evidence(
            job=job,
            events=events,
            steps=[replace(step, at=step.at + since_boot) for step in made if step.job_id == job_id],
            objects=_objects(self._site, job),
            steps_wanted=self._scenario.steps,
            save_steps=self._scenario.save_steps,
            kept_within_seconds=KEPT_WITHIN_SECONDS,
            steps_under_way=self._case.steps_under_way,
            stood_still_seconds=FROZEN_SECONDS if self._case.fault in (Fault.FREEZE, Fault.SUSPEND) else 0.0,
        )
        strike = self._strike
        verdict.struck = strike is not None
        verdict.violations += violations(evidence)
        verdict.violations += self._also_wrong(job)
        ends = Counter(event["data"].get("reason", "") for event in events if event["type"] == "requeued")
        said = "".join(f", {count} {reason}" for reason, count in sorted(ends.items()))
        verdict.outcome = f"{job.state}{said}"
        verdict.runs = sum(event["type"] == "claimed" for event in events)
        verdict.steps_redone = len(evidence.steps) - len({step.number for step in evidence.steps})
        verdict.steps_late = len(steps_late(evidence.steps))
        if strike is not None:
            verdict.recovery_seconds = recovery_seconds(events, strike.at)

    def _also_wrong(self, job: Job) -> list[str]:
        wrong = []
        if self._strike is None:
            wrong.append("the_point_was_reached: no")
        if job.state is not self._case.foretold:
            wrong.append(f"it_ends_as_foretold: {job.state} and not {self._case.foretold}; {job.error}")
        here = {"witness": str(self._site.folder)}
        listed, _ = self._jobs.list(TENANT, JobQuery(metadata=here))
        if [other.id for other in listed] != [job.id]:
            wrong.append(f"one_submit_is_one_job: {[other.id for other in listed]}")
        self._until(lambda: not self._leftovers(), "empty work folders", seconds=TIDY_SECONDS)
        if self._leftovers():
            wrong.append(f"nothing_is_left_behind: {self._leftovers()}")
        return wrong

    def _leftovers(self) -> list[str]:
        return [str(path) for path in (self._site.folder / "work").glob("*/*/*")]

    def _events(self, job_id: str) -> list[dict[str, Any]]:
        events, _ = self._jobs.events(TENANT, job_id, limit=10_000)
        return [
            {"id": e.id, "epoch": e.epoch, "type": e.type, "data": e.data, "at": e.created_at.timestamp()}
            for e in events
        ]


def _objects(site: Site, job: Job) -> dict[str, bytes]:
    keys = site.bucket.list(job_prefix(job.tenant, job.id))
    return {key: site.bucket.open(key).read() for key in keys}
