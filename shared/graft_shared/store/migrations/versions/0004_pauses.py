"""Pauses: since when a job is to pause, and how long it has been paused.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable, or with a default: APIs of the version before go on adding jobs until they are started anew.
    op.add_column("jobs", sa.Column("paused_since", sa.Double))
    op.add_column("jobs", sa.Column("paused_seconds", sa.Double, nullable=False, server_default=sa.text("0")))


def downgrade() -> None:
    for column in ("paused_seconds", "paused_since"):
        op.drop_column("jobs", column)
