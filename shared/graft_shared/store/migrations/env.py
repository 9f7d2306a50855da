"""Alembic's entry: runs the migrations on the connection that `migrate()` hands over."""

from alembic import context

from graft_shared.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=False,  # the transaction is the caller's
)
context.run_migrations()
