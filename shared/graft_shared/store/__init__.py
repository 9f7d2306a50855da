"""The truth about every job: tables, and each edge of a job's life as one compare-and-set transaction."""

from graft_shared.store.engine import Database, open_database
from graft_shared.store.files import Files, StoredFile
from graft_shared.store.jobs import JobQuery, Jobs, NewJob
from graft_shared.store.leases import Leases, Orders
from graft_shared.store.totals import Backlog, Totals
from graft_shared.store.workers import LiveWorker, Workers

__all__ = [
    "Backlog",
    "Database",
    "Files",
    "JobQuery",
    "Jobs",
    "Leases",
    "LiveWorker",
    "NewJob",
    "Orders",
    "StoredFile",
    "Totals",
    "Workers",
    "open_database",
]
