"""From a request in OpenAI's words to the body of a native job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graft_api.compatible.names import LONGEST_MODEL, MODEL_PATTERN, base_and_job_of_model
from graft_api.parsing import error_of
from graft_shared.errors import InvalidParameter
from graft_shared.specs import FILE_ID_PATTERN, METADATA_SCHEMA, NO_NUL, Training

DEFAULTS = Training()
LARGEST_ACCUMULATION = 4096  # of `gradient_accumulation_steps`

Auto = Literal["auto"]

_EXAMPLE: dict[str, Any] = {
    "model": "meta-llama/Llama-2-7b-hf",
    "training_file": "file-9aQ2mXw7Lk4TzR8vBn3YcD6f",
    "suffix": "support-bot",
    "seed": 7,
    "metadata": {"team": "search"},
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Hyperparameters(_Part):
    """The recipe; what is `auto` or left out is the default of a native job."""

    batch_size: Auto | Annotated[int, Field(ge=1, le=LARGEST_ACCUMULATION)] | None = Field(
        default="auto", description=f"Sequences per update. auto: {DEFAULTS.sequences_per_update}."
    )
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0)] | None = Field(
        default="auto", description=f"Times our learning rate, which is {DEFAULTS.learning_rate:g}. auto: 1."
    )
    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] | None = Field(
        default="auto", description=f"auto: {DEFAULTS.num_train_epochs:g}."
    )


class Supervised(_Part):
    """The only method."""

    hyperparameters: Hyperparameters | None = None


class Method(_Part):
    """How the base is tuned: `supervised`."""

    type: Literal["supervised", "dpo", "reinforcement"] = Field(
        description="The last two are refused with 422.", json_schema_extra={"const": "supervised"}
    )
    supervised: Supervised | None = None
    dpo: dict[str, Any] | None = Field(default=None, description="Refused.", json_schema_extra={"type": "null"})
    reinforcement: dict[str, Any] | None = Field(
        default=None, description="Refused.", json_schema_extra={"type": "null"}
    )


class FineTuningRequest(_Part):
    """One fine-tune, as OpenAI's clients ask for it."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    model: str = Field(
        pattern=MODEL_PATTERN,
        max_length=LONGEST_MODEL,
        description="A base model or an adapter of GET /v1/models, or a base that the operator allows from the hub.",
    )
    training_file: str = Field(pattern=FILE_ID_PATTERN)
    validation_file: Annotated[str, Field(pattern=FILE_ID_PATTERN)] | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=NO_NUL)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    metadata: Annotated[dict[str, str], Field(json_schema_extra=METADATA_SCHEMA)] | None = None
    hyperparameters: Hyperparameters | None = Field(default=None, description="OpenAI's older place for them.")
    method: Method | None = None
    integrations: list[Any] | None = Field(
        default=None, description="None or an empty list: there are none here.", json_schema_extra={"maxItems": 0}
    )


def native_body(body: Any) -> dict[str, Any]:
    """The native body that asks for the same job; what the request leaves out is left out there too.

    Raises:
        UnknownParameter: A key that no such request has.
        InvalidParameter: A value of the wrong type or out of its bounds; or something that is not offered here.
    """
    request = _parsed(body)
    _refuse_what_is_not_offered(request)
    training = _training(_hyperparameters(request))
    if request.seed is not None:
        training["seed"] = request.seed
    base_model, earlier_job = base_and_job_of_model(request.model)
    optional = {
        "adapter": {"job": earlier_job} if earlier_job is not None else None,
        "validation": {"file": request.validation_file} if request.validation_file is not None else None,
        "training": training or None,
        "name": request.suffix,
        "metadata": request.metadata,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return {"base_model": base_model, "dataset": {"file": request.training_file}, **given}


def _parsed(body: Any) -> FineTuningRequest:
    if not isinstance(body, dict):
        raise InvalidParameter("The body must be a JSON object: the fine-tuning request.")
    try:
        return FineTuningRequest.model_validate(body)
    except ValidationError as error:
        raise error_of(error.errors(), body=body, model=FineTuningRequest) from error


def _refuse_what_is_not_offered(request: FineTuningRequest) -> None:
    method = request.method
    if method is not None and method.type != "supervised":
        raise InvalidParameter(param="method.type", reason=f"only 'supervised' is offered here, not '{method.type}'")
    for name in ("dpo", "reinforcement"):
        if method is not None and getattr(method, name) is not None:
            raise InvalidParameter(param=f"method.{name}", reason="it does not belong to a method of type 'supervised'")
    if request.integrations:
        raise InvalidParameter(
            param="integrations", reason="none are offered here; GET /jobs/{id}/metrics has the curves of a job"
        )


def _hyperparameters(request: FineTuningRequest) -> Hyperparameters:
    supervised = request.method.supervised if request.method is not None else None
    there = supervised.hyperparameters if supervised is not None else None
    if request.hyperparameters is not None and there is not None and request.hyperparameters != there:
        reason = "they stand under 'method' too, and differ; give them in one place"
        raise InvalidParameter(param="hyperparameters", reason=reason)
    return there or request.hyperparameters or Hyperparameters()


def _training(asked: Hyperparameters) -> dict[str, Any]:
    training: dict[str, Any] = {}
    if isinstance(asked.n_epochs, int):
        training["num_train_epochs"] = asked.n_epochs
    if isinstance(asked.batch_size, int):
        training |= _split(asked.batch_size)
    if isinstance(asked.learning_rate_multiplier, int | float):
        training["learning_rate"] = float(f"{asked.learning_rate_multiplier * DEFAULTS.learning_rate:.12g}")
    return training


def _split(batch_size: int) -> dict[str, int]:
    """The sequences of one update as the two numbers of a spec; the planner splits them into microbatches anew."""
    most = DEFAULTS.per_device_train_batch_size
    per_device = max(part for part in range(1, most + 1) if batch_size % part == 0)
    return {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": batch_size // per_device,
    }
