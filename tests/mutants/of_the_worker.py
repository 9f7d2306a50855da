"""Mutants of the worker and its supervisor, of the bucket's proofs, and of the reconciler."""

# ruff: noqa: E501 (lines of the code that they change)

from __future__ import annotations

from tests.mutants.mutant import Mutant

_SUPERVISOR = "tests/integration/test_supervisor.py::test_"
_WATCH = "tests/unit/test_watch.py::test_"
_OUTCOME = "tests/unit/test_outcome.py"
_RECONCILER = "tests/integration/test_reconciler.py::test_"


def _of(file: str, name: str, breaks: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name=name, breaks=breaks, file=file, old=old, new=new, tests=tests)


_FILE = "services/worker/graft_worker/supervisor/watch.py"
WATCH = [
    _of(
        _FILE,
        "deadline-after-the-lease",
        "a trainer goes on while another may have begun",
        "before + DEADLINE_SHARE * self._times.lease",
        "before + 1.5 * self._times.lease",
        f"{_WATCH}the_deadline_counts_from_before_the_renewal_was_sent_and_comes_before_the_leases_end",
    ),
    _of(
        _FILE,
        "time-taken-after-the-renewal",
        "a slow answer of the store moves the trainer's deadline past the lease",
        """        before = boottime()  # taken before the request, so that a slow answer shortens the deadline, never the safety
        orders = self._leases.renew(self._job_id, self._epoch)
""",
        """        orders = self._leases.renew(self._job_id, self._epoch)
        before = boottime()
""",
        f"{_WATCH}the_deadline_counts_from_before_the_renewal_was_sent_and_comes_before_the_leases_end",
    ),
    _of(
        _FILE,
        "deadline-is-not-rewritten",
        "a healthy trainer leaves when its first lease would have ended",
        "        write_deadline(self._workdir, self._deadline)\n",
        "        if not (self._workdir / 'deadline').exists():\n            write_deadline(self._workdir, self._deadline)\n",
        f"{_WATCH}a_lease_is_renewed_at_every_heartbeat_and_the_deadline_with_it",
    ),
    _of(
        _FILE,
        "a-lost-lease-is-told-politely",
        "a trainer that has lost its job saves first",
        "self._child.kill() if reason is StopReason.LEASE_LOST else self._child.terminate()",
        "self._child.terminate()",
        f"{_WATCH}a_child_whose_lease_is_lost_is_killed_and_not_asked",
    ),
    _of(
        _FILE,
        "a-store-away-is-waited-for-for-ever",
        "a supervisor without a store never ends its trainer",
        "return StopReason.LEASE_LOST if boottime() > self._deadline else None",
        "return None",
        f"{_WATCH}a_store_that_is_away_ends_nothing_before_the_deadline_and_the_child_after_it",
    ),
    _of(
        _FILE,
        "a-store-away-ends-the-run",
        "a moment without the store costs the run",
        "return StopReason.LEASE_LOST if boottime() > self._deadline else None",
        "return StopReason.LEASE_LOST",
        f"{_WATCH}a_store_that_is_away_ends_nothing_before_the_deadline_and_the_child_after_it",
    ),
    _of(
        _FILE,
        "a-drain-hides-a-cancel",
        "a job that was cancelled while its worker drained goes back to the queue",
        "self._stop_reason in (None, *SAVING_STOPS)",
        "self._stop_reason is None",
        f"{_WATCH}a_cancel_is_heard_by_a_run_that_already_leaves",
    ),
    _of(
        _FILE,
        "a-starting-child-hears-nothing",
        "a child that was being started trains on though its run was told to stop",
        "        if child is not None and self._stop_reason is not None:\n            child.terminate()  # told to stop while it was being started\n",
        "",
        f"{_WATCH}a_child_that_is_started_after_its_run_was_told_to_stop_hears_it",
    ),
    _of(
        _FILE,
        "stragglers-live-on",
        "a trainer that ignores SIGTERM keeps its worker and its job",
        "        if overdue and self._child is not None:\n            self._child.kill()\n",
        "",
        f"{_WATCH}a_child_is_asked_once_and_killed_when_its_grace_is_over",
    ),
]

