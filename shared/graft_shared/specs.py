"""JobSpec: what a user asks for, in Hugging Face's names; frozen, and closed to unknown keys.

Names follow `transformers.BitsAndBytesConfig`, `peft.LoraConfig` and `trl.SFTConfig`. Common aliases of those libraries
are accepted and echoed under one name (`_ALIASES`). What is `"auto"` here is decided by the planner or by the GPU, and
the decision is shown in the job's `plan`.
"""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.config import JsonDict, JsonValue

MAX_METADATA_PAIRS = 16  # OpenAI's limits for metadata: 16 pairs, keys of 64 and values of 512 characters
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512
MOST_STEPS = 10_000_000
LONGEST_SECONDS = 366 * 24 * 3600  # of training: a year

BASE_MODEL_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"
FILE_ID_PATTERN = r"^file-[A-Za-z0-9]{1,64}$"
NO_NUL = r"^[^\x00]*$"  # of any text: no store can hold that character
METADATA_KEY_PATTERN = rf"^[^\s\[\]\x00]{{1,{MAX_METADATA_KEY}}}$"
REVISION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$"
HUB_DATASET_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$"

DEFAULT_REVISION = "main"
DEFAULT_MAX_LENGTH = 1024
DEFAULT_SEED = 42

BaseModelName = Annotated[str, Field(pattern=BASE_MODEL_PATTERN, max_length=200)]
FileId = Annotated[str, Field(pattern=FILE_ID_PATTERN)]
SHORTEST_MAX_LENGTH = 8
MaxLength = Annotated[int, Field(ge=SHORTEST_MAX_LENGTH, le=1_048_576)]
CompletionOnlyLoss = bool | Literal["auto"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


METADATA_SCHEMA: JsonDict = {
    "maxProperties": MAX_METADATA_PAIRS,
    "propertyNames": {"pattern": METADATA_KEY_PATTERN},
    "additionalProperties": {"type": "string", "maxLength": MAX_METADATA_VALUE, "pattern": NO_NUL},
}


class QuantType(StrEnum):
    """The 4-bit data type of the base (QLoRA, arXiv 2305.14314, section 3)."""

    NF4 = "nf4"
    FP4 = "fp4"


class ComputeDtype(StrEnum):
    """The type that products are computed in; `auto` takes bfloat16 where the card has it, else float16."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Optim(StrEnum):
    """Optimizers, under the names of `transformers.TrainingArguments.optim`."""

    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    PAGED_ADAMW_32BIT = "paged_adamw_32bit"
    ADAMW_8BIT = "adamw_8bit"
    ADAMW_TORCH = "adamw_torch"


class Scheduler(StrEnum):
    """Learning-rate schedules after the warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


class ReportTo(StrEnum):
    """Trackers that draw a job's curves, where the operator has set them up."""

    MLFLOW = "mlflow"
    TENSORBOARD = "tensorboard"


class Priority(StrEnum):
    """Which of a tenant's queued jobs goes first."""

    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_OF_HUB = ("split", "revision")


def _one_of(sources: dict[str, tuple[str, ...]]) -> JsonDict:
    """The JSON schema of a part that takes exactly one of these; with some of them others must be left out."""
    null: JsonDict = {"type": "null"}
    branches: list[JsonValue] = []
    for source, unfit in sources.items():
        others: JsonDict = {name: null for name in (*sources, *unfit) if name != source}
        branches.append({"required": [source], "properties": {source: {"not": null}, **others}})
    return {"oneOf": branches}


class DatasetSource(_Part):
    """Where rows come from: exactly one of an uploaded file, an object in an allowed bucket, or a hub dataset."""

    model_config = ConfigDict(json_schema_extra=_one_of({"file": _OF_HUB, "uri": _OF_HUB, "hub": ()}))

    file: FileId | None = None
    uri: Annotated[str, Field(pattern=r"^s3://[A-Za-z0-9._-]+/[^\n\x00]+$", max_length=1024)] | None = None
    hub: Annotated[str, Field(pattern=HUB_DATASET_PATTERN, max_length=200)] | None = None
    split: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=128)] | None = None
    revision: Annotated[str, Field(pattern=REVISION_PATTERN)] | None = None

    @field_validator("uri", "revision")
    @classmethod
    def _plain_path(cls, path: str | None) -> str | None:
        parts = (path or "").removeprefix("s3://").split("/")
        if path is not None and any(part in ("", ".", "..") for part in parts):
            raise ValueError("no part of the path may be empty, '.' or '..'")
        if path is not None and re.search(r"[\x00-\x1f\x7f\\#?%*]", path):
            raise ValueError("it may hold no '#', '?', '%', '*', '\\\\' and no control character")
        return path

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        if sum(source is not None for source in (self.file, self.uri, self.hub)) != 1:
            raise ValueError("give exactly one of 'file', 'uri' or 'hub'")
        if self.hub is None and (self.split is not None or self.revision is not None):
            raise ValueError("'split' and 'revision' belong to 'hub'")
        return self


