"""The truth about every job: tables, and each edge of a job's life as one compare-and-set transaction."""

from graft_shared.store.engine import Database, open_database
from graft_shared.store.files import Files, Order, StoredFile, Upload
from graft_shared.store.jobs import JobQuery, Jobs, NewJob
from graft_shared.store.keys import Keys, StoredKey
from graft_shared.store.leases import Leases, Orders
from graft_shared.store.line import Line, PlaceInLine, QueueName, queue_of
from graft_shared.store.merges import Merges
from graft_shared.store.outbox import Outbox, Webhook
from graft_shared.store.quotas import Quota, Quotas, Reached
from graft_shared.store.reports import Report, Reports, ReportState
from graft_shared.store.resends import Sending
from graft_shared.store.sweeps import DueSweep, Sweeps
from graft_shared.store.tenants import Tenants, TenantUse
from graft_shared.store.totals import Backlog, Totals, TrainingNow
from graft_shared.store.uploads import UPLOAD_LIFE
from graft_shared.store.workers import Busy, Crew, LiveWorker, Workers

__all__ = [
    "UPLOAD_LIFE",
    "Backlog",
    "Busy",
    "Crew",
    "Database",
    "DueSweep",
    "Files",
    "JobQuery",
    "Jobs",
    "Keys",
    "Leases",
    "Line",
    "LiveWorker",
    "Merges",
    "NewJob",
    "Order",
    "Orders",
    "Outbox",
    "PlaceInLine",
    "QueueName",
    "Quota",
    "Quotas",
    "Reached",
    "Report",
    "ReportState",
    "Reports",
    "Sending",
    "StoredFile",
    "StoredKey",
    "Sweeps",
    "TenantUse",
    "Tenants",
    "Totals",
    "TrainingNow",
    "Upload",
    "Webhook",
    "Workers",
    "open_database",
    "queue_of",
]
