"""Mutants of the store and of what decides for it. The machine must kill all that one thread can show."""

# ruff: noqa: E501 (lines of the code that they change)

from __future__ import annotations

from tests.mutants.mutant import Mutant

_MACHINE = "tests/integration/test_store_machine.py::test_the_store_does_what_its_model_says_on_sqlite"
_STORE = "tests/integration/test_store.py"
_LOST_MACHINE = (
    "tests/integration/test_postgres.py"
    "::test_a_machine_lost_in_mid_transaction_holds_up_its_own_job_and_account_and_those_for_seconds"
)
_FORKS = "shared/graft_shared/store/forks.py"
_LEASES = "shared/graft_shared/store/leases.py"
_JOBS = "shared/graft_shared/store/jobs.py"
_ROWS = "shared/graft_shared/store/rows.py"
_WORKERS = "shared/graft_shared/store/workers.py"
_DECISIONS = "shared/graft_shared/jobs.py"


def _of(file: str, name: str, breaks: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name=name, breaks=breaks, file=file, old=old, new=new, tests=tests or (_MACHINE,))


FENCES = [
    _of(
        _FORKS,
        "fork-does-not-wait",
        "a process forked in the middle of a transaction on SQLite keeps its lock for ever",
        "            self._wait(lambda: not self._inside)\n",
        "",
        "tests/integration/test_forks.py::test_a_process_forked_beside_a_transaction_locks_nobody_out",
    ),
    _of(
        _LEASES,
        "claim-keeps-the-epoch",
        "a new run has the epoch of the one before, whose late writes it cannot be told from",
        'epoch = best["epoch"] + 1',
        'epoch = best["epoch"]',
    ),
    _of(
        _ROWS,
        "fence-ignores-the-epoch",
        "a late worker writes into the run of another",
        "jobs.c.id == job_id, jobs.c.epoch == epoch, jobs.c.state == state.value",
        "jobs.c.id == job_id, jobs.c.state == state.value",
    ),
    _of(
        _ROWS,
        "fence-ignores-the-state",
        "a run that has ended is written to",
        "jobs.c.id == job_id, jobs.c.epoch == epoch, jobs.c.state == state.value",
        "jobs.c.id == job_id, jobs.c.epoch == epoch",
    ),
    _of(
        _LEASES,
        "renew-ignores-the-state",
        "a job that has ended gets a lease",
        """            row = compare_and_set(connection, job_id, epoch, JobState.RUNNING, lease_expires_at=now() + self._lease)
        return""",
        """            held = update(jobs).where(jobs.c.id == job_id, jobs.c.epoch == epoch).returning(jobs)
            row = connection.execute(held.values(lease_expires_at=now() + self._lease)).mappings().one_or_none()
            if row is None:
                raise LeaseLost(job_id=job_id, epoch=epoch)
        return""",
    ),
    _of(
        _LEASES,
        "orders-ignore-the-epoch",
        "a late worker hears the orders of the run after it, and goes on",
        'jobs.c.id == bindparam("job"), jobs.c.epoch == bindparam("by"), jobs.c.state == JobState.RUNNING.value',
        'jobs.c.id == bindparam("job"), jobs.c.state == JobState.RUNNING.value',
    ),
    _of(
        _LEASES,
        "renew-does-not-renew",
        "a lease runs out however often it is renewed",
        """JobState.RUNNING, lease_expires_at=now() + self._lease)
        return""",
        """JobState.RUNNING, epoch=epoch)
        return""",
    ),
    _of(
        _LEASES,
        "expiry-forgets-the-epoch",
        "a worker that was given up can still settle once its job is claimed anew and lost again",
        '{"epoch": epoch + 1, "gpu_seconds"',
        '{"epoch": epoch, "gpu_seconds"',
    ),
    _of(
        _LEASES,
        "success-keeps-the-lease",
        "a job that has succeeded still holds a lease, and its worker looks busy",
        "                gpu_seconds=_gpu_seconds(),\n                **_no_lease(),\n            )",
        "                gpu_seconds=_gpu_seconds(),\n            )",
    ),
    _of(
        _LEASES,
        "release-asks-nobody-where-he-lives",
        "a worker of the same name elsewhere gives back the leases of one that lives",
        "workers.c.name == name_of(worker), workers.c.place == place, ",
        "workers.c.name == name_of(worker), ",
    ),
    _of(
        _LEASES,
        "release-takes-what-was-claimed-elsewhere",
        "a worker that is cut off trains on while its job is trained where its name went",
        "workers.c.place == place, workers.c.started_at <= jobs.c.claimed_at",
        "workers.c.place == place",
    ),
    _of(
        _WORKERS,
        "a-name-that-moves-is-no-younger",
        "a worker that is cut off trains on while its job is trained where its name went",
        "case((workers.c.place == place, workers.c.started_at), else_=now())",
        "workers.c.started_at",
    ),
    _of(
        _WORKERS,
        "beat-takes-a-living-name",
        "two workers of one name take turns to own it, and each other's jobs",
        "or_(workers.c.place == place, workers.c.seen_at < now() - ALIVE_FOR.total_seconds())",
        "or_(workers.c.place == place, workers.c.seen_at < now())",
    ),
    _of(
        _LEASES,
        "a-lease-is-waited-for",
        "no lease is given back while a lost machine's transaction holds one tenant's account",
        "            wait_at_most(connection, FENCE_WAIT_SECONDS)\n",
        "",
        _LOST_MACHINE,
    ),
    _of(
        "shared/graft_shared/store/postgres.py",
        "a-transaction-may-stand-still",
        "a lost machine keeps its locks for hours",
        "set idle_in_transaction_session_timeout = '{STILL_SECONDS}s'",
        "set idle_in_transaction_session_timeout = '{100 * STILL_SECONDS}s'",
        _LOST_MACHINE,
    ),
    _of(
        "shared/graft_shared/store/engine.py",
        "sqlite-begins-without-the-lock",
        "of many workers that claim at once on SQLite, some fail",
        '"BEGIN" if read_only else "BEGIN IMMEDIATE"',
        '"BEGIN"',
        f"{_STORE}::test_one_job_is_claimed_by_one_worker_only[sqlite]",
        f"{_STORE}::test_many_at_once_with_one_key_make_one_job[sqlite]",
    ),
    _of(
        "shared/graft_shared/store/engine.py",
        "wal-on-every-sqlite",
        "versions of SQLite that lose committed writes in WAL mode are trusted with it",
        'return "WAL" if fixed else "DELETE"',
        'return "WAL"',
        f"{_STORE}::test_wal_is_used_only_where_sqlite_keeps_its_word",
    ),
]