_FILE = "services/worker/graft_worker/supervisor/outcome.py"
OUTCOMES = [
    _of(
        _FILE,
        "a-failure-with-code-0-is-a-success",
        "a child that said why it failed is taken to have succeeded",
        "if code == ExitCode.DONE and last_words is None:",
        "if code == ExitCode.DONE:",
        _OUTCOME,
    ),
    _of(
        _FILE,
        "a-drained-child-that-was-killed-is-lost",
        "a drain that took too long counts as a worker that was lost",
        "    if stop_reason in SAVING_STOPS:\n        return stopped(stop_reason)\n",
        "",
        _OUTCOME,
    ),
    _of(
        _FILE,
        "the-kernels-kill-is-a-loss",
        "a job that needs more memory than the machine has is tried for free",
        "if code == -signal.SIGKILL and oom_kills > 0:",
        "if code == -signal.SIGTERM and oom_kills > 0:",
        _OUTCOME,
    ),
    _of(
        _FILE,
        "overtime-is-a-drain",
        "a job over its 'max_duration_seconds' goes back to the queue, again and again",
        "    if stop_reason is StopReason.MAX_DURATION:\n        return stopped(stop_reason)\n",
        "",
        _OUTCOME,
    ),
]

_GUARD = "services/worker/graft_worker/training/guard.py"
GUARD = [
    _of(
        _GUARD,
        "the-deadline-is-not-asked-for",
        "a thawed trainer makes a step of a job that another has taken",
        "        self.check_lease()\n        if self.is_told_to_stop:",
        "        if self.is_told_to_stop:",
        "tests/unit/test_guard.py",
    ),
    _of(
        _GUARD,
        "the-deadline-has-a-margin",
        "a thawed trainer goes on for a minute",
        "boottime() > deadline - self._earlier():",
        "boottime() > deadline + 60:",
        "tests/unit/test_guard.py",
    ),
    _of(
        _GUARD,
        "long-microbatches-get-no-margin",
        "a trainer whose microbatches take long makes the last beside its successor",
        "self._longest = max(self._longest, self._asked_at - asked_before)",
        "pass",
        "tests/unit/test_guard.py",
    ),
    _of(
        _GUARD,
        "sigterm-is-not-heard",
        "a drained trainer trains on until it is killed, and saves nothing",
        "        self._told = True\n",
        "        self._told = False\n",
        "tests/unit/test_guard.py",
    ),
    _of(
        _GUARD,
        "sigterm-goes-before-the-deadline",
        "a trainer that was told to stop writes a checkpoint of a job that another has taken",
        "        self.check_lease()\n        if self.is_told_to_stop:\n            raise ToldToStop\n",
        "        if self.is_told_to_stop:\n            raise ToldToStop\n        self.check_lease()\n",
        "tests/unit/test_guard.py",
    ),
]

