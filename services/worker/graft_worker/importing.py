"""Datasets of the hub, brought to JSONL: what is trained on is always a file of rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError

from graft_shared.errors import BaseModelUnavailable, InvalidParameter


def import_hub_dataset(
    hub: str, split: str, revision: str | None, path: Path, *, token: str | None, max_bytes: int
) -> int:
    """Write one split of a hub dataset as JSONL; returns the number of rows. Code from the hub is never run.

    Raises:
        InvalidParameter: There is no such dataset, split or revision; it is gated, a script, or too large;
            or a column is no JSON.
        BaseModelUnavailable: The hub does not answer.
    """
    try:
        return _write(
            load_dataset(hub, split=split, revision=revision, streaming=True, token=token or False), path, max_bytes
        )
    except (HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise BaseModelUnavailable(base_model=hub, reason=_first_line(error)) from error
    except (DatasetsError, ValueError, RuntimeError) as error:  # RuntimeError: a dataset that is a script
        raise InvalidParameter(param="dataset.hub", reason=_first_line(error)) from error


def _write(rows: Any, path: Path, max_bytes: int) -> int:
    count = 0
    with path.open("wb") as out:
        for row in rows:
            out.write(_line(row))
            count += 1
            if out.tell() > max_bytes:
                raise ValueError(
                    f"as JSONL it has more than {max_bytes} bytes; name a smaller split, or upload a part of it"
                )
    return count


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except TypeError as error:
        column = next((name for name, value in row.items() if not _is_json(value)), "?")
        raise ValueError(f"the column '{column}' holds {type(row.get(column)).__name__}, which is no JSON") from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