CHECKPOINTS = [
    _of(
        _LEASES,
        "checkpoint-may-go-back",
        "a run that resumed from nothing throws away what was saved",
        "if last is not None and checkpoint.step < last.step:",
        "if last is not None and checkpoint.step < 0:",
        f"{_STORE}::test_a_checkpoint_never_falls_behind_the_committed_one[sqlite]",
    ),
    _of(
        _LEASES,
        "checkpoint-does-not-renew",
        "a long upload costs the lease",
        "                JobState.RUNNING,\n                lease_expires_at=now() + self._lease,\n            )\n            last",
        "                JobState.RUNNING,\n                epoch=epoch,\n            )\n            last",
    ),
    _of(
        _LEASES,
        "the-first-checkpoint-is-progress",
        "a job that dies before its first step again and again is tried for ever",
        """checkpoint["epoch"] == failed_epoch and checkpoint["step"] > 0""",
        """checkpoint["epoch"] == failed_epoch""",
    ),
    _of(
        _LEASES,
        "an-old-checkpoint-is-progress",
        "a job that has saved once is tried for ever",
        """checkpoint["epoch"] == failed_epoch and checkpoint["step"] > 0""",
        """checkpoint["step"] > 0""",
    ),
]

FAILURES = [
    _of(
        _DECISIONS,
        "drained-runs-are-charged",
        "an operator's restarts use up a user's attempts",
        "FailureReason.DRAINED: Remedy(\n        retry=Retry.FREE",
        "FailureReason.DRAINED: Remedy(\n        retry=Retry.CHARGED",
    ),
    _of(
        _DECISIONS,
        "poison-is-never-counted",
        "a job that kills its workers is tried for ever",
        "fruitless = 0 if made_progress else runs_without_progress + counted",
        "fruitless = 0",
    ),
    _of(
        _DECISIONS,
        "a-lost-run-keeps-its-attempt",
        "lost workers use up a user's attempts",
        "return Aftermath(state=state, attempt=attempt - 1, runs_without_progress=fruitless)",
        "return Aftermath(state=state, attempt=attempt, runs_without_progress=fruitless)",
    ),
    _of(
        _DECISIONS,
        "one-attempt-too-many",
        "a job is tried once more than was asked",
        "if attempt < max_attempts else",
        "if attempt <= max_attempts else",
    ),
    _of(
        _DECISIONS,
        "a-new-plan-is-charged",
        "looking for a plan that fits uses up a user's attempts",
        "return Aftermath(state=JobState.QUEUED, attempt=attempt - 1, runs_without_progress=fruitless)",
        "return Aftermath(state=JobState.QUEUED, attempt=attempt, runs_without_progress=fruitless)",
    ),
    _of(
        _DECISIONS,
        "a-failure-undoes-a-cancel",
        "a cancelled job whose worker is lost is trained on",
        "    if cancel_requested:\n        return Aftermath",
        "    if cancel_requested and attempt > 10**6:\n        return Aftermath",
    ),
    _of(
        _LEASES,
        "retries-do-not-wait-longer",
        "a neighbour that is away for a while uses up all attempts",
        'remedy.delays * 2 ** (row["attempt"] - 1)',
        "remedy.delays",
    ),
    _of(
        _LEASES,
        "a-bucket-that-is-away-is-asked-again-at-once",
        "a bucket that is away for five minutes uses up all attempts",
        'remedy.delays * 2 ** (row["attempt"] - 1)',
        '2 ** (row["attempt"] - 1)',
    ),
    _of(
        _LEASES,
        "retries-do-not-wait",
        "a charged failure is tried again at once",
        "        jobs.c.not_before <= now_once(),\n        ~jobs.c.pause_requested,\n",
        "        ~jobs.c.pause_requested,\n",
    ),
    _of(
        _LEASES,
        "a-paused-job-is-claimed",
        "a pause holds nothing up",
        "        ~jobs.c.pause_requested,\n",
        "",
    ),
    _of(
        _DECISIONS,
        "a-pause-is-a-step-towards-poison",
        "a job that is paused five times fails",
        "counted = 1 if retry is Retry.FREE else 0",
        "counted = 1 if retry in (Retry.FREE, Retry.UNCOUNTED) else 0",
    ),
    _of(
        _JOBS,
        "a-resumed-job-keeps-its-old-bell",
        "a job that was resumed waits for its bell to be old though workers are idle",
        "pause_requested=False, bell_rung_at=None)",
        "pause_requested=False)",
        f"{_STORE}::test_nobody_rings_for_a_paused_job_and_it_waits_for_no_worker[sqlite]",
    ),
    _of(
        _JOBS,
        "a-job-that-is-cancelled-can-be-paused",
        "an answer says that a job pauses, and it is cancelled",
        '    if row["cancel_requested"]:\n        raise JobCancelling(job_id=row["id"])\n',
        "",
        f"{_STORE}::test_a_paused_job_is_cancelled_at_once_and_a_pausing_one_is_cancelled_rather_than_paused[sqlite]",
    ),
    _of(
        _LEASES,
        "preparing-uses-up-attempts",
        "attempts of preparing are missing for training",
        "                attempt=0,\n                runs_without_progress=0,\n            )\n            add_event",
        "                runs_without_progress=0,\n            )\n            add_event",
    ),
    _of(
        _LEASES,
        "a-lost-run-costs-nothing",
        "time on the GPU of a run whose worker was lost is not added",
        '{"epoch": epoch + 1, "gpu_seconds": _gpu_seconds(), **_no_lease()}',
        '{"epoch": epoch + 1, **_no_lease()}',
    ),
    _of(
        _LEASES,
        "facts-overwrite-the-reason",
        "a failure whose facts name a reason of their own is told under that",
        '{**failure.facts, "reason": failure.reason.value, "attempt": row["attempt"]}',
        '{"reason": failure.reason.value, "attempt": row["attempt"], **failure.facts}',
    ),
    _of(
        _LEASES,
        "every-run-is-the-first",
        "a job that was taken up again says that it started with its last run",
        'started_at=best["started_at"] or now()',
        "started_at=now()",
    ),
]

