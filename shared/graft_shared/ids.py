"""Names of things: random, typed by their prefix, safe in paths and URLs."""

from __future__ import annotations

import re
import secrets
import string

_ALPHABET = string.ascii_letters + string.digits
_LENGTH = 24  # 62**24 is about 143 bits: no two services ever draw the same id


def new_job_id() -> str:
    """Return a fresh job id, e.g. `ftjob-4fT…`, in the shape OpenAI's clients expect."""
    return "ftjob-" + _random()


def new_file_id() -> str:
    """Return a fresh file id, e.g. `file-9aQ…`."""
    return "file-" + _random()


def new_upload_id() -> str:
    """Return a fresh id of a file that is still to come, e.g. `upload-7hK…`."""
    return "upload-" + _random()


def new_report_id() -> str:
    """Return a fresh id of a report on a file, e.g. `report-2cW…`."""
    return "report-" + _random()


def new_webhook_id() -> str:
    """Return a fresh id of one message to a webhook's receiver, who knows by it what was sent twice."""
    return "evt_" + _random()


def new_merge_id() -> str:
    """Return a fresh id of what merges an adapter; it names objects and log lines, and no route."""
    return "merge-" + _random()


def new_request_id() -> str:
    """Return a fresh id for one HTTP request."""
    return "req-" + _random()


def is_id(text: str, prefix: str) -> bool:
    """Tell whether `text` has the shape of an id with that prefix; says nothing about its existence."""
    return re.fullmatch(rf"{prefix}-[A-Za-z0-9]{{{_LENGTH}}}", text) is not None


def _random() -> str:
    number, letters = secrets.randbelow(len(_ALPHABET) ** _LENGTH), []  # one draw: each asks the system
    for _ in range(_LENGTH):
        number, index = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[index])
    return "".join(letters)
