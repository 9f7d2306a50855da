"""The tables, once; the migrations build the same and a test compares the two.

Every time is a double of Unix seconds by the database's own clock (`engine.now`), so that SQLite and PostgreSQL hold
and compare the same thing.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
    }
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    Column("runs_without_progress", Integer, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("gpu_class", String(32), nullable=False),
    Column("base_model", String(200), nullable=False),
    Column("idempotency_key", String(255)),
    Column("request_sha256", String(64), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("plan", JSON, nullable=False),
    Column("placement", JSON, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("phase", String(16)),
    Column("cancel_requested", Boolean, nullable=False),
    Column("progress", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("memory", JSON, nullable=False),
    Column("warnings", JSON, nullable=False),
    Column("error", JSON),
    Column("prepared", JSON),
    Column("checkpoint", JSON),
    Column("adapter", JSON),
    Column("worker", String(128)),
    Column("next_event", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("not_before", Double, nullable=False),
    Column("bell_rung_at", Double),
    Column("claimed_at", Double),
    Column("lease_expires_at", Double),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("gpu_seconds", Double, nullable=False, server_default=text("0")),
    Column("pause_requested", Boolean, nullable=False, server_default=false()),
    Column("sweep_at", Double),  # when to look for what its runs left in the bucket; null: there is nothing
    Column("sent_before", Integer),  # how often, by a client that names no key but counts; null: any other client
    Column("merges", String(64)),  # the job whose adapter it merges; null: a fine-tune
    Column("deleted_at", Double),  # its tenant sees it no more; the row goes once its objects have gone
    Column("traceparent", String(64)),  # W3C's, of the request that made it; null: it was not traced
    UniqueConstraint("tenant", "idempotency_key"),
    Index(None, "merges"),
    # All that tells a job's place, so that wide rows need not be read for it.
    Index(
        "ix_jobs_queue",
        "state",
        "stage",
        "gpu_class",
        "tenant",
        "priority",
        "created_at",
        "not_before",
        "pause_requested",
        "id",
    ),
    Index(None, "sweep_at"),
    Index(None, "tenant", "created_at"),
    Index(None, "tenant", "state", "stage"),
)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", Integer, nullable=False),
    Column("type", String(32), nullable=False),
    Column("level", String(8), nullable=False),
    Column("message", Text, nullable=False),
    Column("data", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("filename", String(255), nullable=False),
    Column("key", String(512), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("report", JSON, nullable=False),
    Column("created_at", Double, nullable=False),
    Index(None, "tenant", "created_at"),
)

uploads = Table(
    "uploads",
    metadata,
    Column("key", String(512), primary_key=True),  # of an object that is being written and has no row yet
    Column("started_at", Double, nullable=False),
    Column("id", String(64)),  # of an upload through a link; null: this service writes the object itself
    Column("tenant", String(64)),
    Column("filename", String(255)),
    Column("bytes", BigInteger),
    Column("sha256", String(64)),
    Column("file_id", String(64)),  # of the file that it became
    Index(None, "started_at"),
    Index(None, "id", unique=True),
)

reports = Table(
    "reports",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("file_id", String(64), ForeignKey("files.id", ondelete="CASCADE"), nullable=False),
    Column("validation_file_id", String(64), ForeignKey("files.id", ondelete="CASCADE")),
    Column("spec_sha256", String(64), nullable=False),
    Column("spec", JSON, nullable=False),
    Column("state", String(16), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("report", JSON),
    Column("error", JSON),
    Column("created_at", Double, nullable=False),
    Column("claimed_at", Double),
    Column("lease_expires_at", Double),
    Column("finished_at", Double),
    UniqueConstraint("file_id", "spec_sha256"),
    Index(None, "state"),
    Index(None, "validation_file_id"),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("job_id", String(64), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("tenant", String(64), nullable=False),
    Column("url", String(2048), nullable=False),
    Column("type", String(64), nullable=False),
    Column("tries", Integer, nullable=False),
    Column("said", Text),
    Column("created_at", Double, nullable=False),
    Column("next_try_at", Double),  # null: delivered, or given up
    Column("delivered_at", Double),
    UniqueConstraint("job_id"),  # a job ends once
    Index(None, "next_try_at"),
)

workers = Table(
    "workers",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("gpu_class", String(32), nullable=False),
    Column("device", String(200), nullable=False),
    Column("stages", JSON, nullable=False),
    Column("started_at", Double, nullable=False),
    Column("seen_at", Double, nullable=False),
    Column("place", String(64)),
    Column("takes_classes", JSON),
)

tenants = Table(
    "tenants",
    metadata,
    Column("name", String(64), primary_key=True),  # one that its operator has said something about
    Column("share", Double, nullable=False),
    Column("queued_jobs", Integer),  # of the quotas a null is the settings' default
    Column("running_jobs", Integer),
    Column("gpu_hours", Double),
    Column("stored_bytes", BigInteger),
)

worker_time = Table(
    "worker_time",
    metadata,
    Column("tenant", String(64), primary_key=True),
    Column("stage", String(16), primary_key=True),
    Column("day", Double, primary_key=True),  # on which runs ended; its first second, UTC
    Column("seconds", Double, nullable=False),
    Index(None, "stage", "day"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),
    Column("tenant", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("name", String(100), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("last_used_at", Double),
)