class AdapterSource(_Part):
    """An earlier adapter to go on from, by the job that trained it."""

    job: Annotated[str, Field(pattern=r"^ftjob-[A-Za-z0-9]{1,64}$")]


class Validation(_Part):
    """Held-out rows: a share of the dataset, or a file of their own."""

    model_config = ConfigDict(json_schema_extra=_one_of({"split": (), "file": ()}))

    split: Annotated[float, Field(gt=0, lt=1)] | None = None
    file: FileId | None = None

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        if (self.split is None) == (self.file is None):
            raise ValueError("give exactly one of 'split' or 'file'")
        return self

    def rows_held_out(self, rows: int) -> int:
        """How many of the dataset's usable rows are not trained on: the share, but at least one on each side."""
        if self.split is None:
            return 0
        return max(0, min(max(1, round(self.split * rows)), rows - 1))


class Quantization(_Part):
    """How the base is held; names of `transformers.BitsAndBytesConfig`. `load_in_4bit: false` is plain LoRA."""

    load_in_4bit: bool = True
    bnb_4bit_quant_type: QuantType = QuantType.NF4
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: ComputeDtype = ComputeDtype.AUTO


class Lora(_Part):
    """The adapter; names of `peft.LoraConfig`. `target_modules: "auto"` takes the attention projections."""

    r: Annotated[int, Field(ge=1, le=512)] = 16
    lora_alpha: Annotated[float, Field(gt=0, le=4096)] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")], ...] | Literal["auto", "all-linear"] = (
        "auto"
    )
    bias: Literal["none"] = "none"
    use_rslora: bool = False

    @field_validator("target_modules")
    @classmethod
    def _some_targets(cls, targets: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not targets:
            raise ValueError("name at least one module, or use 'all-linear'")
        return targets if isinstance(targets, str) else tuple(dict.fromkeys(targets))


class Training(_Part):
    """The recipe; names of `transformers.TrainingArguments` and `trl.SFTConfig`.

    One update always sees `per_device_train_batch_size × gradient_accumulation_steps` sequences; packing and the
    planner change only how these are split into microbatches.
    """

    num_train_epochs: Annotated[float, Field(gt=0, le=1000)] = 3
    max_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=1024)] = 4
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    lr_scheduler_type: Scheduler = Scheduler.COSINE
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    warmup_steps: Annotated[int, Field(ge=0, le=MOST_STEPS)] | None = None
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[float, Field(gt=0)] = 1e-8
    max_length: MaxLength = DEFAULT_MAX_LENGTH
    packing: bool = True
    completion_only_loss: CompletionOnlyLoss = "auto"
    optim: Optim = Optim.PAGED_ADAMW_8BIT
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    seed: Seed = DEFAULT_SEED
    deterministic: bool = False
    logging_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] = 1
    save_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | Literal["auto"] = "auto"
    eval_steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | Literal["auto"] = "auto"
    early_stopping_patience: Annotated[int, Field(ge=1, le=MOST_STEPS)] | None = None
    report_to: tuple[ReportTo, ...] = ()

    @property
    def sequences_per_update(self) -> int:
        """Sequences that one optimizer step learns from."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of a run on so many rows: `max_steps`, or the epochs, a fraction of one rounded up."""
        if self.max_steps is not None:
            return self.max_steps
        per_epoch = math.ceil(rows / self.sequences_per_update)
        return max(1, math.ceil(self.num_train_epochs * per_epoch))


class Gpu(_Part):
    """Which GPU class the job may use: `auto` takes the cheapest that fits."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True, populate_by_name=True)

    gpu_class: Annotated[str, Field(alias="class", pattern=r"^[a-z0-9-]{1,32}$")] = "auto"
    count: int = Field(default=1, json_schema_extra={"const": 1})

    @field_validator("count")
    @classmethod
    def _one_gpu(cls, count: int) -> int:
        if count != 1:
            raise ValueError("a job trains on exactly 1 GPU; several are not supported yet")
        return count


EXAMPLE: JsonDict = {
    "base_model": "meta-llama/Llama-2-7b-hf",
    "dataset": {"file": "file-9aQ2mXw7Lk4TzR8vBn3YcD6f"},
    "validation": {"split": 0.05},
    "lora": {"r": 16, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "training": {"num_train_epochs": 3, "learning_rate": 2e-4, "max_length": 1024},
    "metadata": {"team": "search"},
}


class JobSpec(_Part):
    """One fine-tune as its user asked for it, normalised: defaults filled in, aliases under one name."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    base_model: BaseModelName
    revision: Annotated[str, Field(pattern=REVISION_PATTERN)] = DEFAULT_REVISION
    dataset: DatasetSource
    validation: Validation | None = None
    adapter: AdapterSource | None = None
    quantization: Quantization = Quantization()
    lora: Lora = Lora()
    training: Training = Training()
    gpu: Gpu = Gpu()
    priority: Priority = Priority.NORMAL
    max_duration_seconds: Annotated[int, Field(ge=1, le=LONGEST_SECONDS)] | None = None
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 3
    name: Annotated[str, Field(max_length=200, pattern=NO_NUL)] | None = None
    webhook_url: Annotated[str, Field(pattern=r"^https?://[^\s#\x00]+$", max_length=2048)] | None = None
    metadata: dict[str, str] = Field(default_factory=dict, json_schema_extra=METADATA_SCHEMA)

    @field_validator("metadata")
    @classmethod
    def _small_metadata(cls, metadata: dict[str, str]) -> dict[str, str]:
        if len(metadata) > MAX_METADATA_PAIRS:
            raise ValueError(f"at most {MAX_METADATA_PAIRS} pairs, found {len(metadata)}")
        for key, value in metadata.items():
            if not re.fullmatch(METADATA_KEY_PATTERN, key):
                raise ValueError(f"the key {key!r} must have 1 to {MAX_METADATA_KEY} characters, no blanks or brackets")
            if len(value) > MAX_METADATA_VALUE:
                raise ValueError(f"the value of {key!r} has {len(value)} characters, at most {MAX_METADATA_VALUE}")
        return metadata

    @model_validator(mode="after")
    def _patience_needs_validation(self) -> Self:
        if self.training.early_stopping_patience is not None and self.validation is None:
            raise ValueError("'early_stopping_patience' needs 'validation'")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_name_each(cls, body: Any) -> Any:
        return rename_aliases(body) if isinstance(body, dict) else body


