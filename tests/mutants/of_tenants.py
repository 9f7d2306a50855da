"""Mutants of what keeps tenants apart and to their shares: quotas, the fair share, deleting, resending, keys."""

# ruff: noqa: E501 (lines of the code that they change)

from __future__ import annotations

from tests.mutants.mutant import Mutant

_MACHINE = "tests/integration/test_store_machine.py::test_the_store_does_what_its_model_says_on_sqlite"
_TENANTS = "tests/integration/test_tenants.py"
_API_KEYS = "tests/unit/test_api_keys.py"
_LEASES = "shared/graft_shared/store/leases.py"
_QUOTAS = "shared/graft_shared/store/quotas.py"
_LINE = "shared/graft_shared/store/line.py"
_JOBS = "shared/graft_shared/store/jobs.py"
_RESENDS = "shared/graft_shared/store/resends.py"
_KEYS = "shared/graft_shared/store/keys.py"
_RING = "services/api/graft_api/keys/ring.py"
_AUTH = "services/api/graft_api/auth.py"


def _of(file: str, name: str, breaks: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name=name, breaks=breaks, file=file, old=old, new=new, tests=tests or (_MACHINE,))


SHARES = [
    _of(
        _QUOTAS,
        "running-jobs-do-not-count",
        "a tenant with many running jobs gets the next worker too",
        "return self.runs * 1.0 / self.share, self.lately / self.share",
        "return (self.lately / self.share,)",
    ),
    _of(
        _QUOTAS,
        "use-does-not-count",
        "a tenant with many jobs keeps all others waiting for the only worker",
        "return self.runs * 1.0 / self.share, self.lately / self.share",
        "return (self.runs * 1.0 / self.share,)",
    ),
    _of(
        _QUOTAS,
        "shares-do-not-count",
        "what the operator says of a tenant's share changes nothing",
        "return self.runs * 1.0 / self.share, self.lately / self.share",
        "return self.runs * 1.0, self.lately",
    ),
    _of(
        _QUOTAS,
        "what-is-at-it-has-used-nothing",
        "long runs cost their tenant nothing until they end",
        "self.lately = func.coalesce(self._used.c.lately, 0.0) + seconds_now",
        "self.lately = func.coalesce(self._used.c.lately, 0.0)",
    ),
    _of(
        _QUOTAS,
        "what-was-used-is-never-forgotten",
        "who used idle workers last week waits for others this week",
        "LATELY = timedelta(days=1)",
        "LATELY = timedelta(days=20)",
        f"{_TENANTS}::test_nobody_who_has_waited_is_passed_by_for_what_was_used_the_day_before_yesterday[sqlite]",
    ),
    _of(
        _QUOTAS,
        "preparing-counts-as-training",
        "data that is prepared costs its tenant the next GPU",
        ".where(worker_time.c.stage == stage.value, day >=",
        ".where(day >=",
    ),
    _of(
        _LEASES,
        "a-lost-run-has-used-nothing",
        "runs whose worker was lost do not count in a fair share",
        "            count_run(connection, job_id, epoch)\n            taken_off",
        "            taken_off",
    ),
    _of(
        _QUOTAS,
        "a-lost-run-is-counted-until-it-is-noticed",
        "a worker that was lost while reconcilers were away costs its tenant the hours until they came back",
        "case((jobs.c.lease_expires_at < now(), jobs.c.lease_expires_at), else_=now())",
        "now()",
    ),
    _of(
        _LINE,
        "places-ignore-what-runs",
        "a job is told a place in which it is not claimed",
        "runs_then = self.runs + self.higher + number",
        "runs_then = self.higher + number",
        f"{_TENANTS}::test_places_in_line_are_the_order_of_the_claims[sqlite]",
    ),
    _of(
        _LINE,
        "places-count-what-a-quota-holds",
        "a job is told to wait for jobs that may not begin",
        "ahead += int(min(other.may_go, other.higher + before))",
        "ahead += int(other.higher + before)",
    ),
]

