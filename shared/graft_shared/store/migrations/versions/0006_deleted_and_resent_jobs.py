"""Jobs that their tenants have deleted, and how often a job's request had been sent before.

Revision ID: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("sent_before", sa.Integer))
    op.add_column("jobs", sa.Column("deleted_at", sa.Double))


def downgrade() -> None:
    op.execute("DELETE FROM jobs WHERE deleted_at IS NOT NULL")  # the version before would show them again
    for column in ("deleted_at", "sent_before"):
        op.drop_column("jobs", column)
