"""When to look for what a job's runs left in the bucket, and uploads that have begun.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("sweep_at", sa.Double))
    op.create_index("ix_jobs_sweep_at", "jobs", ["sweep_at"])
    op.execute("UPDATE jobs SET sweep_at = 0 WHERE epoch > 0")
    op.create_table(
        "uploads",
        sa.Column("key", sa.String(512), nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_uploads"),
    )
    op.create_index("ix_uploads_started_at", "uploads", ["started_at"])


def downgrade() -> None:
    op.drop_table("uploads")
    op.drop_index("ix_jobs_sweep_at", "jobs")
    op.drop_column("jobs", "sweep_at")
