"""Jobs keep the trace of the request that made them.

Revision ID: 0013
Revises: 0012
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("traceparent", sa.String(64)))


def downgrade() -> None:
    op.drop_column("jobs", "traceparent")