BUDGETS = [
    _of(
        _QUOTAS,
        "one-place-too-many",
        "a tenant has one job more in the queue than it may",
        "if others >= most_jobs:",
        "if others > most_jobs:",
    ),
    _of(
        _QUOTAS,
        "what-is-prepared-takes-no-place",
        "a tenant fills the queue by way of preparing",
        "    waits = or_(jobs.c.state == JobState.QUEUED.value, being_prepared)\n    return select(func.count())",
        "    waits = or_(jobs.c.state == JobState.QUEUED.value, and_(being_prepared, jobs.c.epoch < 0))\n    return select(func.count())",
    ),
    _of(
        _QUOTAS,
        "queues-are-counted-by-many-at-once",
        "two submissions take one place",
        '        one_at_a_time(connection, f"queue of {tenant}")\n',
        "",
        f"{_TENANTS}::test_many_submissions_at_once_fill_a_queue_and_no_more[postgres]",
    ),
    _of(
        _QUOTAS,
        "rooms-are-counted-by-many-at-once",
        "two uploads take one place in the bucket",
        '        one_at_a_time(connection, f"files of {tenant}")\n',
        "        pass\n",
        f"{_TENANTS}::test_many_uploads_at_once_fill_the_room_and_no_more[postgres]",
    ),
    _of(
        _QUOTAS,
        "runs-are-counted-by-many-at-once",
        "two claims begin one run too many",
        '    one_at_a_time(connection, f"training of {tenant}")\n',
        "",
        f"{_TENANTS}::test_many_claims_at_once_begin_as_many_runs_as_may_be[postgres]",
    ),
    _of(
        _QUOTAS,
        "one-run-too-many",
        "a tenant trains one job more at once than it may",
        "return int(connection.execute(query).scalar_one()) < limit",
        "return int(connection.execute(query).scalar_one()) <= limit",
        f"{_TENANTS}::test_many_claims_at_once_begin_as_many_runs_as_may_be[postgres]",
    ),
    _of(
        _QUOTAS,
        "the-claim-knows-no-gpu-hours",
        "a queue that was filled in time trains for ever",
        "or_(self.most_seconds.is_(None), self.this_month < self.most_seconds)",
        "or_(self.most_seconds.is_(None), self.this_month < 10**12)",
    ),
    _of(
        _QUOTAS,
        "hours-of-all-months-count",
        "a tenant that has used up a month's GPU-hours never trains again",
        "this_month = func.sum(case((day >= month, seconds), else_=0.0))",
        "this_month = func.sum(seconds)",
        f"{_TENANTS}::test_a_month_whose_gpu_hours_are_used_up_begins_nothing_and_the_next_one_does[sqlite]",
    ),
    _of(
        _QUOTAS,
        "the-settings-go-before-the-operator",
        "a quota that was changed for one tenant is not",
        "return func.coalesce(own, default) if default is not None else own",
        "return func.coalesce(default, own) if default is not None else own",
    ),
    _of(
        _QUOTAS,
        "one-byte-too-many",
        "a tenant stores more than it may",
        "if stored + size > limit:",
        "if stored > limit:",
    ),
    _of(
        _JOBS,
        "a-full-queue-hides-the-job-of-a-key",
        "the last place taken, its own request is refused when it comes again",
        "except (IntegrityError, QuotaExceeded):",
        "except IntegrityError:",
        f"{_TENANTS}::test_one_key_makes_one_job_though_it_takes_the_last_place",
    ),
]

DELETED = [
    _of(
        "shared/graft_shared/store/rows.py",
        "a-deleted-job-is-seen",
        "what was deleted is still answered",
        "return and_(jobs.c.deleted_at.is_(None), jobs.c.merges.is_(None))",
        "return jobs.c.merges.is_(None)",
    ),
    _of(
        _JOBS,
        "a-running-job-can-be-deleted",
        "a job is trained that nobody can see",
        "            if state not in TERMINAL_STATES:\n                raise JobNotEnded",
        "            if state is JobState.QUEUED:\n                raise JobNotEnded",
    ),
    _of(
        _JOBS,
        "a-deleted-job-keeps-its-key",
        "a key is taken by a job that nobody can see",
        '"sweep_at": now(), "idempotency_key": None}',
        '"sweep_at": now()}',
    ),
    _of(
        _JOBS,
        "a-deleted-job-is-never-swept",
        "the artifacts of a deleted job stay for ever",
        'gone = {"deleted_at": now(), "sweep_at": now(),',
        'gone = {"deleted_at": now(),',
    ),
]