CANCELS = [
    _of(
        _JOBS,
        "a-running-job-is-cancelled-at-once",
        "'cancelled' is told while the job is still trained",
        "            if state is JobState.QUEUED:\n                ended",
        "            if state in (JobState.QUEUED, JobState.RUNNING):\n                ended",
    ),
    _of(
        _JOBS,
        "a-finished-job-can-be-cancelled",
        "a cancel that came too late is answered as if it had not",
        "            if state in TERMINAL_STATES:\n                raise JobFinished",
        "            if state in TERMINAL_STATES:\n                return job_from(row)\n                raise JobFinished",
    ),
    _of(
        _LEASES,
        "a-cancelled-job-is-handed-over",
        "a job that was cancelled while it was prepared waits for a trainer that ends it",
        '            if row["cancel_requested"]:\n                row = _end',
        '            if row["cancel_requested"] and row["adapter"]:\n                row = _end',
    ),
    _of(
        _LEASES,
        "no-terminal-event",
        "who follows the events of a job never hears of its end",
        '    add_event(connection, row["id"], row["epoch"], state.value, message, level=level, data=data)\n    put_in',
        "    put_in",
    ),
]

QUEUES = [
    _of(
        _LEASES,
        "smaller-classes-first",
        "a large GPU is spent on what a small one could do",
        "ranks = {name: rank for rank, name in enumerate(gpu_classes)}",
        "ranks = {name: -rank for rank, name in enumerate(gpu_classes)}",
    ),
    _of(
        _LEASES,
        "low-priority-first",
        "urgent jobs wait longest",
        "order = [jobs.c.priority.desc(), *standing",
        "order = [jobs.c.priority, *standing",
    ),
    _of(
        _LEASES,
        "any-worker-takes-any-class",
        "a job is trained on a GPU that cannot hold it",
        "        eligible = and_(eligible, jobs.c.gpu_class.in_(gpu_classes))\n",
        "",
    ),
    _of(
        _LEASES,
        "taken-bells-are-not-marked",
        "every reconciler rings for the same job, again and again",
        "            if bells:\n                connection.execute(rung)\n",
        "",
    ),
    _of(
        _LEASES,
        "one-worker-gets-all-bells",
        "bells lie in a queue that nobody empties",
        "            free.remove(able)\n",
        "",
    ),
    _of(
        _LEASES,
        "a-requeued-job-keeps-its-bell",
        "a job that was given back waits until its old bell is old enough",
        '"bell_rung_at": None, **_no_lease()',
        "**_no_lease()",
    ),
    _of(
        _WORKERS,
        "busy-workers-are-idle",
        "bells are rung for workers that cannot answer",
        ".where(workers.c.name.not_in(_HOLDERS))",
        "",
    ),
]

