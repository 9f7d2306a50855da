"""SDK and command line; knows only HTTP."""

from graft_client.client import GraftClient, Update
from graft_client.errors import (
    AnswerUnreadable,
    DownloadCorrupt,
    GraftAPIError,
    GraftClientError,
    ServiceUnreachable,
    TargetNotEmpty,
    WaitedTooLong,
)
from graft_client.job import TERMINAL_STATUSES, Job

__all__ = [
    "TERMINAL_STATUSES",
    "AnswerUnreadable",
    "DownloadCorrupt",
    "GraftAPIError",
    "GraftClient",
    "GraftClientError",
    "Job",
    "ServiceUnreachable",
    "TargetNotEmpty",
    "Update",
    "WaitedTooLong",
]
