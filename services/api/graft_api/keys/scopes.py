"""What a key may do: the scopes, of which every route but those that are everybody's names one."""

from __future__ import annotations

from enum import StrEnum


class Scope(StrEnum):
    """One thing that a key may be allowed."""

    JOBS_READ = "jobs:read"  # jobs, their history and their adapters; estimates
    JOBS_WRITE = "jobs:write"  # submit, cancel, pause, resume, delete
    FILES_READ = "files:read"
    FILES_WRITE = "files:write"  # upload, delete
    WEBHOOKS = "webhooks"  # the tenant's signing secret, and a webhook to try one out
    METRICS = "metrics"  # the service's figures over all tenants


ALL = frozenset(Scope)
USUAL = tuple(scope for scope in Scope if scope is not Scope.METRICS)  # of a key for which nothing else was said
