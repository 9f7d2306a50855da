"""Datasets of the hub, brought to JSONL: what is trained on is always a file of rows."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import load_dataset
from datasets.exceptions import DatasetNotFoundError

from graft_shared.errors import BaseModelUnavailable, InvalidParameter


def import_hub_dataset(hub: str, split: str, revision: str | None, path: Path, *, token: str | None) -> int:
    """Write one split of a hub dataset as JSONL; returns the number of rows. Code from the hub is never run.

    Raises:
        InvalidParameter: There is no such dataset, split or revision, it is gated, or a column is no JSON.
        BaseModelUnavailable: The hub does not answer.
    """
    try:
        rows = load_dataset(hub, split=split, revision=revision, streaming=True, token=token or False)
        count = 0
        with path.open("w", encoding="utf-8") as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    except (DatasetNotFoundError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InvalidParameter(param="dataset.hub", reason=reason) from error
    except OSError as error:
        raise BaseModelUnavailable(base_model=hub, reason=str(error).strip().splitlines()[0]) from error
    return count