class ReportSpec(_Part):
    """What a report of data depends on beside the rows: the base that reads them, and how they are cut and split."""

    base_model: BaseModelName
    revision: Annotated[str, Field(pattern=REVISION_PATTERN)] = DEFAULT_REVISION
    validation: Validation | None = None
    max_length: MaxLength = DEFAULT_MAX_LENGTH
    completion_only_loss: CompletionOnlyLoss = "auto"
    seed: Seed = DEFAULT_SEED

    @classmethod
    def of(cls, spec: JobSpec) -> Self:
        """What the report of a job's data depends on."""
        training = spec.training
        return cls(
            base_model=spec.base_model,
            revision=spec.revision,
            validation=spec.validation,
            max_length=training.max_length,
            completion_only_loss=training.completion_only_loss,
            seed=training.seed,
        )


# Other names for the same thing, from TRL, PEFT, transformers and OpenAI: (section, alias) -> name.
_ALIASES: dict[tuple[str, str], str] = {
    ("training", "max_seq_length"): "max_length",
    ("training", "epochs"): "num_train_epochs",
    ("training", "n_epochs"): "num_train_epochs",
    ("training", "optimizer"): "optim",
    ("lora", "rank"): "r",
    ("lora", "alpha"): "lora_alpha",
    ("lora", "dropout"): "lora_dropout",
}
# Values that mean the same optimizer in `transformers`.
_OPTIM_ALIASES = {
    "paged_adamw": "paged_adamw_32bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_fused": "adamw_torch",
}


def rename_aliases(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body with every known alias under its one name; raises ValueError where alias and name disagree."""
    renamed = {key: dict(value) if isinstance(value, dict) else value for key, value in body.items()}
    for (section, alias), name in _ALIASES.items():
        part = renamed.get(section)
        if isinstance(part, dict) and alias in part:
            _set_once(part, name, part.pop(alias), alias=f"{section}.{alias}")
    lora = renamed.get("lora")
    if isinstance(lora, dict) and "task_type" in lora and lora.pop("task_type") != "CAUSAL_LM":
        raise ValueError("'lora.task_type' must be 'CAUSAL_LM': only decoder-only language models are trained")
    training = renamed.get("training")
    if isinstance(training, dict):
        optim = training.get("optim")
        if isinstance(optim, str):
            training["optim"] = _OPTIM_ALIASES.get(optim, optim)
        _move_precision_flags(renamed, training)
    return renamed


def _move_precision_flags(body: dict[str, Any], training: dict[str, Any]) -> None:
    """`bf16: true` and `fp16: true` of TrainingArguments are our `quantization.bnb_4bit_compute_dtype`."""
    flags = {flag: training.pop(flag) for flag in ("bf16", "fp16") if flag in training}
    chosen = [flag for flag, on in flags.items() if on is True]
    if any(not isinstance(on, bool) for on in flags.values()):
        raise ValueError("'training.bf16' and 'training.fp16' are true or false")
    if len(chosen) == 2:
        raise ValueError("set one of 'training.bf16' and 'training.fp16', never both")
    if chosen:
        quantization = body.setdefault("quantization", {})
        if isinstance(quantization, dict):
            dtype = {"bf16": "bfloat16", "fp16": "float16"}[chosen[0]]
            _set_once(quantization, "bnb_4bit_compute_dtype", dtype, alias=f"training.{chosen[0]}")


def _set_once(part: dict[str, Any], name: str, value: Any, *, alias: str) -> None:
    if name in part and part[name] != value:
        raise ValueError(f"'{alias}' and '{name}' are the same setting and disagree: {value!r} and {part[name]!r}")
    part[name] = value
