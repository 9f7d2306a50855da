"""Uploads through a link, and reports on files.

Revision ID: 0010
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name, kind in (
        ("id", sa.String(64)),
        ("tenant", sa.String(64)),
        ("filename", sa.String(255)),
        ("bytes", sa.BigInteger),
        ("sha256", sa.String(64)),
        ("file_id", sa.String(64)),
    ):
        op.add_column("uploads", sa.Column(name, kind))
    op.create_index("ix_uploads_id", "uploads", ["id"], unique=True)
    op.create_table(
        "reports",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("file_id", sa.String(64), nullable=False),
        sa.Column("validation_file_id", sa.String(64)),
        sa.Column("spec_sha256", sa.String(64), nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("report", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("claimed_at", sa.Double),
        sa.Column("lease_expires_at", sa.Double),
        sa.Column("finished_at", sa.Double),
        sa.PrimaryKeyConstraint("id", name="pk_reports"),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name="fk_reports_file_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["validation_file_id"], ["files.id"], name="fk_reports_validation_file_id", ondelete="CASCADE"
        ),
        sa.UniqueConstraint("file_id", "spec_sha256", name="uq_reports_file_id_spec_sha256"),
    )
    op.create_index("ix_reports_state", "reports", ["state"])
    op.create_index("ix_reports_validation_file_id", "reports", ["validation_file_id"])


def downgrade() -> None:
    op.drop_table("reports")
    op.drop_index("ix_uploads_id", table_name="uploads")
    for name in ("file_id", "sha256", "bytes", "filename", "tenant", "id"):
        op.drop_column("uploads", name)
