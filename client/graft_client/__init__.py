"""SDK and command line; knows only HTTP."""

from graft_client.client import TERMINAL_STATUSES, GraftClient, Update
from graft_client.errors import (
    DownloadCorrupt,
    GraftAPIError,
    GraftClientError,
    ServiceUnreachable,
    TargetNotEmpty,
    WaitedTooLong,
)

__all__ = [
    "TERMINAL_STATUSES",
    "DownloadCorrupt",
    "GraftAPIError",
    "GraftClient",
    "GraftClientError",
    "ServiceUnreachable",
    "TargetNotEmpty",
    "Update",
    "WaitedTooLong",
]