RESENT = [
    _of(
        _RESENDS,
        "a-new-request-is-taken-for-a-repetition",
        "two equal requests make one job",
        "counted = jobs.c.sent_before.is_not(None) if sending.sent_before else jobs.c.sent_before > 0",
        "counted = jobs.c.sent_before.is_not(None)",
    ),
    _of(
        _RESENDS,
        "a-slow-first-sending-makes-a-second-job",
        "a request that was overtaken by its repetition is trained twice",
        "counted = jobs.c.sent_before.is_not(None) if sending.sent_before else jobs.c.sent_before > 0",
        "counted = jobs.c.sent_before.is_not(None) if sending.sent_before else jobs.c.sent_before < 0",
    ),
    _of(
        _RESENDS,
        "a-repetition-finds-what-was-asked-long-ago",
        "a job of last week is answered to a request of today",
        "jobs.c.created_at >= sending.first_at.timestamp() - CLOCK_GRAIN_SECONDS,",
        "jobs.c.created_at >= 0,",
    ),
    _of(
        _RESENDS,
        "a-repetition-finds-anothers-job",
        "one tenant's request is answered with another's job",
        "        jobs.c.tenant == tenant,\n",
        "",
    ),
    _of(
        _RESENDS,
        "a-repetition-finds-a-deleted-job",
        "a job is answered that was deleted",
        "        jobs.c.deleted_at.is_(None),\n",
        "",
        "tests/integration/test_resends.py::test_a_repetition_whose_job_was_deleted_makes_another[sqlite]",
    ),
]

KEYS = [
    _of(
        _KEYS,
        "a-revoked-key-is-live",
        "a key that leaked cannot be taken back",
        "and_(api_keys.c.revoked_at.is_(None), or_",
        "and_(api_keys.c.created_at.is_not(None), or_",
        f"{_API_KEYS}::test_keys_that_have_expired_are_refused_and_those_that_are_revoked_within_seconds",
    ),
    _of(
        _KEYS,
        "an-expired-key-is-live",
        "a key holds longer than it was made for",
        "or_(api_keys.c.expires_at.is_(None), _EXPIRES_LATER)",
        "or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > 0)",
        f"{_API_KEYS}::test_keys_that_have_expired_are_refused_and_those_that_are_revoked_within_seconds",
    ),
    _of(
        _RING,
        "an-id-is-enough",
        "whoever has seen a list of keys may use them",
        "if not hmac.compare_digest(making.digest_of(key, pepper), expected) or stored is None:",
        "if stored is None:",
        f"{_API_KEYS}::test_a_key_is_kept_as_a_digest_that_needs_the_pepper",
    ),
    _of(
        _RING,
        "the-last-revoked-key-opens-the-service",
        "a service whose keys have all been revoked serves whoever asks",
        "bool(live) or self._stored.any()",
        "bool(live)",
        f"{_API_KEYS}::test_the_first_key_closes_a_service_that_was_open_and_the_last_does_not_open_it",
    ),
    _of(
        _RING,
        "keys-are-read-at-every-request",
        "each request costs the database a look",
        "if held is not None and time.monotonic() < held.at + seconds:\n            return held\n        return await",
        "if held is not None and time.monotonic() < held.at:\n            return held\n        return await",
        f"{_API_KEYS}::test_requests_do_not_ask_the_database_for_their_key",
    ),
    _of(
        _AUTH,
        "scopes-are-not-looked-at",
        "a key that may read deletes",
        "if scope not in caller.scopes:",
        "if not scope:",
        f"{_API_KEYS}::test_each_route_needs_the_scope_that_the_document_names",
    ),
    _of(
        _AUTH,
        "pages-of-elsewhere-are-let-in",
        "any page that is open on a machine with a service without keys reads and starts its jobs",
        "if not caller.has_key:",
        "if not caller.tenant:",
        f"{_API_KEYS}::test_without_keys_no_page_of_elsewhere_may_read_or_change_anything",
    ),
]

MUTANTS = [*SHARES, *BUDGETS, *DELETED, *RESENT, *KEYS]
