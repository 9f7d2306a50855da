"""Jobs for tests of the store and the supervisor."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from graft_shared.capacity import Placement
from graft_shared.defaults import load_capacity
from graft_shared.ids import new_job_id
from graft_shared.jobs import Stage
from graft_shared.memory import MemoryEstimate, Recompute, TrainingPlan
from graft_shared.specs import JobSpec, Optim
from graft_shared.store import NewJob

_numbers = itertools.count()

A_PLAN = TrainingPlan(
    recompute=Recompute.NONE, recompute_every_n=0, microbatch_tokens=512, packing=True, optim=Optim.ADAMW_8BIT
)


def a_spec(**changes: Any) -> dict[str, Any]:
    """A valid normalised spec."""
    body = {"base_model": "graft/tiny", "dataset": {"file": "file-rows"}, **changes}
    return JobSpec.model_validate(body).model_dump(mode="json", by_alias=True)


def a_new_job(
    *, tenant: str = "default", gpu_class: str = "cpu", key: str | None = None, sha: str = "s", **spec: Any
) -> NewJob:
    """A job that admission has accepted."""
    return NewJob(
        id=new_job_id(),
        tenant=tenant,
        spec=a_spec(**spec),
        plan=A_PLAN.to_dict(),
        placement={"target_modules": ["q_proj"], "max_position_embeddings": 128},
        gpu_class=gpu_class,
        request_sha256=sha,
        idempotency_key=key,
    )


def a_placement(gpu_class: str = "cpu") -> Placement:
    """Where a job goes on after it ran out of memory."""
    gpu = load_capacity().get(gpu_class)
    assert gpu is not None
    plan = replace(A_PLAN, recompute=Recompute.FULL, recompute_every_n=1)
    estimate = MemoryEstimate(components={"base_weights": 1000})
    return Placement(gpu_class=gpu, plan=plan, estimate=estimate, target_modules=("q_proj",))


def a_beat(name: str = "w", *, place: str = "here", gpu_class: str = "cpu", **changes: Any) -> dict[str, Any]:
    """What a worker that trains on one class says of itself."""
    facts = {"device": "a device", "stages": (Stage.TRAIN,), "takes_classes": (gpu_class,)}
    return {"name": name, "place": place, "gpu_class": gpu_class, **facts, **changes}
