"""How long each job has held a GPU, over all its runs: what it costs.

Revision ID: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # With a default: APIs of the version before go on adding jobs until they are started anew.
    op.add_column("jobs", sa.Column("gpu_seconds", sa.Double, nullable=False, server_default=sa.text("0")))


def downgrade() -> None:
    op.drop_column("jobs", "gpu_seconds")
