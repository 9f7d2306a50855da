"""Settings that API, workers and reconciler share: `GRAFT_*` in the environment, defaults for one machine."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


def _split_list(text: str | tuple[str, ...]) -> tuple[str, ...]:
    """Read `a,b` from the environment as ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip()) if isinstance(text, str) else text


def _none_if_empty(given: object) -> object:
    """Read an empty variable, as compose sets those that are not written, as none."""
    return None if given == "" else given


NumberOrNone = BeforeValidator(_none_if_empty)
CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_list)]


class SharedSettings(BaseSettings):
    """Where the neighbours are, and the few numbers that everybody must agree on."""

    model_config = SettingsConfigDict(env_prefix="GRAFT_", extra="ignore", frozen=True, populate_by_name=True)

    state_dir: Path = Path(".graft")
    """Everything the embedded service keeps: database, bucket, registered bases, work folders."""

    database_url: str | None = None
    """SQLAlchemy URL; `postgresql+psycopg://…`, or SQLite under `state_dir` by default."""

    broker_url: str = "redis://127.0.0.1:6379/0"
    """The Redis that carries doorbells."""

    s3_bucket: str | None = None
    """Name of the bucket; without it a directory under `state_dir` serves as bucket."""
    s3_endpoint_url: str | None = None
    s3_public_endpoint_url: str | None = None
    """The endpoint that users reach: presigned links point there."""
    s3_region: str = "us-east-1"
    s3_access_key_id: str | None = None
    s3_secret_access_key: SecretStr | None = None

    models_dir: Path | None = None
    """Registered base models: `<models_dir>/<base_model id>/config.json` makes that id known without a hub."""
    catalogue_path: Path | None = None
    capacity_path: Path | None = None
    hub_allowed: CommaList = ()
    """Hub ids outside the catalogue that jobs may name, as shell patterns (`my-org/*`), separated by commas."""
    hub_token: SecretStr | None = None
    hub_token_datasets: CommaList = ()
    """Hub datasets that are read with the token, as such patterns; every other one is read as anybody could."""
    dataset_buckets: CommaList = ()
    """Buckets that `s3://` datasets may come from, separated by commas."""

    webhook_secret: SecretStr | None = None
    """What webhooks are signed with, a key for each tenant made of it; without it there are none."""
    webhook_hosts: CommaList = ()
    """Hosts that webhooks may reach though they are not public, as shell patterns (`*.internal`), by plain HTTP too."""

    quota_queued_jobs: Annotated[int | None, NumberOrNone] = Field(default=None, ge=0)
    """How many jobs of one tenant may wait; of this and the next three, none is no limit. `docs/tenants.md`."""
    quota_running_jobs: Annotated[int | None, NumberOrNone] = Field(default=None, ge=0)
    """How many may train at once."""
    quota_gpu_hours: Annotated[float | None, NumberOrNone] = Field(default=None, ge=0)
    """How many hours of training in a calendar month (UTC)."""
    quota_stored_bytes: Annotated[int | None, NumberOrNone] = Field(default=None, ge=0)
    """How many bytes of uploaded files it may have."""

    max_file_bytes: int = Field(default=2 * 1024**3, ge=1)
    log_format: Literal["json", "text"] = "json"
    """A line of JSON per event, or a short one for people."""

    report_to: Annotated[tuple[Literal["mlflow", "tensorboard"], ...], NoDecode, BeforeValidator(_split_list)] = ()
    """Trackers that are told of every job: `mlflow`, `tensorboard`. A job may ask by `training.report_to` itself."""
    mlflow_tracking_uri: str | None = Field(default=None, validation_alias="MLFLOW_TRACKING_URI")
    """The MLflow server that jobs may report to; the operator's alone to say."""
    tensorboard_dir: Annotated[Path | None, NumberOrNone] = None
    """Where workers write TensorBoard's event files."""

    metrics_port: Annotated[int | None, NumberOrNone] = Field(default=None, ge=1, le=65535)
    """Where this process shows Prometheus its figures, without a key: they name no tenant and no job. None: nowhere."""
    metrics_host: str = "127.0.0.1"

    lease_seconds: float = Field(default=60.0, gt=0)
    heartbeat_seconds: float = Field(default=15.0, gt=0)
    bell_again_seconds: float = Field(default=30.0, gt=0)
    """A queued job whose bell is older than this gets another."""
    reconcile_seconds: float = Field(default=5.0, gt=0)
    sweep_seconds: float = Field(default=15.0, gt=0)
    """How often a reconciler removes from the bucket a slice of what no row needs."""
    sweep_grace_seconds: float = Field(default=3600.0, gt=0)
    """How long after a job's end the last look for what it left is; at least two leases."""
    reconciler_passed_path: Path | None = (
        None  # touched after each pass of the reconciler, and `….tried` even if postponed
    )

    @property
    def database(self) -> str:
        """The database URL in force."""
        return self.database_url or f"sqlite:///{(self.state_dir / 'graft.db').absolute()}"

    @property
    def bucket_dir(self) -> Path:
        """The directory that serves as bucket when no S3 bucket is set."""
        return (self.state_dir / "bucket").absolute()

    @property
    def registered_models_dir(self) -> Path:
        """The folder of registered base models in force."""
        return (self.models_dir or self.state_dir / "models").absolute()

    @property
    def lease(self) -> timedelta:
        """How long a claim or a renewal holds."""
        return timedelta(seconds=self.lease_seconds)

    @property
    def sweep_grace(self) -> timedelta:
        """The grace in force."""
        return max(timedelta(seconds=self.sweep_grace_seconds), 2 * self.lease)