_PUBLISHING = "services/worker/graft_worker/supervisor/publishing.py"
_TRAINING = "services/worker/graft_worker/supervisor/training_run.py"
_BUCKET = "shared/graft_shared/buckets/base.py"
ARTIFACTS = [
    _of(
        _BUCKET,
        "a-checkpoint-is-not-proven-when-it-is-fetched",
        "a job goes on from other bytes than were saved",
        "    if digest.hexdigest() != object.sha256:\n        partial.unlink()\n",
        "    if not digest.hexdigest():\n        partial.unlink()\n",
        f"{_SUPERVISOR}a_checkpoint_that_was_changed_since_is_not_trained_on",
    ),
    _of(
        _BUCKET,
        "reading-back-proves-nothing",
        "an adapter that the bucket has spoilt is a success",
        "            digest.update(chunk)\n    if digest.hexdigest() != object.sha256:\n        raise",
        "            digest.update(chunk)\n    if not digest.hexdigest():\n        raise",
        f"{_SUPERVISOR}an_adapter_that_reads_back_differently_is_no_success",
    ),
    _of(
        _TRAINING,
        "a-checkpoint-is-not-read-back",
        "a checkpoint that the bucket has spoilt becomes the job's",
        "        read_back(neighbours.bucket, stored)\n        checkpoint = ",
        "        checkpoint = ",
        f"{_SUPERVISOR}a_checkpoint_that_reads_back_differently_is_not_the_jobs",
    ),
    _of(
        _PUBLISHING,
        "a-file-is-not-read-back",
        "an adapter's file that the bucket has spoilt is published",
        "    stored = neighbours.bucket.put_file(key, path)\n    read_back(neighbours.bucket, stored)\n",
        "    stored = neighbours.bucket.put_file(key, path)\n",
        f"{_SUPERVISOR}an_adapter_that_reads_back_differently_is_no_success",
    ),
    _of(
        _PUBLISHING,
        "manifest-first",
        "a manifest promises files that are not there",
        "    proofs = []\n    for path in sorted(",
        '    neighbours.bucket.put_bytes(prefix + MANIFEST_NAME, b"{}")\n    proofs = []\n    for path in sorted(',
        f"{_SUPERVISOR}the_manifest_is_written_last_and_only_then_has_the_job_succeeded",
    ),
    _of(
        _TRAINING,
        "resume-from-nothing",
        "every interruption costs all that was trained",
        "    if job.checkpoint is not None:\n        checkpoint_path = ",
        "    if job.checkpoint is not None and job.checkpoint.step < 0:\n        checkpoint_path = ",
        f"{_SUPERVISOR}a_killed_trainer_goes_on_from_its_last_checkpoint_at_no_cost",
    ),
]

