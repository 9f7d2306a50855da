"""Tenants' quotas and shares, the workers' time that each has taken, and keys.

Revision ID: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

QUEUE = ("state", "stage", "gpu_class", "tenant", "priority", "created_at", "not_before", "pause_requested", "id")


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("share", sa.Double, nullable=False),
        sa.Column("queued_jobs", sa.Integer),
        sa.Column("running_jobs", sa.Integer),
        sa.Column("gpu_hours", sa.Double),
        sa.Column("stored_bytes", sa.BigInteger),
        sa.PrimaryKeyConstraint("name", name="pk_tenants"),
    )
    op.create_table(
        "worker_time",
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("stage", sa.String(16), nullable=False),
        sa.Column("day", sa.Double, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("tenant", "stage", "day", name="pk_worker_time"),
    )
    op.create_index("ix_worker_time_stage_day", "worker_time", ["stage", "day"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("expires_at", sa.Double),
        sa.Column("revoked_at", sa.Double),
        sa.Column("last_used_at", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
    )
    op.create_index("ix_jobs_tenant_state_stage", "jobs", ["tenant", "state", "stage"])
    op.create_index("ix_jobs_queue", "jobs", [*QUEUE])
    op.drop_index("ix_jobs_state_stage_gpu_class", "jobs")


def downgrade() -> None:
    op.create_index("ix_jobs_state_stage_gpu_class", "jobs", ["state", "stage", "gpu_class"])
    for index in ("ix_jobs_queue", "ix_jobs_tenant_state_stage"):
        op.drop_index(index, "jobs")
    for table in ("api_keys", "worker_time", "tenants"):
        op.drop_table(table)
