"""What things are called on the compatible surface: adapters, parameters; and back."""

from __future__ import annotations

import re
from typing import Any

from graft_shared.errors import GraftError, InvalidParameter
from graft_shared.jobs import Job
from graft_shared.specs import BASE_MODEL_PATTERN

_JOB_PREFIX = "ftjob-"
_ADAPTER = r"ft:(?P<base>[^:\s\x00]+):[A-Za-z0-9_-]+:[A-Za-z0-9._-]*:(?P<job>[A-Za-z0-9]{1,64})"
_MODEL = re.compile(_ADAPTER)
# What a model may be called in a request: a base, or an adapter. The parts have no names there: schemas know none.
MODEL_PATTERN = f"{BASE_MODEL_PATTERN}|^{re.sub(r'[?]P<[a-z]+>', '', _ADAPTER)}$"
LONGEST_MODEL = 400  # characters
_HYPERPARAMETERS = "method.supervised.hyperparameters"

# Parameters of a job's spec, and what they are called in the request that was translated into it.
PARAMS = {
    "base_model": "model",
    "adapter": "model",
    "adapter.job": "model",
    "dataset": "training_file",
    "dataset.file": "training_file",
    "validation": "validation_file",
    "validation.file": "validation_file",
    "name": "suffix",
    "training.seed": "seed",
    "training.num_train_epochs": f"{_HYPERPARAMETERS}.n_epochs",
    "training.per_device_train_batch_size": f"{_HYPERPARAMETERS}.batch_size",
    "training.gradient_accumulation_steps": f"{_HYPERPARAMETERS}.batch_size",
    "training.learning_rate": f"{_HYPERPARAMETERS}.learning_rate_multiplier",
}


def fine_tuned_model(job: Job) -> str:
    """The name of a job's adapter: base, tenant, the job's own name, and what finds the job again."""
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", job.spec["name"] or "")[:64]
    return f"ft:{job.spec['base_model']}:{job.tenant}:{suffix}:{job.id.removeprefix(_JOB_PREFIX)}"


def base_and_job_of_model(model: str) -> tuple[str, str | None]:
    """The base model that a name tells of and, of an adapter's name, the job that made it."""
    found = _MODEL.fullmatch(model)
    return (found["base"], _JOB_PREFIX + found["job"]) if found else (model, None)


def param_name(param: str | None) -> str | None:
    """The compatible name of a parameter, or the parameter itself where both surfaces have it."""
    return PARAMS.get(param, param) if param is not None else None


def renamed(error: GraftError) -> GraftError:
    """The error with its parameters under their compatible names."""
    facts: dict[str, Any] = dict(error.facts)
    if "errors" in facts:
        facts["errors"] = [{**each, "param": param_name(each["param"])} for each in facts["errors"]]
    if isinstance(error, InvalidParameter) and "reason" in facts and error.param is not None:
        return InvalidParameter(param=param_name(error.param), **facts)
    error.param, error.facts = param_name(error.param), facts
    return error