_TASKS = "services/worker/graft_worker/tasks.py"
_RUN = "services/worker/graft_worker/supervisor/run.py"
WORKER = [
    _of(
        _TASKS,
        "a-busy-worker-keeps-the-bell",
        "an idle worker sleeps beside a job whose bell a busy one has swallowed",
        "    pass_on()\n",
        "",
        f"{_SUPERVISOR}a_bell_that_a_leaving_worker_hears_is_passed_on",
    ),
    _of(
        _TASKS,
        "two-jobs-on-one-gpu",
        "a worker that looks for work begins a second job on its GPU",
        """        if is_free:
            _work_until_idle(slot, neighbours)
""",
        """        if is_free or slot:
            _work_until_idle(slot, neighbours)
""",
        f"{_SUPERVISOR}a_bell_heard_while_the_worker_is_busy_is_passed_on_and_then_answered",
    ),
    _of(
        _TASKS,
        "an-earlier-life-is-forgotten",
        "a restarted worker's job waits for a whole lease",
        "    for lost in neighbours.leases.release_of(slot.holder, neighbours.place):",
        "    for lost in neighbours.leases.release_of(slot.worker, neighbours.place):",
        f"{_SUPERVISOR}a_worker_takes_back_at_once_what_its_earlier_life_left_running",
    ),
    _of(
        _RUN,
        "every-run-has-the-whole-time",
        "a job that is interrupted often outlives its 'max_duration_seconds'",
        "boottime() + limit - self._job.gpu_seconds",
        "boottime() + limit",
        f"{_SUPERVISOR}the_time_of_earlier_runs_counts_for_a_jobs_limit",
    ),
    _of(
        _RUN,
        "a-given-back-job-is-not-rung-for",
        "a drained job waits for the reconciler though others are idle",
        "            self._neighbours.doorbell.ring(job.id, queue_for(after.stage, after.gpu_class))\n",
        "            pass\n",
        f"{_SUPERVISOR}a_drained_worker_saves_a_checkpoint_and_gives_the_job_back_uncharged",
    ),
    _of(
        _RUN,
        "a-drain-is-a-failure",
        "what a drain interrupts is charged to the job as a crash",
        "failure = failure_from(error) if watch.stop_reason is None else stopped(watch.stop_reason)",
        "failure = failure_from(error)",
        f"{_SUPERVISOR}a_drain_while_the_bucket_is_away_costs_no_attempt",
    ),
    _of(
        "services/worker/graft_worker/supervisor/preparation.py",
        "bell-before-the-commit",
        "a trainer wakes, finds nothing and sleeps; the job is committed after",
        "    handed = patience.wait_for(",
        "    neighbours.doorbell.ring(job.id, queue_for(job.stage, job.gpu_class))\n    handed = patience.wait_for(",
        f"{_SUPERVISOR}a_bell_is_rung_for_what_can_be_claimed_already",
    ),
    _of(
        "services/worker/graft_worker/supervisor/child.py",
        "grandchildren-live-on",
        "what a trainer has started goes on after its job has ended",
        "        code = self._process.wait()\n        self.kill()\n",
        "        code = self._process.wait()\n",
        f"{_SUPERVISOR}what_a_child_started_ends_with_it",
    ),
    _of(
        "services/worker/graft_worker/supervisor/child.py",
        "a-child-inherits-everything",
        "a trainer knows the database, the bucket's keys and the hub's token",
        "name: value for name, value in os.environ.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)",
        "name: value for name, value in os.environ.items()",
        f"{_SUPERVISOR}a_child_gets_no_token_and_no_address_of_a_neighbour",
    ),
    _of(
        "services/worker/graft_worker/supervisor/leftovers.py",
        "leftovers-of-the-living",
        "an idle worker removes the folder that a busy one works in",
        "                if is_free:\n                    _empty",
        "                if slot or is_free:\n                    _empty",
        f"{_SUPERVISOR}what_killed_workers_of_this_host_left_is_removed_and_what_a_live_one_works_on_is_not",
    ),
    _of(
        "services/worker/graft_worker/supervisor/locks.py",
        "a-forked-process-keeps-the-lock",
        "a slot stays taken for as long as something that was forked meanwhile lives",
        "    fcntl.flock(fd, fcntl.LOCK_UN)\n",
        "",
        f"{_SUPERVISOR}a_slot_is_free_again_though_a_process_forked_meanwhile_lives_on",
    ),
    _of(
        "services/worker/graft_worker/place.py",
        "a-name-is-held-by-the-pool",
        "a killed worker cannot be started again while a process of its pool is left",
        "fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "tests/integration/test_place.py::test_a_name_is_free_again_when_its_worker_is_dead_though_a_process_of_its_pool_lives_on",
    ),
    _of(
        "services/worker/graft_worker/supervisor/patience.py",
        "patience-hears-no-order",
        "a cancelled job waits for the bucket to its patience's end",
        "        while not self.gave_up():",
        "        while self.gave_up is not None:",
        f"{_SUPERVISOR}a_cancel_reaches_a_run_that_waits_for_the_bucket",
    ),
]

_FILE = "shared/graft_shared/reconciler.py"
RECONCILER = [
    _of(
        _FILE,
        "expired-leases-stay",
        "the job of a lost worker is never given to another",
        "for job in self.leases.release_expired():",
        "for job in self.leases.release_of('', ''):",
        f"{_RECONCILER}a_job_whose_worker_was_lost_is_queued_again_and_rung[sqlite]",
    ),
    _of(
        _FILE,
        "bells-for-the-busy",
        "bells lie in the queues of workers that cannot answer",
        "self.workers.idle()",
        "self.workers.alive()",
        f"{_RECONCILER}no_more_bells_are_rung_than_workers_are_idle[sqlite]",
    ),
    _of(
        _FILE,
        "a-reconciler-dies-with-the-store",
        "after the database was away once, nothing is ever given back",
        "            except StoreUnavailable as error:",
        "            except (StoreUnavailable if every is None else ZeroDivisionError) as error:",
        f"{_RECONCILER}a_database_that_is_away_is_waited_for",
    ),
    _of(
        _FILE,
        "the-dead-are-remembered",
        "the table of workers grows with every container",
        "        self.workers.forget_dead()\n",
        "",
        f"{_RECONCILER}a_worker_not_seen_for_a_day_is_forgotten[sqlite]",
    ),
]

MUTANTS = [*WATCH, *OUTCOMES, *GUARD, *ARTIFACTS, *WORKER, *RECONCILER]
