"""Merged models, each made by a job of its own kind.

Revision ID: 0012
Revises: 0010
"""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("merges", sa.String(64)))
    op.create_index("ix_jobs_merges", "jobs", ["merges"])


def downgrade() -> None:
    op.drop_index("ix_jobs_merges", "jobs")
    op.drop_column("jobs", "merges")
