"""Going on from an earlier adapter: the new job takes over its base and its form."""

from __future__ import annotations

from typing import Any

from graft_shared.errors import InvalidParameter, JobNotFound
from graft_shared.jobs import Job
from graft_shared.specs import JobSpec, Lora
from graft_shared.store import Jobs

_FORM = ("r", "lora_alpha", "target_modules", "use_rslora")  # what makes two adapters fit each other


def going_on(tenant: str, spec: JobSpec, jobs: Jobs) -> JobSpec:
    """The spec with revision and form of the earlier adapter, where it names one; else as it is.

    What the spec says of them itself must be the same: weights of one form mean nothing in another.

    Raises:
        InvalidParameter: There is no such adapter, or it has another base, revision or form.
    """
    if spec.adapter is None:
        return spec
    earlier = _earlier(tenant, spec.adapter.job, jobs)
    if spec.base_model != earlier.spec["base_model"]:
        raise _refused("base_model", spec.base_model, earlier.spec["base_model"], earlier)
    asked = earlier.spec["revision"]
    revision = (earlier.prepared or {}).get("base_commit") or asked  # a branch may have moved since
    if "revision" in spec.model_fields_set and spec.revision not in (asked, revision):
        raise _refused("revision", spec.revision, revision, earlier)
    return spec.model_copy(update={"revision": revision, "lora": _form(spec, earlier)})


def _earlier(tenant: str, job_id: str, jobs: Jobs) -> Job:
    try:
        job = jobs.get(tenant, job_id)
    except JobNotFound as error:
        raise InvalidParameter(param="adapter.job", reason=f"there is no job '{job_id}'") from error
    if job.adapter is None:
        reason = f"the job '{job_id}' is '{job.status}', and only one that has succeeded has an adapter"
        raise InvalidParameter(param="adapter.job", reason=reason)
    return job


def _form(spec: JobSpec, earlier: Job) -> Lora:
    lora = Lora.model_validate(earlier.spec["lora"])
    named = spec.lora.model_fields_set if "lora" in spec.model_fields_set else frozenset()
    for name in _FORM:
        asked, there = getattr(spec.lora, name), getattr(lora, name)
        if name in named and asked != there and not _are_targets(asked, earlier):
            raise _refused(f"lora.{name}", asked, there, earlier)
    return spec.lora.model_copy(update={name: getattr(lora, name) for name in _FORM})


def _are_targets(asked: Any, earlier: Job) -> bool:
    """Whether these modules, named one by one, are those that the earlier job's word stood for."""
    return isinstance(asked, tuple) and set(asked) == set(earlier.placement["target_modules"])


def _refused(param: str, asked: Any, there: Any, earlier: Job) -> InvalidParameter:
    said = list(there) if isinstance(there, tuple) else there
    reason = f"the adapter of '{earlier.id}' has {said!r}, this job asks for {asked!r}; leave it out, or give the same"
    return InvalidParameter(param=param, reason=reason)