TENANTS = [
    _of(
        _JOBS,
        "a-key-hides-another-body",
        "another job is answered than the one that was posted",
        'if row["request_sha256"] != request_sha256:',
        'if row["request_sha256"] == "":',
    ),
    _of(
        "shared/graft_shared/store/rows.py",
        "jobs-of-all-tenants",
        "whoever knows an id reads and cancels another tenant's job",
        'select(jobs).where(jobs.c.tenant == bindparam("of"), jobs.c.id == bindparam("job"), ',
        'select(jobs).where(jobs.c.id == bindparam("job"), ',
    ),
    _of(
        _JOBS,
        "lists-of-all-tenants",
        "everybody's jobs are listed for everybody",
        "wanted = select(jobs).where(jobs.c.tenant == tenant, is_there(), *conditions)",
        "wanted = select(jobs).where(is_there(), *conditions)",
    ),
    _of(
        _JOBS,
        "keys-of-all-tenants",
        "one tenant's key hides another's job",
        "query = select(jobs).where(jobs.c.tenant == tenant, jobs.c.idempotency_key == idempotency_key)",
        "query = select(jobs).where(jobs.c.idempotency_key == idempotency_key).limit(1)",
    ),
    _of(
        "shared/graft_shared/store/files.py",
        "files-of-all-tenants",
        "whoever knows an id trains on another tenant's file",
        "query = select(files).where(files.c.tenant == tenant, files.c.id == file_id)",
        "query = select(files).where(files.c.id == file_id)",
    ),
    _of(
        _LEASES,
        "a-warning-is-told-each-time",
        "a resumed job fills its history with what was told",
        'if warning not in row["warnings"]:',
        'if warning not in row["progress"]:',
    ),
]

MUTANTS = [*FENCES, *CHECKPOINTS, *FAILURES, *CANCELS, *QUEUES, *TENANTS]
