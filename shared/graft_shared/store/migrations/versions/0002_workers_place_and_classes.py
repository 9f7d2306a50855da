"""Where each worker lives, so that two of one name are told apart; and the classes that it takes.

Revision ID: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Nullable: workers of the version before go on with their beats until they are started anew.
    op.add_column("workers", sa.Column("place", sa.String(64)))
    op.add_column("workers", sa.Column("takes_classes", sa.JSON))


def downgrade() -> None:
    for column in ("takes_classes", "place"):
        op.drop_column("workers", column)
